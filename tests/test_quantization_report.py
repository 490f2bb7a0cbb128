"""`quantization_report`: its figures against NumPy, every kind of layer, outliers, bad input."""

import json

import keras
import numpy as np
import pytest
from helpers import BACKEND, decibel, to_numpy

import keras_bitnet
from keras_bitnet import quantization_report
from keras_bitnet.layers import BitConv2D, BitLinear
from keras_bitnet.quantizers import Int4
from keras_bitnet.report import outliers, pairs, probes


def float_model(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(24, "relu", name="a"),
            keras.layers.Dense(5, name="b"),
        ],
        name="small",
    )


def report(model, data, **options):
    return quantization_report(model, data, **{"verbose": 0, **options})


def test_figures_against_numpy(rng):
    model = float_model()
    x = rng.normal(size=(32, 16)).astype("float32")
    qat = keras_bitnet.quantize_model(model, "int4", verbose=0)
    found = report(qat, x, reference=model, batch_size=16)
    first, second = found.layers
    assert [row.path for row in found.layers] == ["a", "b"]
    assert (found.samples, first.precision, first.weights) == (32, "W4A8", 16 * 24)

    kernel = to_numpy(model.layers[0].kernel)
    quantized = to_numpy(qat.layers[0].fake_quantized_matrix())
    assert first.weight.sqnr == pytest.approx(decibel(kernel, quantized - kernel), abs=1e-3)
    assert first.share_zero == np.mean(quantized == 0)
    rounded = to_numpy(qat.layers[0].activation_quantizer.fake_quantize(x))
    assert first.input_sqnr == pytest.approx(decibel(x, rounded - x), abs=1e-2)
    assert first.input_absmax == pytest.approx(np.abs(x).max())

    expected, actual = to_numpy(model(x)), to_numpy(qat(x))
    error = actual - expected
    for errors in (second.output, found.output):
        assert errors.sqnr == pytest.approx(decibel(expected, error), abs=1e-2)
        assert errors.mse == pytest.approx(np.square(error).mean(), rel=1e-3)
        assert errors.max_error == pytest.approx(np.abs(error).max(), rel=1e-3)
        cosine = (expected * actual).sum() / np.sqrt((expected**2).sum() * (actual**2).sum())
        assert errors.cosine == pytest.approx(cosine, abs=1e-5)

    # Only "b" quantized: its inputs are those of the float model.
    hidden = to_numpy(model.layers[0](x))
    alone = to_numpy(qat.layers[1](hidden)) - expected
    wanted = np.square(alone).sum() / np.square(expected).sum()
    assert second.sensitivity == pytest.approx(wanted, rel=1e-2)
    assert sum(first.input_histogram.counts) == x.size
    assert sum(first.weight_histogram.counts) == kernel.size
    assert second.input_histogram.low == 0  # after a relu there is nothing below
    assert found.loss is None


def test_the_loss_and_its_growth(rng):
    model = float_model()
    x = rng.normal(size=(32, 16)).astype("float32")
    y = rng.integers(0, 5, 32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    qat = keras_bitnet.quantize_model(model, verbose=0)
    found = report(qat, (x, y), reference=model, batch_size=16)
    assert found.loss_float == pytest.approx(float(loss(y, model(x))), rel=1e-4)
    assert found.loss == pytest.approx(float(loss(y, qat(x))), rel=1e-3)
    qat.layers[1].quantization_strength.assign(0)
    only_first = float(loss(y, qat(x))) - found.loss_float
    assert found.layers[0].loss_change == pytest.approx(only_first, rel=2e-2, abs=1e-4)
    y = rng.normal(size=(32, 5)).astype("float32")
    named = report(qat, (x, y), reference=model, loss="mse")
    assert named.loss_float == pytest.approx(np.square(y - to_numpy(model(x))).mean(), rel=1e-4)
    with pytest.raises(ValueError, match=r"targets of shapes \[\(32, 5\)\]"):
        report(qat, (x, y), reference=model)


def test_the_float_twin_is_the_model_at_strength_0(rng):
    x = rng.normal(size=(32, 16)).astype("float32")
    model = float_model()
    half = keras_bitnet.quantize_model(model, {"quantization_strength": 0.5}, verbose=0)
    found, given = report(half, x), report(half, x, reference=model)
    assert found.output.sqnr == pytest.approx(given.output.sqnr, abs=1e-3)
    assert float(half.layers[0].quantization_strength) == 0.5  # left as it is


@pytest.mark.parametrize("memory", ["fastest", "smallest"])
def test_a_packed_model_gives_what_it_gives_unpacked(memory, rng):
    x = rng.normal(size=(32, 16)).astype("float32")
    model = float_model()
    qat = keras_bitnet.quantize_model(model, {"weight_quantizer": "ternary", "norm": "rms"},
                                      verbose=0)  # fmt: skip
    for layer in qat.layers:
        layer._untrained_checksum = None  # as if it had been trained
    packed = keras_bitnet.pack_model(qat, memory=memory, verbose=0)
    found, wanted = (report(m, x, reference=model).to_dict() for m in (packed, qat))
    for ours, theirs in zip(found["layers"], wanted["layers"], strict=True):
        assert ours["weight"] == pytest.approx(theirs["weight"], rel=1e-4)
        assert ours["output"] == pytest.approx(theirs["output"], rel=1e-3)
        assert ours["share_zero"] == theirs["share_zero"]
        assert ours["sensitivity"] == pytest.approx(theirs["sensitivity"], rel=1e-3)


TREATMENTS = {
    "smoothing": {"smoothing": 0.5},
    "smoothing in a norm": {"smoothing": 0.5, "norm": "rms"},
    "rotation, kept in 16 bits": {"rotation": "hadamard", "kept_channels": 2},
    "all, kept in 8 bits": {
        "smoothing": 0.5, "rotation": "hadamard", "kept_channels": 3, "kept_bits": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_treated_layers_are_measured_in_their_own_basis(treatment, rng):
    x = rng.normal(size=(32, 16)).astype("float32")
    x[:, 3] *= 20
    model = float_model()
    arguments = TREATMENTS[treatment]
    qat = keras_bitnet.quantize_model(model, {"weight_quantizer": "int8", **arguments}, verbose=0)
    reference = probes.float_twin(qat) if "norm" in arguments else model
    treated = keras_bitnet.calibrate(qat, x, verbose=0)
    kept = arguments.get("kept_channels", 0)
    for measured in (treated, keras_bitnet.pack_model(treated, verbose=0)):
        found = report(measured, x, reference=reference)
        # An 8-bit kernel is near: 30 dB, were it in another basis 0 dB.
        assert all(row.weight.sqnr > 30 for row in found.layers)
        assert found.output.sqnr > 30
        assert found.layers[0].weights == (16 - kept) * 24
        if kept:
            assert found.layers[0].outliers is None  # they are apart
            assert found.layers[0].input_absmax < np.abs(x).max() / 2


def test_tied_embeddings_attention_and_separable_convolutions(rng):
    tokens = keras.Input((6,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(20, 8, name="tok")
    h = embedding(tokens)
    h = keras.layers.MultiHeadAttention(2, 4, name="attention")(h, h)
    h = keras.layers.SeparableConv1D(8, 3, padding="same", name="separable")(h)
    model = keras.Model(tokens, embedding(h, reverse=True))
    x = rng.integers(0, 20, size=(8, 6)).astype("int32")
    qat = keras_bitnet.quantize_model(model, "int8", verbose=0)
    packed = keras_bitnet.pack_model(qat, verbose=0)
    wanted = report(qat, x)
    rows = {row.path: row for row in wanted.layers}
    assert {"tok", "separable", "attention/query"} <= rows.keys()
    assert not any(path.startswith(("tok/", "separable/")) for path in rows)
    assert all(row.weight.sqnr > 30 for row in rows.values())
    assert rows["tok"].weights == 160
    assert rows["separable"].weights == 3 * 8 + 8 * 8
    # The tied table is used both ways, so quantizing it alone is felt.
    assert rows["tok"].sensitivity > 0
    assert rows["tok"].input_histogram is not None  # those of the way back
    found = report(packed, x, reference=model)
    for row in found.layers:
        assert row.weight.sqnr == pytest.approx(rows[row.path].weight.sqnr, abs=0.05), row.path
    assert found.output.sqnr == pytest.approx(wanted.output.sqnr, abs=0.5)


def test_a_calibrated_and_packed_separable_convolution(rng):
    layer = keras.layers.SeparableConv1D(8, 3, name="separable")
    reference = keras.Sequential([keras.Input((6, 4)), layer])
    x = rng.normal(size=(4, 6, 4)).astype("float32")
    quantized = keras_bitnet.quantize_model(reference, "int8", verbose=0)
    packed = keras_bitnet.pack_model(keras_bitnet.calibrate(quantized, x, verbose=0), verbose=0)
    (row,) = keras_bitnet.quantization_report(packed, x, reference=reference, verbose=0).layers
    assert row.weight.sqnr > 40


def test_a_lookup_has_no_inputs_to_quantize(rng):
    model = keras.Sequential([keras.Input((4,), dtype="int32"), keras.layers.Embedding(9, 8)])
    qat = keras_bitnet.quantize_model(model, "int4", verbose=0)
    (row,) = report(qat, rng.integers(0, 9, (4, 4)).astype("int32")).layers
    assert (row.input_absmax, row.input_sqnr, row.input_histogram, row.outliers) == (None,) * 4


def test_a_planted_outlier_is_found_and_treated(rng):
    x = rng.normal(size=(32, 16)).astype("float32")
    x[:, 5] *= 60
    x[:, 11] *= 30
    model = float_model()
    spec = {"weight_quantizer": "int8", "activation_quantizer": "int4"}
    found = report(keras_bitnet.quantize_model(model, spec, verbose=0), x)
    seen = found.layers[0].outliers
    assert [channel.index for channel in seen.channels] == [5, 11]
    median = np.median(np.abs(x).max(0))
    assert seen.channels[0].ratio == pytest.approx(np.abs(x[:, 5]).max() / median, rel=1e-4)
    assert seen.product_sqnr.keys() == {
        "none", "smoothing", "mse", "percentile", "rotation", "kept_channels",
    }  # fmt: skip
    assert seen.suggestion is not None
    assert seen.product_sqnr[seen.suggestion] > seen.product_sqnr["none"] + 1
    assert seen.columns == 2
    text = str(found)
    assert "5 (" in text
    assert seen.how in text
    assert json.loads(found.to_json())["layers"][0]["outliers"]["channels"][0]["index"] == 5
    assert found.layers[1].outliers is None

    # What is promised is what the treated layer gives.
    treated = keras_bitnet.quantize_model(model, {**spec, "kept_channels": 2}, verbose=0)
    treated = keras_bitnet.calibrate(treated, x, static=False, verbose=0)
    matrix = pairs.untreated(treated.layers[0], treated.layers[0].kernel_matrix())
    expected = x @ to_numpy(matrix)
    error = to_numpy(treated.layers[0].product(keras.ops.convert_to_tensor(x))) - expected
    assert seen.product_sqnr["kept_channels"] == pytest.approx(decibel(expected, error), abs=1)
    assert report(treated, x, reference=model).layers[0].outliers is None


def test_a_packed_convolution_is_seen_as_before_it_was_packed(rng):
    model = keras.Sequential([keras.Input((6, 6, 3)), BitConv2D(4, 3, padding="same")])
    x = rng.normal(size=(8, 6, 6, 3)).astype("float32")
    (wanted,) = report(model, x).layers
    (found,) = report(keras_bitnet.pack_model(model, verbose=0), x, reference=model).layers
    assert found.input_absmax == pytest.approx(wanted.input_absmax)
    assert found.input_sqnr == pytest.approx(wanted.input_sqnr, abs=1e-3)


def test_outliers_of_a_convolution_are_channels_of_the_image(rng):
    model = keras.Sequential([keras.Input((6, 8)), keras.layers.Conv1D(4, 3, name="conv")])
    x = rng.normal(size=(16, 6, 8)).astype("float32")
    x[..., 2] *= 40
    found = report(keras_bitnet.quantize_model(model, "int8", verbose=0), x)
    (row,) = found.layers
    assert [channel.index for channel in row.outliers.channels] == [2]
    assert row.outliers.columns == 3
    assert len(row.channels) == 8


def test_dead_channels_do_not_hide_outliers():
    layer = BitLinear(2)
    layer.build((None, 8))
    found = outliers.find_outliers(layer, np.array([0, 0, 0, 0, 0, 1, 1, 9], "float32"))
    assert [channel.index for channel in found.channels] == [7]
    assert outliers.find_outliers(layer, np.zeros(8, "float32")) is None


def test_a_layer_the_data_does_not_reach_is_named(rng):
    @keras.saving.register_keras_serializable("test_report")
    class Half(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.used = keras.layers.Dense(3, name="used")
            self.idle = keras.layers.Dense(3, name="idle")

        def build(self, shape):
            self.used.build(shape)
            self.idle.build(shape)

        def call(self, x):
            return self.used(x)

    model = Half()
    model.build((None, 4))
    qat = keras_bitnet.quantize_model(model, verbose=0)
    found = report(qat, rng.normal(size=(8, 4)).astype("float32"))
    assert [row.path for row in found.layers] == ["used"]
    assert found.unused == ["idle"]
    assert "Not used on this data: idle" in str(found)


def test_every_form_of_data(rng):
    x, y = rng.normal(size=(20, 16)).astype("float32"), np.zeros(20, "int32")
    qat = keras_bitnet.quantize_model(float_model(), verbose=0)
    forms = {"array": x, "tuple": (x, y), "generator": ((x[i : i + 5], y[i : i + 5])
                                                        for i in range(0, 20, 5))}  # fmt: skip
    if BACKEND == "torch":
        from torch import from_numpy
        from torch.utils.data import DataLoader, TensorDataset

        forms["loader"] = DataLoader(TensorDataset(from_numpy(x), from_numpy(y)), batch_size=5)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        forms["dataset"] = tf.data.Dataset.from_tensor_slices((x, y)).batch(5).repeat()
    wanted = report(qat, x, samples=18).output.mse
    for name, data in forms.items():
        found = report(qat, data, samples=18)
        assert found.samples == 18, name
        assert found.output.mse == pytest.approx(wanted, rel=1e-4), name


def with_nan(x):
    x = x.copy()
    x[-1, 2] = np.nan
    return x


X = np.ones((6, 16), "float32")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (X[:0], {}, "holds no examples"),
        (iter(()), {}, "holds no examples"),
        ((X, np.zeros(5)), {}, "as many in each"),
        (iter([(X, np.zeros(6)), (with_nan(X), np.zeros(6))]), {}, "NaN or an infinity"),
        (X[:, :9], {}, r"does not fit model 'small'.*\(1, 9\)"),
        (7, {}, "must be arrays"),
        (X, {"samples": 0}, "samples=0"),
        (X, {"reference": keras.Sequential([keras.Input((16,)), keras.layers.Dense(2, name="z")])},
         "share no quantized layer"),
        (X, {"reference": keras.Sequential([keras.Input((16,)),
                                            keras.layers.EinsumDense("ab,bc->ac", 7, name="a")])},
         "no twin"),
    ],
    ids=["no rows", "no batches", "targets", "a late NaN", "shape", "no data", "samples",
         "other names", "another layer"],
)  # fmt: skip
def test_bad_input(data, options, message):
    qat = keras_bitnet.quantize_model(float_model(), verbose=0)
    with pytest.raises(ValueError, match=message):
        report(qat, data, **options)


def test_a_model_that_makes_an_infinity():
    model = float_model()
    model.layers[1].kernel.assign(np.full((24, 5), 3e38, "float32"))
    with pytest.raises(ValueError, match="makes a NaN or an infinity of `data`"):
        report(keras_bitnet.quantize_model(model, "int8", verbose=0), X, reference=model)


def test_packed_models_need_a_float_reference(rng):
    x = rng.normal(size=(4, 16)).astype("float32")
    packed = keras_bitnet.pack_model(
        keras_bitnet.quantize_model(float_model(), "int8", verbose=0), verbose=0
    )
    with pytest.raises(ValueError, match="give the float model as `reference`"):
        report(packed, x)
    with pytest.raises(ValueError, match="must be a float model"):
        report(packed, x, reference=packed)


def test_a_learned_scale_of_a_single_layer(rng):
    layer = BitLinear(6, weight_quantizer=Int4(scale="learned"), name="one")
    model = keras.Sequential([keras.Input((16,)), layer])
    layer.kernel_log2_scale.assign(layer.kernel_log2_scale + 0.5)
    (row,) = report(model, rng.normal(size=(4, 16)).astype("float32")).layers
    kernel = to_numpy(layer.kernel)
    error = to_numpy(layer.fake_quantized_matrix()) - kernel
    assert row.path == "one"
    assert row.weight.sqnr == pytest.approx(decibel(kernel, error), abs=1e-3)
