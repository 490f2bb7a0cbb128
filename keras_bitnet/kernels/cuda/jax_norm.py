"""Root mean square norm by a CUDA kernel, for JAX: an XLA FFI call."""

import functools

import jax
import numpy as np

from keras_bitnet.kernels import cpu, cuda
from keras_bitnet.kernels.cuda import compiler, library
from keras_bitnet.kernels.cuda.jax import device_reason, devices
from keras_bitnet.kernels.jax_calls import registration_error
from keras_bitnet.kernels.norm import REFERENCE
from keras_bitnet.kernels.select import Kernel

TARGET = "keras_bitnet_norm_cuda"


def refuse(problem):
    """Why the kernel cannot run a `Norm`, or `None`."""
    if jax.device_count() > 1:
        return "there are several devices: XLA splits a norm of its own between them"
    if not problem.static_shape:
        return "the shape of the numbers is not known while tracing"
    reason = device_reason(problem.device) or cpu.refuse_norm_operands(problem)
    return reason or registration_error(library.library(), "kbc_xla_norm", TARGET, "CUDA")


def run(x, scale, epsilon):
    """As `rms_norm`, for a problem that was not refused. With a gradient it is XLA's."""
    for device in devices()[0]:
        library.load(device, compiler.NORM)
    return _norm_once(float(epsilon), x, scale)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # traced once for all layers
def _norm_once(epsilon, x, scale):
    return _norm(epsilon, x, scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm(epsilon, x, scale):
    return _batched(epsilon)(x, scale)


@_norm.defjvp
def _tangents(epsilon, operands, tangents):
    return jax.jvp(functools.partial(_reference, epsilon), operands, tangents)


@functools.cache
def _batched(epsilon):
    """The call for one epsilon, with its rule for `vmap`."""
    reference = functools.partial(_reference, epsilon)

    @jax.custom_batching.custom_vmap
    def call(x, scale):
        # The platform is not known while tracing.
        own = functools.partial(_ffi_call, epsilon)
        return jax.lax.platform_dependent(x, scale, cuda=own, default=reference)

    @call.def_vmap
    def rule(axis_size, batched, x, scale):
        if not batched[1]:  # the new axis of x is one more leading axis
            return call(x, scale), True
        return jax.vmap(reference, [0 if own else None for own in batched])(x, scale), True

    return call


def _ffi_call(epsilon, x, scale):
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = jax.ffi.ffi_call(TARGET, result)
    return call(x, scale.astype("float32"), epsilon=np.float64(epsilon))


def _reference(epsilon, x, scale):
    return REFERENCE.run(x, scale, epsilon)


CUDA = Kernel(cuda.NAME, refuse, run)
