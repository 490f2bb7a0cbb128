"""The RMS norm of the layers by the native operator against NumPy and Keras."""

import functools

import keras
import numpy as np
import pytest
from helpers import (
    BACKEND,
    assert_nan_and_infinity_stay_in_their_rows,
    compiled,
    gradient,
    keras_3_15,
    no_gradient,
    packed_twin,
    relative_error,
    to_numpy,
)
from keras import ops
from test_native_adapters import make_packed, static_scale

from keras_bitnet import kernels
from keras_bitnet.kernels import native, norm, select
from keras_bitnet.layers import BitLinear
from keras_bitnet.layers.rms_normalization import RMSNormalization
from keras_bitnet.ops import bit_matmul
from keras_bitnet.quantizers.activations import ActivationInt4, ActivationInt8

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason=str(native.reason())),
    pytest.mark.usefixtures("on_cpu"),
]
HAS_ROW = any(row.name == "native" for row in norm.TABLES[BACKEND])
TOLERANCE = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}


@pytest.fixture
def ran(monkeypatch):
    """Counts the calls of the native row; stays empty on JAX, which has none."""
    calls = []
    if HAS_ROW:
        row = next(row for row in norm.TABLES[BACKEND] if row.name == "native").load()
        counting = kernels.Kernel(row.name, row.refuse, lambda *a: calls.append(1) or row.run(*a))
        monkeypatch.setitem(norm.TABLES, BACKEND, (counting, norm.REFERENCE))
    return calls


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 128), (40, 2560), (0, 8)])
def test_equals_numpy(shape, dtype, rng, ran):
    x = ops.cast(ops.convert_to_tensor(rng.normal(size=shape).astype("float32") * 3), dtype)
    scale = rng.normal(size=shape[-1:]).astype("float32")
    wide = to_numpy(ops.cast(x, "float32")).astype("float64")
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * scale
    y = norm.rms_norm(x, ops.convert_to_tensor(scale), 1e-5)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert len(ran) == HAS_ROW
    if wide.size:
        assert relative_error(to_numpy(ops.cast(y, "float32")), wanted) < TOLERANCE[dtype]


def test_every_instruction_set(rng):
    x = ops.convert_to_tensor(rng.normal(size=(3, 77)).astype("float32"))
    scale = ops.convert_to_tensor(rng.normal(size=77).astype("float32"))
    wanted = to_numpy(ops.rms_normalization(x, scale=scale, epsilon=1e-5))
    try:
        for name in native.isas():
            native.set_isa(name)
            assert relative_error(to_numpy(norm.rms_norm(x, scale, 1e-5)), wanted) < 1e-6, name
    finally:
        native.set_isa("auto")


def test_nan_and_infinity_are_not_lost():
    assert_nan_and_infinity_stay_in_their_rows(norm.rms_norm)


def test_gradients_are_those_of_keras(rng):
    x = rng.normal(size=(2, 3, 20)).astype("float32")
    scale = rng.normal(size=20).astype("float32")
    weights = ops.convert_to_tensor(rng.normal(size=x.shape).astype("float32"))

    def keras_norm(x, scale):
        return ops.rms_normalization(x, scale=scale, epsilon=1e-5)

    def ours(x, scale):
        return norm.rms_norm(x, scale, 1e-5)

    for i, at in enumerate((x, scale)):

        def loss(value, function, i=i):
            operands = [ops.convert_to_tensor(x), ops.convert_to_tensor(scale)]
            operands[i] = value
            return ops.sum(function(*operands) * weights)

        found, wanted = (
            gradient(functools.partial(loss, function=f), at) for f in (ours, keras_norm)
        )
        assert relative_error(found, wanted) < 1e-5


def test_the_layer_is_keras_own_but_for_rounding(rng, ran):
    ours, theirs = RMSNormalization(epsilon=1e-5), keras.layers.RMSNormalization(epsilon=1e-5)
    x = rng.normal(size=(4, 6, 24)).astype("float32")
    for layer in (ours, theirs):
        layer.build(x.shape)
        layer.scale.assign(np.linspace(0.5, 2, 24))
    model = keras.Sequential([keras.Input(x.shape[1:]), ours])
    assert relative_error(model.predict(x, verbose=0), to_numpy(theirs(x))) < 1e-6
    assert bool(ran) == HAS_ROW
    assert [w.path.split("/")[-1] for w in ours.weights] == ["scale"]


@keras_3_15("has no such norm over several axes")
def test_several_axes_are_keras_own(rng):
    x = rng.normal(size=(4, 6, 24)).astype("float32")
    both = RMSNormalization(axis=(1, 2)), keras.layers.RMSNormalization(axis=(1, 2))
    y, wanted = (to_numpy(layer(x)) for layer in both)
    assert relative_error(y, wanted) < 1e-6


@pytest.mark.skipif(not HAS_ROW, reason="XLA makes one operator of a norm by itself")
def test_the_reference_can_be_forced(rng, ran):
    layer = BitLinear(5, norm="rms")
    x = rng.normal(size=(4, 24)).astype("float32")
    layer.build(x.shape)
    with kernels.use_kernel("reference"):
        layer(x)
    assert not ran


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch knows of a gradient beforehand")
def test_a_forced_kernel_is_no_error_where_a_gradient_is_needed(rng, ran):
    x = ops.convert_to_tensor(rng.normal(size=(4, 24)).astype("float32")).requires_grad_(True)
    with kernels.use_kernel("native"):
        norm.rms_norm(x, ops.ones(24), 1e-5).sum().backward()
        assert not ran
        assert x.grad is not None
        norm.rms_norm(x.detach(), ops.ones(24), 1e-5)
    assert ran


def test_a_forced_row_that_refuses_is_an_error_where_it_is_asked_for():
    table = kernels.Kernel("native", lambda problem: "too odd", None), norm.REFERENCE
    with kernels.use_kernel("native"):
        with pytest.raises(ValueError, match=r"'native' was forced and cannot run .*: too odd"):
            select.first_or_forced(table, None)
        assert select.first_or_forced(table, None, strict=False) is norm.REFERENCE


# -- within a packed matmul ------------------------------------------------------------------


def product(packed, quantizer, apart, x, gain, bias):
    """A norm within the native product, or `apart`, before it."""
    static = static_scale(quantizer)
    with kernels.use_kernel("native"):
        if apart:
            return bit_matmul(norm.rms_norm(x, gain, 1e-5), packed, quantizer, bias, static)
        return bit_matmul(x, packed, quantizer, bias, static, norm=(gain, 1e-5))


QUANTIZERS = ActivationInt8(), ActivationInt4(), ActivationInt8("tensor"), ActivationInt8("static")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_within_a_product_it_is_the_norm_before(quantizer, dtype, rng, ran):
    for m, k, n in ((1, 100, 33), (30, 257, 16)):
        _, packed = make_packed(rng, k, n)
        x = ops.cast(ops.convert_to_tensor(rng.normal(size=(m, k)).astype("float32")), dtype)
        gain, bias = (ops.convert_to_tensor(rng.normal(size=s).astype("float32")) for s in (k, n))
        call = functools.partial(product, packed, quantizer)
        y = compiled(functools.partial(call, False), x, gain, bias)
        assert bool(ran) == (HAS_ROW and quantizer.granularity == "tensor")
        wanted = compiled(functools.partial(call, True), x, gain, bias)
        ran.clear()
        y, wanted = (to_numpy(ops.cast(v, "float32")) for v in (y, wanted))
        np.testing.assert_array_equal(y, wanted)


def test_gradients_within_a_product(rng):
    _, packed = make_packed(rng, 40, 17)
    x = rng.normal(size=(2, 3, 40)).astype("float32")
    gain, bias = (rng.normal(size=size).astype("float32") for size in (40, 17))
    weight = ops.convert_to_tensor(rng.normal(size=(2, 3, 17)).astype("float32"))

    for i, at in enumerate((x, gain, bias)):

        def loss(value, apart, i=i):
            operands = [ops.convert_to_tensor(v) for v in (x, gain, bias)]
            operands[i] = value
            return ops.sum(product(packed, ActivationInt8(), apart, *operands) * weight)

        found = (gradient(functools.partial(loss, apart=apart), at) for apart in (False, True))
        assert relative_error(*found) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "within"),
    [
        ({}, True),
        ({"activation_quantizer": "int4", "weight_quantizer": "int8"}, True),
        ({"norm_position": "post"}, False),
        ({"norm": "layer"}, False),
        ({"rotation": "hadamard"}, False),
        ({"activation_quantizer": None}, True),
        ({"activation_quantizer": ActivationInt8("tensor")}, False),
        ({"lora_rank": 2}, False),
    ],
)
def test_layers_leave_it_to_the_product_where_nothing_is_between(arguments, within, rng, ran):
    layer = BitLinear(9, **{"norm": "rms", "bias_initializer": "ones", **arguments})
    x = rng.normal(size=(5, 32)).astype("float32")
    layer.build(x.shape)
    if layer.norm == "rms":
        layer.normalization.scale.assign(np.linspace(0.5, 2, layer.normalization.scale.shape[0]))
    packed = packed_twin(layer, x.shape)
    for ours, theirs in zip(packed.normalization.weights, layer.normalization.weights, strict=True):
        ours.assign(theirs)
    with no_gradient():
        y = to_numpy(layer(x))
        ran.clear()
        assert relative_error(to_numpy(packed(x)), y) < 1e-5
    if HAS_ROW and layer.norm == "rms":
        assert bool(ran) != within


@pytest.mark.skipif(BACKEND != "jax", reason="JAX has derivatives of forward mode")
def test_the_row_of_a_gpu_on_jax_has_every_derivative(rng):
    """Where there is no GPU its reference runs, under the same derivatives."""
    import jax

    from keras_bitnet.kernels.cuda import jax_norm

    if jax.default_backend() != "cpu":
        pytest.skip("tests/test_cuda_norm.py runs the kernel")
    x, scale = (rng.normal(size=size).astype("float32") for size in ((3, 5, 32), 32))

    def wanted(x, scale):
        return jax_norm._reference(1e-5, x, scale)

    def row(x, scale):
        return jax_norm._norm_once(1e-5, x, scale)

    def gradient(f):
        return jax.grad(lambda x, scale: ops.sum(ops.sin(f(x, scale))), argnums=(0, 1))

    derivatives = (
        lambda f: jax.jit(gradient(f))(x, scale),
        lambda f: jax.jvp(f, (x, scale), (2 * x, scale + 1)),
        lambda f: jax.vmap(gradient(f), in_axes=(0, None))(x, scale),
        lambda f: jax.jvp(gradient(f), (x, scale), (x, scale)),
    )
    for derivative in derivatives:
        for found, true in zip(*map(jax.tree.leaves, map(derivative, (row, wanted))), strict=True):
            np.testing.assert_allclose(found, true, rtol=1e-4, atol=1e-5)
