"""The CUDA kernels for PyTorch: the operator `keras_bitnet::bit_matmul_cuda` and its gradient."""

import weakref

import torch
from keras import ops

from keras_bitnet.kernels import cpu, cuda, torch_operators
from keras_bitnet.kernels.cuda import library
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.kernels.torch_operators import DTYPES, pointer

_SCHEMA = (
    "bit_matmul_cuda(Tensor x, Tensor tiles, Tensor scale, Tensor? bias, Tensor? x_scale, "
    "int out_features, int bits, int group_size, int activation_bits, bool per_tensor, "
    "float offset, float epsilon) -> Tensor"
)


def _device_reasons():
    """Read once, for `torch.compile` traces what reads it: why a device cannot run, by its name."""
    if not torch.backends.cuda.is_built() or not torch.cuda.is_available():
        return {}
    return {f"cuda:{i}": library.reason(i) for i in range(torch.cuda.device_count())}


_REASONS = _device_reasons()


def device_reason(device):
    """Why no kernel runs on a device of PyTorch, given by its name, or `None`."""
    device = device or "an unknown device"
    if not device.startswith("cuda"):
        return f"the values are on {device!r}, not on a CUDA device"
    return _REASONS.get(device if ":" in device else "cuda:0", "there is no such CUDA device")


def refuse(problem):
    """Why the kernel cannot run a problem, or `None`."""
    return device_reason(problem.device) or cuda.refuse(problem)


def run(x, packed, activation_quantizer, bias, activation_scale=None):
    """As `keras_bitnet.ops.bit_matmul`, for a problem that was not refused."""
    activations = cpu.Activations.of(activation_quantizer)
    return torch.ops.keras_bitnet.bit_matmul_cuda(
        x,
        ops.convert_to_tensor(packed.tiles),
        ops.convert_to_tensor(packed.scale),
        None if bias is None else ops.cast(bias, "float32"),
        None if activation_scale is None else ops.cast(activation_scale, "float32"),
        packed.out_features,
        packed.bits,
        packed.group_size or 0,
        activations.bits,
        activations.per_tensor,
        packed.offset,
        activations.epsilon,
    )


def _launch(
    x, tiles, scale, bias, x_scale, out_features, bits, group_size, activation_bits, per_tensor,
    offset, epsilon, kernel=0,
):  # fmt: skip
    """The operator on CUDA; `kernel` forces a row of the launcher's table, for tests."""
    device = x.get_device()
    x, tiles, scale = x.contiguous(), _aligned(tiles), scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    in_features = x.shape[-1]
    _check(x, tiles, scale, bias, x_scale, out_features, bits, group_size)
    weights = _writers(tiles, torch.cuda.current_stream(device).cuda_stream)
    problem = library.MatmulStruct(
        y.numel() // out_features, in_features, out_features, group_size, bits, DTYPES[x.dtype],
        activation_bits, per_tensor, offset, epsilon, scale.shape[1], kernel, weights,
        x.data_ptr(), tiles.data_ptr(), scale.data_ptr(), pointer(x_scale), pointer(bias),
        y.data_ptr(), None,
    )  # fmt: skip
    size = library.workspace(problem)
    if size:
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        problem.workspace = workspace.data_ptr()
    queue(problem, bits, device)
    return y


def queue(problem, kind, device):
    """Queues a problem on the current stream of a device, see `library.run`.

    Args:
        problem: One of the structs of `library`.
        kind: The kind of kernels, see `compiler.KINDS`.
        device: Number of the device.
    """
    library.load(device, kind)
    library.run(problem, device, torch.cuda.current_stream(device).cuda_stream)


# Of tensors by identity: a weak reference, their state, and the streams that waited for it.
_settled: dict[int, tuple[weakref.ref, tuple[int, int], set[int]]] = {}


def _writers(tiles, stream):
    """Whether a kernel still running on the stream may be writing a tensor, see `src/shim.h`.

    PyTorch counts what changes a tensor in place. While count and memory are those of an earlier
    launch on the stream, which waited for all before it, only reads were queued since. A graph that
    is captured starts when all before it is done, so it need not have a launch of its own.
    """
    if tiles.is_inference():
        return library.WEIGHTS_UNKNOWN  # not counted
    key, state = id(tiles), (tiles._version, tiles.data_ptr())
    found = _settled.get(key)
    if found is None or found[0]() is not tiles or found[1] != state:
        found = (weakref.ref(tiles, lambda _: _settled.pop(key, None)), state, set())
        _settled[key] = found
    elif stream in found[2] or torch.cuda.is_current_stream_capturing():
        return library.WEIGHTS_READY
    found[2].add(stream)
    return library.WEIGHTS_SETTLE


def _aligned(tiles):
    tiles = tiles.contiguous()
    return tiles if tiles.data_ptr() % 16 == 0 else tiles.clone()


def _check(x, tiles, scale, bias, x_scale, out_features, bits, group_size):
    k, n = x.shape[-1], out_features
    groups = -(-k // group_size) if group_size else 1
    wanted = (
        ("tiles", tiles, torch.uint8, {(-(-n // 16), -(-k * bits // 32), 16, 4)}),
        ("scale", scale, torch.float32, {(groups, 1), (groups, n)}),
        ("bias", bias, torch.float32, {(n,)}),
        ("x_scale", x_scale, torch.float32, {(), (1,)}),
    )
    torch_operators.check(x.device, wanted)


torch_operators.define(
    _SCHEMA,
    _launch,
    "CUDA",
    torch_operators.fake_matmul,
    torch_operators.matmul_gradient,
    torch_operators.matmul_context,
)

CUDA = Kernel(cuda.NAME, refuse, run)
