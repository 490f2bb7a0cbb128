"""Where every bit of a packed weight lies. No other module knows a bit position.

**In memory** one rule serves 1, 2, 4 and 8 bits, on every device. A matrix of unsigned codes
`(in, out)` is cut in tiles of 16 outputs x `32 / bits` inputs, 64 bytes each:

    uint8 [ceil(out / 16), ceil(in * bits / 32), 16, 4]

Byte `j` of a column's four holds input `4 * i + j` of the tile at bit `bits * i`. Read as a
little-endian word, `(word >> bits * i) & mask` is four consecutive codes, one to a byte:
the operand of an 8-bit dot product. A 64-byte load is `8 / bits` such operands of 16 columns.
Padding takes code 0.

**On disk** a ternary matrix is written five trits to a byte (1.6 bits a weight):
`uint8 [ceil(in / 5), out]`, byte = `c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4` over five consecutive
inputs, padded with code 1 (the value zero). These are the bytes of `pack_ternary(axis=0)`
in Keras 3.16.
"""

import numpy as np
from keras import ops

BITS = (1, 2, 4, 8)
TILE_OUTPUTS = 16
WORD_BYTES = 4

_TRITS = 5
_PLACES = 3 ** np.arange(_TRITS)  # (5,)
_MAX_TRIT_BYTE = 3**_TRITS - 1


def tile_inputs(bits):
    """Inputs that one tile spans: 32, 16, 8 or 4 for 1, 2, 4 or 8 bits."""
    if bits not in BITS:
        raise ValueError(f"`bits` must be one of {BITS}. Received: bits={bits}")
    return 32 // bits


def tiles_shape(in_features, out_features, bits):
    """Shape of the packed bytes of an `(in_features, out_features)` matrix of codes."""
    return (
        -(-out_features // TILE_OUTPUTS),
        -(-in_features // tile_inputs(bits)),
        TILE_OUTPUTS,
        WORD_BYTES,
    )


def pack(codes, bits):
    """Packs unsigned codes into tiles; it never rounds and never clips.

    Args:
        codes: Integer array `(in, out)` with values in `[0, 2**bits)`.
        bits: 1, 2, 4 or 8.

    Returns:
        NumPy `uint8` array of shape `tiles_shape(in, out, bits)`.

    Raises:
        ValueError: `codes` is not an integer matrix, or a code does not fit in `bits`.
    """
    codes = _as_codes(codes, 2**bits - 1)
    shape = tiles_shape(codes.shape[0], codes.shape[1], bits)
    tiles_out, tiles_in = shape[:2]
    padded = _pad(codes, tiles_in * tile_inputs(bits), tiles_out * TILE_OUTPUTS, value=0)
    # (tile_in, i, j, tile_out, column) -> (tile_out, tile_in, column, j, i)
    digits = padded.reshape(tiles_in, 8 // bits, WORD_BYTES, tiles_out, TILE_OUTPUTS)
    digits = digits.transpose(3, 0, 4, 2, 1)
    packed = np.zeros(shape, np.uint8)
    for i in range(8 // bits):
        packed |= digits[..., i] << np.uint8(bits * i)
    return packed


def unpack(tiles, bits, in_features, out_features):
    """Unpacks tiles into unsigned codes; traceable on every backend.

    Args:
        tiles: `uint8` tensor of shape `tiles_shape(in_features, out_features, bits)`.
        bits: 1, 2, 4 or 8.
        in_features: Number of inputs (rows of the result).
        out_features: Number of outputs (columns of the result).

    Returns:
        `uint8` tensor `(in_features, out_features)`.
    """
    tiles_out, tiles_in = tiles_shape(in_features, out_features, bits)[:2]
    codes = _digits(tiles, bits, axis=-1)
    codes = ops.transpose(codes, (1, 4, 3, 0, 2))  # (tile_in, i, j, tile_out, column)
    codes = ops.reshape(codes, (tiles_in * tile_inputs(bits), tiles_out * TILE_OUTPUTS))
    return codes[:in_features, :out_features]


def gather(tiles, columns, bits, in_features, out_features):
    """Unpacks chosen columns only: reads `in_features * bits / 8` bytes a column.

    Args:
        tiles: `uint8` tensor of shape `tiles_shape(in_features, out_features, bits)`.
        columns: Integer tensor `(...)` of outputs, counted modulo `out_features`.
        bits: 1, 2, 4 or 8.
        in_features: Number of inputs.
        out_features: Number of outputs.

    Returns:
        `uint8` tensor `(..., in_features)`.
    """
    tiles_out, tiles_in = tiles_shape(in_features, out_features, bits)[:2]
    columns = ops.mod(ops.cast(columns, "int32"), out_features)[..., None]
    tile = columns // TILE_OUTPUTS * tiles_in + ops.arange(tiles_in, dtype="int32")
    words = ops.reshape(tiles, (tiles_out * tiles_in * TILE_OUTPUTS, WORD_BYTES))
    words = ops.take(words, tile * TILE_OUTPUTS + columns % TILE_OUTPUTS, axis=0)
    codes = _digits(words, bits, axis=-2)  # (..., tile_in, i, j)
    leading = ops.shape(codes)[:-3]
    codes = ops.reshape(codes, (*leading, tiles_in * tile_inputs(bits)))
    return codes[..., :in_features]


def _digits(packed, bits, axis):
    """The `8 / bits` codes of every byte along a new axis."""
    if bits == 8:
        return ops.expand_dims(packed, axis)
    mask = np.uint8(2**bits - 1)  # a Python int would turn uint8 into int32 on TensorFlow
    digits = [
        ops.bitwise_and(ops.right_shift(packed, np.uint8(bits * i)), mask) for i in range(8 // bits)
    ]
    return ops.stack(digits, axis=axis)


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
    return np.tensordot(_PLACES, digits, axes=(0, 1)).astype(np.uint8)


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
    packed = np.asarray(packed)
    rows = -(-in_features // _TRITS)
    if packed.ndim != 2 or packed.shape[0] != rows or packed.dtype != np.uint8:
        raise ValueError(
            f"Packed trits of {in_features} inputs are a uint8 array of shape ({rows}, out). "
            f"Received: {packed.dtype} array of shape {packed.shape}"
        )
    if packed.size and packed.max() > _MAX_TRIT_BYTE:
        raise ValueError(
            f"A byte of five trits is at most {_MAX_TRIT_BYTE}. Received: {packed.max()}. "
            "The data is corrupt or in another format."
        )
    digits = packed[:, None, :] // _PLACES[None, :, None] % 3
    return digits.reshape(rows * _TRITS, -1)[:in_features].astype(np.uint8)


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
    return codes.astype(np.uint8)


def _pad(codes, rows, columns, value):
    padding = ((0, rows - codes.shape[0]), (0, columns - codes.shape[1]))
    return np.pad(codes, padding, constant_values=value)
