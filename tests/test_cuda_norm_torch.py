"""The RMS norm by a CUDA kernel under PyTorch: its operator, compilation, graphs."""

import pytest
from helpers import BACKEND, packed_twin, relative_error

if BACKEND != "torch":
    pytest.skip("the torch backend is not the active one", allow_module_level=True)

import torch

from keras_bitnet.kernels import norm
from keras_bitnet.kernels.cuda import library, torch_norm
from keras_bitnet.layers import BitLinear

if library.reason(0) is not None:
    pytest.skip(library.reason(0), allow_module_level=True)


def numbers(rng, *shape):
    return torch.tensor(rng.normal(size=shape) * 3, dtype=torch.float32, device="cuda")


def test_memory_that_is_not_aligned(rng):
    memory, gain = numbers(rng, 5 * 132 + 1), numbers(rng, 133)
    wanted = norm.rms_norm(memory[1:].view(5, 132).clone(), gain[1:].clone(), 1e-5)
    found = norm.rms_norm(memory[1:].view(5, 132), gain[1:], 1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile(mode, rng):
    torch._dynamo.reset()
    layer = packed_twin(BitLinear(256, norm="rms"), (None, 256))
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for rows in (1, 40):
        x = numbers(rng, rows, 256)
        with torch.no_grad():
            for _ in range(3):  # compiled, the norm may be rounded otherwise
                assert relative_error(compiled(x).cpu(), layer(x).cpu()) < 0.02


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
