"""Readers of files from strangers: whole files come in, all others are refused in words."""

import contextlib
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from helpers import damaged

from keras_bitnet.files import replacing
from keras_bitnet.interop import files
from keras_bitnet.interop.codecs import BLOCK_TYPES
from keras_bitnet.interop.gguf_file import GGUFFile
from keras_bitnet.interop.safetensors_file import WEIGHTS, Checkpoint, write_checkpoint


@pytest.fixture
def gguf_path(tmp_path, rng):
    """A file written by the gguf package."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "Ġb", "é"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_float32("llama.rope.freq_base", 5e5)
    writer.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    codes = np.arange(512, dtype=np.uint8).reshape(2, 256) % 3
    kind = gguf.GGMLQuantizationType.TQ2_0
    writer.add_tensor("tq2", BLOCK_TYPES["tq2_0"].encode(codes, np.ones((1, 1))), raw_dtype=kind)
    kind = gguf.GGMLQuantizationType.Q4_1
    values = rng.normal(size=(2, 64)).astype(np.float32)
    writer.add_tensor("q4_1", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_comes_in(gguf_path):
    gguf = pytest.importorskip("gguf")
    with GGUFFile(gguf_path) as file:
        assert file.metadata["llama.block_count"] == 3
        assert file.metadata["tokenizer.ggml.tokens"] == ["a", "Ġb", "é"]
        assert file.metadata["tokenizer.ggml.token_type"] == [1, 1, 3]
        assert file.info("f32").shape == (2, 3)
        np.testing.assert_array_equal(file.floats("f32", (2, 3)), np.arange(6).reshape(2, 3))
        codes, scale, offset = file.codes("tq2", (2, 256))
        assert (codes.dtype, scale.shape, offset) == (np.uint8, (2, 1), -1.0)
        assert codes[0, :4].tolist() == [0, 1, 2, 0]
        assert file.codes("q4_1", (2, 64)) is None
        for tensor in gguf.GGUFReader(gguf_path).tensors:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(file.floats(tensor.name, None), expected)
        with pytest.raises(ValueError, match=r"must have shape \(3, 2\)"):
            file.floats("f32", (3, 2))
        with pytest.raises(ValueError, match="no tensor 'absent'"):
            file.floats("absent", (3, 2))


def header(*, tensors=0, keys=0, body=b"", version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, keys) + body


def text(value):
    return struct.pack("<Q", len(value)) + value


HOSTILE = {
    "empty": (b"", "is empty"),
    "magic": (header(magic=b"GGML"), "no GGUF file"),
    "version": (header(version=1), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "cut in the counts": (header()[:10], "truncated"),
    "2**60 keys": (header(keys=2**60), "items are to follow"),
    "2**60 tensors": (header(tensors=2**60), "items are to follow"),
    "a string of 2**62": (header(keys=1, body=struct.pack("<Q", 2**62) + bytes(20)), "items"),
    "an array of 2**60": (
        header(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 0, 2**60) + bytes(20)),
        "items are to follow",
    ),
    "a nested array": (header(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "type 9"),
    "an unknown value": (header(keys=1, body=text(b"k") + struct.pack("<I", 77)), "type 77"),
    "no UTF-8": (header(keys=1, body=text(b"\xff\xfe") + struct.pack("<IB", 0, 1)), "UTF-8"),
    "a key twice": (header(keys=2, body=(text(b"k") + struct.pack("<IB", 0, 1)) * 2), "twice"),
    "alignment 0": (
        header(keys=1, body=text(b"general.alignment") + struct.pack("<II", 4, 0)), "alignment",
    ),
    "99 dimensions": (header(tensors=1, body=text(b"t") + struct.pack("<I", 99) + bytes(64)), "99"),
    "a tensor beyond the end": (
        header(tensors=1, body=text(b"t") + struct.pack("<IQIQ", 1, 2**40, 0, 0) + bytes(64)),
        "4398046511104 bytes",
    ),
    "an offset beyond the end": (
        header(tensors=1, body=text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 2**62) + bytes(64)),
        "truncated or corrupt",
    ),
    "a size that overflows": (
        header(tensors=1, body=text(b"t") + struct.pack("<I4QIQ", 4, *[2**63] * 4, 0, 0)),
        "truncated or corrupt",
    ),
    "an unknown type": (
        header(tensors=1, body=text(b"t") + struct.pack("<IQIQ", 1, 1, 999, 0) + bytes(64)),
        "GGUF type 999",
    ),
    "half a block": (
        header(tensors=1, body=text(b"t") + struct.pack("<IQIQ", 1, 255, 35, 0) + bytes(99)),
        "multiple of 256",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_gguf_headers_are_refused(name, tmp_path):
    content, message = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        GGUFFile(tmp_path / "x.gguf")


def test_random_damage_to_a_gguf_file_raises_nothing_but_value_errors(gguf_path, tmp_path, rng):
    whole = gguf_path.read_bytes()
    path = tmp_path / "damaged.gguf"
    refused = 0
    for content in damaged(whole, rng, trials=300, reach=400, most=3):
        path.write_bytes(content)
        try:
            with GGUFFile(path) as file:
                for tensor in file.tensors:
                    file.floats(tensor, None)
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("shard_bytes", [10**9, 70])
def test_checkpoints_are_written_and_read(shard_bytes, tmp_path, rng):
    tensors = {
        "a": rng.normal(size=(4, 6)).astype(ml_dtypes.bfloat16),
        "b": rng.integers(0, 255, (3, 5)).astype(np.uint8),
        "c": rng.normal(size=(7,)).astype(np.float32),
    }
    write_checkpoint(tmp_path, tensors.items(), shard_bytes)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == (["model.safetensors"] if shard_bytes > 100 else [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ])  # fmt: skip
    (tmp_path / "any").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    with Checkpoint(tmp_path) as checkpoint:
        assert sorted(checkpoint.keys()) == ["a", "b", "c"]
        assert checkpoint.dtype("a") == "BF16"
        for name, array in tensors.items():
            found = checkpoint.read(name, array.shape, [checkpoint.dtype(name)])
            np.testing.assert_array_equal(found, array)
            rows = checkpoint.rows(name, array.shape, [checkpoint.dtype(name)])
            assert rows.shape == array.shape
            np.testing.assert_array_equal(rows[1:3], array[1:3])
            np.testing.assert_array_equal(rows[2:99], array[2:])
        with pytest.raises(ValueError, match="Received: BF16"):
            checkpoint.rows("a", (4, 6), ["F32"])
        with pytest.raises(ValueError, match=r"'b' must have shape \(5, 3\)"):
            checkpoint.read("b", (5, 3), ["U8"])
        with pytest.raises(ValueError, match="Received: U8"):
            checkpoint.read("b", (3, 5), ["F32"])
        with pytest.raises(ValueError, match="no tensor 'd'"):
            checkpoint.read("d", (3, 5), ["F32"])


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors",
     "C:x.safetensors", "model.bin", 7],
)  # fmt: skip
def test_an_index_names_only_files_of_its_folder(file, tmp_path):
    index = {"weight_map": {"a": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="files of its own folder"):
        Checkpoint(tmp_path)


def test_damaged_checkpoints_are_refused(tmp_path):
    folder = tmp_path / "good"
    folder.mkdir()
    write_checkpoint(folder, {"a": np.ones((64, 64), np.float32)}.items())
    whole = (folder / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    for content in (b"", whole[:50], whole[:-1], struct.pack("<Q", 2**60) + b"{}", whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no valid safetensors"):
            Checkpoint(tmp_path)
    path.unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match="weight_map"):
        Checkpoint(tmp_path)
    index = {"weight_map": {"b": "other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"other\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match="it does not"):
        Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        Checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "JSON object"), ("{", "valid JSON"), ("[" * 10**5, "valid")]
)
def test_json_files_are_bounded_objects(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        files.read_json(path)
    path.write_text(json.dumps({"a": "x" * 100}))
    with pytest.raises(ValueError, match="at most 50 bytes"):
        files.read_json(path, limit=50)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "x.gguf").write_text("old")
    with pytest.raises(TypeError), files.folder_written_whole(tmp_path / "a") as folder:
        (folder / "x.gguf").write_text(b"half")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_text() == "old"
    with files.folder_written_whole(tmp_path / "new") as folder:
        (folder / "a").write_text("whole")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a"]


def test_files_written_beside_another_are_whole_too(tmp_path):
    for content in ("old", "new"):
        with contextlib.suppress(TypeError), replacing(tmp_path / "m.onnx") as temporary:
            temporary.with_name("m.onnx.data").write_text(content)
            temporary.write_text(content if content == "old" else None)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(
        ("m.onnx", "m.onnx.data"), "old"
    )


def test_weights_written_before_do_not_stay_beside_new_ones(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for shard_bytes in (10**9, 70, 10**9, 50):
        tensors = {name: np.full(20, shard_bytes, np.float32) for name in "abc"}
        with files.folder_written_whole(tmp_path, replaced=WEIGHTS) as folder:
            write_checkpoint(folder, tensors.items(), shard_bytes)
        with Checkpoint(tmp_path) as checkpoint:
            assert (checkpoint.read("a", (20,), ["F32"]) == shard_bytes).all()
    assert (tmp_path / "tokenizer.json").exists()


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(ImportError, match=r"'no_such_package': `pip install keras-bitnet\[gguf\]`"):
        files.require("no_such_package.module", "gguf")
