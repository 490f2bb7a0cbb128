"""The RMS norm by a CUDA kernel: against NumPy, in layers; the codes of training."""

import numpy as np
import pytest
from helpers import (
    BACKEND,
    assert_nan_and_infinity_stay_in_their_rows,
    no_gradient,
    packed_twin,
    relative_error,
    to_numpy,
)
from keras import ops

from keras_bitnet import kernels
from keras_bitnet.kernels import norm
from keras_bitnet.kernels.cuda import library
from keras_bitnet.layers import BitLinear

if BACKEND not in ("jax", "torch"):
    pytest.skip("TensorFlow runs the reference on a GPU", allow_module_level=True)
if library.reason(0) is not None:
    pytest.skip(library.reason(0), allow_module_level=True)

DTYPES = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}
# Rows that the threads of a block hold and rows that they do not, odd sizes, none at all.
SHAPES = ((1, 1), (3, 17), (2, 5, 128), (7, 257), (40, 2560), (2, 9001), (3, 20000), (0, 8))


def numbers(rng, *shape, dtype="float32"):
    return ops.cast(rng.normal(size=shape).astype("float32") * 3, dtype)


def wide(x):
    return to_numpy(ops.cast(x, "float32")).astype("float64")


@pytest.fixture
def ran(monkeypatch):
    """Counts the calls of the norm by itself."""
    calls = []
    first, *others = norm.TABLES[BACKEND]
    row = first.load()
    counting = kernels.Kernel(row.name, row.refuse, lambda *a: calls.append(1) or row.run(*a))
    monkeypatch.setitem(norm.TABLES, BACKEND, (counting, *others))
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_numpy(shape, dtype, rng, ran):
    x, gain = numbers(rng, *shape, dtype=dtype), numbers(rng, shape[-1])
    squares = (wide(x) ** 2).mean(-1, keepdims=True)
    wanted = wide(x) / np.sqrt(squares + 1e-5) * wide(gain)
    y = norm.rms_norm(x, gain, 1e-5)
    assert len(ran) == 1
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    if wanted.size:
        assert relative_error(wide(y), wanted) < DTYPES[dtype]


def test_nan_and_infinity_stay_in_their_rows():
    assert_nan_and_infinity_stay_in_their_rows(norm.rms_norm)


@pytest.mark.parametrize("rows", [1, 64])
def test_packed_codes_are_those_of_training(rows, rng, ran):
    # One code of ten thousand that differs shows: it changes an output by 1 of 127 parts.
    layer = BitLinear(64, norm="rms", use_bias=False)
    layer.build((None, 512))
    layer.normalization.scale.assign(np.linspace(0.5, 2, 512))
    packed = packed_twin(layer, (None, 512))
    packed.normalization.scale.assign(layer.normalization.scale)
    with no_gradient():
        for _ in range(400 // rows + 4):
            x = numbers(rng, rows, 512)
            assert relative_error(to_numpy(packed(x)), to_numpy(layer(x))) < 1e-5
    assert ran
