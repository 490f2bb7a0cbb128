"""Root mean square norm by a CUDA kernel, for PyTorch: one operator."""

import torch

from keras_bitnet.kernels import cpu, cuda, torch_operators
from keras_bitnet.kernels.cuda import compiler, library
from keras_bitnet.kernels.cuda.torch import device_reason, queue
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.kernels.torch_operators import DTYPES

_SCHEMA = "rms_norm_cuda(Tensor x, Tensor gain, float epsilon) -> Tensor"


def refuse(problem):
    """Why the kernel cannot run a `Norm`, or `None`."""
    reason = device_reason(problem.device)
    if reason is not None:
        return reason
    if torch.compiler.is_compiling():
        return "`torch.compile` makes one kernel of it too"
    if problem.gradient:
        return "a gradient is needed"
    return cpu.refuse_norm_operands(problem)


def run(x, scale, epsilon):
    """As `rms_norm`, for a problem that was not refused."""
    return torch.ops.keras_bitnet.rms_norm_cuda(x, scale.to(torch.float32), epsilon)


def _launch(x, gain, epsilon):
    x, gain = x.contiguous(), gain.contiguous()
    features = x.shape[-1]
    torch_operators.check(x.device, [("gain", gain, torch.float32, {(features,)})])
    y = torch.empty_like(x)
    problem = library.NormStruct(
        rows=x.numel() // features,
        features=features,
        dtype=DTYPES[x.dtype],
        epsilon=epsilon,
        x=x.data_ptr(),
        gain=gain.data_ptr(),
        y=y.data_ptr(),
    )
    queue(problem, compiler.NORM, x.get_device())
    return y


torch_operators.define(_SCHEMA, _launch, "CUDA", torch_operators.fake_like)

CUDA = Kernel(cuda.NAME, refuse, run)
