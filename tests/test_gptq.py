import keras
import numpy as np
import pytest
from helpers import relative_error, to_numpy

import keras_bitnet
from keras_bitnet.layers import BitConv2D, BitEinsumDense, BitEmbedding, BitLinear
from keras_bitnet.quantizers import Binary, Int2, Int4, Int8, Ternary
from keras_bitnet.transforms import gptq

QUANTIZERS = (
    Binary(),
    Ternary(),
    Ternary("absmedian", granularity="channel"),
    Int2(),
    Int2(levels="integer", group_size=32),
    Int4(),
    Int4(group_size=64),
    Int8(granularity="tensor"),
)


def related(rng, rows, channels):
    """Inputs most of which follow from a few."""
    few = rng.normal(size=(rows, channels // 8)) @ rng.normal(size=(channels // 8, channels))
    return (few + 0.3 * rng.normal(size=(rows, channels))).astype("float32")


def float_model(layer, x):
    layer.activation_quantizer = None
    return keras.Sequential([keras.Input(x.shape[1:]), layer])


def adjusted(model, x, **options):
    return keras_bitnet.calibrate(model, x, rounding="gptq", verbose=0, **options)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_outputs_stay_nearer_than_with_each_weight_rounded_by_itself(quantizer, rng):
    x = related(rng, 512, 72)
    model = float_model(BitLinear(24, weight_quantizer=quantizer), x)
    wanted = x @ to_numpy(model.layers[0].kernel)
    nearest = to_numpy(keras_bitnet.pack_model(model, verbose=0)(x))
    found = adjusted(model, x)
    outputs = to_numpy(found(x))
    assert np.square(outputs - wanted).sum() < 0.3 * np.square(nearest - wanted).sum()
    assert found.layers[0].weight_quantizer.learned
    packed = keras_bitnet.pack_model(found, verbose=0)
    assert relative_error(to_numpy(packed(x)), outputs) < 1e-5


def test_levels_are_those_of_the_surgeon_one_input_at_a_time(rng):
    """Optimal brain surgery as it is written down, in float64, without factors or blocks."""
    k, n, damping = 200, 5, 0.02
    x = related(rng, 400, k)
    x[:, 7] = 0
    weight, quantizer = rng.normal(size=(k, n)).astype("float32"), Int4("learned", group_size=64)
    moments = (x.T @ x).astype("float64")
    levels, scale = gptq.rounded(weight, moments, quantizer, damping)
    order = np.argsort(-np.diag(moments), kind="stable")
    moments[7, 7] = np.diag(moments).mean()
    inverse = np.linalg.inv(moments + np.eye(k) * damping * np.diag(moments).mean())
    step, left = np.repeat(scale, 64, axis=0)[:k].astype("float64"), weight.astype("float64")
    wanted = np.zeros((k, n))
    for i in order:
        wanted[i] = np.clip(np.rint(left[i] / step[i]), -7, 7)
        error = (left[i] - wanted[i] * step[i]) / inverse[i, i]
        left -= np.outer(inverse[:, i], error)
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    assert (levels != wanted).mean() < 0.005  # a weight between two levels may take either
    np.testing.assert_array_equal(levels[7], np.clip(np.rint(weight[7] / step[7]), -7, 7))


@pytest.mark.parametrize(
    "arguments", [{"kept_channels": 3}, {"smoothing": 0.5}, {"rotation": "hadamard"}], ids=str
)
def test_with_treated_inputs_and_static_scales(arguments, rng, tmp_path):
    x = related(rng, 256, 128)
    x[:, [5, 60, 100]] *= 20
    layer = BitLinear(16, weight_quantizer="int4", norm="rms", **arguments)
    model = keras.Sequential([keras.Input((128,)), layer])
    found = adjusted(model, x)
    layer = found.layers[0]
    if layer.kept_channels:
        rows = to_numpy(layer.kept_indices)
        np.testing.assert_array_equal(rows, [5, 60, 100])
        kernel = to_numpy(model.layers[0].kernel)
        np.testing.assert_array_equal(to_numpy(layer.kernel)[rows], kernel[rows])
    packed = keras_bitnet.pack_model(found, verbose=0)
    assert relative_error(to_numpy(packed(x)), to_numpy(found(x))) < 1e-5
    packed.save(tmp_path / "packed.keras")
    again = keras_bitnet.load_model(tmp_path / "packed.keras")
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(packed(x)))


@pytest.mark.parametrize("kind", ["convolution", "einsum"])
def test_other_layers(kind, rng):
    options = {"weight_quantizer": Int2("absmax"), "activation_quantizer": None}
    if kind == "convolution":
        layer = BitConv2D(8, 3, **options)
        x = rng.normal(size=(16, 9, 9, 4)).cumsum(1).cumsum(2).astype("float32")
    else:
        layer = BitEinsumDense("abc,cde->abde", (None, 4, 4), **options)
        x = related(rng, 576, 36).reshape(64, 9, 36)
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    nearest = to_numpy(keras_bitnet.pack_model(model, verbose=0)(x))
    found = to_numpy(keras_bitnet.pack_model(adjusted(model, x), verbose=0)(x))
    layer.quantization_strength.assign(0)
    wanted = to_numpy(layer(x))
    assert np.square(found - wanted).sum() < 0.5 * np.square(nearest - wanted).sum()


def test_later_layers_see_what_was_rounded_before(rng, monkeypatch):
    x = related(rng, 256, 64)
    first = BitLinear(64, "relu", weight_quantizer="binary", activation_quantizer=None, name="a")
    second = BitLinear(8, weight_quantizer="int2", activation_quantizer=None, name="b")
    model = keras.Sequential([keras.Input((64,)), first, second])
    moments = []

    def round_kernel(layer, seen, damping):
        moments.append(seen)
        rounds(layer, seen, damping)

    rounds = gptq.round_kernel
    monkeypatch.setattr(gptq, "round_kernel", round_kernel)
    hidden = np.maximum(x @ to_numpy(first.kernel), 0)
    adjusted(model, x)
    assert relative_error(moments[1], hidden.T @ hidden) < 1e-5
    monkeypatch.setattr(gptq, "_MEMORY", 4 * 64 * 64)
    found = adjusted(model, x)
    hidden = np.maximum(x @ to_numpy(found.layers[0].kernel), 0)
    assert relative_error(moments[3], hidden.T @ hidden) < 1e-5
    with pytest.raises(ValueError, match="read 2 times"):
        adjusted(model, ((x[i : i + 64],) for i in range(0, 256, 64)))


def test_trains_further_and_leaves_the_strength_alone(rng):
    x, y = related(rng, 128, 32), rng.normal(size=(128, 4)).astype("float32")
    layer = BitLinear(4, weight_quantizer="ternary", quantization_strength=0.25)
    found = adjusted(keras.Sequential([keras.Input((32,)), layer]), x, static=False)
    assert float(to_numpy(found.layers[0].quantization_strength)) == 0.25
    found.compile(keras.optimizers.Adam(0.01), "mse")
    losses = found.fit(x, y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_inputs_that_are_always_zero(rng):
    model = float_model(BitLinear(4, weight_quantizer="int4"), np.zeros((8, 32), "float32"))
    found = adjusted(model, np.zeros((8, 32), "float32"))
    x = rng.normal(size=(5, 32)).astype("float32")
    assert relative_error(to_numpy(found(x)), x @ to_numpy(model.layers[0].kernel)) < 0.15


def test_refusals(rng):
    class Other(Int4):
        def round_levels(self, ratio):
            return super().round_levels(ratio * 0.9)

    x = rng.normal(size=(16, 32)).astype("float32")
    model = float_model(BitLinear(4, weight_quantizer="int4", name="head"), x)
    with pytest.raises(ValueError, match="'head' is packed"):
        adjusted(keras_bitnet.pack_model(model, verbose=0), x)
    with pytest.raises(ValueError, match="'odd' has Other"):
        adjusted(float_model(BitLinear(4, weight_quantizer=Other(), name="odd"), x), x)
    with pytest.raises(ValueError, match="`rounding` must be one of"):
        keras_bitnet.calibrate(model, x, rounding="awq", verbose=0)
    with pytest.raises(ValueError, match="`damping` must be"):
        adjusted(model, x, damping=0.0)
    tokens = keras.Sequential([keras.Input((3,), dtype="int32"), BitEmbedding(10, 4)])
    with pytest.raises(ValueError, match="found no layer to calibrate"):
        adjusted(tokens, np.zeros((2, 3), "int32"))
