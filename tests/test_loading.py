"""`load_model`, and the filling of large weights in parts."""

import zipfile

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from helpers import to_numpy
from test_models import make_model, tokens

import keras_bitnet
from keras_bitnet.interop import weights
from keras_bitnet.layers import BitLinear, large_weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = keras_bitnet.pack_model(make_model(embedding_quantizer="int8"), verbose=0)
    path = tmp_path_factory.mktemp("saved") / "packed.keras"
    model.save(path)
    return model, path


def test_a_file_in_a_folder_that_cannot_be_written_to(saved, rng, monkeypatch):
    model, path = saved

    def refuse(*args, dir=None, **kwargs):
        raise PermissionError(f"read-only: {dir}")

    monkeypatch.setattr("keras_bitnet.loading.tempfile.TemporaryDirectory", refuse)
    ids = tokens(rng)
    np.testing.assert_array_equal(
        to_numpy(keras_bitnet.load_model(path)(ids)), to_numpy(model(ids))
    )


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="TensorFlow does not say where variables are"
)
@pytest.mark.usefixtures("on_cpu")
def test_large_weights_lie_in_huge_pages(rng, monkeypatch):
    pages, asked = keras_bitnet.kernels.pages, []

    def advise(address, size):
        asked.append((address, size))
        return len(asked) > 1  # the first one is refused

    model = keras.Sequential([keras.Input((512,)), BitLinear(4096, name="a"), BitLinear(4096)])
    packed = keras_bitnet.pack_model(model, verbose=0)
    x = rng.standard_normal((1, 512)).astype("float32")
    before = to_numpy(packed(x))
    monkeypatch.setattr(pages, "_page_bytes", lambda: 1 << 16)
    monkeypatch.setattr(pages, "_advise", advise)
    assert pages.use_huge_pages(packed) == 0  # less than a cache holds
    assert not asked
    monkeypatch.setattr(pages, "LEAST_BYTES", 1 << 20)
    moved = pages.use_huge_pages(packed)
    size = sum(int(np.prod(v.shape)) for v in packed.variables if "kernel_tiles" in v.path)
    tiles = packed.layers[-1].kernel_tiles
    begin, end = pages._span(tiles)
    assert end - begin == int(np.prod(tiles.shape))
    assert moved == (len(asked) - 1) << 16
    assert moved > 0.8 * size
    assert all(address % (1 << 16) == 0 and size == 1 << 16 for address, size in asked)
    assert len({a for a, _ in asked if begin <= a < end}) >= (end - begin >> 16) - 1
    monkeypatch.undo()
    monkeypatch.setattr(pages, "LEAST_BYTES", 1 << 20)
    assert 0 <= pages.use_huge_pages(packed) <= pages._page_bytes() * 4
    np.testing.assert_array_equal(to_numpy(packed(x)), before)


def test_large_weights_come_in_parts(saved, rng, monkeypatch):
    model, path = saved
    sizes = []
    original = h5py.Dataset.__getitem__

    def counting(dataset, key):
        value = original(dataset, key)
        if isinstance(key, slice) and isinstance(value, np.ndarray):
            sizes.append(value.nbytes)
        return value

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counting)
    monkeypatch.setattr(large_weights, "PART_BYTES", 600)
    loaded = keras_bitnet.load_model(path)
    table = to_numpy(model.backbone.token_embedding.kernel_tiles)
    assert table.nbytes > 2 * 600
    assert sum(sizes) == table.nbytes  # the embedding alone, the rest are trits and small
    assert max(sizes) <= 600
    ids = tokens(rng)
    np.testing.assert_array_equal(to_numpy(loaded(ids)), to_numpy(model(ids)))
    for one, other in zip(model.variables, loaded.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))
    if keras.backend.backend() == "tensorflow":  # two readings share the memory of the variable
        variable = loaded.backbone.token_embedding.kernel_tiles.value
        one, other = (np.asarray(memoryview(variable.read_value())) for _ in range(2))
        assert one.ctypes.data == other.ctypes.data
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


def test_keras_loads_the_same(saved, rng):
    model, path = saved
    ids = tokens(rng)
    loaded = keras.models.load_model(path)
    np.testing.assert_array_equal(to_numpy(loaded(ids)), to_numpy(model(ids)))


def test_other_models_and_files(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    model.save(tmp_path / "plain.keras")
    loaded = keras_bitnet.load_model(str(tmp_path / "plain.keras"))
    x = np.ones((1, 3), "float32")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert loaded.compiled
    # A compressed file could be of any size when it is unzipped: Keras reads it with its guards.
    with (
        zipfile.ZipFile(tmp_path / "plain.keras") as source,
        zipfile.ZipFile(tmp_path / "small.keras", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert keras_bitnet.load_model(tmp_path / "small.keras").compiled
    (tmp_path / "no.keras").write_text("no zip")
    with pytest.raises(ValueError, match=r"model\.save"):
        keras_bitnet.load_model(tmp_path / "no.keras")
    with pytest.raises(FileNotFoundError, match=r"none\.keras"):
        keras_bitnet.load_model(tmp_path / "none.keras")


def test_packed_models_are_compiled_as_the_backend_does(tmp_path):
    def saved_and_loaded(model, **arguments):
        model.compile("sgd", "mse", **arguments)
        model.save(tmp_path / "compiled.keras")
        return keras_bitnet.load_model(tmp_path / "compiled.keras").jit_compile

    inputs = keras.Input((8,))
    model = keras.Model(inputs, BitLinear(4)(inputs))
    packed = keras_bitnet.pack_model(model, verbose=0)
    packed.compile("sgd", "mse")
    usual = packed.jit_compile
    assert saved_and_loaded(packed, jit_compile=True) is usual
    assert saved_and_loaded(packed, jit_compile=False) is False
    assert saved_and_loaded(model, jit_compile=True) is True  # training is as its author wants it


def test_links_and_chunks_are_left_to_keras(tmp_path, monkeypatch):
    monkeypatch.setattr(large_weights, "PART_BYTES", 4)
    plain = np.arange(60, dtype=np.uint8).reshape(6, 10)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["plain"] = plain
        file["linked"] = h5py.SoftLink("/plain")
        file.create_dataset("chunked", data=plain, chunks=(2, 10))

        class Store:
            _h5_entry_group = file

            def __getitem__(self, name):
                return f"Keras reads {name}"

        assert isinstance(large_weights.parts_of(Store(), "plain"), h5py.Dataset)
        assert large_weights.parts_of(Store(), "linked") == "Keras reads linked"
        assert large_weights.parts_of(Store(), "chunked") == "Keras reads chunked"
        assert large_weights.parts_of({"plain": plain}, "plain") is plain
        variable = keras.Variable(
            large_weights.UntouchedZeros(), plain.shape, "uint8", trainable=False
        )
        assert not to_numpy(variable).any()
        large_weights.fill(variable, file["plain"])
        np.testing.assert_array_equal(to_numpy(variable), plain)


class Rows:
    """A matrix in a file, which counts the rows that are asked for at once."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.counts = matrix, matrix.shape, []

    def __getitem__(self, rows):
        block = self.matrix[rows]
        self.counts.append(len(block))
        return block


@pytest.mark.parametrize("group_size", [None, 32])
def test_float_matrices_are_packed_in_blocks(group_size, rng, monkeypatch):
    granularity = "channel" if group_size is None else "group"
    quantizer = keras_bitnet.quantizers.Int8(granularity=granularity, group_size=group_size)
    matrix = rng.standard_normal((50, 40)).astype("float32")
    layer = BitLinear(50, use_bias=False, weight_quantizer=quantizer)
    layer.build((None, 40))
    layer.kernel.assign(matrix.T)
    wanted = keras_bitnet.pack_model(layer, verbose=0)
    packed = BitLinear(50, use_bias=False, weight_quantizer=quantizer, packed=True)
    packed.build((None, 40))
    monkeypatch.setattr(large_weights, "PART_BYTES", 40 * 16)
    rows = Rows(matrix)
    weights.set_matrix(packed, rows)
    assert rows.counts == [16, 16, 16, 2]
    np.testing.assert_array_equal(to_numpy(packed.kernel_tiles), to_numpy(wanted.kernel_tiles))
    np.testing.assert_array_equal(to_numpy(packed.kernel_scale), to_numpy(wanted.kernel_scale))
    matrix[-1, -1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        weights.set_matrix(packed, matrix)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_table_of_tokens_is_read_in_parts(dtype, rng, monkeypatch):
    matrix = rng.standard_normal((50, 40)).astype(ml_dtypes.bfloat16)
    table = keras.layers.Embedding(50, 40, dtype=dtype)
    table.build()
    monkeypatch.setattr(large_weights, "PART_BYTES", 16 * 40 * 4)
    rows = Rows(matrix)
    weights.set_matrix(table, rows)
    found = to_numpy(keras.ops.cast(table.embeddings, "float32"))
    np.testing.assert_array_equal(found, matrix.astype("float32"))
    assert rows.counts == [16, 16, 16, 2]
    matrix[-1, -1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        weights.set_matrix(table, rows)
