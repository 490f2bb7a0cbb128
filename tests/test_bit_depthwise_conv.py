import keras
import numpy as np
import pytest
from helpers import BACKEND, gradient, packed_twin, relative_error, to_numpy
from keras import ops

from keras_bitnet import pack_model, quantize_model, summary
from keras_bitnet.layers import (
    BitDepthwiseConv1D,
    BitDepthwiseConv2D,
    BitSeparableConv1D,
    BitSeparableConv2D,
)
from keras_bitnet.ops import layout
from keras_bitnet.quantizers import ActivationInt4, ActivationInt8

CASES = [
    (BitDepthwiseConv1D, {"kernel_size": 3, "padding": "same", "depth_multiplier": 2}, (9,)),
    (BitDepthwiseConv2D, {"kernel_size": 3, "padding": "same", "strides": 2}, (7, 8)),
    (BitDepthwiseConv2D, {"kernel_size": (2, 3), "dilation_rate": (2, 1)}, (7, 6)),
    (BitSeparableConv1D, {"filters": 5, "kernel_size": 3, "strides": 2}, (9,)),
    (BitSeparableConv2D, {"filters": 5, "kernel_size": 3, "padding": "same",
                          "depth_multiplier": 2, "activation": "relu"}, (6, 7)),
]  # fmt: skip


def names(case):
    return f"{case[0].__name__}-{case[1]}"


def stock(case):
    cls, arguments, shape = case
    layer = getattr(keras.layers, cls.__name__[3:])(**arguments, bias_initializer="ones")
    return keras.Sequential([keras.Input((*shape, 4)), layer])


@pytest.mark.parametrize("case", CASES, ids=names)
def test_strength_zero_is_the_twin_and_strength_one_packs(case, rng):
    twin = stock(case)
    x = rng.normal(size=(2, *case[2], 4)).astype("float32")
    spec = {"weight_quantizer": "int4", "quantization_strength": 0.0, "norm": None}
    model = quantize_model(twin, spec, verbose=0)
    layer = model.layers[0]
    assert type(layer) is case[0]
    np.testing.assert_allclose(to_numpy(model(x)), to_numpy(twin(x)), rtol=1e-4, atol=1e-5)
    assert type(layer).from_config(layer.get_config()).get_config() == layer.get_config()
    inner = [layer] if hasattr(layer, "window") else [layer.depthwise, layer.pointwise]
    for part in inner:
        part.quantization_strength.assign(1.0)
    y = to_numpy(model(x))
    assert relative_error(y, to_numpy(twin(x))) > 1e-3
    packed = pack_model(model, verbose=0)
    error = relative_error(to_numpy(packed(x)), y)
    assert error < (1e-5 if len(inner) == 1 else 2e-2)  # behind the first layer codes may flip
    assert type(packed.layers[0]) is case[0]
    assert not any(v.path.endswith("/kernel") for v in packed.variables)
    counts = [summary(m, as_data=True).totals for m in (twin, model, packed)]
    assert counts[0].macs == counts[1].macs == counts[2].macs > 0
    assert counts[1].bytes_packed == counts[2].bytes_stored


@pytest.mark.parametrize("cls", [BitDepthwiseConv2D, BitSeparableConv2D])
def test_channels_first(cls, rng):
    arguments = {"kernel_size": 3, "padding": "same", "strides": 2}
    if cls is BitSeparableConv2D:
        arguments["filters"] = 5
    last, first = (cls(**arguments, data_format=f"channels_{end}") for end in ("last", "first"))
    x = rng.normal(size=(2, 7, 8, 4)).astype("float32")
    wanted = to_numpy(last(x))
    first.build((2, 4, 7, 8))
    for source, target in zip(last.variables, first.variables, strict=True):
        target.assign(source)
    y = to_numpy(first(np.moveaxis(x, -1, 1)))
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), wanted, rtol=1e-5, atol=1e-6)
    assert first.compute_output_shape((2, 4, 7, 8)) == y.shape


def test_all_channels_of_a_patch_share_a_scale_and_each_filter_has_one():
    layer = BitDepthwiseConv1D(2, use_bias=False, weight_quantizer="int8")
    x = np.array([[[1.0, 0.4], [0.3, 100.0], [0.2, 0.7]]], "float32")
    layer.build(x.shape)
    layer.kernel.assign(np.array([[[1.0], [0.5]], [[1.0], [0.5]]]))
    scale = 100 / 127
    wanted = np.rint(x[0, :2] / scale) * scale + np.rint(x[0, 1:] / scale) * scale
    np.testing.assert_allclose(to_numpy(layer(x))[0], wanted * [1, 0.5], rtol=1e-5)
    packed = packed_twin(layer, x.shape)
    assert tuple(packed.kernel_scale.shape) == (1, 2)
    assert tuple(packed.kernel_tiles.shape) == layout.tiles_shape(2, 2, 8)


def test_gradient_is_that_of_the_convolution_with_the_quantized_kernel(rng):
    layer = BitDepthwiseConv2D(3, depth_multiplier=2, activation_quantizer=None)
    x = rng.normal(size=(2, 5, 5, 4)).astype("float32")
    layer.build(x.shape)
    kernel = layer.matrix_to_kernel(layer.fake_quantized_matrix())
    ahead = ops.convert_to_tensor(rng.normal(size=(2, 3, 3, 8)).astype("float32"))
    actual = gradient(lambda v: ops.sum(layer(v) * ahead), x)
    wanted = gradient(lambda v: ops.sum(ops.depthwise_conv(v, kernel) * ahead), x)
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


def test_separable_trains_and_saves(rng, tmp_path):
    x = rng.normal(size=(64, 8, 8, 2)).astype("float32")
    y = x[..., 0].mean((1, 2))
    layers = [
        BitSeparableConv2D(8, 3, activation="relu", projection_norm="rms", name="sep"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input((8, 8, 2)), *layers])
    model.compile(keras.optimizers.Adam(0.02), "mse")
    losses = model.fit(x, y, epochs=8, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    packed = pack_model(model, verbose=0)
    packed.save(tmp_path / "p.keras")
    again = keras.models.load_model(tmp_path / "p.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), packed.predict(x, verbose=0))
    assert relative_error(to_numpy(packed(x)), to_numpy(model(x))) < 2e-2  # codes may flip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitDepthwiseConv2D(3, depth_multiplier=0), "depth_multiplier=0"),
        (lambda: BitDepthwiseConv2D(3, norm="rms"), "BitDepthwiseConv2D has no `norm`"),
        (lambda: BitDepthwiseConv2D(3).enable_lora(2), "has no LoRA"),
        (lambda: BitDepthwiseConv2D(3, lora_rank=2), "has no `lora_rank`"),
        (lambda: BitDepthwiseConv2D(3, rotation="hadamard"), "has no `rotation`"),
        (lambda: BitDepthwiseConv2D(3, kept_channels=1), "has no `kept_channels`"),
        (lambda: BitDepthwiseConv2D(3, activation_quantizer="static_int8"), "no static"),
        (lambda: BitDepthwiseConv2D(3, padding="causal"), "padding='causal'"),
        (lambda: BitSeparableConv2D(0, 3), "filters=0"),
        (lambda: BitSeparableConv2D(4, 9).build((None, 8, 8, 4)), "does not fit"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_a_batch_without_images(granularity):
    quantizer = ActivationInt8(granularity)
    layer = BitDepthwiseConv1D(3, depth_multiplier=2, activation_quantizer=quantizer)
    layer.build((None, 9, 4))
    assert tuple(layer(np.ones((0, 9, 4), "float32")).shape) == (0, 7, 8)


def test_a_patch_of_padding_alone_is_zero(rng):
    layer = BitDepthwiseConv1D(2, padding="same", dilation_rate=3)
    x = rng.normal(size=(1, 2, 4)).astype("float32")  # the first window looks at -1 and 2
    y = to_numpy(layer(x))
    np.testing.assert_array_equal(y[:, 0], 0)
    assert np.isfinite(y).all()
    assert y[:, 1].any()


class Rounded(ActivationInt8):
    """A quantizer with a formula of its own."""

    def _round(self, ratio):
        return ops.clip(ops.floor(ratio), -self.highest, self.highest)


@pytest.mark.parametrize(
    "quantizer", [ActivationInt8(), ActivationInt8("tensor"), ActivationInt4(), Rounded(), None]
)
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("stride", [1, 3])
def test_taps_are_quantized_as_their_patch_is(quantizer, strength, stride, rng):
    """Though no patch is made; with a step beyond the window some pixels are unseen."""
    options = {"activation_quantizer": quantizer, "quantization_strength": strength}
    layer = BitDepthwiseConv2D(2, stride, depth_multiplier=2, **options)
    x = rng.normal(size=(2, 7, 8, 4)).astype("float32")
    x[:, 2, 2] = 50  # seen by no window of the larger step
    y = to_numpy(layer(x))
    patches = layer.window.patches(ops.convert_to_tensor(x))
    if quantizer is not None:
        patches = quantizer.fake_quantize(patches, strength=np.float32(strength))
    patches = to_numpy(patches).reshape(*y.shape[:-1], 4, 4)
    kernel = to_numpy(layer.matrix_in_use()).reshape(4, 4, 2)
    wanted = np.einsum("bhwtc,tcm->bhwcm", patches, kernel).reshape(y.shape)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's own")
@pytest.mark.usefixtures("whole_graph")
@pytest.mark.parametrize("packed_layout", ["tiles", "trits"])
def test_torch_compiles_a_packed_layer_whole(packed_layout, rng):
    import torch

    layer = BitDepthwiseConv1D(3, packed=True, packed_layout=packed_layout)
    x = ops.convert_to_tensor(rng.normal(size=(2, 9, 4)).astype("float32"))
    layer.build(x.shape)
    for name in ("kernel_tiles", "kernel_scale"):
        weight = getattr(layer, name)
        weight.assign(rng.integers(0, 42, weight.shape))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        wanted = layer(x)
        assert wanted.abs().max() > 0
        torch.testing.assert_close(compiled(x), wanted)
