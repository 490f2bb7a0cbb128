"""The weight quantizers: 1, 1.58, 2, 4 and 8 bits, each a row of constants."""

import math

import keras
from keras import ops

from keras_bitnet.checks import check_choice
from keras_bitnet.quantizers.base import WeightQuantizer


@keras.saving.register_keras_serializable("keras_bitnet")
class Binary(WeightQuantizer):
    """One bit: `w ~ s * sign(w)`, with `s = mean |w|` and `sign(0) = +1`.

    Levels -1/2 and +1/2 of the stored scale `2 s`. The mean of the weights is not subtracted,
    so that the result fits the one-bit format of GGUF; a norm before the layer does that work.

    Shapes: weight `(in, out)` -> codes `(in, out)` in {0, 1}, scale `(1 or groups, 1 or out)`.
    Gradient: `gradient="identity"` (default) or `"clipped"` where `|w| > 2 s`.
    Arguments: see `WeightQuantizer`; `scale="absmean"`, `granularity="tensor"` by default.

    Source:
        Rastegari et al. 2016, XNOR-Net (https://arxiv.org/abs/1603.05279); Wang et al. 2023,
        BitNet (https://arxiv.org/abs/2310.11453), which centres the weights first.
    """

    name = "binary"
    formula = "sign"
    bits = 1
    bits_per_weight = 1.0
    level_count = 2
    offset = -0.5
    scales = ("absmean", "learned")
    factor = 2.0
    learned_init = "absmean"
    learned_margin = 0.5

    def __init__(
        self, scale="absmean", granularity="tensor", group_size=None, gradient="identity",
        epsilon=1e-5,
    ):  # fmt: skip
        super().__init__(scale, granularity, group_size, gradient, epsilon)

    def round_levels(self, ratio):
        """+1/2 where `ratio >= 0`, else -1/2."""
        return ops.where(ratio >= 0, 0.5, -0.5)


@keras.saving.register_keras_serializable("keras_bitnet")
class Ternary(WeightQuantizer):
    """log2(3) = 1.58 bits: `w ~ s * clip(round(w / s), -1, 1)`, with `s = mean |w|`.

    Two bits a weight in memory, 1.6 on disk. `scale="absmedian"` takes the median of `|w|`,
    `"absmax"` the largest, `"learned"` trains it.

    Shapes: weight `(in, out)` -> codes `(in, out)` in {0, 1, 2} for -1, 0, +1,
    scale `(1 or groups, 1 or out)`.
    Gradient: `gradient="identity"` (default) or `"clipped"` where `|w| > 1.5 s`.
    Arguments: see `WeightQuantizer`; `scale="absmean"`, `granularity="tensor"` by default.

    Source:
        Ma et al. 2024, BitNet b1.58 (https://arxiv.org/abs/2402.17764), the default to the
        letter with epsilon 1e-5; Nielsen and Schneider-Kamp 2024, BitNet b1.58 Reloaded
        (https://arxiv.org/abs/2407.09527), the median.
    """

    name = "ternary"
    bits = 2
    bits_per_weight = math.log2(3)
    level_count = 3
    offset = -1.0
    scales = ("absmean", "absmedian", "absmax", "learned")
    learned_init = "absmean"

    def __init__(
        self, scale="absmean", granularity="tensor", group_size=None, gradient="identity",
        epsilon=1e-5,
    ):  # fmt: skip
        super().__init__(scale, granularity, group_size, gradient, epsilon)


@keras.saving.register_keras_serializable("keras_bitnet")
class Int2(WeightQuantizer):
    """Two bits. Four levels without a zero, or the integers -2 .. 1.

    `levels="stretched"` (default) is the stretched elastic quantizer:
    `w ~ s * {-1.5, -0.5, 0.5, 1.5}` with `s = a / 2`, where `a` starts as `max |w|`;
    `levels="integer"` is `w ~ s * {-2, -1, 0, 1}`.

    Shapes: weight `(in, out)` -> codes `(in, out)` in {0, 1, 2, 3}, scale
    `(1 or groups, 1 or out)`.
    Gradient: learned scale (default): 1 where `|w| < a`, 0 outside; of the scale: LSQ's.
    Arguments: see `WeightQuantizer`; `scale="learned"`, `granularity="channel"` by default.

    Source:
        Liu et al. 2025, ParetoQ (https://arxiv.org/abs/2502.02631), stretched elastic quant.
        There the gradient ends at 0.99 a, here at a.
    """

    name = "int2"
    bits = 2
    bits_per_weight = 2.0
    level_count = 4
    factor = 0.5

    def __init__(
        self, scale="learned", granularity="channel", group_size=None, gradient="identity",
        epsilon=1e-5, levels="stretched",
    ):  # fmt: skip
        super().__init__(scale, granularity, group_size, gradient, epsilon)
        check_choice("levels", levels, ("stretched", "integer"))
        self.levels = levels
        # The stretched grid covers half a step on either side of its outer levels.
        self.offset, self.learned_margin = (-1.5, 0.5) if levels == "stretched" else (-2.0, 0.0)

    def get_config(self):
        """The arguments of the constructor."""
        return {**super().get_config(), "levels": self.levels}


@keras.saving.register_keras_serializable("keras_bitnet")
class Int4(WeightQuantizer):
    """Four bits, symmetric: `w ~ s * clip(round(w / s), -7, 7)`, with `s = max |w| / 7`.

    Shapes: weight `(in, out)` -> codes `(in, out)` in 1 .. 15 for -7 .. 7 (0 is not used),
    scale `(1 or groups, 1 or out)`.
    Gradient: `gradient="identity"` (default; an absmax scale never clips); `scale="learned"`
    trains the step with LSQ's gradients.
    Arguments: see `WeightQuantizer`; `scale="absmax"`, `granularity="channel"` by default.

    Source:
        Esser et al. 2020, Learned Step Size Quantization (https://arxiv.org/abs/1902.08153).
        There the step starts as `2 mean |w| / sqrt(7)`, here as `max |w| / 7`.
    """

    name = "int4"
    bits = 4
    bits_per_weight = 4.0
    level_count = 16
    offset = -8.0
    factor = 1 / 7

    def __init__(
        self, scale="absmax", granularity="channel", group_size=None, gradient="identity",
        epsilon=1e-12,
    ):  # fmt: skip
        super().__init__(scale, granularity, group_size, gradient, epsilon)

    @property
    def lowest(self):
        """-7: the grid is symmetric and leaves the lowest code out."""
        return -self.highest


@keras.saving.register_keras_serializable("keras_bitnet")
class Int8(Int4):
    """Eight bits, symmetric: `w ~ s * clip(round(w / s), -127, 127)`, `s = max |w| / 127`.

    Shapes: weight `(in, out)` -> codes `(in, out)` in 1 .. 255 for -127 .. 127 (0 is not
    used), scale `(1 or groups, 1 or out)`.
    Gradient, arguments and source: as for `Int4`.
    """

    name = "int8"
    bits = 8
    bits_per_weight = 8.0
    level_count = 256
    offset = -128.0
    factor = 1 / 127
