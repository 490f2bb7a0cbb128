"""The native CPU kernels under PyTorch's ways of tracing."""

import os

import numpy as np
import pytest
from helpers import BACKEND, keras_3_15, packed_twin, relative_error, run_python

if BACKEND != "torch":
    pytest.skip("the torch backend is not the active one", allow_module_level=True)

import keras
import torch
from test_native_adapters import make_packed, packed_layer

from keras_bitnet import kernels
from keras_bitnet.kernels import native
from keras_bitnet.kernels import torch as _registers_the_operator  # noqa: F401
from keras_bitnet.layers import BitConv2D, BitFeedForward, BitGroupedQueryAttention
from keras_bitnet.ops import bit_matmul, joint_bit_matmul
from keras_bitnet.ops.window import Window
from keras_bitnet.quantizers.activations import ActivationInt8

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason=str(native.reason())),
    pytest.mark.usefixtures("on_cpu"),
]


def has_op(graph):
    return any("bit_matmul" in str(node.target) for node in graph.nodes)


@pytest.mark.usefixtures("whole_graph")
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile(dynamic, rng):
    torch._dynamo.reset()
    layer = packed_layer(rng)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for rows in (5, 2, 9):
        x = torch.randn(rows, 100)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.usefixtures("whole_graph")
def test_compile_as_the_first_call_of_a_process():
    code = """
import json, torch
from keras_bitnet.layers import BitLinear
layer = BitLinear(8, packed=True)
layer.build((None, 16))
y = torch.compile(layer, fullgraph=True)(torch.ones(2, 16))
print(json.dumps(list(y.shape)))
"""
    assert run_python(code, CUDA_VISIBLE_DEVICES="") == [2, 8]


@pytest.mark.usefixtures("whole_graph")
def test_compiled_gradient(rng):
    torch._dynamo.reset()
    layer = packed_layer(rng)
    x = torch.randn(5, 100)
    found = []
    for call in (layer, torch.compile(layer, fullgraph=True, dynamic=True)):
        v = x.clone().requires_grad_()
        call(v).square().sum().backward()
        found.append((v.grad, layer.bias.value.grad))
        layer.bias.value.grad = None
    for actual, wanted in zip(*found, strict=True):
        assert relative_error(actual, wanted) < 2e-6


@pytest.mark.usefixtures("whole_graph")
@pytest.mark.parametrize("kernel", ["native", "reference"])
def test_export(kernel, rng):
    layer = packed_layer(rng)
    x = torch.randn(5, 100)
    batch = torch.export.Dim("batch")
    with kernels.use_kernel(kernel):
        program = torch.export.export(layer, (x,), dynamic_shapes=(({0: batch},),))
    assert has_op(program.graph) == (kernel == "native")
    assert relative_error(program.module()(x[:3]).detach(), layer(x[:3]).detach()) < 2e-6


@pytest.mark.parametrize("granularity", ["tensor", 32])
@pytest.mark.parametrize("bias", [0, 33])
@pytest.mark.parametrize("gain", [0, 100])
def test_opcheck(granularity, bias, gain, rng, request):
    if granularity == 32:  # its derivative repeats; old Keras reads how often from a tensor
        request.getfixturevalue("whole_graph")
    _, packed = make_packed(rng, 100, 33, granularity=granularity)
    x, b, x_scale = torch.randn(2, 5, 100), torch.randn(bias), torch.full((bias % 2,), 0.02)
    group_size = packed.group_size or 0
    attributes = (33, 2, 0, group_size, 8, False, packed.offset, 1e-5, 1e-5)
    op = torch.ops.keras_bitnet.bit_matmul.default
    x, b, gain = (t.requires_grad_() for t in (x, b, torch.randn(gain)))
    tensors = (x, packed.tiles, packed.scale, b, x_scale, gain)
    torch.library.opcheck(op, (*tensors, *attributes))


@pytest.mark.usefixtures("whole_graph")
@pytest.mark.parametrize("count", [2, 3])
def test_joint_operators(count, rng):
    """opcheck, one node of a compiled program, and the operator over ctypes."""
    from keras_bitnet.kernels import torch as adapter

    packed = [make_packed(rng, 100, n)[1] for n in (33, 16, 20)[:count]]
    biases = [torch.randn(33), *[torch.empty(0)] * (count - 1)]
    x, gain, none = torch.randn(2, 5, 100), torch.randn(100), torch.empty(0)
    weights = [t for p, b in zip(packed, biases, strict=True) for t in (p.tiles, p.scale, b)]
    sizes = [p.out_features for p in packed]
    numbers = (*sizes, 2, 0, 0, 8, False, packed[0].offset, 1e-5, 1e-5)
    operator = getattr(torch.ops.keras_bitnet, f"bit_matmul_{count}").default
    wanted = operator(x, *weights, none, gain, *numbers)
    results = adapter._run_through_ctypes(x, *weights, none, gain, *numbers, weights=count)
    assert all(map(torch.equal, results, wanted))
    for tensor in (x, biases[0], gain):
        tensor.requires_grad_()
    torch.library.opcheck(operator, (x, *weights, none, gain, *numbers))

    def together(x):
        return joint_bit_matmul(x, packed, ActivationInt8())

    x = torch.randn(1, 100)
    found = []

    def backend(graph, _):
        found.extend(
            str(node.target) for node in graph.graph.nodes if "bit_mat" in str(node.target)
        )
        return graph

    with torch.no_grad():
        results = torch.compile(together, fullgraph=True, backend=backend)(x)
        assert all(map(torch.equal, results, together(x)))
    assert found == [f"keras_bitnet.bit_matmul_{count}.default"]


@pytest.mark.usefixtures("whole_graph")
@pytest.mark.parametrize("use_bias", [False, True])
def test_blocks_compile_to_joint_operators(use_bias):
    x = torch.randn(2, 3, 64)
    feed_forward = BitFeedForward(96, use_bias=use_bias, packed=True)
    feed_forward.build(x.shape)
    attention = BitGroupedQueryAttention(
        16, 4, 2, use_bias=use_bias, flash_attention=False, packed=True
    )
    attention.build(x.shape, x.shape)
    for function, weights in ((feed_forward, 2), (lambda x: attention(x, x), 3)):
        found = []

        def backend(graph, _, found=found):
            found.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        with torch.no_grad():
            y = torch.compile(function, fullgraph=True, backend=backend)(x)
            assert torch.equal(y, function(x))
        products = [target for target in found if "bit_matmul" in target]
        one, joint = (f"keras_bitnet.bit_matmul{i}.default" for i in ("", f"_{weights}"))
        assert products == [joint, one]


def test_opcheck_of_a_convolution(rng):
    _, packed = make_packed(rng, 100, 33)
    numbers = Window.of(2, (2, 5), 2, 1, "same", "channels_last").numbers
    x, bias, gain = torch.randn(2, 3, 7, 10), torch.randn(33), torch.randn(100)
    tensors = (x, packed.tiles, packed.scale, bias, torch.empty(0), gain)
    attributes = (33, 2, 0, 0, 8, False, packed.offset, 1e-5, 1e-5, *numbers)
    for tensor in (x, bias, gain):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.keras_bitnet.bit_conv.default, (*tensors, *attributes))


@pytest.mark.usefixtures("whole_graph")
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_compile_and_export_of_a_convolution(data_format, rng):
    layer = BitConv2D(6, 3, strides=2, padding="same", data_format=data_format)
    x = torch.randn(2, 8, 8, 8)
    layer.build(x.shape)
    layer = packed_twin(layer, x.shape)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
        exported = torch.export.export(layer, (x,))
    assert any(str(n.target) == "keras_bitnet.bit_conv.default" for n in exported.graph.nodes)
    assert torch.equal(exported.module()(x), layer(x))


def test_operator_over_ctypes(rng):
    from keras_bitnet.kernels import torch as adapter

    _, packed = make_packed(rng, 100, 33)
    x, gain = torch.randn(5, 100), torch.randn(100)
    wanted = bit_matmul(x, packed, ActivationInt8(), norm=(gain, 1e-5))
    arguments = (33, 2, 0, 0, 8, False, packed.offset, 1e-5, 1e-5)
    none = torch.empty(0)
    operands = (x, packed.tiles, packed.scale, none, none, gain, *arguments)
    y = adapter._run_through_ctypes(*operands, weights=1)
    assert torch.equal(y, wanted)
    x, window = torch.randn(2, 9, 25), Window.of(1, 4, 2, 1, "causal", "channels_last")
    wanted = bit_matmul(x, packed, ActivationInt8(), window=window)
    operands = (x, packed.tiles, packed.scale, none, none, none, *arguments, *window.numbers)
    assert torch.equal(adapter._run_through_ctypes(*operands, weights=1), wanted)


def test_operator_checks_its_operands(rng):
    _, packed = make_packed(rng, 100, 33)
    attributes = (33, 2, 0, 0, 8, False, packed.offset, 1e-5, 1e-5)
    none = torch.empty(0)
    x = torch.randn(5, 100)
    right = {"x": x, "bias": none, "x_scale": none, "gain": none}
    for wrong, message in (
        ({"x": x[:, :50].contiguous()}, "tiles must be"),
        ({"x": x.t().contiguous().t()}, "contiguous"),
        ({"bias": torch.ones(7)}, "bias must be"),
        ({"x_scale": torch.ones(2)}, "x_scale must be"),
        ({"x_scale": torch.zeros(1)}, "x_scale, must be positive"),
        ({"gain": torch.ones(33)}, "gain must be"),
        ({"x": x.double()}, "dtype"),
    ):
        x, *others = {**right, **wrong}.values()
        with pytest.raises(RuntimeError, match=message):
            torch.ops.keras_bitnet.bit_matmul(x, packed.tiles, packed.scale, *others, *attributes)


@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        (0, -5, "one to three spatial axes"),
        (0, 4, "one to three spatial axes"),
        (3, 0, r"must be in \[1, 2\^20\]"),
        (4, 1 << 40, r"must be in \[1, 2\^20\]"),
        (3, 60, "larger than the images"),
        (3, 5, "tiles must be"),
    ],
)
def test_operator_checks_its_window(place, number, message, rng):
    _, packed = make_packed(rng, 100, 33)
    numbers = list(Window.of(2, (2, 5), 2, 1, "valid", "channels_last").numbers)
    numbers[place] = number
    none = torch.empty(0)
    operands = (torch.randn(1, 9, 9, 10), packed.tiles, packed.scale, none, none, none)
    attributes = (33, 2, 0, 0, 8, False, packed.offset, 1e-5, 1e-5, *numbers)
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        torch.ops.keras_bitnet.bit_conv.default(*operands, *attributes)


def test_operands_at_odd_addresses(rng):
    _, packed = make_packed(rng, 100, 33)
    raw = torch.zeros(packed.tiles.numel() + 1, dtype=torch.uint8)
    raw[1:] = packed.tiles.reshape(-1)
    x = torch.randn(5, 100)
    wanted = bit_matmul(x, packed, ActivationInt8())
    object.__setattr__(packed, "tiles", raw[1:].reshape(packed.tiles.shape))
    assert torch.equal(bit_matmul(x, packed, ActivationInt8()), wanted)


def test_meta_tensors_and_functional_models(rng):
    inputs = keras.Input((7, 100))
    model = keras.Model(inputs, packed_layer(rng)(inputs))
    assert model.output_shape == (None, 7, 33)
    assert model.predict(np.ones((2, 7, 100), "float32"), verbose=0).shape == (2, 7, 33)


def test_threads_follow_torch():
    code = """
import json, os, torch
torch.set_num_threads(1)
from keras_bitnet.layers import BitLinear
layer = BitLinear(2048, packed=True)
layer.build((None, 2048))
before = len(os.listdir("/proc/self/task"))
layer(torch.ones(64, 2048))
print(json.dumps(len(os.listdir("/proc/self/task")) - before))
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc on this system")
    assert run_python(code, CUDA_VISIBLE_DEVICES="") == 0


def test_the_threads_of_torch_run_the_kernels():
    """As they do where OpenMP is not told to wait passively; not in a forked child."""
    code = """
import json, os, threading, torch
from test_native_adapters import make_packed, np
from keras_bitnet import kernels
from keras_bitnet.kernels import native
from keras_bitnet.ops import bit_matmul
from keras_bitnet.quantizers import ActivationInt8
torch.set_num_threads(3)
native.set_threads(3)
_, packed = make_packed(np.random.default_rng(0), 2048, 1024)
x = torch.randn(64, 2048)
with kernels.use_kernel("reference"):
    wanted = bit_matmul(x, packed, ActivationInt8())
torch.ones(1 << 20).sum()  # starts them
before = len(os.listdir("/proc/self/task"))
y = bit_matmul(x, packed, ActivationInt8())
found = [(y - wanted).abs().max().item() / wanted.abs().max().item()]
more = len(os.listdir("/proc/self/task")) - before
def call():
    found.append(float(not torch.equal(bit_matmul(x, packed, ActivationInt8()), y)))
callers = [threading.Thread(target=call) for _ in range(8)]
[c.start() for c in callers], [c.join() for c in callers]
child = os.fork()
if child == 0:
    os._exit(not (bit_matmul(x, packed, ActivationInt8()).numpy() == y.numpy()).all())
print(json.dumps([max(found), more, os.waitpid(child, 0)[1]]))
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc on this system")
    error, more_threads, child = run_python(code, OMP_WAIT_POLICY="", CUDA_VISIBLE_DEVICES="")
    assert error < 2e-6
    assert more_threads == 0
    assert child == 0


@keras_3_15("writes no files of PyTorch")
def test_model_export(rng, tmp_path):
    model = keras.Sequential([keras.Input((100,)), packed_layer(rng)])
    x = np.ones((1, 100), "float32")
    with kernels.use_kernel("reference"):
        model.export(str(tmp_path / "model.pt2"), format="torch", verbose=False)
    program = torch.export.load(tmp_path / "model.pt2")
    assert not has_op(program.graph)
    assert relative_error(program.module()(torch.tensor(x)).detach(), model(x).detach()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_to_another_dtype(dtype, rng):
    """As a model of `Dense`, whose products promote."""
    model = keras.Sequential([keras.Input((100,)), packed_layer(rng)])
    x = torch.randn(3, 100)
    before = model(x).detach()
    assert relative_error(model.to(dtype)(x).detach(), before) < 2e-2
