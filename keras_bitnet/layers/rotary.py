"""Rotary position embedding in the rotate-half form of Llama, BitNet and GPT-NeoX."""

import numpy as np
from keras import ops


def rotary_tables(positions, head_dim, max_wavelength, scaling_factor=1.0):
    """Cosines and sines of the angles `position / max_wavelength ** (2 i / head_dim)`.

    Args:
        positions: Integer tensor `(..., length)`.
        head_dim: Even size of an attention head.
        max_wavelength: The base of the angles, "theta" of other libraries.
        scaling_factor: Positions are divided by it.

    Returns:
        `(cos, sin)`: `float32` tensors `(..., length, 1, head_dim)`, halves equal.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1 / np.float32(max_wavelength) ** exponents / np.float32(scaling_factor)
    frequencies = ops.convert_to_tensor(np.concatenate([frequencies, frequencies]), "float32")
    angles = ops.expand_dims(ops.cast(positions, "float32"), (-2, -1)) * frequencies
    return ops.cos(angles), ops.sin(angles)


def in_float32(tables):
    """The tables as they were made: a layer may get its arguments in its compute dtype."""
    return tuple(ops.cast(table, "float32") for table in tables)


def rotate(x, tables):
    """Turns each pair `(x[i], x[i + head_dim / 2])` by its angle.

    Args:
        x: Tensor `(batch, length, heads, head_dim)`.
        tables: What `rotary_tables` gave for its positions.

    Returns:
        Tensor of the shape and dtype of `x`; computed in `float32`.

    Source:
        Su et al. 2021, RoFormer (https://arxiv.org/abs/2104.09864).
    """
    cos, sin = in_float32(tables)
    dtype, half = x.dtype, x.shape[-1] // 2
    x = ops.cast(x, "float32")
    turned = ops.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return ops.cast(x * cos + turned * sin, dtype)
