"""TQ1_0: ternary, five codes to a byte, 54 bytes for 256 weights (1.69 bits a weight).

Codes are the base-3 digits `v = 81 c0 + 27 c1 + 9 c2 + 3 c3 + c4` of a byte that stores the
fraction `ceil(v * 256 / 243)`: digit `n` is then the top of a multiplication by `3**(n + 1)`.
The codes of a byte lie 32 apart in the first 160 weights, 16 apart in the next 80, and 4 apart
(four to a byte, the last digit 0) in the last 16. The scale stands last.
"""

import numpy as np

from keras_bitnet.interop.codecs.block_type import BlockType

_PARTS = ((0, 160, 32), (160, 240, 16), (240, 256, 4))  # first code, end, bytes
_PLACES = np.array([81, 27, 9, 3, 1], np.uint16)
_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


def pack(codes):
    """`uint8 (blocks, 256)` to `(blocks, 52)`."""
    packed = []
    for start, end, size in _PARTS:
        digits = codes[:, start:end].reshape(len(codes), -1, size)  # (blocks, 5 or 4, bytes)
        places = _PLACES[: digits.shape[1], None]
        value = (digits * places).sum(axis=1, dtype=np.uint16)
        packed.append(((value.astype(np.uint32) * 256 + 242) // 243).astype(np.uint8))
    return np.concatenate(packed, axis=1)


def unpack(digits):
    """`uint8 (blocks, 52)` to `(blocks, 256)`; any byte gives digits 0, 1, 2."""
    codes, position = [], 0
    for start, end, size in _PARTS:
        part = digits[:, None, position : position + size]
        count = (end - start) // size
        fraction = part * _POWERS[:count, None]  # modulo 256
        code = (fraction.astype(np.uint16) * 3) >> 8
        codes.append(code.astype(np.uint8).reshape(len(digits), -1))
        position += size
    return np.concatenate(codes, axis=1)


TQ1_0 = BlockType(
    name="tq1_0", id=34, file_type=36, block_size=256, block_bytes=54, code_count=3,
    offset=-1.0, pack=pack, unpack=unpack, scale_first=False,
)  # fmt: skip
