"""The native CPU rows as every backend sees them; what only one has is in test_native_<backend>."""

import dataclasses
import functools
import math
import threading

import keras
import numpy as np
import oracle
import pytest
from helpers import BACKEND, compiled, gradient, relative_error, to_numpy
from keras import ops

from keras_bitnet import kernels
from keras_bitnet.kernels import native
from keras_bitnet.layers import BitLinear
from keras_bitnet.ops import PackedTensor, bit_matmul, joint_bit_matmul
from keras_bitnet.ops.window import Window
from keras_bitnet.quantizers.activations import ActivationInt4, ActivationInt8

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason=str(native.reason())),
    pytest.mark.usefixtures("on_cpu"),
]

OFFSETS = {1: (-0.5,), 2: (-1.0, -1.5), 4: (-8.0,), 8: (-128.0,)}
GRANULARITIES = ("tensor", "channel", 32, 128)
DTYPES = ("float32", "bfloat16", "float16")
SIZES = ((1, 1, 1), (3, 7, 31), (4, 31, 33), (17, 100, 257), (1, 257, 100), (33, 260, 16))
QUANTIZERS = (
    ActivationInt8(),
    ActivationInt4(),
    ActivationInt8("tensor"),
    ActivationInt4("tensor"),
    ActivationInt8("static"),
    None,
)
X_SCALE = np.float32(0.02)  # clips some: an int8 code reaches 127 * 0.02 = 2.54
# A result is rounded to its dtype, and float32 sums differ in order.
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}


def make_packed(rng, k, n, bits=2, granularity="tensor", offset=None, layout="tiles"):
    codes = rng.integers(0, 3 if layout == "trits" else 2**bits, (k, n))
    group_size = granularity if isinstance(granularity, int) else None
    groups = -(-k // group_size) if group_size else 1
    scale = rng.uniform(0.5, 1.5, (groups, 1 if granularity == "tensor" else n)).astype("float32")
    offset = OFFSETS[bits][0] if offset is None else offset
    packed = PackedTensor.from_codes(codes, scale, offset, bits, group_size, layout)
    tensors = (ops.convert_to_tensor(packed.tiles), ops.convert_to_tensor(packed.scale))
    return codes, PackedTensor(*tensors, offset, bits, k, n, group_size, layout)


def static_scale(quantizer):
    is_static = quantizer is not None and quantizer.granularity == "static"
    return ops.convert_to_tensor(X_SCALE) if is_static else None


def expected(x, codes, packed, quantizer, bias):
    if quantizer is None:
        return x.astype("float64") @ to_numpy(packed.dequantize()) + (0 if bias is None else bias)
    if quantizer.granularity == "static":
        inverse, top = np.float32(1) / X_SCALE, quantizer.highest
        x_codes, x_scale = np.clip(np.rint(x * inverse), -top, top).astype(np.int64), X_SCALE
    else:
        x_codes, x_scale = oracle.quantize_activation(
            x, quantizer.highest, quantizer.granularity == "tensor"
        )
    scale = to_numpy(packed.scale).astype("float64")
    group_size = packed.group_size or packed.in_features
    step = 1 if float(packed.offset).is_integer() else 2
    sums = oracle.accumulate(x_codes, codes, packed.offset, group_size) / step  # (m, groups, n)
    return (sums * scale).sum(axis=1) * x_scale + (0 if bias is None else bias)


def packed_layer(rng, k=100, units=33, **kwargs):
    layer = BitLinear(units, packed=True, **kwargs)
    source = BitLinear(units, **kwargs)
    layer.build((None, k))
    source.build((None, k))
    layer.pack_from(source)
    if layer.bias is not None:
        layer.bias.assign(rng.normal(size=units))
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("bits", "offset"), [(b, o) for b in OFFSETS for o in OFFSETS[b]])
def test_equals_oracle_and_reference(bits, offset, granularity, dtype, rng):
    first = bits + DTYPES.index(dtype) + GRANULARITIES.index(granularity)
    for i in range(first, first + 3):  # all sizes and quantizers meet over the parameters
        (m, k, n), quantizer = SIZES[i % len(SIZES)], QUANTIZERS[i % len(QUANTIZERS)]
        codes, packed = make_packed(rng, k, n, bits, granularity, offset)
        bias = rng.normal(size=n).astype("float32") if n % 2 else None
        x = ops.cast(rng.normal(size=(m, k)).astype("float32"), dtype)

        def multiply(kernel, x, packed=packed, quantizer=quantizer, bias=bias):
            with kernels.use_kernel(kernel):
                return bit_matmul(x, packed, quantizer, bias, static_scale(quantizer))

        y = compiled(functools.partial(multiply, "native"), x)
        reference = compiled(functools.partial(multiply, "reference"), x)
        assert keras.backend.standardize_dtype(y.dtype) == dtype
        assert tuple(y.shape) == (m, n)
        x, y, reference = (to_numpy(ops.cast(v, "float32")) for v in (x, y, reference))
        assert relative_error(y, expected(x, codes, packed, quantizer, bias)) < TOLERANCE[dtype]
        assert relative_error(y, reference) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(100,), (0, 100), (2, 0, 100), (1, 2, 3, 4, 100)])
def test_leading_axes(shape, rng):
    _, packed = make_packed(rng, 100, 33)
    x = rng.normal(size=shape).astype("float32")
    with kernels.use_kernel("native"):
        y = bit_matmul(x, packed, ActivationInt8())
        rows = bit_matmul(x.reshape(-1, 100), packed, ActivationInt8())
    assert tuple(y.shape) == (*shape[:-1], 33)
    np.testing.assert_array_equal(to_numpy(y).reshape(-1, 33), to_numpy(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["tensor", 32])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_joint_products(count, granularity, dtype, rng):
    """The bits of one product after another, with their gradients."""
    quantizer = QUANTIZERS[(count + DTYPES.index(dtype)) % 3]
    packed = [make_packed(rng, 100, n, 2, granularity)[1] for n in (33, 16, 100, 1)[:count]]
    biases = [ops.convert_to_tensor(rng.normal(size=33).astype("float32")), *[None] * (count - 1)]
    x = rng.normal(size=(2, 3, 100)).astype("float32")

    def together(x):
        return joint_bit_matmul(x, packed, quantizer, biases)

    def apart(x):
        return [bit_matmul(x, p, quantizer, b) for p, b in zip(packed, biases, strict=True)]

    def loss(products, x):
        return sum(
            ops.sum(ops.square(ops.cast(y, "float32"))) for y in products(ops.cast(x, dtype))
        )

    with kernels.use_kernel("native"):
        for y, wanted in zip(
            compiled(together, ops.cast(x, dtype)), compiled(apart, ops.cast(x, dtype)), strict=True
        ):
            assert keras.backend.standardize_dtype(y.dtype) == dtype
            np.testing.assert_array_equal(*(to_numpy(ops.cast(v, "float32")) for v in (y, wanted)))
        dx, wanted = (gradient(functools.partial(loss, f), x) for f in (together, apart))
    assert relative_error(dx, wanted) < (1e-6 if dtype == "float32" else 2e-2)


def test_joint_products_are_one_operation(rng, monkeypatch):
    packed = [make_packed(rng, 64, n)[1] for n in (20, 33)]
    other = make_packed(rng, 64, 20, bits=4)[1]
    calls = []
    row = next(row for row in kernels.select.TABLES[BACKEND] if row.name == "native").load()

    def count(*operands):
        calls.append(len(operands[1]))
        return row.run_joint(*operands)

    counted = dataclasses.replace(row, run_joint=count)
    monkeypatch.setitem(kernels.select.TABLES, BACKEND, (counted, kernels.select.REFERENCE))
    x = ops.ones((1, 64))
    assert len(joint_bit_matmul(x, packed, ActivationInt8())) == 2
    assert calls == [2]
    assert len(joint_bit_matmul(x, [*packed, other], ActivationInt8())) == 3  # of other bits
    assert calls == [2]


def test_packed_tensor_of_numpy_arrays(rng):
    codes, packed = make_packed(rng, 100, 33)
    arrays = PackedTensor.from_codes(codes, packed.scale, packed.offset, 2)
    x = rng.normal(size=(3, 100)).astype("float32")
    with kernels.use_kernel("native"):
        y = to_numpy(bit_matmul(x, arrays, ActivationInt8()))
        np.testing.assert_array_equal(y, to_numpy(bit_matmul(x, packed, ActivationInt8())))


def test_lower_bound_of_the_absolute_maximum(rng):
    _, packed = make_packed(rng, 100, 33)
    x = rng.uniform(-0.1, 0.1, (3, 100)).astype("float32")
    found = []
    for name in ("native", "reference"):
        with kernels.use_kernel(name):
            found.append(to_numpy(bit_matmul(x, packed, ActivationInt8(epsilon=2.0))))
    assert relative_error(*found) < 2e-6


def test_operands_that_are_views(rng):
    _, packed = make_packed(rng, 100, 33)
    x = ops.transpose(ops.convert_to_tensor(rng.normal(size=(100, 6)).astype("float32")))
    with kernels.use_kernel("native"):
        y = bit_matmul(x, packed, ActivationInt8())
    with kernels.use_kernel("reference"):
        assert relative_error(to_numpy(y), bit_matmul(x, packed, ActivationInt8())) < 2e-6


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_of_activations_and_bias(bits, granularity, dtype, rng):
    _, packed = make_packed(rng, 100, 33, bits, granularity)
    x = rng.normal(size=(2, 3, 100)).astype("float32")
    bias = rng.normal(size=33).astype("float32")
    weight = rng.normal(size=(2, 3, 33)).astype("float32")

    def loss(x, bias):
        y = bit_matmul(ops.cast(x, dtype), packed, ActivationInt8(), bias)
        return ops.sum(ops.multiply(ops.cast(y, "float32"), weight))

    found = {}
    for name in ("native", "reference"):
        with kernels.use_kernel(name):
            found[name] = (
                gradient(lambda v: loss(v, bias), x),
                gradient(lambda v: loss(x, ops.convert_to_tensor(v)), bias),
            )
    for actual, wanted in zip(found["native"], found["reference"], strict=True):
        assert relative_error(actual, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_patches_of_images(rank, dtype, rng):
    """As rows the same bits on this kernel, and the result and gradient of the reference."""
    window = Window.of(rank, (2, 3, 2)[:rank], (1, 2, 1)[:rank], 1, "same", "channels_last")
    x = rng.normal(size=(2, *(6, 5, 3)[:rank], 4)).astype("float32")
    k = 4 * math.prod(window.size)
    _, packed = make_packed(rng, k, 33)
    bias, gain = (ops.convert_to_tensor(rng.uniform(size=n).astype("float32")) for n in (33, k))
    for quantizer in QUANTIZERS:
        for norm in (None, (gain, 1e-5)):

            def multiply(x, images=True, quantizer=quantizer, norm=norm):
                x = ops.cast(x, dtype) if images else window.patches(ops.cast(x, dtype))
                arguments = bias, static_scale(quantizer), norm, window if images else None
                return ops.cast(bit_matmul(x, packed, quantizer, *arguments), "float32")

            def loss(x, multiply=multiply):
                y = multiply(x)
                return ops.sum(ops.multiply(y, ops.cos(ops.arange(33, dtype="float32"))))

            y, dx = {}, {}
            for kernel in ("native", "reference"):
                with kernels.use_kernel(kernel):
                    y[kernel] = to_numpy(compiled(multiply, x))
                    dx[kernel] = gradient(loss, x)
            assert y["native"].shape == (*window.positions(x.shape), 33)
            with kernels.use_kernel("native"):
                rows = to_numpy(compiled(functools.partial(multiply, images=False), x))
            np.testing.assert_array_equal(y["native"], rows)
            if norm is None:  # behind a norm one code may be the next one
                assert relative_error(y["native"], y["reference"]) < TOLERANCE[dtype]
                assert relative_error(dx["native"], dx["reference"]) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_trits(dtype, rng):
    """Five to a byte: the same bits as from the tiles of two bits, and the gradient."""
    for m, k, n in SIZES:
        codes, packed = make_packed(rng, k, n, layout="trits")
        tiles = PackedTensor.from_codes(codes, to_numpy(packed.scale), packed.offset, 2)
        x = ops.cast(rng.normal(size=(m, k)).astype("float32"), dtype)
        with kernels.use_kernel("native"):
            y = to_numpy(ops.cast(bit_matmul(x, packed, ActivationInt8()), "float32"))
            wanted = to_numpy(ops.cast(bit_matmul(x, tiles, ActivationInt8()), "float32"))
        np.testing.assert_array_equal(y, wanted)
        with kernels.use_kernel("reference"):
            reference = to_numpy(ops.cast(bit_matmul(x, packed, ActivationInt8()), "float32"))
        assert relative_error(y, reference) < TOLERANCE[dtype]
    g = gradient(
        lambda v: ops.sum(bit_matmul(v, packed, ActivationInt8())), to_numpy(ops.ones((m, k)))
    )
    assert relative_error(g, np.ones((m, n)) @ to_numpy(tiles.dequantize()).T) < 1e-5


def test_static_scale(rng):
    """Through the gradient too, and what is not finite shows in its own row alone."""
    _, packed = make_packed(rng, 100, 33)
    x = rng.normal(size=(4, 100)).astype("float32")
    x[0, 0] = 50  # clipped
    broken = x.copy()
    broken[1, 7], broken[2, 9] = np.nan, np.inf
    quantizer = ActivationInt8("static")

    def call(v):
        return bit_matmul(v, packed, quantizer, None, static_scale(quantizer))

    found = []
    for name in ("native", "reference"):
        with kernels.use_kernel(name):
            found.append((gradient(lambda v: ops.sum(call(v) ** 2), x), to_numpy(call(broken))))
    (native_gradient, y), (reference_gradient, wanted) = found
    assert relative_error(native_gradient, reference_gradient) < 5e-6
    assert not np.isfinite(y[[1, 2]]).any()
    assert relative_error(y[[0, 3]], wanted[[0, 3]]) < 2e-6


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_trains_what_is_around_a_packed_layer(policy, rng):
    layer = packed_layer(rng, norm="rms", dtype=policy)
    x = rng.normal(size=(64, 100)).astype("float32")
    target = rng.normal(size=(64, 33)).astype("float32")
    weights = {}
    for name in ("reference", "native"):
        with kernels.use_kernel(name):
            twin = BitLinear.from_config(layer.get_config())
            model = keras.Sequential([keras.Input((100,)), twin])
            twin.set_weights(layer.get_weights())
            model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=BACKEND == "jax")
            history = model.fit(x, target, epochs=3, batch_size=24, shuffle=False, verbose=0)
            losses = history.history["loss"]
            assert losses[-1] < losses[0]
            assert np.isfinite(model.evaluate(x, target, verbose=0))
            assert model.predict(x, verbose=0).shape == (64, 33)
            weights[name] = [np.asarray(w, "float32") for w in model.get_weights()]
    for actual, wanted in zip(weights["native"], weights["reference"], strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5 if policy == "float32" else 2e-2)


def problem(**changes):
    facts = {"in_features": 64, "out_features": 8, "bits": 2, "group_size": None,
             "dtype": "float32", "activation_bits": 8, "activation_granularity": "token",
             "activation_formula": "absmax", "device": "cpu"}  # fmt: skip
    return kernels.Problem(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"device": None}, None),
        ({"group_size": 64, "activation_bits": 4, "activation_granularity": "tensor"}, None),
        ({"device": "cuda:0"}, "'cuda:0', not on the CPU"),
        ({"device": "/job:localhost/replica:0/task:0/device:GPU:0"}, "not on the CPU"),
        ({"activation_bits": None, "activation_granularity": None}, None),
        ({"activation_bits": None, "dtype": "float64"}, "dtype float64"),
        ({"activation_bits": 6}, "activations of 6 bits"),
        ({"activation_granularity": "static"}, None),
        ({"activation_granularity": "channel"}, "'channel'"),
        ({"dtype": "float64"}, "dtype float64"),
        ({"group_size": 48}, "multiple of 32"),
        ({"bits": 8, "in_features": 200_000}, "int32"),
    ],
)
def test_explain_says_why(changes, reason):
    rows = dict(kernels.explain(problem(**changes)))
    assert rows["reference"] is None
    if reason is None:
        assert rows["native"] is None
    else:
        assert reason in rows["native"]


def test_explain_asks_about_the_device_that_a_layer_runs_on(rng, monkeypatch):
    asked = []
    row = kernels.Kernel("asked", lambda problem: asked.append(problem), run=None)
    monkeypatch.setitem(kernels.select.TABLES, BACKEND, (row,))
    kernels.explain(packed_layer(rng))
    assert asked[0].device == str(ops.zeros(1).device)


def test_explain_without_a_library(monkeypatch):
    monkeypatch.setattr("keras_bitnet.kernels.cpu.NO_LIBRARY", "it was not built at install")
    assert dict(kernels.explain(problem()))["native"] == "it was not built at install"


def test_forced_kernel_that_cannot_run(rng):
    _, packed = make_packed(rng, 96, 8, granularity=48)
    with kernels.use_kernel("native"), pytest.raises(ValueError, match="not a multiple of 32"):
        bit_matmul(np.ones((2, 96), "float32"), packed)


def test_layer_runs_the_native_kernel_by_itself(rng, monkeypatch):
    layer = packed_layer(rng)
    assert dict(kernels.explain(layer))["native"] is None
    x = rng.normal(size=(4, 100)).astype("float32")
    y = to_numpy(layer(x))
    with kernels.use_kernel("native"):
        np.testing.assert_array_equal(to_numpy(layer(x)), y)
    monkeypatch.setitem(kernels.select.TABLES, BACKEND, (kernels.select.REFERENCE,))
    assert relative_error(to_numpy(layer(x)), y) < 2e-6


def test_many_threads_at_once(rng):
    _, packed = make_packed(rng, 512, 512)
    x = ops.convert_to_tensor(rng.normal(size=(4, 512)).astype("float32"))
    wanted = to_numpy(bit_matmul(x, packed, ActivationInt8()))
    wrong = []

    def work():
        for _ in range(50):
            y = to_numpy(bit_matmul(x, packed, ActivationInt8()))
            wrong.append(not np.array_equal(y, wanted))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 400
