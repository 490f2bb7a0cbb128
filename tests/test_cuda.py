"""The CUDA rows against the oracle, the reference and NumPy; on a machine with a GPU only."""

import dataclasses

import numpy as np
import oracle
import pytest
from helpers import BACKEND, gradient, relative_error, to_numpy
from keras import ops
from test_native_adapters import (
    OFFSETS,
    QUANTIZERS,
    TOLERANCE,
    expected,
    make_packed,
    packed_layer,
    static_scale,
)

from keras_bitnet import kernels
from keras_bitnet.kernels.cuda import library
from keras_bitnet.ops import PackedTensor, bit_matmul
from keras_bitnet.quantizers.activations import ActivationInt8

if BACKEND not in ("jax", "torch"):
    pytest.skip("TensorFlow runs the reference on a GPU", allow_module_level=True)
if library.reason(0) is not None:
    pytest.skip(library.reason(0), allow_module_level=True)

GRANULARITIES = ("tensor", "channel", 32, 64, 128)
DTYPES = ("float32", "bfloat16", "float16")
# (m, k, n): all kernels, and sizes that are no multiple of anything.
SIZES = (
    (1, 1, 1), (3, 7, 31), (7, 260, 33), (1, 257, 100), (9, 512, 257), (17, 100, 257),
    (40, 260, 128), (70, 1000, 132), (130, 384, 520), (1, 4096, 48), (33, 31, 4),
    (1, 8200, 50),
)  # fmt: skip


def run(kernel, *arguments):
    with kernels.use_kernel(kernel):
        return to_numpy(ops.cast(bit_matmul(*arguments), "float32"))


def identity(k):
    """An 8-bit weight that returns the activations."""
    codes = np.full((k, k), 128) + np.eye(k, dtype=int)
    packed = PackedTensor.from_codes(codes, np.ones((1, 1)), -128.0, 8)
    tensors = (ops.convert_to_tensor(packed.tiles), ops.convert_to_tensor(packed.scale))
    return PackedTensor(*tensors, -128.0, 8, k, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("bits", "offset"), [(b, o) for b in OFFSETS for o in OFFSETS[b]])
def test_equals_oracle_and_reference(bits, offset, granularity, dtype, rng):
    for (m, k, n), i in zip(SIZES, range(len(SIZES)), strict=True):
        quantizer = QUANTIZERS[(i + bits + GRANULARITIES.index(granularity)) % len(QUANTIZERS)]
        codes, packed = make_packed(rng, k, n, bits, granularity, offset)
        bias = rng.normal(size=n).astype("float32") if n % 2 else None
        x = ops.cast(rng.normal(size=(m, k)).astype("float32"), dtype)
        arguments = (x, packed, quantizer, bias, static_scale(quantizer))
        y = run("cuda", *arguments)
        assert y.shape == (m, n)
        wanted = expected(to_numpy(ops.cast(x, "float32")), codes, packed, quantizer, bias)
        assert relative_error(y, wanted) < TOLERANCE[dtype], (m, k, n, quantizer)
        if BACKEND == "torch":  # XLA would compile each
            reference = run("reference", *arguments)
            assert relative_error(y, reference) < TOLERANCE[dtype], (m, k, n, quantizer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", OFFSETS)
def test_float_activations(bits, granularity, dtype, rng):
    """Off by float32's rounding, or by 2^-16 of the largest input of 16 bits; then rounded."""
    for m, k, n in (*SIZES, (1, 12000, 20)):  # so many codes take the matrix kernels
        _, packed = make_packed(rng, k, n, bits, granularity)
        bias = rng.normal(size=n).astype("float32") if n % 2 else None
        x = rng.normal(size=(m, k)) * 10.0 ** rng.integers(-3, 1, (m, 1))
        x[-1, : k // 2] = 0
        x = ops.cast(x.astype("float32"), dtype)
        y = run("cuda", x, packed, None, bias)
        kernel = to_numpy(packed.dequantize()).astype("float64")
        added = 0 if bias is None else bias.astype("float64")
        x = to_numpy(ops.cast(x, "float32")).astype("float64")
        wanted, largest = x @ kernel + added, np.abs(x) @ np.abs(kernel) + np.abs(added)
        rounding = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
        close = rounding * np.abs(wanted) + (2e-6 if dtype == "float32" else 1e-4) * largest
        assert (np.abs(y - wanted) <= close).all(), (m, k, n)


@pytest.mark.parametrize("rows", [1, 5])
def test_float_activations_at_the_ends_of_float32(rows, rng):
    _, packed = make_packed(rng, 64, 33)
    kernel = to_numpy(packed.dequantize()).astype("float64")
    for size in (1e35, 1e-25, 0, 1e-44):
        x = rng.normal(size=(rows, 64)).astype("float32") * np.float32(size)
        y, wanted = run("cuda", x, packed, None), x.astype("float64") @ kernel
        assert np.abs(y - wanted).max() <= 1e-6 * max(np.abs(wanted).max(), 1e-30), size


@pytest.mark.parametrize("rows", [1, 2, 33, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_activations_are_the_same_bits(dtype, rows, rng):
    k = 260
    x = ops.cast(rng.normal(size=(rows, k)).astype("float32") * 3, dtype)
    with kernels.use_kernel("cuda"):
        y = to_numpy(bit_matmul(ops.cast(x, "float32"), identity(k), ActivationInt8()))
    codes, scale = oracle.quantize_activation(to_numpy(ops.cast(x, "float32")))
    np.testing.assert_array_equal(y, codes.astype("float32") * scale)


@pytest.mark.parametrize("rows", [1, 5, 20, 50, 100])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_sums_are_the_same_bits(bits, rows, rng):
    k, n = 300, 150
    codes, packed = make_packed(rng, k, n, bits)
    packed = dataclasses.replace(packed, scale=ops.ones((1, 1), "float32"))
    x = rng.integers(-127, 128, (rows, k))
    x[:, 0] = 127  # the scale is 1: the activations are their own codes
    y = run("cuda", x.astype("float32"), packed, ActivationInt8())
    step = 1 if float(packed.offset).is_integer() else 2
    sums = oracle.accumulate(x, codes, packed.offset)
    scale = np.float32(127) * np.float32(1 / 127)
    np.testing.assert_array_equal(y, sums.astype("float32") * np.float32(1 / step) * scale)


@pytest.mark.parametrize("quantizer", [ActivationInt8(), None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 4, 70, 300])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_values_stay_in_their_rows(value, rows, dtype, quantizer, rng):
    _, packed = make_packed(rng, 100, 33)
    x = rng.normal(size=(rows, 100)).astype("float32")
    wanted = run("cuda", ops.cast(x, dtype), packed, quantizer)
    x[0, 50] = value
    y = run("cuda", ops.cast(x, dtype), packed, quantizer)
    assert not np.isfinite(y[0]).any()
    np.testing.assert_array_equal(y[1:], wanted[1:])


@pytest.mark.parametrize("quantizer", [ActivationInt8(), None])
@pytest.mark.parametrize("shape", [(100,), (0, 100), (2, 0, 100), (1, 2, 3, 4, 100)])
def test_leading_axes(shape, quantizer, rng):
    _, packed = make_packed(rng, 100, 33)
    x = rng.normal(size=shape).astype("float32")
    y = run("cuda", x, packed, quantizer)
    assert y.shape == (*shape[:-1], 33)
    rows = run("cuda", x.reshape(-1, 100), packed, quantizer)
    np.testing.assert_array_equal(y.reshape(-1, 33), rows)


@pytest.mark.parametrize("quantizer", [ActivationInt8(), None])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 64])
def test_gradient(granularity, quantizer, rng):
    _, packed = make_packed(rng, 100, 33, 2, granularity)
    x = rng.normal(size=(2, 3, 100)).astype("float32")
    bias = rng.normal(size=33).astype("float32")

    def loss(x, bias):
        return ops.sum(ops.square(bit_matmul(x, packed, quantizer, bias)))

    found = []
    for name in ("cuda", "reference"):
        with kernels.use_kernel(name):
            found.append(gradient(lambda v: loss(v, ops.convert_to_tensor(bias)), x))
            found.append(gradient(lambda v: loss(ops.convert_to_tensor(x), v), bias))
    assert relative_error(found[0], found[2]) < 1e-5
    assert relative_error(found[1], found[3]) < 1e-5


@pytest.mark.parametrize("quantizer", [ActivationInt8(), None])
@pytest.mark.parametrize("granularity", ["channel", 64])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_joint_products(rows, granularity, quantizer, rng):
    """One operation gives what one product after another does, and so does its gradient."""
    weights = [make_packed(rng, 260, n, 2, granularity)[1] for n in (33, 100, 7)]
    x, first, last = (rng.normal(size=size).astype("float32") for size in ((rows, 260), 33, 7))

    def joint(x, last):
        biases = [ops.convert_to_tensor(first), None, last]
        return kernels.select.TABLES[BACKEND][0].load().run_joint(x, weights, quantizer, biases)

    def apart(x, last):
        with kernels.use_kernel("cuda"):
            return [
                bit_matmul(x, weight, quantizer, bias)
                for weight, bias in zip(weights, [first, None, last], strict=True)
            ]

    def of(multiply):
        def loss(x, last):
            return sum(ops.sum(ops.square(y)) for y in multiply(x, last))

        tensors = [ops.convert_to_tensor(v) for v in (x, last)]
        return [
            *map(to_numpy, multiply(*tensors)),
            gradient(lambda v: loss(v, tensors[1]), x),
            gradient(lambda v: loss(tensors[0], v), last),
        ]

    for y, wanted in zip(of(joint), of(apart), strict=True):
        assert relative_error(y, wanted) < 5e-6


@pytest.mark.parametrize("quantizer", ["int8", None])
def test_layer_runs_the_kernel_by_itself(quantizer, rng, monkeypatch):
    layer = packed_layer(rng, activation_quantizer=quantizer)
    x = ops.convert_to_tensor(rng.normal(size=(4, 100)).astype("float32"))
    y = to_numpy(layer(x))
    with kernels.use_kernel("cuda"):
        np.testing.assert_array_equal(to_numpy(layer(x)), y)
    monkeypatch.setitem(kernels.select.TABLES, BACKEND, (kernels.select.REFERENCE,))
    assert relative_error(to_numpy(layer(x)), y) < (2e-6 if quantizer else 1e-5)
