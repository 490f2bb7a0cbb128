"""I2_S of bitnet.cpp on x86: ternary, 2 bits a weight, one scale for the whole tensor.

The matrix is flattened row by row and cut in runs of 128: byte `m` of 32 holds the codes `m`,
`32 + m`, `64 + m`, `96 + m`, the first in its highest bits. The float32 scale and 28 zero bytes
follow. The ARM build of bitnet.cpp orders the codes otherwise and cannot read these files.
"""

import numpy as np

NAME = "i2_s"
ID = 36
FILE_TYPE = 40
RUN = 128
TAIL_BYTES = 32


def nbytes(size):
    """Bytes of a tensor of `size` weights."""
    return size // 4 + TAIL_BYTES


def encode(codes, scale):
    """Writes ternary codes and the scale of their tensor.

    Args:
        codes: `uint8` array `(out, in)` of 0, 1, 2; `in` is a multiple of 128.
        scale: Float or array of one: `w = scale * (code - 1)`.

    Returns:
        `uint8` array `(nbytes(out * in),)`.

    Raises:
        ValueError: The shape or a code does not fit.
    """
    if codes.ndim != 2 or codes.shape[1] % RUN or (codes.size and codes.max() > 2):
        raise ValueError(
            f"'{NAME}' takes ternary codes of shape (out, in), `in` a multiple of {RUN}. "
            f"Received: codes of shape {codes.shape}"
            + (f" up to {codes.max()}" if codes.size else "")
        )
    runs = codes.reshape(-1, 4, RUN // 4)
    packed = np.zeros((len(runs), RUN // 4), np.uint8)
    for n in range(4):
        packed |= runs[:, n] << np.uint8(6 - 2 * n)
    tail = np.zeros(TAIL_BYTES, np.uint8)
    tail[:4] = np.asarray(scale, "<f4").reshape(1).view(np.uint8)
    return np.concatenate([packed.reshape(-1), tail])


def decode(data, shape):
    """Reads the bytes that `encode` writes.

    Args:
        data: `uint8` array `(nbytes(out * in),)`.
        shape: `(out, in)`.

    Returns:
        `(codes, scale)`: `uint8 (out, in)` and a `float32` array `(1, 1)`.

    Raises:
        ValueError: The size does not fit the shape, or a code is none of 0, 1, 2.
    """
    size = shape[0] * shape[1]
    if data.dtype != np.uint8 or data.shape != (nbytes(size),) or shape[1] % RUN:
        raise ValueError(
            f"A tensor {tuple(shape)} in '{NAME}' has {nbytes(size)} bytes and rows of a multiple "
            f"of {RUN}. Received: {data.dtype} array of shape {data.shape}"
        )
    shifts = np.array([6, 4, 2, 0], np.uint8)[:, None]
    runs = data[:-TAIL_BYTES].reshape(-1, 1, RUN // 4)
    codes = ((runs >> shifts) & np.uint8(3)).reshape(shape)
    if codes.size and codes.max() > 2:
        raise ValueError(
            f"'{NAME}' holds ternary codes 0, 1, 2. Received: {codes.max()}. The data is corrupt "
            "or in another format."
        )
    return codes, data[-TAIL_BYTES:][:4].view("<f4").astype(np.float32).reshape(1, 1)
