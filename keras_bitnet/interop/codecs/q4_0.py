"""Q4_0: four bits, values -8 .. 7 times d, 18 bytes for 32 weights (4.5 bits a weight).

Byte `i` of 16 holds code `i` in its low half and code `16 + i` in its high half. The scale
stands first.
"""

from keras_bitnet.interop.codecs.block_type import BlockType, shift_pack, shift_unpack


def pack(codes):
    """`uint8 (blocks, 32)` to `(blocks, 16)`."""
    return shift_pack(codes.reshape(-1, 2, 16), 4)


def unpack(digits):
    """`uint8 (blocks, 16)` to `(blocks, 32)`."""
    return shift_unpack(digits, 4).reshape(-1, 32)


Q4_0 = BlockType(
    name="q4_0", id=2, file_type=2, block_size=32, block_bytes=18, code_count=16,
    offset=-8.0, pack=pack, unpack=unpack,
)  # fmt: skip
