"""The CUDA kernels for PyTorch: operators of a product and of several of the same activations."""

import functools
import math
import weakref

import torch
from keras import ops

from keras_bitnet.kernels import cpu, cuda, torch_operators
from keras_bitnet.kernels.cuda import library
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.kernels.torch_operators import DTYPES, pointer

# The operators, by how many weights they multiply the same activations.
_NAMES = {1: "bit_matmul_cuda"} | {
    weights: f"bit_matmul_cuda_{weights}" for weights in range(2, library.MAX_JOINT + 1)
}


def _schema(weights):
    tensors, sizes, results = torch_operators.matmul_schema(weights, "Tensor?")
    return (
        f"{_NAMES[weights]}(Tensor x, {tensors}Tensor? x_scale, {sizes}int bits, int group_size, "
        f"int activation_bits, bool per_tensor, float offset, float epsilon) -> {results}"
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
    return _call(x, [packed], activation_quantizer, [bias], activation_scale)


def run_joint(x, packed, activation_quantizer, biases):
    """As `keras_bitnet.ops.joint_bit_matmul`, for at most four weights that are alike."""
    if len(packed) > library.MAX_JOINT:
        return None
    return list(_call(x, packed, activation_quantizer, biases))


def _call(x, packed, activation_quantizer, biases, activation_scale=None):
    activations = cpu.Activations.of(activation_quantizer)
    tensors = (
        (
            ops.convert_to_tensor(weight.tiles),
            ops.convert_to_tensor(weight.scale),
            None if bias is None else ops.cast(bias, "float32"),
        )
        for weight, bias in zip(packed, biases, strict=True)
    )
    return getattr(torch.ops.keras_bitnet, _NAMES[len(packed)])(
        x,
        *(tensor for weight in tensors for tensor in weight),
        None if activation_scale is None else ops.cast(activation_scale, "float32"),
        *(weight.out_features for weight in packed),
        packed[0].bits,
        packed[0].group_size or 0,
        activations.bits,
        activations.per_tensor,
        packed[0].offset,
        activations.epsilon,
    )


def _launch(*operands, weights=1, kernel=0):
    """The operators on CUDA; `kernel` forces a row of the launcher's table, for tests."""
    x, tensors, (x_scale,), sizes, numbers = torch_operators.matmul_operands(operands, weights)
    bits, group_size, activation_bits, per_tensor, offset, epsilon = numbers
    device, x = x.get_device(), x.contiguous()
    stream = torch.cuda.current_stream(device).cuda_stream
    rows, in_features = math.prod(x.shape[:-1]), x.shape[-1]
    results, structs = [], []
    kept: list = []  # until the launch
    for (tiles, scale, bias), size in zip(tensors, sizes, strict=True):
        tiles, scale = _aligned(tiles), scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        _check(x, tiles, scale, bias, x_scale, size, bits, group_size)
        y = x.new_empty((*x.shape[:-1], size))
        structs.append(library.MatmulStruct(
            rows, in_features, size, group_size, bits, DTYPES[x.dtype], activation_bits, per_tensor,
            offset, epsilon, scale.shape[1], kernel, _writers(tiles, stream), x.data_ptr(),
            tiles.data_ptr(), scale.data_ptr(), pointer(x_scale), pointer(bias), y.data_ptr(), None,
        ))  # fmt: skip
        results.append(y)
        kept += tiles, scale, bias
    size = library.workspace(structs[0])
    if size:
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        for struct in structs:
            struct.workspace = workspace.data_ptr()
    queue(library.JointStruct.of(structs), bits, device)
    return tuple(results) if weights > 1 else results[0]


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


for _weights in _NAMES:
    torch_operators.define(
        _schema(_weights),
        functools.partial(_launch, weights=_weights),
        "CUDA",
        functools.partial(torch_operators.fake_matmul, weights=_weights),
        torch_operators.matmul_gradient,
        functools.partial(torch_operators.matmul_context, weights=_weights),
    )

CUDA = Kernel(cuda.NAME, refuse, run, run_joint=run_joint)
