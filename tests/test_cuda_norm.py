"""The RMS norm by a CUDA kernel: against NumPy, in layers, in graphs; the codes of training."""

import numpy as np
import pytest
from helpers import BACKEND, packed_twin, relative_error

if BACKEND != "torch":
    pytest.skip("the torch backend is not the active one", allow_module_level=True)

import torch

from keras_bitnet import kernels
from keras_bitnet.kernels import norm
from keras_bitnet.kernels.cuda import library, torch_norm
from keras_bitnet.layers import BitLinear

if library.reason(0) is not None:
    pytest.skip(library.reason(0), allow_module_level=True)

DTYPES = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}
# Rows that the threads of a block hold and rows that they do not, odd sizes, none at all.
SHAPES = ((1, 1), (3, 17), (2, 5, 128), (7, 257), (40, 2560), (2, 9001), (3, 20000), (0, 8))


def numbers(rng, *shape, dtype="float32"):
    return torch.tensor(rng.normal(size=shape) * 3, dtype=getattr(torch, dtype), device="cuda")


@pytest.fixture
def ran(monkeypatch):
    """Counts the calls of the norm by itself."""
    calls = []
    row, (_, *others) = torch_norm.CUDA, norm.TABLES["torch"]
    counting = kernels.Kernel(row.name, row.refuse, lambda *a: calls.append(1) or row.run(*a))
    monkeypatch.setitem(norm.TABLES, "torch", (counting, *others))
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_numpy(shape, dtype, rng, ran):
    x, gain = numbers(rng, *shape, dtype=dtype), numbers(rng, shape[-1])
    wide = x.double().cpu().numpy()
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * gain.double().cpu().numpy()
    y = norm.rms_norm(x, gain, 1e-5)
    assert len(ran) == 1
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    if wide.size:
        assert relative_error(y.double().cpu(), wanted) < DTYPES[dtype]


def test_memory_that_is_not_aligned(rng):
    memory, gain = numbers(rng, 5 * 132 + 1), numbers(rng, 133)
    wanted = norm.rms_norm(memory[1:].view(5, 132).clone(), gain[1:].clone(), 1e-5)
    found = norm.rms_norm(memory[1:].view(5, 132), gain[1:], 1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_nan_and_infinity_stay_in_their_rows():
    x = torch.ones(3, 20, device="cuda")
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    y = norm.rms_norm(x, torch.ones(20, device="cuda"), 1e-5)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert y[2, 4].isnan()


def test_refusals(rng):
    x, gain = numbers(rng, 3, 20), numbers(rng, 20)

    def reason(x):
        return torch_norm.refuse(norm.Norm.of(x, gain))

    assert reason(x) is None
    assert "float64" in reason(x.double())
    assert "on 'cpu'" in reason(x.cpu())
    assert "gradient" in reason(x.requires_grad_())
    with torch.no_grad():
        assert reason(x) is None


@pytest.mark.parametrize("rows", [1, 64])
def test_packed_codes_are_those_of_training(rows, rng, ran):
    # One code of ten thousand that differs shows: it changes an output by 1 of 127 parts.
    layer = BitLinear(64, norm="rms", use_bias=False)
    layer.build((None, 512))
    layer.normalization.scale.assign(np.linspace(0.5, 2, 512))
    packed = packed_twin(layer, (None, 512))
    packed.normalization.scale.assign(layer.normalization.scale)
    with torch.no_grad():
        for _ in range(400 // rows + 4):
            x = numbers(rng, rows, 512)
            assert relative_error(packed(x).cpu(), layer(x).cpu()) < 1e-5
    assert ran


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile(mode, rng, ran):
    torch._dynamo.reset()
    layer = packed_twin(BitLinear(256, norm="rms"), (None, 256))
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for rows in (1, 40):
        x = numbers(rng, rows, 256)
        with torch.no_grad():
            for _ in range(3):  # compiled, the norm may be rounded otherwise
                assert relative_error(compiled(x).cpu(), layer(x).cpu()) < 0.02
    assert ran


@pytest.mark.parametrize("rows", [1, 16, 100])
def test_cuda_graph(rows, rng):
    # A launch may start before the kernel before it ends; it must not read its rows too early.
    layer = packed_twin(BitLinear(256, norm="rms"), (None, 256))
    gain, x = numbers(rng, 256), numbers(rng, rows, 256)

    def chain(y):
        for _ in range(4):
            y = layer(norm.rms_norm(y, gain, 1e-5))
        return y

    with torch.no_grad():
        chain(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(y, chain(x))


def test_a_gain_written_just_before(rng):
    x, gain = numbers(rng, 1, 4096), numbers(rng, 4096)
    wanted, written = norm.rms_norm(x, gain, 1e-5), torch.zeros_like(gain)
    for _ in range(40):
        written.zero_()
        written.copy_(gain)
        assert torch.equal(norm.rms_norm(x, written, 1e-5), wanted)


def test_opcheck(rng):
    x, gain = numbers(rng, 2, 5, 100), numbers(rng, 100)
    torch.library.opcheck(torch.ops.keras_bitnet.rms_norm_cuda.default, (x, gain, 1e-5))


def test_operator_checks_its_operands(rng):
    with pytest.raises(ValueError, match="`gain` must be"):
        torch.ops.keras_bitnet.rms_norm_cuda(numbers(rng, 3, 20), numbers(rng, 19), 1e-5)
