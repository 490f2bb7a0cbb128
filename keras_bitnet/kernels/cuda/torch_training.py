"""Fake quantization by CUDA kernels for PyTorch: an operator for activations, one for weights.

Each is one pass over its values in place of a dozen; the gradient is the identity.
"""

import torch

from keras_bitnet.kernels import cpu, cuda, torch_operators
from keras_bitnet.kernels.cuda import compiler, library
from keras_bitnet.kernels.cuda.torch import device_reason, queue
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.kernels.torch_operators import DTYPES, pointer

_ACTIVATIONS = (
    "fake_quantize_cuda(Tensor x, Tensor? strength, Tensor? scale, float highest, "
    "bool per_tensor, float epsilon) -> Tensor"
)
_WEIGHT = (
    "fake_quantize_weight_cuda(Tensor weight, Tensor scale, Tensor? strength, int group_size, "
    "float lowest, float highest, float half, bool binary, ScalarType dtype) -> Tensor"
)


def refuse(problem):
    """Why the kernels cannot run a `FakeQuantization`, or `None`."""
    reason = device_reason(problem.device)
    if reason is not None:
        return reason
    if torch.compiler.is_compiling():
        return "`torch.compile` fuses the reference with what is around it, which is faster"
    if problem.dtype not in cpu.DTYPES:
        return f"values of dtype {problem.dtype}; accepted: {', '.join(cpu.DTYPES)}"
    if problem.formula not in ("absmax", "nearest", "sign"):
        return f"quantized by {problem.formula}; accepted: absmax, nearest, sign"
    if problem.scale == "learned":
        return "the scale is learned: it needs a gradient of its own"
    if problem.gradient != "identity":
        return f"the gradient is {problem.gradient!r}; accepted: 'identity'"
    return None


def run(quantizer, values, *arguments):
    """As `reference_fake_quantize` of a quantizer, for a problem that was not refused."""
    if quantizer.formula == "absmax":
        return _run_activations(quantizer, values, *arguments)
    return _run_weight(quantizer, values, *arguments)


def _run_activations(quantizer, x, scale=None, strength=None):
    return torch.ops.keras_bitnet.fake_quantize_cuda(
        x,
        _number(strength, x),
        _number(scale, x),
        float(quantizer.highest),
        quantizer.granularity == "tensor",
        quantizer.epsilon,
    )


def _run_weight(quantizer, weight, scale, strength, dtype):
    scale = quantizer.compute_scale(weight) if scale is None else scale.detach()
    return torch.ops.keras_bitnet.fake_quantize_weight_cuda(
        weight,
        scale,
        _number(strength, weight),
        quantizer.group_size or 0,
        float(quantizer.lowest),
        float(quantizer.highest),
        quantizer.offset % 1,
        quantizer.formula == "sign",
        getattr(torch, dtype),
    )


def _number(value, like):
    """A scalar as a float32 tensor on the device of another, without a gradient, or `None`."""
    if value is None:
        return None
    return torch.as_tensor(value, dtype=torch.float32, device=like.device).detach()


def _fake_quantize(x, strength, scale, highest, per_tensor, epsilon):
    x = x.contiguous()
    y = torch.empty_like(x)
    columns = max(x.shape[-1], 1) if x.dim() else 1
    problem = library.FakeStruct(
        rows=x.numel() // columns, columns=columns, dtype=DTYPES[x.dtype], per_tensor=per_tensor,
        scale_columns=1, epsilon=epsilon, lowest=-highest, highest=highest, x=x.data_ptr(),
        x_scale=pointer(scale), strength=pointer(strength), y=y.data_ptr(),
    )  # fmt: skip
    if per_tensor:
        workspace = torch.empty(1, dtype=torch.int32, device=x.device)
        problem.workspace = workspace.data_ptr()
    queue(problem, compiler.TRAINING, x.get_device())
    return y


def _fake_quantize_weight(
    weight, scale, strength, group_size, lowest, highest, half, binary, dtype
):  # fmt: skip
    weight, scale = weight.contiguous(), scale.contiguous()
    k, n = weight.shape
    groups = -(-k // group_size) if group_size else 1
    if weight.dtype != torch.float32 or tuple(scale.shape) not in {(groups, 1), (groups, n)}:
        raise ValueError(
            f"`weight` must be float32 and `scale` of shape {(groups, 1)} or {(groups, n)}. "
            f"Received: {weight.dtype} and {tuple(scale.shape)}"
        )
    y = torch.empty_like(weight, dtype=dtype)
    problem = library.FakeStruct(
        rows=k, columns=n, group_size=group_size, weight=1, dtype=DTYPES[dtype], binary=binary,
        scale_columns=scale.shape[1], lowest=lowest, highest=highest, half=half,
        x=weight.data_ptr(), scale=scale.data_ptr(), strength=pointer(strength), y=y.data_ptr(),
    )  # fmt: skip
    queue(problem, compiler.TRAINING, weight.get_device())
    return y


def _like_in_dtype(weight, *attributes):
    return torch.empty_like(weight, dtype=attributes[-1], memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.dtype, ctx.others = inputs[0].dtype, len(inputs) - 1


def _straight_through(ctx, dy):
    return dy.to(ctx.dtype), *[None] * ctx.others


for _schema, _run, _fake in (
    (_ACTIVATIONS, _fake_quantize, torch_operators.fake_like),
    (_WEIGHT, _fake_quantize_weight, _like_in_dtype),
):
    torch_operators.define(_schema, _run, "CUDA", _fake, _straight_through, _setup_context)

CUDA = Kernel(cuda.NAME, refuse, run)
