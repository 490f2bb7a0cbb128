import keras
import numpy as np
import pytest
from helpers import BACKEND, KERAS, gradient, packed_twin, relative_error, to_numpy
from keras import ops

from keras_bitnet import calibrate, pack_model, quantize_model, summary
from keras_bitnet.layers import BitConv1D, BitConv2D, BitConv3D, BitDepthwiseConv2D
from keras_bitnet.quantizers import ActivationInt8, Int4, StaticActivation

# (layer, arguments, spatial sizes); channels are 4
CASES = [
    (BitConv1D, {"kernel_size": 3}, (9,)),
    (BitConv1D, {"kernel_size": 4, "padding": "causal", "dilation_rate": 2}, (9,)),
    (BitConv1D, {"kernel_size": 3, "padding": "same", "strides": 2, "groups": 2}, (10,)),
    (BitConv2D, {"kernel_size": 3, "padding": "same", "strides": 2}, (7, 8)),
    (BitConv2D, {"kernel_size": (2, 3), "dilation_rate": (2, 1)}, (7, 6)),
    (BitConv2D, {"kernel_size": 1, "strides": 2}, (7, 6)),
    (BitConv2D, {"kernel_size": 3, "padding": "SAME", "groups": 4, "use_bias": False}, (5, 6)),
    (BitConv3D, {"kernel_size": (1, 2, 3), "padding": "same", "strides": (1, 2, 1)}, (3, 4, 5)),
]


FLIPS = 2e-2  # behind another quantized layer one code may be the next one


def stock(cls):
    return getattr(keras.layers, cls.__name__[3:])


def made(cls, arguments, shape, rng, **more):
    """A layer, its Keras twin with the same weights, and inputs."""
    first = arguments.get("data_format") == "channels_first"
    input_shape = (2, 4, *shape) if first else (2, *shape, 4)
    twin = stock(cls)(8, **arguments, bias_initializer="random_normal")
    layer = cls(8, **arguments, **more)
    twin.build(input_shape)
    layer.build(input_shape)
    layer.take_weights(twin)
    return layer, twin, rng.normal(size=input_shape).astype("float32")


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_strength_zero_is_its_keras_twin_and_strength_one_packs(case, data_format, rng):
    cls, arguments, shape = case
    layer, twin, x = made(cls, {**arguments, "data_format": data_format}, shape, rng)
    layer.quantization_strength.assign(0.0)
    y = to_numpy(layer(x))
    assert layer.compute_output_shape(x.shape) == y.shape
    if BACKEND == "tensorflow" and data_format == "channels_first":
        axes = (0, *range(2, x.ndim), 1)  # TensorFlow has no such convolution on a CPU
        last, *_ = made(cls, {**arguments, "data_format": "channels_last"}, shape, rng)
        last.take_weights(twin)
        last.quantization_strength.assign(0.0)
        wanted = np.moveaxis(to_numpy(last(np.transpose(x, axes))), -1, 1)
    else:
        wanted = to_numpy(twin(x))
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    layer.quantization_strength.assign(1.0)
    y = to_numpy(layer(x))
    assert relative_error(y, wanted) > 1e-2
    packed = packed_twin(layer, x.shape)
    assert relative_error(to_numpy(packed(x)), y) < 1e-5
    again = cls.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


@pytest.mark.parametrize(
    "arguments",
    [
        {"activation_quantizer": None, "norm": "rms", "norm_position": "post"},
        {"activation_quantizer": None, "norm": "rms"},
        {"activation_quantizer": "int4", "rotation": "hadamard", "data_format": "channels_last"},
        {"activation_quantizer": ActivationInt8(granularity="tensor")},
        {"weight_quantizer": Int4(group_size=32, scale="learned"), "norm": "rms"},
        {"norm": "layer", "norm_position": "post", "groups": 2},
        {"lora_rank": 2},
    ],
    ids=str,
)
def test_options_pack_alike(arguments, rng):
    layer = BitConv2D(6, 3, padding="same", strides=2, **arguments)
    x = rng.normal(size=(2, 7, 7, 4)).astype("float32")
    y = to_numpy(layer(x))
    packed = packed_twin(layer, x.shape)
    if layer.lora_enabled:
        layer.lora_kernel_b.assign(rng.normal(size=layer.lora_kernel_b.shape))
        for name in ("lora_kernel_a", "lora_kernel_b"):
            getattr(packed, name).assign(getattr(layer, name))
        y = to_numpy(layer(x))
    assert relative_error(to_numpy(packed(x)), y) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_float_activations_convolve_as_patches_do(case, rng):
    cls, arguments, shape = case
    layer, _, x = made(cls, arguments, shape, rng, activation_quantizer=None)
    wanted = to_numpy(layer.product(layer.patches(x), layer.bias))
    np.testing.assert_allclose(to_numpy(layer(x)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images", [1, 4])  # 49 and 196 output positions: a product, a convolution
def test_packed_float_activations_of_few_and_of_many_positions(images, rng):
    layer, _, x = made(BitConv2D, {"kernel_size": 3}, (9, 9), rng, activation_quantizer=None)
    packed = packed_twin(layer, x.shape)
    x = np.resize(x, (images, *x.shape[1:]))
    assert packed._few_positions(ops.convert_to_tensor(x)) == (images == 1)
    assert relative_error(to_numpy(packed(x)), to_numpy(layer(x))) < 1e-5


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_one_scale_convolves_as_patches_do(case, strength, rng):
    cls, arguments, shape = case
    for quantizer in (ActivationInt8("tensor"), StaticActivation()):
        options = {"activation_quantizer": quantizer, "quantization_strength": strength}
        layer, _, x = made(cls, arguments, shape, rng, **options)
        if layer.static:
            layer.activation_scale.assign(0.01)
        x.reshape(-1)[0] = np.nan if strength == 1 else 3  # an infinity or NaN shows in its patches
        wanted = to_numpy(layer.product(layer.patches(x), layer.bias))
        np.testing.assert_allclose(to_numpy(layer(x)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("quantizer", [ActivationInt8(), ActivationInt8("tensor"), None])
def test_a_batch_without_images(quantizer, packed):
    images, wanted = np.ones((0, 9, 9, 4), "float32"), (0, 7, 7, 8)
    layer = BitConv2D(8, 3, packed=packed, activation_quantizer=quantizer)
    if BACKEND != "torch" and KERAS < (3, 14):
        pytest.skip("Keras 3.13 refuses such a batch on JAX and TensorFlow")
    found = ops.conv(ops.convert_to_tensor(images), ops.ones((3, 3, 4, 8))).shape
    if layer._convolves and tuple(found) != wanted:
        pytest.skip("the backend gives such a batch back as it is: oneDNN does on some CPUs")
    layer.build((None, 9, 9, 4))
    assert tuple(layer(images).shape) == wanted


@pytest.mark.skipif(BACKEND != "jax", reason="`jax.export`")
@pytest.mark.parametrize("strides", [1, 2])
def test_jax_exports_images_of_unknown_size(strides, rng):
    import jax
    from jax import export

    layer = BitConv2D(2, 3, strides, padding="same")
    x = rng.normal(size=(2, 5, 6, 3)).astype("float32")
    wanted = to_numpy(layer(x))
    sizes = (2, *export.symbolic_shape("height, width"), 3)
    exported = export.export(jax.jit(layer))(jax.ShapeDtypeStruct(sizes, "float32"))
    assert relative_error(exported.call(x), wanted) < 1e-6


def test_a_patch_is_a_token_and_padding_is_zero():
    layer = BitConv1D(1, 3, padding="same", use_bias=False, kernel_initializer="ones")
    x = np.array([[[1.0], [-2.0], [100.0], [0.4]]], "float32")
    y = to_numpy(layer(x)).ravel()
    wanted = []
    for patch in ([0, 1, -2], [1, -2, 100], [-2, 100, 0.4], [100, 0.4, 0]):
        scale = np.abs(patch).max() / 127
        wanted.append((np.rint(np.array(patch) / scale) * scale).sum())
    np.testing.assert_allclose(y, wanted, rtol=1e-5)


def test_gradient_is_that_of_the_convolution_with_the_quantized_kernel(rng):
    layer, _, x = made(BitConv2D, {"kernel_size": 3}, (5, 5), rng, activation_quantizer=None)
    kernel = layer.matrix_to_kernel(layer.fake_quantized_matrix())
    ahead = ops.convert_to_tensor(rng.normal(size=(2, 3, 3, 8)).astype("float32"))
    actual = gradient(lambda v: ops.sum(layer(v) * ahead), x)
    wanted = gradient(lambda v: ops.sum(ops.conv(v, kernel) * ahead), x)
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


def test_a_network_trains_packs_saves_and_takes_any_size(rng, tmp_path):
    x = rng.normal(size=(64, 8, 8, 1)).astype("float32")
    y = x[:, 2:6, 2:6].mean((1, 2, 3))
    stock_model = keras.Sequential(
        [
            keras.Input((None, None, 1)),
            keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu"),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1),
        ]
    )
    spec = {"norm": "rms", "norm_position": "post", "quantization_strength": 1.0}
    model = quantize_model(stock_model, spec, filters="conv", verbose=0)
    assert [type(layer) for layer in model.layers[:2]] == [BitConv2D, BitConv2D]
    model.compile(keras.optimizers.Adam(0.02), "mse")
    losses = model.fit(x, y, epochs=8, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    packed = pack_model(model, verbose=0)
    wanted = to_numpy(model(x))
    assert relative_error(to_numpy(packed(x)), wanted) < FLIPS
    packed.save(tmp_path / "p.keras")
    again = keras.models.load_model(tmp_path / "p.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), packed.predict(x, verbose=0))
    np.testing.assert_allclose(
        again.predict(x[:, :6], verbose=0), to_numpy(packed(x[:, :6])), rtol=1e-4, atol=1e-5
    )


def test_calibration_finds_static_scales_of_patches(rng):
    x = rng.normal(size=(16, 8, 8, 2)).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            BitDepthwiseConv2D(3, padding="same"),
            BitConv2D(4, 3, strides=2, weight_quantizer="int8"),
        ]
    )
    model = calibrate(model, x, verbose=0)
    depthwise, conv = model.layers
    assert conv.static
    assert not depthwise.static
    largest = np.abs(to_numpy(conv.patches(depthwise(x)))).max()
    np.testing.assert_allclose(float(conv.activation_scale), largest / 127, rtol=1e-4)
    inputs = depthwise(x)
    y = to_numpy(conv(inputs))
    packed = pack_model(model, verbose=0).layers[1]
    assert relative_error(to_numpy(packed(inputs)), y) < 1e-5


def test_summary_counts_as_for_the_twin():
    for arguments in ({"padding": "same", "groups": 2}, {"strides": 2}):
        counts = []
        for cls in (keras.layers.Conv2D, BitConv2D):
            model = keras.Sequential([keras.Input((9, 9, 4)), cls(6, 3, **arguments)])
            counts.append(summary(model, as_data=True).totals.macs)
        assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitConv2D(0, 3), "Received: filters=0"),
        (lambda: BitConv2D(6, 3, groups=4), "filters=6, groups=4"),
        (lambda: BitConv2D(6, (3, 3, 3)), r"kernel_size=\(3, 3, 3\)"),
        (lambda: BitConv2D(6, 3, strides=0), "strides=0"),
        (lambda: BitConv2D(6, 3, padding="causal"), "padding='causal'"),
        (lambda: BitConv2D(6, 3, data_format="NCHW"), "data_format='NCHW'"),
        (lambda: BitConv1D(6, 3, strides=2, dilation_rate=2), "does not go with"),
        (lambda: BitConv2D(6, 3).build((None, 8, 8, None)), "must be known"),
        (lambda: BitConv2D(6, 9).build((None, 8, 8, 4)), "does not fit"),
        (lambda: BitConv2D(6, 3, groups=3).build((None, 8, 8, 4)), "groups=3"),
        (lambda: BitConv2D(6, 3).build((None, 8, 4)), "2 spatial axes"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
