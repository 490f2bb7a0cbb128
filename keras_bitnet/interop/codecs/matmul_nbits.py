"""The packed weights of ONNX Runtime's operator `MatMulNBits`.

    uint8 [out, blocks, block_size * bits / 8],   w = scale[out, block] * (code - 2^(bits - 1))

The inputs of a row are cut in blocks; within one the codes follow each other from the lowest
bits of a byte up. Two, four and eight bits are all there are.
"""

import numpy as np

BITS = (2, 4, 8)


def width(levels):
    """The fewest bits whose codes hold whole levels.

    Raises:
        ValueError: None do.
    """
    low, high = int(levels.min(initial=0)), int(levels.max(initial=0))
    for bits in BITS:
        if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1):
            return bits
    raise ValueError(f"Levels must be signed integers of 8 bits. Received: {low} to {high}")


def pack_blocks(levels, bits):
    """Packs whole levels.

    Args:
        levels: Integer array `(out, blocks, block_size)` in `[-2^(bits - 1), 2^(bits - 1))`.
        bits: 2, 4 or 8.

    Returns:
        `uint8` array `(out, blocks, block_size * bits / 8)`.
    """
    codes = (levels + 2 ** (bits - 1)).astype(np.uint8)
    codes = codes.reshape(*codes.shape[:2], -1, 8 // bits)
    packed = np.zeros(codes.shape[:-1], np.uint8)
    for i in range(8 // bits):
        packed |= codes[..., i] << np.uint8(bits * i)
    return packed
