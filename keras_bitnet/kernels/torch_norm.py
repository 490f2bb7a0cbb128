"""Root mean square norm by the native CPU library, for PyTorch: one operator."""

import torch

from keras_bitnet.kernels import cpu
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.kernels.torch import REGISTERED, not_registered
from keras_bitnet.kernels.torch_operators import fake_like


def refuse(problem):
    """Why the kernel cannot run a `Norm`, or `None`."""
    if not REGISTERED:
        return not_registered()
    if torch.compiler.is_compiling():
        return "`torch.compile` makes one operator of it too"
    return "a gradient is needed" if problem.gradient else cpu.refuse_norm(problem)


def run(x, scale, epsilon):
    """As `rms_norm`, for a problem that was not refused."""
    scale = scale.to(torch.float32).contiguous()
    return torch.ops.keras_bitnet.rms_norm.default(x.contiguous(), scale, epsilon)


if REGISTERED:
    torch.library.register_fake("keras_bitnet::rms_norm", fake_like)

NATIVE = Kernel(cpu.NAME, refuse, run)
