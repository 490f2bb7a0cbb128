"""What layers made of quantized layers share: the arguments that they hand down."""

from typing import ClassVar

import keras

from keras_bitnet import quantizers
from keras_bitnet.checks import check_own_names


class BitComposite(keras.Layer):
    """Base of the layers that multiply only through the quantized layers inside them.

    It knows nothing of packing: `keras_bitnet.pack_model` replaces the inner layers.

    Args:
        weight_quantizer, activation_quantizer, norm, norm_position, norm_epsilon,
            quantization_strength: Of the inner layers, see `keras_bitnet.layers.BitLayer`.
    """

    own_names: ClassVar[dict[str, str | None]] = {}  # as in `BitLayer`

    def __init__(
        self,
        *args,
        weight_quantizer="ternary",
        activation_quantizer="int8",
        norm=None,
        norm_position="pre",
        norm_epsilon=1e-5,
        quantization_strength=1.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        check_own_names(self, norm=norm)
        quantization = {
            "weight_quantizer": quantizers.get(weight_quantizer),
            "activation_quantizer": quantizers.get_activation(activation_quantizer),
            "norm": norm,
            "norm_position": norm_position,
            "norm_epsilon": norm_epsilon,
            "quantization_strength": quantization_strength,
        }
        self.quantization = {
            name: value for name, value in quantization.items() if self.own_names.get(name, name)
        }

    def get_config(self):
        """The arguments of the constructor."""
        config = {**super().get_config(), **self.quantization}
        for name in ("weight_quantizer", "activation_quantizer"):
            config[name] = quantizers.serialize(config[name])
        return config
