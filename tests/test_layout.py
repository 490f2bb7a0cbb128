import numpy as np
import oracle
import pytest
from helpers import to_numpy

from keras_bitnet.ops import PackedTensor, layout

SIZES = [(1, 1), (7, 31), (31, 33), (100, 17), (257, 7)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", layout.BITS)
def test_tiles_equal_the_oracle_and_unpack_to_the_codes(bits, size, rng):
    codes = rng.integers(0, 2**bits, size)
    tiles = layout.pack(codes, bits)
    np.testing.assert_array_equal(tiles, oracle.pack(codes, bits))
    assert tiles.shape == layout.tiles_shape(*size, bits)
    unpacked = layout.unpack(tiles, bits, *size)
    assert str(to_numpy(unpacked).dtype) == "uint8"
    np.testing.assert_array_equal(to_numpy(unpacked), codes)


@pytest.mark.parametrize("size", [*SIZES, (243, 5)])
def test_trits_in_memory_are_the_digits_of_a_fraction(size, rng):
    codes = rng.integers(0, 3, size)
    if size == (243, 5):  # every byte there is, in the first places of the first tiles
        codes = np.array(list(np.ndindex(3, 3, 3, 3, 3)))
        codes = codes.T.repeat(4, axis=0)  # (20, 243): inputs 4 * i + j are digit i
    tiles = layout.pack(codes, 2, "trits")
    assert tiles.shape == layout.tiles_shape(*codes.shape, 2, "trits")
    for row, column in ((0, 0), (len(codes) - 1, codes.shape[1] - 1), (len(codes) // 2, 0)):
        tile = tiles[column // 16, row // 20, column % 16]
        i, j = divmod(row % 20, 4)
        assert int(tile[j]) * 3**i % 256 * 3 // 256 == codes[row, column]
    unpacked = to_numpy(layout.unpack(tiles, 2, *codes.shape, "trits"))
    assert str(unpacked.dtype) == "uint8"
    np.testing.assert_array_equal(unpacked, codes)


def test_a_word_holds_four_consecutive_codes_to_a_mask():
    codes = np.arange(16, dtype=np.uint8)[:, None] % 4
    word = layout.pack(codes, 2)[0, 0, 0].view("<u4")[0]
    for i in range(4):
        four = np.array([(word >> (2 * i)) & 0x03030303], "<u4").view(np.uint8)
        np.testing.assert_array_equal(four, codes[4 * i : 4 * i + 4, 0])


@pytest.mark.parametrize("size", SIZES)
def test_trits_are_the_bytes_of_keras(size, rng):
    codes = rng.integers(0, 3, size).astype(np.uint8)
    packed = layout.pack_trits(codes)
    assert packed.shape == (-(-size[0] // 5), size[1])
    np.testing.assert_array_equal(layout.unpack_trits(packed, size[0]), codes)
    column = [*codes[:5, 0].tolist(), 1, 1, 1, 1][:5]
    assert packed[0, 0] == sum(c * 3**i for i, c in enumerate(column))


def test_trits_against_keras_itself(rng):
    keras_quantizers = pytest.importorskip("keras.quantizers")
    if not hasattr(keras_quantizers, "pack_ternary"):
        pytest.skip("this Keras has no pack_ternary (3.16 adds it)")
    codes = rng.integers(0, 3, (33, 6))
    packed, _, _ = keras_quantizers.pack_ternary(codes - 1, axis=0)
    np.testing.assert_array_equal(to_numpy(packed), layout.pack_trits(codes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layout.pack(np.full((3, 3), 4), 2), "values from 4 to 4"),
        (lambda: layout.pack(np.full((3, 3), -1), 2), "values from -1"),
        (lambda: layout.pack(np.zeros((3, 3)), 2), "float64 array"),
        (lambda: layout.pack(np.zeros(3, int), 2), r"shape \(3,\)"),
        (lambda: layout.pack(np.zeros((3, 3), int), 3), "Received: bits=3"),
        (lambda: layout.pack_trits(np.full((3, 3), 3)), r"\[0, 2\]"),
        (lambda: layout.pack(np.full((3, 3), 3), 2, "trits"), r"\[0, 2\]"),
        (lambda: layout.tiles_shape(3, 3, 4, "trits"), "Received: bits=4"),
        (lambda: layout.tiles_shape(3, 3, 2, "planes"), "Received: layout='planes'"),
        (
            lambda: PackedTensor.from_codes(np.zeros((4, 3)), np.ones((1, 1)), -1, 2, 32, "trits"),
            "without groups",
        ),
        (lambda: layout.unpack_trits(np.full((1, 3), 243, np.uint8), 5), "at most 242"),
        (lambda: layout.unpack_trits(np.zeros((2, 3), np.uint8), 5), r"shape \(1, out\)"),
        (
            lambda: PackedTensor.from_codes(np.zeros((4, 3), int), np.ones((1, 2)), -1, 2),
            r"Received: scale.shape=\(1, 2\)",
        ),
        (
            lambda: PackedTensor.from_codes(np.zeros((4, 3), int), np.full((1, 1), np.nan), -1, 2),
            "NaN or infinity",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bytes_in_memory_and_on_disk(rng):
    codes = rng.integers(0, 3, (4000, 1024))
    packed = PackedTensor.from_codes(codes, np.ones((1, 1)), -1, 2)
    assert packed.nbytes * 8 / codes.size <= 2.001
    packed = PackedTensor.from_codes(codes, np.ones((1, 1)), -1, 2, layout="trits")
    assert packed.nbytes * 8 / codes.size <= 1.601
    assert layout.pack_trits(codes).nbytes * 8 / codes.size == 1.6
