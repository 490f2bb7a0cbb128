"""The activation quantizers: symmetric integers, scaled as the data comes or once and for all."""

import keras
import numpy as np
from keras import ops

from keras_bitnet.checks import check_choice, check_number
from keras_bitnet.kernels import training
from keras_bitnet.ops.constants import constant_like
from keras_bitnet.ops.division import divide
from keras_bitnet.ops.magnitude import largest_magnitude
from keras_bitnet.ops.ste import blend, straight_through
from keras_bitnet.quantizers.quantizer import Quantizer


class ActivationQuantizer(Quantizer):
    """Base of the absmax quantizers.

        a = max(max |x|, epsilon),   code = clip(round(x * (highest / a)), -highest, highest)
        x ~ scale * code,            scale = a / highest

    float32 arithmetic whatever the dtype of `x`, one IEEE division, halves to even: the codes
    are the same bits on every backend and device. A static scale takes the place of the computed
    one: `code = clip(round(x * (1 / scale)), -highest, highest)`.

    Args:
        granularity: `"token"`: the values of one position, that is the last axis, share a scale.
            `"tensor"`: all values do. `"static"`: all values of all calls do; the scale is a
            variable of the layer, from calibration.
        epsilon: Lower bound of the absolute maximum: a token of zeros gets codes 0.

    Raises:
        ValueError: An argument is none of these.
    """

    name = ""
    bits = 0
    highest = 0
    momentum: float | None = None  # of a static scale that follows the inputs
    formula = "absmax"  # what kernels compute; the name of a subclass that computes otherwise

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        own = ("_ratio", "_round", "quantize", "quantize_with_gradient", "reference_fake_quantize")
        if any(getattr(cls, name) is not getattr(ActivationQuantizer, name) for name in own):
            cls.formula = cls.__name__

    def __init__(self, granularity="token", epsilon=1e-5):
        super().__init__("int8", epsilon)
        check_choice("granularity", granularity, ("token", "tensor", "static"))
        self.granularity = granularity

    def quantize(self, x, scale=None):
        """Quantizes to integers.

        Args:
            x: Float tensor `(..., features)`. A NaN or an infinity makes the scale NaN,
                so that it cannot vanish in an integer.
            scale: The static scale, a `float32` scalar, where `granularity` is `"static"`.

        Returns:
            `(codes, scale)`: `int8` of the shape of `x`, and `float32` that broadcasts with
            it, `(..., 1)`.

        Raises:
            ValueError: There is no scale for a static quantizer, or one for another.
        """
        x = ops.cast(x, "float32")
        ratio, scale = self._ratio(x, scale)
        # A maximum may pass over a NaN (in TensorFlow, compiled with XLA), and so would integers.
        axis = None if self.granularity == "tensor" else -1
        finite = ops.all(ops.isfinite(x), axis=axis, keepdims=True)
        return ops.cast(self._round(ratio), "int8"), ops.where(finite, scale, np.nan)

    def quantize_with_gradient(self, x, scale=None):
        """As `quantize`, codes as `float32` with a straight-through gradient to `x`."""
        ratio, scale = self._ratio(x, scale)
        return straight_through(ratio, self._round(ratio)), scale

    def fake_quantize(self, x, scale=None, strength=None):
        """Rounds to the grid and back, gradient passed unchanged: the activations of QAT.

        Args:
            x: Float tensor `(..., features)`.
            scale: The static scale, see `quantize`.
            strength: Scalar tensor in [0, 1], 0 gives `x` itself, or `None` for 1.

        Returns:
            Tensor of the shape and dtype of `x`.
        """
        self._check_scale(scale)
        kernel = training.choose(training.of_activations(self, x))
        return kernel.run(self, x, scale, strength)

    def reference_fake_quantize(self, x, scale=None, strength=None):
        """What `fake_quantize` means, in plain `keras.ops`."""
        dtype = x.dtype
        x = ops.cast(x, "float32")
        ratio, scale = self._ratio(ops.stop_gradient(x), scale)
        mixed = blend(x, self._round(ratio) * scale, strength)
        return ops.cast(straight_through(x, mixed), dtype)

    def fake_quantize_part(self, x, largest, strength=None):
        """`fake_quantize` of a part of tokens, whose absolute maximum is known.

        Args:
            x: `float32` tensor.
            largest: `float32` tensor that broadcasts with it: the absolute maximum of the token
                that each number belongs to, at least `epsilon`.
            strength: See `fake_quantize`.

        Returns:
            `float32` tensor of the shape of `x`.
        """
        inverse, scale = self._step(ops.stop_gradient(largest))
        codes = ops.round(ops.stop_gradient(x) * inverse)  # none is larger than `highest`
        return straight_through(x, blend(x, codes * scale, strength))

    def _check_scale(self, scale):
        if (scale is None) == (self.granularity == "static"):
            raise ValueError(
                f"A quantizer of granularity '{self.granularity}' takes "
                f"{'a static `scale`' if scale is None else 'no `scale`'}. Received: scale={scale}"
            )

    def _ratio(self, x, scale):
        x = ops.cast(x, "float32")
        self._check_scale(scale)
        if scale is not None:
            return self._static_ratio(x, ops.stop_gradient(ops.cast(scale, "float32")))
        axis = -1 if self.granularity == "token" else tuple(range(len(x.shape)))
        inverse, scale = self._step(largest_magnitude(x, axis, self.epsilon))
        return x * inverse, scale

    def _step(self, largest):
        """What makes codes of numbers of this absolute maximum, and the scale of the codes."""
        # A tensor is divided, as `number / tensor` is a rounded reciprocal times the number on
        # torch. The constant is multiplied: XLA turns a division by it into that, others do not.
        inverse = divide(constant_like(largest, self.highest), largest)
        return inverse, largest * float(np.float32(1 / self.highest))

    def _static_ratio(self, x, scale):
        """As `_ratio`; the scale of a token that holds a NaN or an infinity is NaN."""
        finite = ops.all(ops.isfinite(ops.stop_gradient(x)), axis=-1, keepdims=True)
        scale = ops.where(finite, scale, constant_like(scale, float("nan")))
        return x * divide(ops.ones_like(scale), scale), scale

    def _round(self, ratio):
        return ops.clip(ops.round(ops.stop_gradient(ratio)), -self.highest, self.highest)

    def get_config(self):
        """The arguments of the constructor."""
        return {"granularity": self.granularity, "epsilon": self.epsilon}


@keras.saving.register_keras_serializable("keras_bitnet")
class ActivationInt8(ActivationQuantizer):
    """Dynamic 8-bit activations: `round(x * 127 / max |x|)`, by default per token.

    Shapes: `(..., features)` -> `int8` codes of that shape, scale `(..., 1)`.
    Gradient: identity (an absmax scale never clips). Arguments: see `ActivationQuantizer`.

    Source:
        Ma et al. 2024, BitNet b1.58 (https://arxiv.org/abs/2402.17764). There the range is
        -128 .. 127; an absmax scale never reaches -128, so the codes are the same.
    """

    name = "int8"
    bits = 8
    highest = 127


@keras.saving.register_keras_serializable("keras_bitnet")
class ActivationInt4(ActivationQuantizer):
    """Dynamic 4-bit activations: `round(x * 7 / max |x|)`, by default per token.

    Shapes: `(..., features)` -> `int8` codes of that shape in -7 .. 7, scale `(..., 1)`.
    Gradient: identity. Arguments: see `ActivationQuantizer`.

    Source:
        Wang et al. 2024, BitNet a4.8 (https://arxiv.org/abs/2411.04965). There the scale is
        `mean |x| * sqrt(7)` and clips, here it is the absolute maximum.
    """

    name = "int4"
    bits = 4
    highest = 7


@keras.saving.register_keras_serializable("keras_bitnet")
class StaticActivation(ActivationQuantizer):
    """Activations with one scale for all inputs, a weight of the layer.

        code = clip(round(x * (1 / scale)), -highest, highest),   highest = 2^(bits - 1) - 1

    `keras_bitnet.calibrate` finds the scale. With a momentum it follows the data in training,

        scale = momentum * scale + (1 - momentum) * max(max |x|, epsilon) / highest

    starting from the first batch; and in inference too, once the variable `follow_in_inference`
    of the layer is true: `layer.follow_in_inference.assign(True)`.

    Shapes: `(..., features)` -> `int8` codes of that shape, scale `(..., 1)`.
    Gradient: identity.

    Args:
        bits: 4 or 8.
        momentum: In [0, 1), or `None`: only calibration sets the scale.
            On JAX the cell of an RNN with one needs `unroll=True`: a loop changes no variable.
        epsilon: Lower bound of the absolute maximum.

    Raises:
        ValueError: An argument is none of these.

    Source:
        Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference (https://arxiv.org/abs/1712.05877), the moving average.
    """

    name = "static"

    def __init__(self, bits=8, momentum=None, epsilon=1e-5):
        super().__init__("static", epsilon)
        check_choice("bits", bits, (4, 8))
        if momentum is not None:
            check_number("momentum", momentum, "[0, 1)")
        self.bits = bits
        self.highest = 2 ** (bits - 1) - 1
        self.momentum = momentum

    def get_config(self):
        """The arguments of the constructor."""
        return {"bits": self.bits, "momentum": self.momentum, "epsilon": self.epsilon}
