"""TQ2_0: ternary, two bits a code, 66 bytes for 256 weights (2.06 bits a weight).

A block is two halves of 128 codes. In a half, byte `m` of 32 holds the codes `m`, `32 + m`,
`64 + m`, `96 + m` from its lowest bits up. The scale stands last.
"""

from keras_bitnet.interop.codecs.block_type import BlockType, shift_pack, shift_unpack


def pack(codes):
    """`uint8 (blocks, 256)` to `(blocks, 64)`."""
    return shift_pack(codes.reshape(-1, 4, 32), 2).reshape(-1, 64)


def unpack(digits):
    """`uint8 (blocks, 64)` to `(blocks, 256)`."""
    return shift_unpack(digits.reshape(-1, 32), 2).reshape(-1, 256)


TQ2_0 = BlockType(
    name="tq2_0", id=35, file_type=37, block_size=256, block_bytes=66, code_count=3,
    offset=-1.0, pack=pack, unpack=unpack, scale_first=False,
)  # fmt: skip
