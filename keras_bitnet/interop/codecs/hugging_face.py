"""Hugging Face's packing of ternary matrices: four rows to a byte.

With `R = out / 4`, byte `[r, c]` holds the codes of the rows `r`, `R + r`, `2 R + r`, `3 R + r`
of column `c` from its lowest bits up: blocks along the rows, not interleaved.
"""

import numpy as np

ROWS = 4


def pack_rows(codes):
    """Packs ternary codes.

    Args:
        codes: `uint8` array `(out, in)` of 0, 1, 2; `out` is a multiple of 4.

    Returns:
        `uint8` array `(out / 4, in)`.

    Raises:
        ValueError: The shape or a code does not fit.
    """
    if codes.ndim != 2 or codes.shape[0] % ROWS or (codes.size and codes.max() > 2):
        raise ValueError(
            "Hugging Face's packing takes ternary codes of shape (out, in), `out` a multiple of "
            f"{ROWS}. Received: codes of shape {codes.shape}"
            + (f" up to {codes.max()}" if codes.size else "")
        )
    blocks = codes.reshape(ROWS, -1, codes.shape[1])
    packed = np.zeros(blocks.shape[1:], np.uint8)
    for n in range(ROWS):
        packed |= blocks[n] << np.uint8(2 * n)
    return packed


def unpack_rows(packed):
    """The inverse of `pack_rows`.

    Raises:
        ValueError: The data is no uint8 matrix, or holds the code 3.
    """
    if packed.ndim != 2 or packed.dtype != np.uint8:
        raise ValueError(
            "Packed ternary weights are a uint8 matrix (out / 4, in). "
            f"Received: {packed.dtype} array of shape {packed.shape}"
        )
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None, None]
    codes = ((packed[None] >> shifts) & np.uint8(3)).reshape(-1, packed.shape[1])
    if codes.size and codes.max() > 2:
        raise ValueError(
            f"Ternary codes are 0, 1, 2. Received: {codes.max()}. The data is corrupt or in "
            "another format."
        )
    return codes
