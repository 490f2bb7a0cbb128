"""Attention of new tokens to a cache by CUDA kernels, for JAX: an XLA FFI call."""

from keras_bitnet.kernels import cuda
from keras_bitnet.kernels.cuda import compiler, library
from keras_bitnet.kernels.cuda.jax import device_reason, devices
from keras_bitnet.kernels.jax_attention import attend
from keras_bitnet.kernels.jax_calls import registration_error
from keras_bitnet.kernels.select import Kernel

TARGET = "keras_bitnet_attention_cuda"


def refuse(problem):
    """Why the kernel cannot run an `Attention`, or `None`."""
    reason = device_reason(problem.device) or cuda.refuse_attention(problem)
    return reason or registration_error(library.library(), "kbc_xla_attention", TARGET, "CUDA")


def run(*arguments):
    """As `attend_next`, for a problem that was not refused."""
    for device in devices()[0]:
        library.load(device, compiler.ATTENTION)
    return attend("cuda", TARGET, *arguments)


CUDA = Kernel(cuda.NAME, refuse, run)
