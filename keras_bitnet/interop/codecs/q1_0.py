"""Q1_0: one bit, w = +d or -d, 18 bytes for 128 weights (1.125 bits a weight).

Bit `j % 8` of byte `j // 8` is code `j`: 1 for +d. The scale stands first.
"""

import numpy as np

from keras_bitnet.interop.codecs.block_type import BlockType


def pack(codes):
    """`uint8 (blocks, 128)` to `(blocks, 16)`."""
    return np.packbits(codes, axis=1, bitorder="little")


def unpack(digits):
    """`uint8 (blocks, 16)` to `(blocks, 128)`."""
    return np.unpackbits(digits, axis=1, bitorder="little")


# w = d * 2 * (code - 1/2): the scale of a binary `PackedTensor` is the step 2 d.
Q1_0 = BlockType(
    name="q1_0", id=41, file_type=40, block_size=128, block_bytes=18, code_count=2,
    offset=-0.5, pack=pack, unpack=unpack, step=2.0,
)  # fmt: skip
