"""What every weight quantizer shares: granularity, scale, codes, fake quantization."""

import math
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_bitnet.checks import check_choice
from keras_bitnet.kernels import training
from keras_bitnet.ops.constants import constant_like
from keras_bitnet.ops.division import divide
from keras_bitnet.ops.packed_tensor import expand_scale
from keras_bitnet.ops.ste import blend, scale_gradient, straight_through
from keras_bitnet.quantizers.quantizer import Quantizer

GRANULARITIES = ("tensor", "channel", "group")
GRADIENTS = ("identity", "clipped")


class QuantizedWeight(NamedTuple):
    """Codes and scale of a weight matrix: `w ~ scale * (codes + offset)`.

    Attributes:
        codes: `uint8` tensor `(in, out)`.
        scale: `float32` tensor `(1 or groups, 1 or out)`.
        offset: Float.
    """

    codes: Any
    scale: Any
    offset: float


def absmean(magnitude):
    """Mean over axis 1."""
    return ops.mean(magnitude, axis=1)


def absmax(magnitude):
    """Maximum over axis 1."""
    return ops.amax(magnitude, axis=1)


def absmedian(magnitude):
    """Median over axis 1, by sorting (`torch.quantile` stops at 16 million values)."""
    ordered = ops.sort(magnitude, axis=1)
    size = magnitude.shape[1]
    return (ordered[:, (size - 1) // 2] + ordered[:, size // 2]) * 0.5


STATISTICS = {"absmean": absmean, "absmedian": absmedian, "absmax": absmax}


class WeightQuantizer(Quantizer):
    """Base of the weight quantizers: a uniform grid of `level_count` values.

        w ~ scale * level,   level = code + offset,   code in {0 .. level_count - 1}

    Stateless: it holds no variables. A learned scale belongs to the layer, which passes it in.
    A weight is always a matrix `(in, out)`, and the arithmetic is float32 whatever the dtype
    of the weight. A subclass is a row of constants, and `round_levels` where rounding to the
    nearest level is not what it does.

    Args:
        scale: How the scale is found: `"absmean"`, `"absmedian"` or `"absmax"` of the weights
            that share it, or `"learned"`: a trained variable of the layer (learned step size,
            LSQ), which starts from the statistic `learned_init`. The layer trains its
            logarithm (as TQT does, https://arxiv.org/abs/1903.08066). Weight decay pulls the scale
            towards 1: `optimizer.exclude_from_weight_decay(var_names=["log2_scale"])`.
        granularity: Which weights share a scale: `"tensor"` (all), `"channel"` (an output's),
            `"group"` (`group_size` consecutive inputs of an output).
        group_size: Inputs to a group, a multiple of 32. Giving it implies
            `granularity="group"`, which without it takes 64.
        gradient: Straight-through estimator of the weight where the scale is not learned.
            `"identity"` passes the gradient unchanged, `"clipped"` stops it where the weight
            lies more than half a step outside the grid. A learned scale always clips.
        epsilon: Lower bound of the statistic: a group of zeros gets this scale, not 0.

    Raises:
        ValueError: An argument is none of these.
    """

    name = ""
    bits = 0  # of a code in memory
    bits_per_weight = 0.0
    level_count = 0
    offset = 0.0
    scales: tuple[str, ...] = ("absmax", "learned")
    factor = 1.0  # scale = factor * statistic
    learned_init = "absmax"
    learned_margin = 0.0  # how far outside the grid the gradient of LSQ still passes, in steps
    formula = "nearest"  # what kernels compute; the name of a subclass that computes otherwise

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        own = ("round_levels", "quantize", "reference_fake_quantize")
        if "formula" not in vars(cls) and any(name in vars(cls) for name in own):
            cls.formula = cls.__name__

    def __init__(
        self,
        scale="absmax",
        granularity="tensor",
        group_size=None,
        gradient="identity",
        epsilon=1e-5,
    ):
        super().__init__("uint8", epsilon)
        if group_size is not None:
            granularity = "group"
        elif granularity == "group":
            group_size = 64
        check_choice("scale", scale, self.scales)
        check_choice("granularity", granularity, GRANULARITIES)
        check_choice("gradient", gradient, GRADIENTS)
        if group_size is not None and (
            not isinstance(group_size, int) or group_size <= 0 or group_size % 32
        ):
            raise ValueError(
                "`group_size` must be a positive multiple of 32, so that groups end where the "
                f"tiles of the packed layout do. Received: group_size={group_size}"
            )
        self.scale = scale
        self.granularity = granularity
        self.group_size = group_size
        self.gradient = gradient

    @property
    def learned(self):
        """Whether the scale is a trained variable of the layer."""
        return self.scale == "learned"

    @property
    def lowest(self):
        """The lowest level."""
        return self.offset

    @property
    def highest(self):
        """The highest level."""
        return self.level_count - 1 + self.offset

    def scale_shape(self, in_features, out_features):
        """Shape of the scale of an `(in_features, out_features)` weight."""
        if self.granularity == "tensor":
            return (1, 1)
        groups = 1 if self.group_size is None else -(-in_features // self.group_size)
        return (groups, out_features)

    def compute_scale(self, weight):
        """Computes the scale from the weights (for a learned scale: where it starts).

        Args:
            weight: Tensor `(in, out)`.

        Returns:
            `float32` tensor of `scale_shape(in, out)`, without a gradient.
        """
        weight = _as_matrix(weight)
        magnitude = ops.stop_gradient(ops.abs(weight))
        statistic = STATISTICS[self.learned_init if self.learned else self.scale]
        k, n = magnitude.shape
        if self.granularity == "tensor":
            value = statistic(ops.reshape(magnitude, (1, k * n)))[:, None]
        elif self.granularity == "channel":
            value = statistic(magnitude[None])
        else:
            whole = k - k % self.group_size
            blocks = [magnitude[:whole], magnitude[whole:]]
            sizes = [self.group_size, k - whole]
            parts = [
                statistic(ops.reshape(block, (-1, size, n)))
                for block, size in zip(blocks, sizes, strict=True)
                if block.shape[0]
            ]
            value = ops.concatenate(parts, axis=0)
        return ops.maximum(value, constant_like(value, self.epsilon)) * self.factor

    def round_levels(self, ratio):
        """The level nearest to `ratio = weight / scale`; halves go to the even neighbour."""
        half = self.offset - math.floor(self.offset)  # 1/2 for a grid between the integers
        return ops.clip(ops.round(ratio - half) + half, self.lowest, self.highest)

    def quantize(self, weight, scale=None):
        """Quantizes a weight to codes.

        Args:
            weight: Tensor `(in, out)`.
            scale: The learned scale of the layer, positive, or `None` to compute it.

        Returns:
            `QuantizedWeight(codes, scale, offset)`.
        """
        weight = _as_matrix(weight)
        scale = self.compute_scale(weight) if scale is None else ops.cast(scale, "float32")
        levels = self.round_levels(divide(weight, self._expand(scale, weight)))
        return QuantizedWeight(ops.cast(levels - self.offset, "uint8"), scale, self.offset)

    def dequantize(self, quantized):
        """The `float32` weight `(in, out)` that a `QuantizedWeight` stands for."""
        levels = ops.cast(quantized.codes, "float32") + quantized.offset
        return levels * self._expand(quantized.scale, levels)

    def restore(self, quantized):
        """A float weight that quantizes to the given codes and scale again.

        Mostly that is `dequantize`. Where the scale is computed, the outermost levels are
        moved outwards, which keeps their codes, until the statistic gives the scale back:
        the mean of {-s, 0, s} alone would be smaller than s, and so can the median be.

        Args:
            quantized: `QuantizedWeight`.

        Returns:
            `float32` tensor `(in, out)`.
        """
        weight = self.dequantize(quantized)
        if self.scale == "absmax":
            largest = ops.sign(weight) * self._expand(quantized.scale, weight) / self.factor
            levels = ops.cast(quantized.codes, "float32") + quantized.offset
            outermost = ops.logical_or(levels == self.lowest, levels == self.highest)
            return ops.where(outermost, largest, weight)
        if self.learned:
            return weight
        return weight * self._expand(quantized.scale / self.compute_scale(weight), weight)

    def fake_quantize(self, weight, scale=None, strength=None, dtype=None):
        """Rounds a weight to the grid and back, keeping a gradient: the weight of QAT.

        Args:
            weight: Tensor `(in, out)`.
            scale: The learned scale of the layer, or `None` to compute it.
            strength: Scalar tensor in [0, 1], 0 gives the float weight, or `None` for 1.
            dtype: Dtype to which the result is rounded, `float32` by default.

        Returns:
            Tensor `(in, out)`. The gradient of the weight is that of `gradient`;
            for a learned scale, those of weight and scale are the ones of LSQ.
        """
        weight = _as_matrix(weight)
        scale = None if scale is None else ops.convert_to_tensor(scale)
        dtype = "float32" if dtype is None else keras.backend.standardize_dtype(dtype)
        kernel = training.choose(training.of_weight(self, weight, dtype))
        return kernel.run(self, weight, scale, strength, dtype)

    def reference_fake_quantize(self, weight, scale, strength, dtype):
        """What `fake_quantize` means, in plain `keras.ops`."""
        if self.learned and scale is not None:
            return ops.cast(blend(weight, self._learned_step(weight, scale), strength), dtype)
        scale = self.compute_scale(weight) if scale is None else ops.stop_gradient(scale)
        step = self._expand(scale, weight)
        ratio = divide(ops.stop_gradient(weight), step)
        mixed = blend(weight, self.round_levels(ratio) * step, strength)
        if self.gradient == "clipped":
            inside = self._inside(ratio, margin=0.5)
            weight = blend(weight, ops.where(inside, weight, ops.stop_gradient(weight)), strength)
        return ops.cast(straight_through(weight, mixed), dtype)

    def _learned_step(self, weight, scale):
        """LSQ: `round(w / s) * s`, differentiable in both, the gradient of s damped."""
        sharing = math.prod(weight.shape) / math.prod(scale.shape)
        scale = scale_gradient(scale, 1 / math.sqrt(sharing * max(self.highest, 1.0)))
        step = self._expand(scale, weight)
        ratio = weight / step
        levels = ops.stop_gradient(self.round_levels(ratio))
        inside = self._inside(ratio, margin=self.learned_margin)
        return ops.where(inside, straight_through(ratio, levels), levels) * step

    def _inside(self, ratio, margin):
        return ops.logical_and(ratio >= self.lowest - margin, ratio <= self.highest + margin)

    def _expand(self, scale, weight):
        return expand_scale(scale, weight.shape[0], self.group_size)

    def get_config(self):
        """The arguments of the constructor."""
        return {
            "scale": self.scale,
            "granularity": self.granularity,
            "group_size": self.group_size,
            "gradient": self.gradient,
            "epsilon": self.epsilon,
        }


def _as_matrix(weight):
    weight = ops.cast(ops.convert_to_tensor(weight), "float32")
    if len(weight.shape) != 2:
        raise ValueError(
            "A weight quantizer takes a matrix of shape (in, out); reshape the weight first. "
            f"Received: weight.shape={tuple(weight.shape)}"
        )
    return weight
