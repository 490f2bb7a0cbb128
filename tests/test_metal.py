"""The Metal kernels, executed as C++ behind the host code that runs them on a Mac."""

import dataclasses
import re

import numpy as np
import oracle
import pytest
from helpers import BACKEND, relative_error, to_numpy

if BACKEND != "torch":
    pytest.skip("the Metal kernels are PyTorch's", allow_module_level=True)

import metal_shim
import torch
from test_native_adapters import OFFSETS, expected, make_packed, packed_layer

from keras_bitnet import kernels
from keras_bitnet.kernels import metal
from keras_bitnet.kernels.metal import dispatch
from keras_bitnet.ops import bit_matmul, reference_matmul
from keras_bitnet.quantizers.activations import ActivationInt4, ActivationInt8

SOURCE = dispatch.SOURCE.read_text("ascii")

needs_compiler = pytest.mark.skipif(
    metal_shim.obstacle() is not None, reason=str(metal_shim.obstacle())
)


@pytest.fixture(scope="module")
def shader(tmp_path_factory):
    return metal_shim.build(SOURCE, tmp_path_factory.mktemp("metal"))


@pytest.fixture(autouse=True)
def _poisoned_memory(on_cpu):
    """Fresh tensors hold NaN and the largest integers; the shim runs on the processor's."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cpu_operator(shader, monkeypatch):
    """The row `metal` runs on CPU tensors, by the shim."""
    fragment = torch.library.Library("keras_bitnet", "FRAGMENT")
    fragment.impl("metal_matmul", lambda *operands: dispatch.matmul(shader, *operands), "CPU")
    monkeypatch.setattr(metal, "OBSTACLE", None)
    monkeypatch.setattr(metal, "DEVICE", "cpu")
    # What is chosen here must not be remembered for later tests.
    monkeypatch.setattr(kernels.select, "_search", kernels.select._find)
    yield torch.ops.keras_bitnet.metal_matmul.default
    fragment._destroy()


def launch(shader, x, packed, quantizer, bias=None, activation_scale=None):
    """`metal.run` without the operator."""
    return dispatch.matmul(
        shader, x, packed.tiles, packed.scale, bias, activation_scale,
        packed.out_features, packed.bits, packed.group_size or 0, quantizer.bits,
        quantizer.granularity, packed.offset, quantizer.epsilon,
    )  # fmt: skip


def assert_sums_equal_the_oracle(shader, bits, offset, size, group_size=None):
    """Scales of one, so that the output is the integer sums themselves."""
    rng = np.random.default_rng(0)
    m, k, n = size
    codes, packed = make_packed(rng, k, n, bits, group_size or "tensor", offset)
    packed.scale.fill_(1)
    x = rng.integers(-127, 128, (m, k))
    y = launch(
        shader,
        torch.tensor(x, dtype=torch.float32),
        packed,
        ActivationInt8(granularity="static"),
        activation_scale=torch.tensor(1.0),
    )
    step = 1 if float(offset).is_integer() else 2
    wanted = (oracle.accumulate(x, codes, offset) / step).astype("float32")
    np.testing.assert_array_equal(y.numpy(), wanted)


@needs_compiler
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize(
    ("bits", "offset"), [(bits, offset) for bits in OFFSETS for offset in OFFSETS[bits]]
)
def test_integer_sums(bits, offset, group_size, shader):
    for size in ((1, 1, 1), (1, 257, 33), (2, 31, 16), (4, 32, 15), (5, 100, 17), (9, 7, 31)):
        assert_sums_equal_the_oracle(shader, bits, offset, size, group_size)


@needs_compiler
def test_sums_past_float32_stay_exact(shader):
    assert_sums_equal_the_oracle(shader, 8, -128.0, (1, 9000, 3))


@needs_compiler
@pytest.mark.parametrize("granularity", ["tensor", "channel", 32, 64])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_output(bits, granularity, shader, rng):
    for m, k, n in ((1, 257, 33), (3, 70, 31)):
        codes, packed = make_packed(rng, k, n, bits, granularity)
        x, bias = rng.normal(size=(m, k)).astype("float32"), rng.normal(size=n).astype("float32")
        for quantizer in (ActivationInt8(), ActivationInt4("tensor")):
            y = launch(shader, torch.tensor(x), packed, quantizer, torch.tensor(bias))
            assert relative_error(y, expected(x, codes, packed, quantizer, bias)) < 1e-6


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["token", "tensor", "static"])
@pytest.mark.parametrize("cls", [ActivationInt8, ActivationInt4])
def test_codes_of_the_activations_are_bit_equal(cls, granularity, dtype, shader, rng):
    quantizer = cls(granularity=granularity)
    static = torch.tensor(0.0173) if granularity == "static" else None
    for rows, k in ((1, 1), (3, 300), (1, 1031)):
        x = torch.tensor(rng.normal(size=(rows, k)) * 3).to(dtype)
        x[0, 0] = 0
        codes, scale = dispatch._quantize(
            shader, x, rows, k + 5, quantizer.highest, granularity, static, quantizer.epsilon
        )
        wanted, wanted_scale = quantizer.quantize(x, static)
        np.testing.assert_array_equal(codes[:, :k].to(torch.int8), wanted)
        assert (codes[:, k:] == 0).all()
        np.testing.assert_array_equal(scale, torch.broadcast_to(wanted_scale, (rows, 1))[:, 0])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, shader, rng):
    _, packed = make_packed(rng, 100, 33)
    for rows in (1, 6):
        x = torch.tensor(rng.normal(size=(rows, 100))).to(dtype)
        y = launch(shader, x, packed, ActivationInt8())
        assert y.dtype == dtype
        wanted = launch(shader, x.float(), packed, ActivationInt8())
        assert torch.equal(y, wanted.to(dtype))


@needs_compiler
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("granularity", ["token", "tensor", "static"])
def test_what_is_not_finite_reaches_the_output(granularity, bad, shader, rng):
    _, packed = make_packed(rng, 40, 3)
    static = torch.tensor(0.02) if granularity == "static" else None
    x = torch.ones(2, 40)
    x[0, 3] = bad
    y = launch(shader, x, packed, ActivationInt8(granularity=granularity), None, static)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all() == (granularity != "tensor")
    for dtype in (torch.bfloat16, torch.float16):
        y = launch(shader, x.to(dtype), packed, ActivationInt8(), None)
        assert not y[0].isfinite().any()


@needs_compiler
def test_no_rows(shader, rng):
    _, packed = make_packed(rng, 8, 3)
    assert launch(shader, torch.ones(0, 8), packed, ActivationInt8()).shape == (0, 3)


BARRIER = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
MUTATIONS = {
    "the mask of another width": ("(1u << BITS) - 1)", "(1u << BITS))"),
    "digits in another order": ("words[c] >> (BITS * digit)", "words[c] >> (BITS * (digit ^ 1))"),
    "a byte to the wrong input": ("float(odd.x) * x[r].y", "float(odd.x) * x[r].z"),
    "the sum of inputs not taken off": ("+ grid.shift * inputs[r]", "+ 0 * inputs[r]"),
    "a tile read twice": ("tile += MATMUL_THREADS / 4", "tile += MATMUL_THREADS / 8"),
    "a lane left out": ("lane < LANES; lane *= 2", "lane < LANES / 2; lane *= 2"),
    "a SIMD group left out": ("i < MATMUL_THREADS / LANES; ++i", "i < 3; ++i"),
    "rows without a bound": ("row >= uint(sizes.rows) || ", ""),
    "no barrier": (f"{BARRIER}  for (uint cell", "  for (uint cell"),
}


def without_other_widths(source):
    """Only the kernels for 2 bits, which build faster."""
    return re.sub(r"^MATMULS\([148]\)\n", "", source, flags=re.MULTILINE)


@needs_compiler
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_kernel_fails(mutation, tmp_path):
    old, new = MUTATIONS[mutation]
    assert SOURCE.count(old) == 1
    mutant = metal_shim.build(without_other_widths(SOURCE).replace(old, new), tmp_path)
    with pytest.raises(AssertionError):  # noqa: PT012
        for size in ((1, 600, 17), (5, 600, 17)):
            assert_sums_equal_the_oracle(mutant, 2, -1.0, size)


def test_arguments_of_the_source():
    """What the C++ build does not see: buffer indices, positions, characters."""
    assert SOURCE.isascii()
    kernels_found = re.findall(r"kernel void \w+\((.*?)\) \{", SOURCE, re.DOTALL)
    assert len(kernels_found) == 3
    for parameters in kernels_found:
        *buffers, group, thread = re.findall(r"\[\[([^]]+)\]\]", parameters)
        assert buffers == [f"buffer({i})" for i in range(len(buffers))]
        assert group == "threadgroup_position_in_grid"
        assert thread == "thread_position_in_threadgroup"


# --- The row and the operator ----------------------------------------------------------------


def test_refuses_without_an_apple_gpu(monkeypatch, rng):
    _, packed = make_packed(rng, 8, 3)
    problem = kernels.Problem.of(torch.ones(1, 8), packed, ActivationInt8())
    monkeypatch.setattr(metal, "OBSTACLE", "no GPU")
    assert metal.refuse(problem) == "no GPU"
    assert dict(kernels.explain(problem))["metal"] == "no GPU"
    with kernels.use_kernel("metal"), pytest.raises(ValueError, match="no GPU"):
        bit_matmul(torch.ones(1, 8), packed, ActivationInt8())
    monkeypatch.setattr(metal, "OBSTACLE", None)
    assert "on 'cpu', not on an Apple GPU" in metal.refuse(problem)
    problem = dataclasses.replace(problem, device="mps:0")
    assert metal.refuse(problem) is None
    assert "'trits'" in metal.refuse(dataclasses.replace(problem, layout="trits"))
    assert "float" in metal.refuse(dataclasses.replace(problem, activation_bits=None))


def test_obstacles(monkeypatch):
    def broken(source):
        raise SyntaxError("program_source:1: error")

    dispatch.library.cache_clear()
    if not torch.backends.mps.is_available():
        assert "no Apple GPU" in dispatch.obstacle.__wrapped__()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "compile_shader", broken)
    assert "does not compile or run: program_source:1" in dispatch.obstacle.__wrapped__()
    monkeypatch.delattr(torch.mps, "compile_shader")
    assert "has no `torch.mps.compile_shader`" in dispatch.obstacle.__wrapped__()


@needs_compiler
def test_check_of_the_shader(shader, monkeypatch):
    assert dispatch.check(shader, "cpu") is None
    monkeypatch.setattr(shader, "grouped_4_4", shader.grouped_4_1, raising=False)
    assert "wrong on this GPU" in dispatch.check(shader, "cpu")


@needs_compiler
@pytest.mark.parametrize("bias", [True, False])
def test_operator(bias, cpu_operator, rng):
    _, packed = make_packed(rng, 100, 33, granularity=32)
    x = torch.randn(2, 5, 100, requires_grad=True)
    b = torch.randn(33, requires_grad=True) if bias else None
    quantizer = ActivationInt8()
    with kernels.use_kernel("metal"):
        y = bit_matmul(x, packed, quantizer, b)
    wanted = reference_matmul(x, packed, quantizer, b)
    assert relative_error(y.detach(), wanted.detach()) < 1e-6
    operands = [x, *([b] if bias else [])]
    upstream = torch.randn_like(y)
    found = torch.autograd.grad((y * upstream).sum(), operands)
    expected = torch.autograd.grad((wanted * upstream).sum(), operands)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-5

    if bias:
        return
    tensors = (x, packed.tiles, packed.scale, b, None)
    attributes = (33, 2, 32, 8, "token", packed.offset, 1e-5)
    torch.library.opcheck(cpu_operator, (*tensors, *attributes))


@needs_compiler
def test_operands_at_odd_addresses(shader, rng):
    _, packed = make_packed(rng, 100, 33)
    raw = torch.zeros(packed.tiles.numel() + 1, dtype=torch.uint8)
    raw[1:] = packed.tiles.reshape(-1)
    x = torch.randn(5, 100)
    wanted = launch(shader, x, packed, ActivationInt8())
    arguments = (33, 2, 0, 8, "token", packed.offset, 1e-5)
    tiles = raw[1:].reshape(packed.tiles.shape)
    y = dispatch.matmul(shader, x, tiles, packed.scale, None, None, *arguments)
    assert torch.equal(y, wanted)


@needs_compiler
def test_layer_and_compile(cpu_operator, shader, rng, whole_graph):
    layer = packed_layer(rng)
    x = torch.randn(5, 100)
    wanted = to_numpy(layer(x))
    torch._dynamo.reset()
    with kernels.use_kernel("metal"), torch.no_grad():
        shader.launched.clear()
        assert relative_error(layer(x), wanted) < 1e-6
        assert shader.launched == ["quantize", "matmul_2_4"]
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert relative_error(compiled(x[:1]), wanted[:1]) < 1e-6
        assert shader.launched[2:] == ["quantize", "matmul_2_1"]
