"""Q2_0: two bits, values -1, 0, 1, 2 times d, 18 bytes for 64 weights (2.25 bits a weight).

Byte `i` holds four consecutive codes from its lowest bits up. The scale stands first.
"""

from keras_bitnet.interop.codecs.block_type import BlockType, shift_pack, shift_unpack


def pack(codes):
    """`uint8 (blocks, 64)` to `(blocks, 16)`."""
    return shift_pack(codes.reshape(-1, 16, 4).swapaxes(1, 2), 2)


def unpack(digits):
    """`uint8 (blocks, 16)` to `(blocks, 64)`."""
    return shift_unpack(digits, 2).swapaxes(1, 2).reshape(-1, 64)


Q2_0 = BlockType(
    name="q2_0", id=42, file_type=41, block_size=64, block_bytes=18, code_count=4,
    offset=-1.0, pack=pack, unpack=unpack,
)  # fmt: skip
