"""What the packed matmul means, in plain `keras.ops`: any backend, any device, traceable.

    y[m, n] = scale_x[m] * sum_g scale_w[g, n] * (sum_k step * (code + offset) * xq) / step + bias

The inner sum is exact integer arithmetic: `step` is 2 where the offset is a half, so that
`step * (code + offset)` is whole. It runs as a float32 matmul of whole numbers in slices so
short that no partial sum leaves the 24 bits in which float32 is exact; the operands fit in 8
bits, so reduced-precision matrix units (TF32, bfloat16) change nothing. Plain autodiff gives
the gradient with respect to `x`.
"""

import numpy as np
from keras import ops

from keras_bitnet.ops.ste import straight_through

_EXACT = 2**24


def step(offset):
    """The factor that makes `step * (code + offset)` whole: 1, or 2 for a half offset."""
    return 1 if float(offset).is_integer() else 2


def accumulate(x_codes, packed):
    """The exact integer sums `sum_k step * (code + offset) * x_code`.

    Args:
        x_codes: Integer tensor `(..., in_features)` with values in [-128, 127].
        packed: `PackedTensor`.

    Returns:
        `int32` tensor `(..., out_features)`, or `(..., groups, out_features)` when packed
        in groups. These are the numbers that every kernel must reproduce bit for bit.
    """
    x_codes = ops.cast(x_codes, "float32")
    slices = _accumulate_slices(x_codes, packed)
    return sum(ops.cast(part, "int32") for part in slices)


def reference_matmul(x, packed, activation_quantizer=None, bias=None, activation_scale=None):
    """`x @ dequantize(packed) + bias` with quantized activations; see `ops.bit_matmul`."""
    dtype = x.dtype
    x = ops.cast(x, "float32")
    if activation_quantizer is None:
        y = ops.matmul(x, packed.dequantize())
    else:
        x_codes, x_scale = activation_quantizer.quantize_with_gradient(x, activation_scale)
        sums = _exact_sum(_accumulate_slices(x_codes, packed))
        y = _apply_weight_scale(sums, packed) * x_scale
    if bias is not None:
        y = y + ops.cast(bias, "float32")
    return ops.cast(y, dtype)


def _accumulate_slices(x_codes, packed):
    """Float32 tensors of exact whole numbers whose sum is the accumulator."""
    factor = step(packed.offset)
    weights = ops.cast(packed.codes(), "float32") * factor + factor * packed.offset  # (k, n)
    if packed.group_size is not None:
        return [_grouped_matmul(x_codes, weights, packed.group_size)]
    largest = factor * max(abs(packed.offset), 2**packed.bits - 1 + packed.offset)
    length = int(_EXACT // (128 * largest))
    starts = range(0, packed.in_features, length)
    return [ops.matmul(x_codes[..., i : i + length], weights[i : i + length]) for i in starts]


def _grouped_matmul(x_codes, weights, group_size):
    in_features, out_features = weights.shape
    groups = -(-in_features // group_size)
    padding = groups * group_size - in_features
    leading = ops.shape(x_codes)[:-1]
    x_codes = ops.pad(ops.reshape(x_codes, (-1, in_features)), ((0, 0), (0, padding)))
    x_codes = ops.transpose(ops.reshape(x_codes, (-1, groups, group_size)), (1, 0, 2))
    weights = ops.pad(weights, ((0, padding), (0, 0)))
    weights = ops.reshape(weights, (groups, group_size, out_features))
    sums = ops.transpose(ops.matmul(x_codes, weights), (1, 0, 2))  # (m, g, n)
    return ops.reshape(sums, (*leading, groups, out_features))


def _exact_sum(slices):
    if len(slices) == 1:
        return slices[0]
    exact = ops.cast(sum(ops.cast(part, "int32") for part in slices), "float32")
    return straight_through(sum(slices), exact)


def _apply_weight_scale(sums, packed):
    scale = ops.cast(packed.scale, "float32") * np.float32(1 / step(packed.offset))
    if packed.group_size is None:
        return sums * scale[0]
    return ops.sum(sums * scale, axis=-2)
