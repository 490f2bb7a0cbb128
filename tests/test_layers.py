import keras
import numpy as np
import oracle
import pytest
from helpers import BACKEND, packed_twin, relative_error, to_numpy, trace_once
from keras import ops

from keras_bitnet import quantizers
from keras_bitnet.layers import BitEinsumDense, BitLinear
from keras_bitnet.quantizers import ActivationInt8, StaticActivation

NAMES = ["binary", "ternary", "int2", "int4", "int8"]
GRANULARITIES = [("tensor", None), ("channel", None), ("group", 32)]


def quantizer(name, granularity="tensor", group_size=None, **arguments):
    return type(quantizers.get(name))(granularity=granularity, group_size=group_size, **arguments)


@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_forward_equals_the_oracle_and_the_packed_twin(name, granularity, group_size, rng):
    layer = BitLinear(
        17,
        bias_initializer="random_normal",
        weight_quantizer=quantizer(name, granularity, group_size),
    )
    x = rng.normal(size=(5, 100)).astype("float32")
    y = to_numpy(layer(x))
    w, bias = to_numpy(layer.kernel), to_numpy(layer.bias)
    assert relative_error(y, oracle.linear(x, w, bias, name, granularity, group_size)) < 1e-5
    assert relative_error(to_numpy(packed_twin(layer, (None, 100))(x)), y) < 1e-5


@pytest.mark.parametrize("scale", ["absmean", "absmedian", "absmax", "learned"])
def test_ternary_scales_pack_alike(scale, rng):
    layer = BitLinear(9, weight_quantizer=quantizer("ternary", "channel", scale=scale))
    x = rng.normal(size=(4, 40)).astype("float32")
    assert relative_error(to_numpy(packed_twin(layer, (None, 40))(x)), to_numpy(layer(x))) < 1e-5


@pytest.mark.parametrize("activation_quantizer", [None, "int4", "int8"])
def test_activation_quantizers_pack_alike(activation_quantizer, rng):
    layer = BitLinear(9, "relu", activation_quantizer=activation_quantizer)
    x = rng.normal(size=(4, 3, 40)).astype("float32")
    assert relative_error(to_numpy(packed_twin(layer, (None, 3, 40))(x)), to_numpy(layer(x))) < 1e-5


def test_strength_zero_is_dense(rng):
    x = rng.normal(size=(4, 30)).astype("float32")
    dense = keras.layers.Dense(7, "tanh", bias_initializer="ones")
    layer = BitLinear(7, "tanh", quantization_strength=0.0)
    wanted = to_numpy(dense(x))
    layer.build((None, 30))
    layer.kernel.assign(dense.kernel)
    layer.bias.assign(dense.bias)
    np.testing.assert_allclose(to_numpy(layer(x)), wanted, rtol=1e-6, atol=1e-7)
    layer.quantization_strength.assign(1.0)
    assert relative_error(to_numpy(layer(x)), wanted) > 1e-3


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norm(norm, position, rng):
    layer = BitLinear(6, bias_initializer="ones", norm=norm, norm_position=position)
    x = 3 + rng.normal(size=(4, 20)).astype("float32")
    y = to_numpy(layer(x))

    def normalize(v):
        v = v - v.mean(-1, keepdims=True) if norm == "layer" else v
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-5)

    w, bias = to_numpy(layer.kernel), to_numpy(layer.bias)
    inputs = normalize(x) if position == "pre" else x
    wanted = oracle.linear(inputs, w, bias, "ternary", "tensor")
    wanted = wanted if position == "pre" else normalize(wanted)
    assert relative_error(y, wanted) < (1e-2 if position == "pre" else 1e-4)  # codes may flip
    twin = packed_twin(layer, (None, 20))
    assert relative_error(to_numpy(twin(x)), y) < 1e-5


@pytest.mark.parametrize(
    ("weight_quantizer", "jit_compile", "learning_rate"),
    [
        ("ternary", True, 0.02),
        ("ternary", False, 0.02),
        (quantizer("int4", scale="learned"), False, 0.02),
        (quantizer("ternary", scale="learned"), False, 0.02),
    ],
)
def test_training_lowers_the_loss(weight_quantizer, jit_compile, learning_rate, rng):
    x = rng.normal(size=(256, 16)).astype("float32")
    y = x[:, :1] - x[:, 1:2]
    model = keras.Sequential(
        [
            keras.Input((16,)),
            BitLinear(32, "relu", norm="rms", weight_quantizer=weight_quantizer),
            BitLinear(1, kernel_regularizer="l2", kernel_constraint="max_norm"),
        ]
    )
    model.compile(keras.optimizers.Adam(learning_rate), "mse", jit_compile=jit_compile)
    if BACKEND == "torch":
        trace_once(model)
    losses = model.fit(x, y, epochs=8, batch_size=32, verbose=0).history["loss"]
    assert losses[-1] < 0.6 * losses[0]


def test_gradient_accumulation_and_mixed_precision(rng):
    x = rng.normal(size=(128, 16)).astype("float32")
    layers = [BitLinear(32, "relu", norm="rms", dtype="mixed_bfloat16"), BitLinear(1)]
    model = keras.Sequential([keras.Input((16,)), *layers])
    optimizer = keras.optimizers.Adam(0.02, gradient_accumulation_steps=2)
    model.compile(optimizer, "mse")
    losses = model.fit(x, x[:, :1], epochs=8, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert keras.backend.standardize_dtype(layers[0].kernel.dtype) == "float32"


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16", "mixed_float16"])
def test_lower_precision_packs_to_the_same_codes_and_close_outputs(dtype, rng):
    layer = BitLinear(20, dtype=dtype)
    x = ops.cast(rng.normal(size=(6, 48)).astype("float32"), layer.compute_dtype)
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    twin = packed_twin(layer, (None, 48))
    expected, _, _ = oracle.quantize_weight(
        "ternary", to_numpy(ops.cast(ops.convert_to_tensor(layer.kernel), "float32")), "tensor"
    )
    np.testing.assert_array_equal(to_numpy(twin.packed_kernel.codes()), expected)
    actual = to_numpy(ops.cast(twin(x), "float32"))
    assert relative_error(actual, to_numpy(ops.cast(y, "float32"))) < 2e-2


def test_mask_goes_through():
    embedding = keras.layers.Embedding(10, 8, mask_zero=True)
    y = BitLinear(4)(embedding(np.array([[1, 2, 0]])))
    np.testing.assert_array_equal(to_numpy(y._keras_mask), [[True, True, False]])


@pytest.mark.parametrize("packed", [False, True])
def test_lora(packed, rng):
    base = BitLinear(5)
    x = rng.normal(size=(64, 12)).astype("float32")
    before = to_numpy(base(x))
    layer = packed_twin(base, (None, 12)) if packed else base
    layer.enable_lora(2, lora_alpha=4)
    np.testing.assert_allclose(to_numpy(layer(x)), before, rtol=1e-4, atol=1e-5)
    codes = base.quantized_matrix().codes
    model = keras.Sequential([keras.Input((12,)), layer])
    names = {v.name for v in model.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b", "bias"}
    model.compile(keras.optimizers.Adam(0.05), "mse")
    losses = model.fit(x, before + x[:, :5], epochs=15, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    np.testing.assert_array_equal(to_numpy(base.quantized_matrix().codes), to_numpy(codes))
    low_rank = to_numpy(layer.lora_kernel_a) @ to_numpy(layer.lora_kernel_b) * 2
    y = to_numpy(layer(x)) - to_numpy(layer.bias)
    assert relative_error(y, before + x @ low_rank) < 1e-4
    with pytest.raises(ValueError, match="enabled on layer"):
        layer.enable_lora(2)


def test_config_round_trip():
    layer = BitLinear(
        3, "relu", False, norm="rms", norm_position="post", norm_epsilon=1e-3, lora_rank=2,
        weight_quantizer=quantizer("int4", "group", 64, scale="learned"),
        activation_quantizer="int4", quantization_strength=0.5, kernel_regularizer="l2",
        name="here", dtype="mixed_bfloat16",
    )  # fmt: skip
    again = BitLinear.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    again.build((None, 8))
    assert again.lora_enabled


@pytest.mark.parametrize(
    ("equation", "output_shape", "bias_axes", "input_shape"),
    [
        ("abc,cde->abde", (None, 4, 6), "de", (2, 3, 8)),
        ("abc,cde->abde", (None, 4, 6), "e", (2, 3, 8)),
        ("abc,ced->abde", (None, 4, 6), "d", (2, 3, 8)),
        ("abde,dec->abc", (None, 5), "c", (2, 3, 4, 6)),
        ("...x,xy->...y", 7, "y", (2, 3, 8)),
        ("ab...,bc->ac...", 5, None, (2, 8, 3, 4)),
    ],
)
def test_einsum_is_its_keras_twin(equation, output_shape, bias_axes, input_shape, rng):
    twin = keras.layers.EinsumDense(equation, output_shape, bias_axes=bias_axes)
    layer = BitEinsumDense(
        equation, output_shape, bias_axes=bias_axes, quantization_strength=0.0, norm=None
    )
    x = rng.normal(size=input_shape).astype("float32")
    wanted = to_numpy(twin(x))
    layer.build(input_shape)
    layer.kernel.assign(twin.kernel)
    if bias_axes:
        twin.bias.assign(rng.normal(size=twin.bias.shape))
        layer.bias.assign(twin.bias)
        wanted = to_numpy(twin(x))
    assert layer.compute_output_shape(input_shape) == wanted.shape
    np.testing.assert_allclose(to_numpy(layer(x)), wanted, rtol=1e-4, atol=1e-5)
    layer.quantization_strength.assign(1.0)
    packed = packed_twin(layer, input_shape)
    assert relative_error(to_numpy(packed(x)), to_numpy(layer(x))) < 1e-5
    again = BitEinsumDense.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitLinear(0), "Received: units=0"),
        (lambda: BitLinear(2.5), "Received: units=2.5"),
        (lambda: BitLinear(3, norm="batch"), "Received: norm='batch'"),
        (lambda: BitLinear(3, norm_position="in"), "Received: norm_position='in'"),
        (lambda: BitLinear(3, quantization_strength=2), "Received: quantization_strength=2"),
        (lambda: BitLinear(3, weight_quantizer="int3"), "Unknown weight quantizer"),
        (lambda: BitLinear(3, weight_quantizer=None), "`weight_quantizer` is required"),
        (lambda: BitLinear(3, lora_rank=0), "Received: lora_rank=0"),
        (lambda: BitLinear(3, dtype="int8_from_float32"), "dtype=int8_from_float32"),
        (lambda: BitLinear(3).enable_lora(2), "before enabling LoRA"),
        (lambda: BitLinear(3).build((None, None)), "must be known"),
        (lambda: BitLinear(3).packed_kernel, "is not packed"),
        (lambda: BitEinsumDense("ab,bc,cd->ad", 3), "must look like"),
        (lambda: BitEinsumDense("abc,acd->abd", (None, 3)), "plain product"),
        (lambda: BitEinsumDense("ab,bc->ac", 3, bias_axes="a").build((2, 4)), "bias_axes='a'"),
        (lambda: BitEinsumDense("ab,bc->ac", 3).build((2, 4, 5)), "inputs of rank 3"),
        (
            lambda: BitEinsumDense("ab,bc->ac", (3, 4)).build((2, 4)),
            r"output_shape=\(3, 4\)",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_of_the_wrong_size():
    layer = BitLinear(3)
    layer.build((None, 8))
    with pytest.raises(ValueError, match="expected axis -1"):
        layer(np.ones((2, 7), "float32"))


@pytest.mark.parametrize("granularity", ["token", "tensor", "static"])
def test_a_batch_without_rows(granularity):
    static = granularity == "static"
    activation = StaticActivation(8, momentum=0.9) if static else ActivationInt8(granularity)
    layer = BitLinear(7, activation_quantizer=activation)
    model = keras.Sequential([keras.Input((3, 20)), layer])
    assert tuple(model(np.ones((0, 3, 20), "float32")).shape) == (0, 3, 7)


def test_kernel_that_is_not_finite_is_not_packed():
    layer = BitLinear(3, name="broken")
    layer.build((None, 8))
    layer.kernel.assign(np.full((8, 3), np.nan))
    with pytest.raises(ValueError, match="'broken' holds a NaN"):
        packed_twin(layer, (None, 8))
    assert np.isnan(to_numpy(layer(np.ones((2, 8), "float32")))).all()


@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile is of the torch backend")
def test_torch_compile_of_a_bare_layer(rng):
    import torch

    layer = BitLinear(8, norm="rms")
    x = torch.from_numpy(rng.normal(size=(4, 16)).astype("float32"))
    wanted = layer(x)
    compiled = torch.compile(layer)
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="jax.jit is of the JAX backend")
def test_jax_jit_of_stateless_call(rng):
    import jax

    layer = BitLinear(8)
    x = rng.normal(size=(4, 16)).astype("float32")
    wanted = to_numpy(layer(x))
    state = (
        [v.value for v in layer.trainable_variables],
        [v.value for v in layer.non_trainable_variables],
    )
    y, _ = jax.jit(layer.stateless_call)(*state, x)
    np.testing.assert_allclose(np.asarray(y), wanted, rtol=1e-5, atol=1e-6)
