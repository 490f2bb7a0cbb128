"""An orthogonal rotation of the last axis that spreads outliers over their neighbours."""

import functools

import numpy as np
from keras import ops

BLOCK = 128  # the widest block that is still far cheaper than the product behind it


def hadamard(x, block=BLOCK):
    """Rotates the last axis by a block-diagonal Walsh-Hadamard matrix with signs.

        y = x @ diag(R, R, ..., R'),   R = D H D,   R = R^T,   R @ R = I

    Blocks of `block` values; what is left at the end takes smaller powers of two, so any width
    will do: 300 = 128 + 128 + 32 + 8 + 4. The matrix is its own inverse, and a channel of
    magnitude a becomes `block` channels of `a / sqrt(block)`: what a few large channels would
    cost the grid of an integer is shared by all.

    `D` holds the signs of Rudin and Shapiro. Without them the first row of `H` would gather the
    mean of a block in one value, `sqrt(block)` times as large: after a ReLU, whose values have a
    mean, that makes an outlier where there was none. With them no value is larger than
    `sqrt(2)` times that mean.

    Args:
        x: Float tensor `(..., width)`.
        block: Power of two, values that are mixed.

    Returns:
        Tensor of the shape and dtype of `x`; the arithmetic is float32.

    Raises:
        ValueError: `block` is no power of two.

    Source:
        Wang et al. 2025, BitNet v2 (https://arxiv.org/abs/2504.18415); blocks as in QuEST
        (https://arxiv.org/abs/2502.05003); signs as in QuaRot
        (https://arxiv.org/abs/2404.00456), where they are random.
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"`block` must be a power of two. Received: block={block}")
    dtype, width = x.dtype, x.shape[-1]
    x = ops.cast(x, "float32")
    parts, start = [], 0
    for size, count in _blocks(width, block):
        part = x if count * size == width else x[..., start : start + count * size]
        parts.append(_rotate_blocks(part, size, count))
        start += count * size
    return ops.cast(parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=-1), dtype)


def _rotate_blocks(x, size, count):
    """One matmul with a small matrix: measured faster than a butterfly on all backends."""
    if size == 1:
        return x
    leading = ops.shape(x)[:-1]
    y = ops.matmul(ops.reshape(x, (-1, size)), ops.convert_to_tensor(_matrix(size)))
    return ops.reshape(y, (*leading, count * size))


def _blocks(width, block):
    """`(size, count)` of the blocks from left to right, sizes falling."""
    found = [(block, width // block)]
    rest = width % block
    found += [(1 << bit, 1) for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
    return [(size, count) for size, count in found if count]


@functools.cache
def _matrix(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = np.array([_rudin_shapiro(i) for i in range(size)])
    return (signs[:, None] * matrix * signs / np.sqrt(size)).astype("float32")


def _rudin_shapiro(i):
    """-1 where the binary digits of `i` hold an odd number of pairs 11, else 1."""
    return -1 if (i & i >> 1).bit_count() % 2 else 1
