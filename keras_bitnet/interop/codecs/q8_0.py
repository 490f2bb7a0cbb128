"""Q8_0: eight bits, signed, 34 bytes for 32 weights (8.5 bits a weight). The scale stands first."""

import numpy as np

from keras_bitnet.interop.codecs.block_type import BlockType

_SIGN = np.uint8(128)


def pack(codes):
    """`uint8 (blocks, 32)`, 128 for zero, to the two's complement of the same shape."""
    return codes ^ _SIGN


Q8_0 = BlockType(
    name="q8_0", id=8, file_type=7, block_size=32, block_bytes=34, code_count=256,
    offset=-128.0, pack=pack, unpack=pack,
)  # fmt: skip
