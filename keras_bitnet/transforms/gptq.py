"""Rounding that makes up for its own error: GPTQ."""

import numpy as np
from keras import ops

from keras_bitnet.ops.packed_tensor import expand_scale

_ROWS = 128  # inputs whose error is carried at once to those after them
_FACTORS = np.geomspace(0.3, 2, 40, dtype="float32")  # of the scale of the weights alone
_MEMORY = 1 << 30  # bytes of second moments that are gathered in one pass


def portions(layers):
    """Layers in groups that are looked at together, in their order.

    Those after them see what was rounded before, and the memory of the moments is bounded.
    """
    groups: list[list] = []
    used = _MEMORY
    for layer in layers:
        size = 4 * layer.in_features**2
        used += size
        if used > _MEMORY:
            groups.append([])
            used = size
        groups[-1].append(layer)
    return groups


def round_kernel(layer, moments, damping):
    """Replaces a float kernel, whose scale is learned, by values of its grid.

    Args:
        layer: `BitLayer` that is not packed.
        moments: Array `(in_features, in_features)`: sum of `x^T x` over its inputs.
        damping: See `rounded`.
    """
    matrix = layer.kernel_matrix()
    part = ops.convert_to_numpy(layer.without_kept_rows(matrix))
    levels, scale = rounded(part, moments, layer.weight_quantizer, damping)
    kept = ops.convert_to_numpy(matrix) - part
    kernel = levels * _expand(scale, part, layer.weight_quantizer) + kept
    layer.kernel.assign(layer.matrix_to_kernel(ops.convert_to_tensor(kernel)))
    layer.kernel_log2_scale.assign(np.log2(scale))


def rounded(weight, moments, quantizer, damping=0.01):
    """Levels and scale of a weight that keep its product with the inputs.

    Inputs are rounded one after another, those of the largest moment first; the inputs that
    are still float are corrected so that `|x w - x q|^2` grows least. The scale comes before:
    the multiple of that of the weights alone with the least error of rounding, where errors
    count by the second moment of their input.

    Args:
        weight: Float array `(in, out)`.
        moments: Array `(in, in)`: sum of `x^T x` over the inputs.
        quantizer: `WeightQuantizer` that rounds to the nearest level.
        damping: Part of the mean moment that is added to all, positive: how little to trust
            what few data say.

    Returns:
        `(levels, scale)`, float32 arrays `(in, out)` and `(1 or groups, 1 or out)`.

    Source:
        Frantar et al. 2022, GPTQ (https://arxiv.org/abs/2210.17323).
    """
    moments = np.array(moments, "float64")
    own = np.diag(moments).copy()
    unseen = own == 0  # always zero: such inputs are rounded by themselves
    moments[unseen, unseen] = own.mean() or 1
    scale = _best_scale(weight, own if own.any() else own + 1, quantizer)
    order = np.argsort(-own, kind="stable")
    factors = _factors(moments[np.ix_(order, order)], damping)
    left = weight[order].astype("float32")
    step = _expand(scale, weight, quantizer)[order]
    levels = np.empty_like(left)
    for begin in range(0, len(left), _ROWS):
        end = min(begin + _ROWS, len(left))
        errors = np.empty_like(left[begin:end])
        for i in range(begin, end):
            levels[i] = _nearest(left[i] / step[i], quantizer)
            errors[i - begin] = (left[i] - levels[i] * step[i]) / factors[i, i]
            left[i + 1 : end] -= np.outer(factors[i, i + 1 : end], errors[i - begin])
        left[end:] -= factors[begin:end, end:].T @ errors
    result = np.empty_like(levels)
    result[order] = levels
    return result, scale


def _factors(moments, damping):
    """The upper Cholesky factor of the inverse of the damped moments, `float32`."""
    mean = np.diag(moments).mean()
    while True:
        damped = moments + np.eye(len(moments)) * (damping * mean)
        try:
            return np.linalg.cholesky(np.linalg.inv(damped)).T.astype("float32")
        except np.linalg.LinAlgError:  # rounding has made them indefinite
            damping *= 10


def _best_scale(weight, own, quantizer):
    start = ops.convert_to_numpy(quantizer.compute_scale(weight))
    best, least = start, np.full(start.shape, np.inf)
    steps = _expand(start, weight, quantizer)
    for factor in _FACTORS:
        step = steps * factor
        errors = np.square(weight - _nearest(weight / step, quantizer) * step) * own[:, None]
        error = _sum_of_scales(errors, start.shape, quantizer.group_size)
        best = np.where(error < least, start * factor, best)
        least = np.minimum(error, least)
    return best


def _sum_of_scales(errors, shape, group_size):
    """The sum over the weights that share a scale, of `shape`."""
    if shape == (1, 1):
        return errors.sum().reshape(1, 1)
    return np.add.reduceat(errors, np.arange(0, len(errors), group_size or len(errors)), axis=0)


def _nearest(ratio, quantizer):
    """`quantizer.round_levels` in NumPy: 0.02 ms for a row, by a backend 0.3 to 0.6."""
    half = np.float32(quantizer.offset - np.floor(quantizer.offset))
    return np.clip(np.rint(ratio - half) + half, quantizer.lowest, quantizer.highest)


def _expand(scale, weight, quantizer):
    expanded = ops.convert_to_numpy(expand_scale(scale, len(weight), quantizer.group_size))
    return np.broadcast_to(expanded, weight.shape)
