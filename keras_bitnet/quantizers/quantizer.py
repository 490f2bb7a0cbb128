"""What weight and activation quantizers share: equal and printed by their arguments."""

import keras

from keras_bitnet.checks import check_number


class Quantizer(keras.Quantizer):
    """Base of `WeightQuantizer` and `ActivationQuantizer`, which have `fake_quantize`.

    Args:
        output_dtype: Dtype of the codes.
        epsilon: Lower bound of a statistic that becomes a scale, positive.
    """

    def __init__(self, output_dtype, epsilon):
        super().__init__(output_dtype=output_dtype)
        check_number("epsilon", epsilon, "(0, inf)")
        self.epsilon = float(epsilon)

    def __call__(self, x):
        """Same as `fake_quantize(x)`."""
        return self.fake_quantize(x)

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash((type(self), *self.get_config().values()))

    def __repr__(self):
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"
