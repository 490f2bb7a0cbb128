"""Slow, obvious NumPy twins of what the package computes. Imports nothing of the package."""

import numpy as np


def quantize_weight(name, w, granularity, group_size=None, scale="default"):
    """Returns `(codes, scale broadcast to w, offset)` in float32 arithmetic, group by group."""
    codes = np.zeros(w.shape, np.int64)
    scales = np.zeros(w.shape, np.float32)
    for rows, columns in _blocks(w.shape, granularity, group_size):
        codes[rows, columns], scales[rows, columns] = _quantize_block(
            name, w[rows, columns].astype(np.float32), scale
        )
    offset = {"binary": -0.5, "ternary": -1, "int2": -1.5, "int4": -8, "int8": -128}[name]
    return codes, scales, offset


def _blocks(shape, granularity, group_size):
    k, n = shape
    if granularity == "tensor":
        return [(slice(0, k), slice(0, n))]
    size = k if granularity == "channel" else group_size
    return [(slice(i, min(i + size, k)), slice(j, j + 1)) for i in range(0, k, size)
            for j in range(n)]  # fmt: skip


def _quantize_block(name, w, scale):
    magnitude = np.abs(w)
    if name == "binary":
        s = 2 * max(magnitude.mean(dtype=np.float32), np.float32(1e-5))
        return (w >= 0).astype(np.int64), s
    if name == "ternary":
        statistic = {"default": np.mean, "absmedian": np.median, "absmax": np.max}[scale]
        s = np.float32(max(statistic(magnitude), np.float32(1e-5)))
        return np.clip(np.round(w / s), -1, 1).astype(np.int64) + 1, s
    if name == "int2":
        s = max(magnitude.max(), np.float32(1e-5)) * np.float32(0.5)
        return np.clip(np.round(w / s - np.float32(0.5)) + 2, 0, 3).astype(np.int64), s
    top = {"int4": 7, "int8": 127}[name]
    s = np.float32(max(magnitude.max(), np.float32(1e-12)) * np.float32(1 / top))
    return np.clip(np.round(w / s), -top, top).astype(np.int64) + top + 1, s


def quantize_activation(x, top=127, per_tensor=False):
    """Returns `(codes, scale)` of absmax activations in float32 arithmetic."""
    x = x.astype(np.float32)
    largest = np.abs(x).max(axis=None if per_tensor else -1, keepdims=True)
    largest = np.maximum(largest, np.float32(1e-5))
    codes = np.clip(np.round(x * (np.float32(top) / largest)), -top, top).astype(np.int64)
    return codes, largest * np.float32(1 / top)


def pack(codes, bits):
    """The tile layout, bit by bit."""
    k, n = codes.shape
    inputs = 32 // bits
    tiles = np.zeros((-(-n // 16), -(-k // inputs), 16, 4), np.uint8)
    for row in range(k):
        for column in range(n):
            i, j = divmod(row % inputs, 4)
            tile = tiles[column // 16, row // inputs, column % 16]
            tile[j] |= np.uint8(int(codes[row, column]) << (bits * i))
    return tiles


def accumulate(x_codes, codes, offset, group_size=None):
    """`sum step * (code + offset) * x` in int64, `(m, n)` or `(m, groups, n)`."""
    step = 1 if float(offset).is_integer() else 2
    weights = step * codes.astype(np.int64) + int(step * offset)
    if group_size is None:
        return x_codes @ weights
    k = len(weights)
    parts = [x_codes[:, i : i + group_size] @ weights[i : i + group_size]
             for i in range(0, k, group_size)]  # fmt: skip
    return np.stack(parts, axis=1)


def linear(x, w, bias, name, granularity, group_size=None, top=127):
    """The quantized layer in float64, from float32 codes and scales."""
    codes, scales, offset = quantize_weight(name, w, granularity, group_size)
    x_codes, x_scale = quantize_activation(x, top)
    weight = (codes + offset) * scales.astype(np.float64)
    return (x_codes * x_scale.astype(np.float64)) @ weight + bias
