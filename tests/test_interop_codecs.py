import numpy as np
import pytest

from keras_bitnet.interop.codecs import BLOCK_TYPES, hugging_face, i2_s


def written_out(name, c):
    """The bytes of one block of codes as the formats describe them, code by code."""
    if name == "tq2_0":
        return [sum(int(c[128 * h + 32 * n + m]) << 2 * n for n in range(4))
                for h in range(2) for m in range(32)]  # fmt: skip
    if name == "tq1_0":
        groups = [[m + 32 * n for n in range(5)] for m in range(32)]
        groups += [[160 + m + 16 * n for n in range(5)] for m in range(16)]
        groups += [[240 + m + 4 * n for n in range(4)] for m in range(4)]
        values = [sum(int(c[i]) * 3 ** (4 - n) for n, i in enumerate(g)) for g in groups]
        return [-(-v * 256 // 243) for v in values]
    if name == "q2_0":
        return [sum(int(c[4 * i + n]) << 2 * n for n in range(4)) for i in range(16)]
    if name == "q1_0":
        return [sum(int(c[8 * i + n]) << n for n in range(8)) for i in range(16)]
    if name == "q4_0":
        return [int(c[i]) | int(c[16 + i]) << 4 for i in range(16)]
    return [(int(v) - 128) % 256 for v in c]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_block_types_are_the_written_format_and_come_back(name, rng):
    block = BLOCK_TYPES[name]
    codes = rng.integers(0, block.code_count, (3, 2 * block.block_size)).astype(np.uint8)
    scale = rng.random((3, 2)).astype(np.float16).astype(np.float32)
    data = block.encode(codes, scale)
    half = (scale / block.step).astype("<f2").view(np.uint8).reshape(3, 2, 2)
    for row in range(3):
        for i in range(2):
            qs = written_out(name, codes[row, i * block.block_size :][: block.block_size])
            d = half[row, i].tolist()
            expected = qs + d if name.startswith("tq") else d + qs
            found = data[row, i * block.block_bytes :][: block.block_bytes]
            np.testing.assert_array_equal(found, expected)
    again, scale_again = block.decode(data)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(scale_again, scale)


@pytest.mark.parametrize("name", ["tq2_0", "tq1_0", "q4_0", "q8_0"])
def test_the_gguf_package_reads_the_same_weights(name, rng):
    gguf = pytest.importorskip("gguf")
    block = BLOCK_TYPES[name]
    codes = rng.integers(0, block.code_count, (4, 512)).astype(np.uint8)
    data = block.encode(codes, np.float32([[0.5]]))
    weights = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(weights, 0.5 * (codes.astype(np.float32) + block.offset))


@pytest.mark.parametrize("name", ["tq2_0", "tq1_0"])
def test_ternary_blocks_are_the_bytes_that_the_gguf_package_writes(name, rng):
    gguf = pytest.importorskip("gguf")
    codes = rng.integers(0, 3, (4, 1024)).astype(np.uint8)
    expected = gguf.quants.quantize(
        codes.astype(np.float32) - 1, gguf.GGMLQuantizationType[name.upper()]
    )
    data = BLOCK_TYPES[name].encode(codes, np.ones((1, 1)))
    np.testing.assert_array_equal(data, expected)


def test_i2_s_is_the_written_format_and_comes_back(rng):
    codes = rng.integers(0, 3, (3, 256)).astype(np.uint8)
    data = i2_s.encode(codes, 1.5)
    assert data.nbytes == codes.size // 4 + 32
    flat = codes.reshape(-1)
    for run in range(len(flat) // 128):
        for m in range(32):
            c = [int(flat[128 * run + 32 * n + m]) for n in range(4)]
            assert data[32 * run + m] == c[0] << 6 | c[1] << 4 | c[2] << 2 | c[3]
    assert data[-32:-28].view("<f4")[0] == 1.5
    assert not data[-28:].any()
    again, scale = i2_s.decode(data, codes.shape)
    np.testing.assert_array_equal(again, codes)
    assert scale.item() == 1.5


def test_hugging_face_packs_blocks_of_rows(rng):
    codes = rng.integers(0, 3, (12, 5)).astype(np.uint8)
    packed = hugging_face.pack_rows(codes)
    for r in range(3):
        for c in range(5):
            assert packed[r, c] == sum(int(codes[r + 3 * n, c]) << 2 * n for n in range(4))
    np.testing.assert_array_equal(hugging_face.unpack_rows(packed), codes)


def test_hugging_face_packing_is_that_of_transformers(rng):
    torch = pytest.importorskip("torch")
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    codes = rng.integers(0, 3, (8, 16)).astype(np.uint8)
    theirs = bitnet.pack_weights(torch.tensor(codes.astype(np.float32) - 1))
    np.testing.assert_array_equal(hugging_face.pack_rows(codes), theirs.numpy())


CODES = np.full((4, 256), 3, np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BLOCK_TYPES["tq2_0"].encode(CODES, np.ones((1, 1))), "codes below 3. Received: 3"),
        (lambda: BLOCK_TYPES["tq2_0"].encode(CODES[:, :255], np.ones((1, 1))), "multiple of 256"),
        (lambda: BLOCK_TYPES["q2_0"].encode(CODES, np.full((1, 1), 1e6)), "float16"),
        (lambda: BLOCK_TYPES["tq2_0"].decode(np.zeros((1, 65), np.uint8)), "blocks of 66 bytes"),
        (lambda: BLOCK_TYPES["tq2_0"].decode(np.full((1, 66), 255, np.uint8)), "corrupt"),
        (lambda: i2_s.encode(CODES, 1.0), "up to 3"),
        (lambda: i2_s.decode(np.zeros(7, np.uint8), (1, 128)), "64 bytes"),
        (lambda: i2_s.decode(np.full(64, 255, np.uint8), (1, 128)), "corrupt"),
        (lambda: hugging_face.pack_rows(CODES), "up to 3"),
        (lambda: hugging_face.pack_rows(CODES[:3]), "multiple of 4"),
        (lambda: hugging_face.unpack_rows(np.full((2, 2), 255, np.uint8)), "corrupt"),
        (lambda: hugging_face.unpack_rows(np.zeros((2, 2))), "float64"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
