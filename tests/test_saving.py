import copy
import pickle
import zipfile

import h5py
import keras
import numpy as np
import pytest
from helpers import relative_error, to_numpy

import keras_bitnet
from keras_bitnet.layers import BitLinear


def model_and_input(rng, units=3, **arguments):
    model = keras.Sequential(
        [keras.Input((64,)), BitLinear(32, "relu", norm="rms", **arguments), BitLinear(units)]
    )
    return model, rng.normal(size=(4, 64)).astype("float32")


def packed_file(tmp_path, rng):
    model, x = model_and_input(rng)
    packed = keras_bitnet.pack_model(model, verbose=0)
    path = tmp_path / "packed.keras"
    packed.save(path)
    return packed, x, path


def edit_weights(path, edit):
    """Rewrites the weights inside a .keras file."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    weights = path.parent / "weights.h5"
    weights.write_bytes(files["model.weights.h5"])
    with h5py.File(weights, "a") as h5:
        edit(h5)
    files["model.weights.h5"] = weights.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def test_lora_and_learned_scales_survive(tmp_path, rng):
    quantizer = keras_bitnet.quantizers.Int4(scale="learned", group_size=32)
    model, x = model_and_input(rng, weight_quantizer=quantizer)
    model.layers[0].enable_lora(2)
    model.layers[0].lora_kernel_b.assign(rng.normal(size=(2, 32)))
    model.layers[0].kernel_log2_scale.assign(to_numpy(model.layers[0].kernel_log2_scale) + 0.3)
    model.layers[1].quantization_strength.assign(0.25)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(model(x)))
    assert float(again.layers[1].quantization_strength) == 0.25
    with pytest.warns(UserWarning, match="quantization_strength"):
        packed = keras_bitnet.pack_model(model, verbose=0)
    model.layers[1].quantization_strength.assign(1.0)
    assert relative_error(to_numpy(packed(x)), to_numpy(model(x))) < 1e-5
    packed.save(tmp_path / "p.keras")
    again = keras.models.load_model(tmp_path / "p.keras")
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(packed(x)))


def test_a_ternary_kernel_takes_1_6_bits_on_disk(tmp_path):
    model = keras.Sequential([keras.Input((4000,)), BitLinear(1024, use_bias=False)])
    model.compile("adam", "mse")
    packed = keras_bitnet.pack_model(model, verbose=0)
    packed.save(tmp_path / "p.keras")
    bits = 8 * (tmp_path / "p.keras").stat().st_size / (4000 * 1024)
    assert bits <= 1.7
    with zipfile.ZipFile(tmp_path / "p.keras") as archive:
        archive.extract("model.weights.h5", tmp_path)
    with h5py.File(tmp_path / "model.weights.h5") as h5:
        names = []
        h5.visit(names.append)
        assert not any("kernel" in name for name in names if "optimizer" in name)


def test_weights_of_a_dense_checkpoint_load(rng):
    dense = keras.layers.Dense(5, bias_initializer="ones")
    layer = BitLinear(5, quantization_strength=0.0)
    x = rng.normal(size=(3, 8)).astype("float32")
    wanted = to_numpy(dense(x))
    layer.build((None, 8))
    store = {}
    dense.save_own_variables(store)
    layer.load_own_variables({k: to_numpy(v) for k, v in store.items()})
    np.testing.assert_allclose(to_numpy(layer(x)), wanted, rtol=1e-5, atol=1e-6)


def test_float_weights_do_not_load_into_a_packed_model(tmp_path, rng):
    model, _ = model_and_input(rng)
    model.save_weights(tmp_path / "float.weights.h5")
    packed = keras_bitnet.pack_model(model, verbose=0)
    with pytest.raises(ValueError, match="expects the weights"):
        packed.load_weights(tmp_path / "float.weights.h5")


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_file(share, tmp_path, rng):
    _, _, path = packed_file(tmp_path, rng)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises((ValueError, OSError, zipfile.BadZipFile)):
        keras.models.load_model(path)


KERNEL = "layers/bit_linear/vars/kernel_trits"


def _replace(h5, name, value):
    del h5[name]
    h5[name] = value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda h5: h5[KERNEL].write_direct(np.full(h5[KERNEL].shape, 255, "uint8")),
            "at most 242",
        ),
        (lambda h5: _replace(h5, KERNEL, h5[KERNEL][:-1]), "shape"),
        (lambda h5: _replace(h5, KERNEL, h5[KERNEL][:, :-1]), "32 outputs. Received: data of 31"),
        (lambda h5: h5.__delitem__(KERNEL), "expects the weights"),
        (
            lambda h5: h5["layers/bit_linear/vars/kernel_scale"].write_direct(
                np.full((1, 1), np.nan, "float32")
            ),
            "NaN or an infinity",
        ),
    ],
)
def test_corrupt_weights(edit, message, tmp_path, rng):
    _, _, path = packed_file(tmp_path, rng)
    edit_weights(path, edit)
    with pytest.raises(ValueError, match=message):
        keras.models.load_model(path)


def test_flipped_bytes_never_pass_unseen(tmp_path, rng):
    _, _, path = packed_file(tmp_path, rng)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(byte ^ 0xFF for byte in data[middle : middle + 64])
    path.write_bytes(bytes(data))
    with pytest.raises(Exception):  # noqa: B017, PT011  zip checks its sums
        keras.models.load_model(path)


def test_packed_models_are_copied_and_given_other_weights(rng):
    def packed_model():
        return keras_bitnet.pack_model(model_and_input(rng)[0], verbose=0)

    packed, other, (_, x) = packed_model(), packed_model(), model_and_input(rng)
    before, wanted = to_numpy(packed(x)), to_numpy(other(x))
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        np.testing.assert_array_equal(to_numpy(twin(x)), before)
        twin.set_weights(other.get_weights())
        np.testing.assert_array_equal(to_numpy(twin(x)), wanted)
    np.testing.assert_array_equal(to_numpy(packed(x)), before)
