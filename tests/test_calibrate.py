import gc
import itertools
import os
import pathlib

import keras
import numpy as np
import pytest
from helpers import BACKEND, keras_3_15, relative_error, to_numpy

import keras_bitnet
from keras_bitnet.layers import BitEinsumDense, BitLinear
from keras_bitnet.quantizers import ActivationQuantizer, StaticActivation
from keras_bitnet.transforms.observers import METHODS

METHOD_NAMES = sorted(METHODS)


def small_model(**arguments):
    return keras.Sequential(
        [
            keras.Input((12,)),
            BitLinear(16, "relu", weight_quantizer="int8", name="a", **arguments),
            BitLinear(3, weight_quantizer="int8", name="b", **arguments),
        ]
    )


def feeds(x):
    """The same data in every form that Keras takes on this backend, batches of 16."""

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(x) // 16

        def __getitem__(self, i):
            return x[16 * i : 16 * i + 16], np.zeros(16)

    found = {"array": x, "PyDataset": Batches()}
    found["generator"] = ((x[i : i + 16],) for i in range(0, len(x), 16))
    if BACKEND == "torch":
        from torch import from_numpy
        from torch.utils.data import DataLoader, TensorDataset

        found["DataLoader"] = DataLoader(TensorDataset(from_numpy(x)), batch_size=16)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        found["tf.data"] = tf.data.Dataset.from_tensor_slices(x).batch(16)
    return found


def test_every_form_of_data_gives_the_same_scales(rng, recwarn):
    x = rng.normal(size=(64, 12)).astype("float32")
    model = small_model()
    before = [to_numpy(w).copy() for w in model.weights]
    for name, data in feeds(x).items():
        calibrated = keras_bitnet.calibrate(model, data, batch_size=None, verbose=0)
        first, second = calibrated.layers
        np.testing.assert_allclose(
            float(first.activation_scale), np.abs(x).max() / 127, rtol=1e-6, err_msg=name
        )
        np.testing.assert_allclose(to_numpy(first.input_absmax), np.abs(x).max(0), rtol=1e-6)
        weight = to_numpy(first.fake_quantized_matrix())
        hidden = np.maximum(x @ weight, 0)  # the inputs of the first are float while it looks
        np.testing.assert_allclose(
            float(second.activation_scale), hidden.max() / 127, rtol=1e-5, err_msg=name
        )
        assert isinstance(first.activation_quantizer, StaticActivation)
    for old, now in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(now))
    assert relative_error(to_numpy(calibrated(x)), to_numpy(model(x))) < 0.05
    assert not [w for w in recwarn if "ran out of data" in str(w.message)]


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_packs_saves_and_is_near(method, tmp_path, rng):
    x = rng.normal(size=(256, 12)).astype("float32")
    model = small_model()
    calibrated = keras_bitnet.calibrate(model, x, method, verbose=0)
    assert relative_error(to_numpy(calibrated(x)), to_numpy(model(x))) < 0.25
    packed = keras_bitnet.pack_model(calibrated, verbose=0)
    assert relative_error(to_numpy(packed(x)), to_numpy(calibrated(x))) < 1e-5
    packed.save(tmp_path / "p.keras")
    again = keras.models.load_model(tmp_path / "p.keras")
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(packed(x)))
    np.testing.assert_array_equal(
        to_numpy(again.layers[0].input_absmax), to_numpy(calibrated.layers[0].input_absmax)
    )


def scale_of(x, method, bits, **options):
    layer = BitLinear(2, activation_quantizer=f"int{bits}")
    model = keras.Sequential([keras.Input((x.shape[-1],)), layer])
    options = {"batch_size": len(x), "verbose": 0, **options}
    model = keras_bitnet.calibrate(model, x, method, **options)
    return float(model.layers[0].activation_scale) * model.layers[0].activation_quantizer.highest


def test_thresholds_against_numpy(rng):
    x = rng.laplace(size=(500, 40)).astype("float32")
    x[0, 0] = 300  # one outlier
    x[:, 1] = 0
    magnitudes = np.abs(x[x != 0])
    found = scale_of(x, "percentile", 8, percentile=99)
    np.testing.assert_allclose(found, np.percentile(magnitudes, 99), rtol=0.1)
    assert scale_of(x, "minmax", 8) == pytest.approx(300)

    def error(threshold):
        step = threshold / 7
        return np.square(x - np.clip(np.round(x / step), -7, 7) * step).sum()

    x[0, 0] = 20
    least = min(error(t) for t in np.geomspace(0.5, 20, 400))
    assert error(scale_of(x, "mse", 4)) < 1.02 * least
    assert error(scale_of(x, "histogram", 4)) < 1.5 * least
    assert error(scale_of(x, "minmax", 4)) > 2 * least
    assert 4 < scale_of(x, "entropy", 8) <= 20


def test_the_histogram_grows_with_the_data(rng):
    x = np.concatenate([rng.uniform(0, 10.0**e, size=(64, 8)) for e in range(-3, 3)])
    x = x.astype("float32")
    in_parts = scale_of(x, "percentile", 8, percentile=90, batch_size=64)
    at_once = scale_of(x, "percentile", 8, percentile=90)
    np.testing.assert_allclose(in_parts, at_once, rtol=1e-2)
    np.testing.assert_allclose(at_once, np.percentile(x, 90), rtol=2e-2)


def test_ema_follows_the_batches():
    x = np.concatenate([np.full((32, 4), 1.0), np.full((32, 4), 3.0)]).astype("float32")
    assert scale_of(x, "ema", 8, batch_size=32) == pytest.approx(0.99 * 1 + 0.01 * 3)


def test_smoothing_and_kept_channels_are_set_from_data(rng):
    x = rng.normal(size=(128, 12)).astype("float32")
    x[:, [2, 7]] *= 50
    model = small_model(kept_channels=2, smoothing=0.5, rotation=None, quantization_strength=0.0)
    wanted = to_numpy(model(x))
    calibrated = keras_bitnet.calibrate(model, x, verbose=0)
    layer = calibrated.layers[0]
    weight = np.abs(to_numpy(model.layers[0].kernel)).max(1)
    factor = np.sqrt(np.abs(x).max(0) / weight)
    np.testing.assert_allclose(to_numpy(layer.input_gain), 1 / factor, rtol=1e-4)
    largest = np.argsort(-np.abs(x / factor).max(0))[:2]
    np.testing.assert_array_equal(to_numpy(layer.kept_indices), np.sort(largest))
    assert relative_error(to_numpy(calibrated(x)), wanted) < 1e-5


def test_inner_layers_and_packed_models_are_calibrated(rng):
    inputs = keras.Input((5, 8))
    attended = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(attended))
    model = keras_bitnet.quantize_model(model, "int8", verbose=0)
    x = rng.normal(size=(16, 5, 8)).astype("float32")
    packed = keras_bitnet.pack_model(model, verbose=0)
    calibrated = keras_bitnet.calibrate(packed, x, filters="attention", verbose=0)
    layer = calibrated.get_layer("attention")._query_dense
    assert isinstance(layer, BitEinsumDense)
    assert layer.packed
    assert layer.calibrated
    assert calibrated.get_layer("head").activation_quantizer.granularity == "token"
    assert relative_error(to_numpy(calibrated(x)), to_numpy(packed(x))) < 0.05


def test_a_packed_static_layer_runs_before_its_weights_are_loaded():
    # As where Keras builds a subclassed model by running it.
    layer = BitLinear(3, activation_quantizer=StaticActivation(), packed=True)
    assert np.isfinite(to_numpy(layer(np.ones((2, 8), "float32")))).all()


def test_lower_precision_is_observed_in_float32(rng):
    x = rng.integers(-16, 17, (1024, 12)).astype("float32") / 16  # bfloat16 holds them, not 1000
    scales = []
    for dtype in ("float32", "mixed_bfloat16"):
        model = keras.Sequential([keras.Input((12,)), BitLinear(3, dtype=dtype)])
        model = keras_bitnet.calibrate(model, x, "percentile", percentile=60, verbose=0)
        scales.append(float(to_numpy(model.layers[0].activation_scale)))
    assert scales[0] == scales[1]


def test_kernels_of_16_bits_are_treated_in_float32(rng):
    x = rng.integers(-16, 17, (16, 12)).astype("float32") / 16
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(3, dtype="bfloat16")])
    spec = {"smoothing": 0.5, "kept_channels": 2, "rotation": "hadamard"}
    model = keras_bitnet.calibrate(
        keras_bitnet.quantize_model(model, spec, verbose=0), x, verbose=0
    )
    packed = keras_bitnet.pack_model(model, verbose=0)
    y, expected = (to_numpy(keras.ops.cast(m(x), "float32")) for m in (packed, model))
    assert np.abs(y - expected).max() < 0.02 * np.abs(expected).max()


def resident_bytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="no /proc/self/statm")
def test_memory_after_120_batches_is_that_after_20(rng):
    """The batches between are 26 MB; with what they make on their way, several times that."""
    x = rng.normal(size=(64, 1024)).astype("float32")
    held, steps = {}, 120

    def stream():
        for i in itertools.count():
            if i % 20 == 19:  # as often before the first look as between all others
                gc.collect()
                held[i] = resident_bytes()
            yield (x + i,)

    model = keras.Sequential([keras.Input((1024,)), BitLinear(4, name="a")])
    model = keras_bitnet.calibrate(model, stream(), steps=steps, verbose=0)
    assert model.layers[0].calibrated
    assert held[119] - held[19] < 10e6


class Odd(ActivationQuantizer):
    bits, highest = 8, 127

    def quantize(self, x, scale=None):
        return super().quantize(x, scale)


def nan_data(row=35):
    """In the last batch, which is a smaller one, or in another."""
    x = np.ones((40, 12), "float32")
    x[row, 3] = np.nan
    return x


def deaf_model():
    """Its first layer may lose a NaN before a quantized layer sees it."""
    hidden = [keras.layers.Reshape((12, 1)), keras.layers.MaxPooling1D(3), keras.layers.Flatten()]
    return keras.Sequential([keras.Input((12,)), *hidden, BitLinear(2, name="a")])


def breaking_model():
    """Makes an infinity of finite data."""
    rescaling = keras.layers.Rescaling(3e38)
    return keras.Sequential([keras.Input((12,)), rescaling, BitLinear(2, name="a")])


def two_inputs():
    inputs = {k: keras.Input((n,), name=k) for k, n in (("one", 12), ("two", 4))}
    return keras.Model(inputs, BitLinear(2)(keras.layers.Concatenate()(list(inputs.values()))))


def ones(*shapes):
    """Inputs of `two_inputs`."""
    return {k: np.ones(s, "float32") for k, s in zip(("one", "two"), shapes, strict=False)}


class NoBatches(keras.utils.PyDataset):
    def __len__(self):
        return 0

    def __getitem__(self, i):
        raise IndexError(i)


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (small_model, np.ones((0, 12)), {}, "`data` is empty"),
        (small_model, NoBatches(), {}, "`data` is empty"),
        pytest.param(
            small_model,
            (x for x in ()),
            {},
            "empty generator",
            marks=keras_3_15("raises an IndexError"),
        ),
        (small_model, None, {}, "Received: None"),
        (small_model, "text", {}, "Unrecognized data type"),
        (small_model, nan_data(), {}, "`data` holds a NaN"),
        (small_model, nan_data(0), {"method": "ema"}, "`data` holds a NaN"),
        (small_model, nan_data(0), {"method": "mse"}, "`data` holds a NaN"),
        (deaf_model, nan_data(), {}, "`data` holds a NaN"),
        (breaking_model, np.full((4, 12), 2.0), {}, "layer 'a' hold a NaN or an inf"),
        (small_model, np.ones((4, 9), "float32"), {}, "12"),
        (small_model, np.ones((4, 5, 12), "float32"), {}, "12"),
        (two_inputs, np.ones((4, 12), "float32"), {}, "expects 2"),
        (two_inputs, ones((4, 12)), {}, "two"),
        (two_inputs, ones((4, 12), (4, 5)), {}, "4, 5"),
        (two_inputs, ones((4, 12), (5, 4)), {}, "same number of examples"),
        (small_model, [(np.ones((4, 12)), np.ones(4))] * 3, {}, "not as batches.* 6 arrays"),
        (small_model, np.ones((4, 12)), {"method": "median"}, "`method` must be one of"),
        (small_model, np.ones((4, 12)), {"percentile": 0}, "percentile=0"),
        (small_model, np.ones((4, 12)), {"batch_size": 0}, "batch_size=0"),
        (small_model, np.ones((4, 12)), {"steps": 0}, "steps=0"),
        (small_model, np.ones((4, 12)), {"filters": "nothing"}, "no layer to calibrate"),
        (small_model, np.ones((4, 12)), {"static": False}, "smoothing.*static=False$"),
        (
            lambda: small_model(smoothing=0.5),
            (np.ones((4, 12)) for _ in range(3)),
            {},
            "read 2 times",
        ),
        (lambda: small_model(activation_quantizer=Odd()), np.ones((4, 12)), {}, "no static scale"),
    ],
)
def test_bad_input_leaves_the_model_as_it_is(model, data, options, message, rng):
    model = model()
    x = rng.normal(size=(4, 12)).astype("float32")
    x = ones((4, 12), (4, 4)) if len(model.inputs) == 2 else x
    before = to_numpy(model(x))
    with pytest.raises(ValueError, match=message):
        keras_bitnet.calibrate(model, data, verbose=0, **options)
    np.testing.assert_array_equal(to_numpy(model(x)), before)


@pytest.mark.parametrize("activations", ["int8", "static_int8"])
def test_a_nan_reaches_the_outputs_of_a_compiled_model(activations, rng):
    """Packed too, where it has to pass through integers."""
    x = rng.normal(size=(16, 12)).astype("float32")
    model = keras.Sequential([keras.Input((12,)), BitLinear(5, activation_quantizer=activations)])
    if activations == "static_int8":
        model = keras_bitnet.calibrate(model, x, verbose=0)
    packed = keras_bitnet.pack_model(model, verbose=0)
    x[3, 7], x[5, 0] = np.nan, np.inf
    for each in (model, packed):
        broken = ~np.isfinite(each.predict(x, verbose=0))
        assert broken[[3, 5]].all()
        assert not np.delete(broken, [3, 5], axis=0).any()


class Cell(keras.layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units
        self.inner = BitLinear(units, name="inner")

    def build(self, shape):
        self.inner.build((shape[0], shape[-1] + self.units))

    def call(self, x, states):
        state = self.inner(keras.ops.concatenate([x, states[0]], -1))
        return state, [state]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def test_the_cell_of_an_rnn(rng):
    x = rng.normal(size=(4, 3, 5)).astype("float32")
    model = keras.Sequential([keras.Input((3, 5)), keras.layers.RNN(Cell(6)), BitLinear(2)])
    rest = keras_bitnet.calibrate(model, x, filters=lambda layer: layer.name != "inner", verbose=0)
    assert rest.layers[-1].calibrated
    if BACKEND == "jax":
        with pytest.raises(ValueError, match="`unroll=True`"):
            keras_bitnet.calibrate(model, x, verbose=0)
        model = keras.Sequential(
            [keras.Input((3, 5)), keras.layers.RNN(Cell(6), unroll=True), BitLinear(2)]
        )
    assert keras_bitnet.calibrate(model, x, verbose=0).layers[0].cell.inner.calibrated
