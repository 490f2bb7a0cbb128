import itertools

import keras
import numpy as np
import pytest
from helpers import BACKEND, gradient, relative_error, to_numpy
from keras import ops

import keras_bitnet
from keras_bitnet import quantizers
from keras_bitnet.layers import BitConv2D, BitDepthwiseConv2D, BitEinsumDense, BitLinear
from keras_bitnet.ops import hadamard
from keras_bitnet.quantizers import StaticActivation

TREATMENTS = [
    {"rotation": "hadamard"},
    {"smoothing": 0.5},
    {"smoothing": 0.5, "norm": "rms"},
    {"smoothing": 0.5, "norm": "layer", "rotation": "hadamard"},
    {"kept_channels": 3, "kept_bits": 16},
    {"kept_channels": 3, "kept_bits": 8, "rotation": "hadamard", "smoothing": 0.3},
]


def with_outliers(rng, shape, channels=(3, 17), size=30):
    x = rng.normal(size=shape).astype("float32")
    x[..., list(channels)] *= size
    return x


def treated(model, rng):
    """Gives smoothing factors and kept channels that are not the initial ones."""
    for layer in model.layers:
        if layer.smoothing is not None:
            layer.divide_inputs(rng.uniform(0.5, 3, size=layer.in_features))
        if layer.kept_channels:
            layer.kept_indices.assign(rng.permutation(layer.in_features)[: layer.kept_channels])
        if layer.static:
            layer.activation_scale.assign(0.07)


@pytest.mark.parametrize("width", [1, 7, 100, 128, 300])
def test_hadamard_is_an_orthogonal_involution_of_any_width(width, rng):
    x = rng.normal(size=(3, 2, width)).astype("float32")
    y = to_numpy(hadamard(x))
    np.testing.assert_allclose(to_numpy(hadamard(y)), x, atol=1e-5)
    np.testing.assert_allclose((y**2).sum(-1), (x**2).sum(-1), rtol=1e-5)
    first = 1 << (width.bit_length() - 1) if width < 128 else 128
    matrix = np.ones((1, 1))
    while len(matrix) < first:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    signs = np.array([(-1) ** sum(d == "11" for d in pairs(f"{i:b}")) for i in range(first)])
    wanted = (signs * x[..., :first]) @ (matrix / np.sqrt(first)) * signs
    np.testing.assert_allclose(y[..., :first], wanted, atol=1e-5)


def pairs(digits):
    """Neighbouring digits, two by two: `"1101"` gives 11, 10, 01."""
    return map("".join, itertools.pairwise(digits))


@pytest.mark.parametrize("width", [16, 128, 384])
def test_hadamard_makes_no_outlier_of_a_mean(width):
    """The matrix without signs makes `sqrt(block)` of it."""
    assert np.abs(to_numpy(hadamard(np.ones((1, width), "float32")))).max() < 1.415


def test_rotation_costs_inputs_without_outliers_nothing(rng):
    """After a ReLU the matrix without signs would lose 8 dB: the mean would be an outlier."""
    x = np.maximum(rng.normal(size=(200, 256)), 0).astype("float32")
    quantizer = quantizers.ActivationInt4()
    error = np.linalg.norm(to_numpy(quantizer(x)) - x)
    assert np.linalg.norm(to_numpy(hadamard(quantizer(hadamard(x)))) - x) < 1.1 * error


def test_hadamard_gradient_and_arguments(rng):
    x, g = rng.normal(size=(2, 3, 20)).astype("float32")
    found = gradient(lambda v: ops.sum(ops.multiply(hadamard(v), g)), x)
    np.testing.assert_allclose(found, to_numpy(hadamard(g)), atol=1e-5)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(x, block=12)


@pytest.mark.parametrize("arguments", TREATMENTS)
def test_strength_zero_is_the_float_layer(arguments, rng):
    layer = BitLinear(9, quantization_strength=0.0, **arguments)
    plain = keras.Sequential([keras.Input((40,))])
    if "norm" in arguments:
        norms = {"rms": keras.layers.RMSNormalization, "layer": keras.layers.LayerNormalization}
        plain.add(norms[arguments["norm"]](epsilon=1e-5))
    dense = keras.layers.Dense(9, bias_initializer="ones")
    plain.add(dense)
    x = with_outliers(rng, (6, 40))
    model = keras.Sequential([keras.Input((40,)), layer])
    layer.take_weights(dense)
    wanted = to_numpy(plain(x))
    assert relative_error(to_numpy(model(x)), wanted) < 1e-5
    treated(model, rng)
    assert relative_error(to_numpy(model(x)), wanted) < 1e-5


@pytest.mark.parametrize(("weight", "activation"), [("binary", "static_int8"), ("int4", "int4")])
@pytest.mark.parametrize("arguments", TREATMENTS[1:])
def test_packed_is_what_was_trained_and_unpacks(arguments, weight, activation, tmp_path, rng):
    layer = BitLinear(
        9, weight_quantizer=weight, activation_quantizer=activation, name="layer", **arguments
    )
    model = keras.Sequential([keras.Input((40,)), layer])
    treated(model, rng)
    x = with_outliers(rng, (6, 40))
    wanted = to_numpy(model(x))
    packed = keras_bitnet.pack_model(model, verbose=0)
    assert relative_error(to_numpy(packed(x)), wanted) < 1e-5
    unpacked = keras_bitnet.unpack_model(packed, verbose=0)
    assert relative_error(to_numpy(unpacked(x)), wanted) < 1e-5
    if weight == "int4":
        packed.save(tmp_path / "p.keras")
        again = keras.models.load_model(tmp_path / "p.keras")
        np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(packed(x)))
        assert again.layers[0].get_config() == packed.layers[0].get_config()


def test_einsum_layers_are_treated_alike(rng):
    layer = BitEinsumDense(
        "abc,cde->abde", (None, 4, 6), activation_quantizer="int4", rotation="hadamard",
        kept_channels=2,
    )  # fmt: skip
    model = keras.Sequential([keras.Input((3, 24)), layer])
    x = with_outliers(rng, (2, 3, 24))
    packed = keras_bitnet.pack_model(model, verbose=0)
    assert relative_error(to_numpy(packed(x)), to_numpy(model(x))) < 1e-5


def test_each_treatment_makes_four_bits_better(rng):
    x = with_outliers(rng, (256, 128))
    dense = keras.layers.Dense(64)
    wanted = to_numpy(dense(x))

    def error(**arguments):
        layer = BitLinear(64, weight_quantizer="int8", activation_quantizer="int4", **arguments)
        model = keras.Sequential([keras.Input((128,)), layer])
        layer.take_weights(dense)
        if len(arguments) > 0 and "rotation" not in arguments:
            model = keras_bitnet.calibrate(model, x, static=False, verbose=0)
        return np.linalg.norm(to_numpy(model(x)) - wanted) / np.linalg.norm(wanted)

    plain = error()
    assert error(rotation="hadamard") < 0.6 * plain
    assert error(smoothing=0.5) < 0.6 * plain
    assert error(kept_channels=2) < 0.2 * plain
    assert error(kept_channels=2, kept_bits=8) < 0.2 * plain


@pytest.mark.parametrize("jit_compile", [False] if BACKEND == "torch" else [False, True])
def test_the_scale_follows_training_and_inference_when_asked(jit_compile, rng):
    x = rng.normal(size=(64, 8)).astype("float32")
    quantizer = StaticActivation(8, momentum=0.5)
    layer = BitLinear(1, activation_quantizer=quantizer)
    model = keras.Sequential([keras.Input((8,)), layer])
    model.compile("sgd", "mse", jit_compile=jit_compile)
    assert not layer.calibrated
    model.predict(x, verbose=0)
    assert not layer.calibrated
    model.fit(x, x[:, :1], batch_size=32, epochs=1, shuffle=False, verbose=0)
    first, second = np.abs(x[:32]).max() / 127, np.abs(x[32:]).max() / 127
    scale = (first + second) / 2
    np.testing.assert_allclose(float(layer.activation_scale), scale, rtol=1e-5)
    model.evaluate(4 * x, x[:, :1], verbose=0)
    model.predict(4 * x, verbose=0)
    np.testing.assert_allclose(float(layer.activation_scale), scale, rtol=1e-5)
    packed = keras_bitnet.pack_model(model, verbose=0)
    layer = packed.layers[0]
    packed.predict(4 * x, verbose=0)
    np.testing.assert_allclose(float(layer.activation_scale), scale, rtol=1e-5)
    layer.follow_in_inference.assign(True)  # no retrace
    packed.predict(4 * x, verbose=0, batch_size=64)
    scale = (scale + 4 * max(first, second)) / 2
    np.testing.assert_allclose(float(layer.activation_scale), scale, rtol=1e-5)
    x[0, 0] = np.nan
    packed.predict(x, verbose=0, batch_size=64)
    np.testing.assert_allclose(float(layer.activation_scale), scale, rtol=1e-5)


def test_training_can_be_said_at_the_call(rng):
    layer = BitLinear(1, activation_quantizer="static_int8")
    x = rng.normal(size=(3, 8)).astype("float32")
    layer(x)
    assert not layer.calibrated
    layer.product(ops.convert_to_tensor(x))
    assert not layer.calibrated
    layer(x, training=True)
    assert layer.calibrated


def test_static_activations_need_a_scale_to_be_packed():
    model = keras.Sequential([keras.Input((8,)), BitLinear(1, activation_quantizer="static_int4")])
    with pytest.raises(ValueError, match="no scale for them yet"):
        keras_bitnet.pack_model(model, verbose=0)


def test_static_quantizer_config():
    quantizer = StaticActivation(4, momentum=0.9)
    assert quantizers.get_activation(quantizers.serialize(quantizer)) == quantizer
    assert quantizers.get_activation("static_int8") == StaticActivation(8, momentum=0.99)
    assert "momentum=0.9" in repr(quantizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotation": "fourier"}, "`rotation` must be one of"),
        ({"smoothing": 1.5}, "smoothing=1.5"),
        ({"kept_channels": 1.5}, "at least 0. Received: kept_channels=1.5"),
        ({"kept_channels": True}, "at least 0. Received: kept_channels=True"),
        ({"kept_channels": 2, "kept_bits": 4}, "`kept_bits` must be one of"),
        ({"kept_channels": 8}, "has 8 inputs and cannot keep as many"),
        ({"activation_quantizer": "static_int3"}, "static_int8"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras.Sequential([keras.Input((8,)), BitLinear(3, **arguments)])


@pytest.mark.parametrize(
    "arguments", [{"bits": 3}, {"momentum": 1.0}, {"momentum": -0.1}, {"epsilon": 0}]
)
def test_bad_static_quantizer(arguments):
    with pytest.raises(ValueError, match="Received"):
        StaticActivation(**arguments)


def test_lora_and_smoothing_in_a_norm(rng):
    layer = BitLinear(4, norm="rms", smoothing=0.5, quantization_strength=0.0)
    model = keras.Sequential([keras.Input((16,)), layer])
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(rng.normal(size=(2, 4)))
    x = rng.normal(size=(3, 16)).astype("float32")
    wanted = to_numpy(model(x))
    treated(model, rng)
    assert relative_error(to_numpy(model(x)), wanted) < 1e-5


def test_stock_weights_load_into_the_treated_basis(rng):
    dense = keras.layers.Dense(5)
    x = rng.normal(size=(3, 8)).astype("float32")
    wanted = to_numpy(dense(x))
    layer = BitLinear(5, quantization_strength=0.0, rotation="hadamard", smoothing=0.5)
    model = keras.Sequential([keras.Input((8,)), layer])
    treated(model, rng)
    store: dict = {}
    dense.save_own_variables(store)
    layer.load_own_variables({k: to_numpy(v) for k, v in store.items()})
    assert relative_error(to_numpy(layer(x)), wanted) < 1e-5


def test_treated_layers_train(rng):
    x = rng.normal(size=(128, 16)).astype("float32")
    layers = [
        BitLinear(32, "relu", norm="rms", activation_quantizer="int4", rotation="hadamard"),
        BitLinear(1, activation_quantizer="static_int8", kept_channels=2),
    ]
    model = keras.Sequential([keras.Input((16,)), *layers])
    model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=BACKEND != "torch")
    losses = model.fit(x, x[:, :1], epochs=8, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: BitLinear(3, norm="rms"), (6,)),
        (lambda: BitLinear(3, activation_quantizer=None), (6,)),
        (lambda: BitEinsumDense("abc,cd->abd", (None, 3)), (4, 6)),
        (lambda: BitConv2D(3, 2), (4, 4, 6)),
        (lambda: BitConv2D(3, 2, activation_quantizer=None), (4, 4, 6)),
        (lambda: BitDepthwiseConv2D(2), (4, 4, 6)),
    ],
)
def test_integer_inputs_are_taken_as_floats(make, shape, dtype, rng):
    """As in `Dense`; pixels are often bytes."""
    x = (rng.integers(0, 2, (2, *shape)) * rng.integers(1, 200, shape)).astype(dtype)
    model = keras.Sequential([keras.Input(shape, dtype=dtype), make()])
    packed = keras_bitnet.pack_model(model, verbose=0)
    expected = to_numpy(model(x.astype("float32")))
    for one in (model, packed):
        y = one.layers[-1](x)
        assert keras.backend.standardize_dtype(y.dtype) == "float32"
        np.testing.assert_allclose(to_numpy(y), expected, atol=1e-5 * np.abs(expected).max())
