"""Where every bit of a packed weight lies. No other module knows a bit position.

**In memory** one rule serves 1, 2, 4 and 8 bits, on every device. A matrix of unsigned codes
`(in, out)` is cut in tiles of 16 outputs x `32 / bits` inputs, 64 bytes each:

    uint8 [ceil(out / 16), ceil(in * bits / 32), 16, 4]

Byte `j` of a column's four holds input `4 * i + j` of the tile at bit `bits * i`. Read as a
little-endian word, `(word >> bits * i) & mask` is four consecutive codes, one to a byte:
the operand of an 8-bit dot product. A 64-byte load is `8 / bits` such operands of 16 columns.
Padding takes code 0.

Ternary codes have a second layout in memory, `"trits"`, 1.6 bits a weight: five codes to a byte,

    uint8 [ceil(out / 16), ceil(in / 20), 16, 4]

Byte `j` of a column's four again holds input `4 * i + j`, as digit `i` of a fraction to the base
3: `byte / 256 = 0.c0 c1 c2 c3 c4`, rounded up. So the whole part of `3 * byte / 256` is `c0`, and
`3 * byte` modulo 256 is the byte with the next digit first: decoded without a division.

**On disk** a ternary matrix is written five trits to a byte (1.6 bits a weight):
`uint8 [ceil(in / 5), out]`, byte = `c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4` over five consecutive
inputs, padded with code 1 (the value zero). These are the bytes of `pack_ternary(axis=0)`
in Keras 3.16.
"""

import numpy as np
from keras import ops

from keras_bitnet.checks import check_choice
from keras_bitnet.ops.constants import constant

BITS = (1, 2, 4, 8)
LAYOUTS = ("tiles", "trits")
TILE_OUTPUTS = 16
WORD_BYTES = 4

_TRITS = 5
_MAX_TRIT_BYTE = 3**_TRITS - 1
_BLOCK_CODES = 1 << 19  # codes that are unpacked at a time: they stay in the cache


def check_layout(layout, bits, group_size=None):
    """Raises a `ValueError` unless codes of so many bits, in such groups, have that layout."""
    check_choice("layout", layout, LAYOUTS)
    if bits not in BITS:
        raise ValueError(f"`bits` must be one of {BITS}. Received: bits={bits}")
    if layout == "trits" and (bits != 2 or group_size is not None):
        raise ValueError(
            "Layout 'trits' is for ternary codes, of 2 bits, without groups. "
            f"Received: bits={bits}, group_size={group_size}"
        )


def codes_in_byte(bits, layout="tiles"):
    """Codes that one byte holds: 8, 4, 2 or 1 for 1, 2, 4 or 8 bits; 5 trits."""
    check_layout(layout, bits)
    return _TRITS if layout == "trits" else 8 // bits


def tile_inputs(bits, layout="tiles"):
    """Inputs that one tile spans: 32, 16, 8 or 4 for 1, 2, 4 or 8 bits; 20 for trits."""
    return WORD_BYTES * codes_in_byte(bits, layout)


def tiles_shape(in_features, out_features, bits, layout="tiles"):
    """Shape of the packed bytes of an `(in_features, out_features)` matrix of codes."""
    return (
        -(-out_features // TILE_OUTPUTS),
        -(-in_features // tile_inputs(bits, layout)),
        TILE_OUTPUTS,
        WORD_BYTES,
    )


def pack(codes, bits, layout="tiles"):
    """Packs unsigned codes into tiles; it never rounds and never clips.

    Args:
        codes: Integer array `(in, out)` with values in `[0, 2**bits)`; 0, 1, 2 for trits.
        bits: 1, 2, 4 or 8.
        layout: `"tiles"` or `"trits"`.

    Returns:
        NumPy `uint8` array of shape `tiles_shape(in, out, bits, layout)`.

    Raises:
        ValueError: `codes` is not an integer matrix, or a code does not fit.
    """
    codes = _as_codes(codes, 2 if layout == "trits" else 2**bits - 1)
    shape = tiles_shape(codes.shape[0], codes.shape[1], bits, layout)
    tiles_out, tiles_in = shape[:2]
    inputs = tile_inputs(bits, layout)
    padded = _pad(codes, tiles_in * inputs, tiles_out * TILE_OUTPUTS, value=0)
    digits = padded.reshape(tiles_in, inputs // WORD_BYTES, WORD_BYTES, -1)
    if layout == "trits":
        numbers = _joined(digits[:, ::-1].astype(np.uint16), 3, 1)
        words = (numbers * 256 // 3**_TRITS + 1).astype(np.uint8)
    else:
        words = _joined(digits, 2**bits, 1)
    # (tile_in, j, tile_out, column) -> (tile_out, tile_in, column, j)
    words = words.reshape(tiles_in, WORD_BYTES, tiles_out, TILE_OUTPUTS)
    return np.ascontiguousarray(words.transpose(2, 0, 3, 1))


def _joined(digits, base, axis):
    """`sum(digits[i] * base**i)` along an axis, in the dtype of the digits."""
    places = np.moveaxis(digits, axis, 0)
    total = places[0].copy()
    for i in range(1, len(places)):
        total += places[i] * digits.dtype.type(base**i)
    return total


def unpack(tiles, bits, in_features, out_features, layout="tiles"):
    """Unpacks tiles into unsigned codes; traceable on every backend.

    Args:
        tiles: `uint8` tensor of shape `tiles_shape(in_features, out_features, bits, layout)`.
        bits: 1, 2, 4 or 8.
        in_features: Number of inputs (rows of the result).
        out_features: Number of outputs (columns of the result).
        layout: `"tiles"` or `"trits"`.

    Returns:
        `uint8` tensor `(in_features, out_features)`.
    """
    tiles_out, tiles_in = tiles_shape(in_features, out_features, bits, layout)[:2]
    codes = _digits(tiles, bits, layout, axis=-1)
    codes = ops.transpose(codes, (1, 4, 3, 0, 2))  # (tile_in, i, j, tile_out, column)
    codes = ops.reshape(codes, (tiles_in * tile_inputs(bits, layout), tiles_out * TILE_OUTPUTS))
    return codes[:in_features, :out_features]


def gather(tiles, columns, bits, in_features, out_features, layout="tiles"):
    """Unpacks chosen columns only: reads `in_features * bits / 8` bytes a column.

    Args:
        tiles: `uint8` tensor of shape `tiles_shape(in_features, out_features, bits, layout)`.
        columns: Integer tensor `(...)` of outputs, counted modulo `out_features`.
        bits: 1, 2, 4 or 8.
        in_features: Number of inputs.
        out_features: Number of outputs.
        layout: `"tiles"` or `"trits"`.

    Returns:
        `uint8` tensor `(..., in_features)`.
    """
    tiles_out, tiles_in = tiles_shape(in_features, out_features, bits, layout)[:2]
    columns = (ops.cast(columns, "int32") % out_features)[..., None]
    tile = columns // TILE_OUTPUTS * tiles_in + ops.arange(tiles_in, dtype="int32")
    words = ops.reshape(tiles, (tiles_out * tiles_in * TILE_OUTPUTS, WORD_BYTES))
    words = ops.take(words, tile * TILE_OUTPUTS + columns % TILE_OUTPUTS, axis=0)
    codes = _digits(words, bits, layout, axis=-2)  # (..., tile_in, i, j)
    leading = ops.shape(codes)[:-3]
    codes = ops.reshape(codes, (*leading, tiles_in * tile_inputs(bits, layout)))
    return codes[..., :in_features]


def _digits(packed, bits, layout, axis):
    """The codes of every byte, along a new axis."""
    if bits == 8:
        return ops.expand_dims(packed, axis)
    if layout == "trits":
        return ops.stack(_trits(packed), axis=axis)
    mask = _byte(2**bits - 1)
    shifts = range(0, 8, bits)
    fields = [ops.bitwise_and(ops.right_shift(packed, _byte(shift)), mask) for shift in shifts]
    return ops.stack(fields, axis=axis)


def _byte(number):
    # TensorFlow makes int32 of uint8 and a Python int; `torch.compile` traces no NumPy number.
    return constant(number, "uint8")


def _trits(packed):
    """Whole parts of `3 * byte / 256`, one after another; the rest is the next byte."""
    digits = []
    for _ in range(_TRITS):
        first = ops.cast(ops.greater_equal(packed, _byte(86)), "uint8")  # 3 * 86 = 258
        second = ops.cast(ops.greater_equal(packed, _byte(171)), "uint8")  # 3 * 171 = 513
        digits.append(ops.add(first, second))
        packed = ops.multiply(packed, _byte(3))  # modulo 256
    return digits


def pack_trits(codes):
    """Packs ternary codes 0, 1, 2 five to a byte, for the disk.

    Args:
        codes: Integer array `(in, out)` with values in {0, 1, 2}.

    Returns:
        NumPy `uint8` array `(ceil(in / 5), out)`.

    Raises:
        ValueError: `codes` is not an integer matrix or holds another value.
    """
    codes = _as_codes(codes, 2)
    rows = -(-codes.shape[0] // _TRITS)
    digits = _pad(codes, rows * _TRITS, codes.shape[1], value=1).reshape(rows, _TRITS, -1)
    return _joined(digits, 3, 1)


def unpack_trits(packed, in_features):
    """Unpacks the bytes of `pack_trits`.

    Args:
        packed: `uint8` array `(ceil(in_features / 5), out)`.
        in_features: Number of inputs before padding.

    Returns:
        NumPy `uint8` array `(in_features, out)` of codes 0, 1, 2.

    Raises:
        ValueError: The shape does not fit, or a byte is above 242 and so holds no five trits.
    """
    packed = as_packed_trits(packed, in_features)
    rows = len(packed)
    if packed.size and packed.max() > _MAX_TRIT_BYTE:
        raise ValueError(
            f"A byte of five trits is at most {_MAX_TRIT_BYTE}. Received: {packed.max()}. "
            "The data is corrupt or in another format."
        )
    digits = np.empty((rows, _TRITS, packed.shape[1]), np.uint8)
    for i in range(_TRITS):
        rest = packed // np.uint8(3)
        np.subtract(packed, rest * np.uint8(3), out=digits[:, i])
        packed = rest
    return digits.reshape(rows * _TRITS, -1)[:in_features]


def as_packed_trits(packed, in_features):
    """A contiguous array of the shape and dtype of what `pack_trits` gives.

    Raises:
        ValueError: It has another shape or dtype.
    """
    packed = np.asarray(packed)
    rows = -(-in_features // _TRITS)
    if packed.ndim != 2 or packed.shape[0] != rows or packed.dtype != np.uint8:
        raise ValueError(
            f"Packed trits of {in_features} inputs are a uint8 array of shape ({rows}, out). "
            f"Received: {packed.dtype} array of shape {packed.shape}"
        )
    return np.ascontiguousarray(packed)


def tiles_from_trits(packed, in_features, layout="tiles"):
    """The bytes of `pack_trits` as tiles in memory, some columns at a time.

    Args:
        packed: `uint8` array `(ceil(in_features / 5), out)`.
        in_features: Number of inputs before padding.
        layout: `"tiles"` or `"trits"`.

    Returns:
        NumPy `uint8` array of shape `tiles_shape(in_features, out, 2, layout)`.

    Raises:
        ValueError: As `unpack_trits`.
    """
    tiles = np.empty(tiles_shape(in_features, packed.shape[1], 2, layout), np.uint8)
    step = max(1, _BLOCK_CODES // (in_features * TILE_OUTPUTS))  # columns of tiles
    for i in range(0, len(tiles), step):
        columns = packed[:, i * TILE_OUTPUTS : (i + step) * TILE_OUTPUTS]
        tiles[i : i + step] = pack(unpack_trits(columns, in_features), 2, layout)
    return tiles


def _as_codes(codes, maximum):
    codes = np.asarray(codes)
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            "`codes` must be an integer matrix of shape (in_features, out_features). "
            f"Received: {codes.dtype} array of shape {codes.shape}"
        )
    if codes.size and (codes.min() < 0 or codes.max() > maximum):
        raise ValueError(
            f"`codes` must lie in [0, {maximum}]. "
            f"Received: values from {codes.min()} to {codes.max()}"
        )
    return codes.astype(np.uint8, copy=False)


def _pad(codes, rows, columns, value):
    if codes.shape == (rows, columns):
        return codes
    padding = ((0, rows - codes.shape[0]), (0, columns - codes.shape[1]))
    return np.pad(codes, padding, constant_values=value)
