import dataclasses

import keras
import numpy as np
import oracle
import pytest
from helpers import gradient, relative_error, to_numpy
from keras import ops

from keras_bitnet import kernels, quantizers
from keras_bitnet.layers import BitLinear
from keras_bitnet.ops import PackedTensor, accumulate, bit_matmul, reference_matmul

NAMES = ["binary", "ternary", "int2", "int4", "int8"]
GRANULARITIES = [("tensor", None), ("channel", None), ("group", 32), ("group", 64)]
SIZES = [(1, 1, 1), (3, 7, 31), (2, 31, 33), (5, 100, 17), (1, 257, 7)]


def make(name, k, n, rng, granularity="tensor", group_size=None):
    w = rng.normal(size=(k, n)).astype("float32")
    arguments = {"scale": "absmax"} if name == "int2" else {}
    cls = type(quantizers.get(name))
    quantizer = cls(granularity=granularity, group_size=group_size, **arguments)
    codes, scale, offset = quantizer.quantize(w)
    packed = PackedTensor.from_codes(codes, scale, offset, quantizer.bits, quantizer.group_size)
    return w, dataclasses.replace(packed, scale=ops.convert_to_tensor(packed.scale))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_accumulators_and_output_equal_the_oracle(name, granularity, group_size, size, rng):
    m, k, n = size
    w, packed = make(name, k, n, rng, granularity, group_size)
    x = rng.normal(size=(m, k)).astype("float32")
    x_codes, _ = oracle.quantize_activation(x)
    expected = oracle.accumulate(
        x_codes, to_numpy(packed.codes()), packed.offset, packed.group_size
    )
    sums = accumulate(x_codes.astype("int8"), packed)
    assert keras.backend.standardize_dtype(sums.dtype) == "int32"
    np.testing.assert_array_equal(to_numpy(sums), expected)

    bias = rng.normal(size=n).astype("float32")
    y = bit_matmul(x, packed, quantizers.get_activation("int8"), bias)
    wanted = oracle.linear(x, w, bias, name, granularity, group_size)
    assert relative_error(to_numpy(y), wanted) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_sums_past_float32_stay_exact(name):
    k = 5000 if name in ("int4", "int8") else 200_000
    codes = np.full((k, 3), 2 ** quantizers.get(name).bits - 1 if name != "ternary" else 2)
    offset = quantizers.get(name).offset
    packed = PackedTensor.from_codes(codes, np.ones((1, 1)), offset, quantizers.get(name).bits)
    x_codes = np.full((2, k), 127, "int8")
    x_codes[0, ::2] = 126
    expected = oracle.accumulate(x_codes.astype("int64"), codes, offset)
    np.testing.assert_array_equal(to_numpy(accumulate(x_codes, packed)), expected)
    if name != "int4":  # 5000 inputs of 4 bits fit in one exact slice
        assert np.abs(expected).max() > 2**24


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(33,), (1, 33), (2, 3, 4, 33)])
def test_leading_dimensions_and_dtypes(shape, dtype, rng):
    _, packed = make("ternary", 33, 20, rng)
    x = ops.cast(rng.normal(size=shape).astype("float32"), dtype)
    y = bit_matmul(x, packed, quantizers.get_activation("int8"))
    assert tuple(y.shape) == (*shape[:-1], 20)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    rows = ops.reshape(ops.cast(x, "float32"), (-1, 33))
    wanted = to_numpy(bit_matmul(rows, packed, quantizers.get_activation("int8")))
    tolerance = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[dtype]
    actual = to_numpy(ops.cast(y, "float32")).reshape(wanted.shape)
    assert relative_error(actual, wanted) <= tolerance


@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
def test_float_activations(granularity, group_size, rng):
    _, packed = make("int4", 70, 9, rng, granularity, group_size)
    x = rng.normal(size=(4, 70)).astype("float32")
    wanted = x.astype("float64") @ to_numpy(packed.dequantize()).astype("float64")
    assert relative_error(to_numpy(bit_matmul(x, packed)), wanted) < 1e-6


@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("name", ["ternary", "int8"])
def test_gradient_is_straight_through(name, granularity, group_size, rng):
    _, packed = make(name, 1200, 5, rng, granularity, group_size)  # int8: two exact slices
    x = rng.normal(size=(3, 1200)).astype("float32")
    upstream = rng.normal(size=(3, 5)).astype("float32")
    quantizer = quantizers.get_activation("int8")
    g = gradient(lambda v: ops.sum(ops.multiply(bit_matmul(v, packed, quantizer), upstream)), x)
    wanted = upstream @ to_numpy(packed.dequantize()).T
    assert relative_error(g, wanted) < 1e-5


def test_not_a_number_reaches_the_output(rng):
    _, packed = make("ternary", 8, 3, rng)
    x = np.ones((2, 8), "float32")
    x[0, 3] = np.nan
    y = to_numpy(bit_matmul(x, packed, quantizers.get_activation("int8")))
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


def test_bad_input(rng):
    _, packed = make("ternary", 8, 3, rng)
    with pytest.raises(ValueError, match=r"in_features=8. Received: x.shape=\(2, 7\)"):
        bit_matmul(np.ones((2, 7), "float32"), packed)
    with pytest.raises(ValueError, match="Received: dtype=int32"):
        bit_matmul(np.ones((2, 8), "int32"), packed)


def test_forcing_a_kernel(rng, monkeypatch):
    _, packed = make("ternary", 8, 3, rng)
    x = np.ones((2, 8), "float32")
    quantizer = quantizers.get_activation("int8")
    wanted = to_numpy(reference_matmul(ops.convert_to_tensor(x), packed, quantizer))
    with kernels.use_kernel("reference"):
        np.testing.assert_array_equal(to_numpy(bit_matmul(x, packed, quantizer)), wanted)
    with pytest.raises(ValueError, match="Unknown kernel"), kernels.use_kernel("warp"):
        pass
    monkeypatch.setattr(kernels.select, "DEFAULT", "warp")  # as KERAS_BITNET_KERNEL does
    with pytest.raises(ValueError, match="Received: 'warp'"):
        bit_matmul(x, packed, quantizer)


def test_explain_ends_with_the_reference(rng):
    _, packed = make("ternary", 8, 3, rng)
    x = ops.ones((2, 8))
    rows = kernels.explain(kernels.Problem.of(x, packed, quantizers.get_activation("int8")))
    assert rows[-1] == ("reference", None)
    with pytest.raises(ValueError, match="has no weights yet"):
        kernels.explain(BitLinear(3))


class Clipped(quantizers.ActivationInt8):
    """A quantizer of a user's, which no kernel knows."""

    def _round(self, ratio):
        return ops.clip(super()._round(ratio), -50, 50)


def test_a_quantizer_of_ones_own_runs_as_it_says(rng):
    _, packed = make("ternary", 40, 3, rng)
    x = rng.normal(size=(4, 40)).astype("float32")
    quantizer = Clipped()
    codes, scale = quantizer.quantize(x)
    wanted = to_numpy(codes).astype("float64") * to_numpy(scale) @ to_numpy(packed.dequantize())
    assert relative_error(to_numpy(bit_matmul(x, packed, quantizer)), wanted) < 1e-5
