"""Attention of one new token to a cache by a CUDA kernel, for JAX: an XLA FFI call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from keras_bitnet.kernels import cuda
from keras_bitnet.kernels.attention import REFERENCE
from keras_bitnet.kernels.cuda import compiler, library
from keras_bitnet.kernels.cuda.jax import device_reason, devices
from keras_bitnet.kernels.select import Kernel

TARGET = "keras_bitnet_attention_cuda"


@functools.cache
def _registration_error():
    """Registers the handler with XLA, once. Returns why it could not, or `None`."""
    try:
        handler = jax.ffi.pycapsule(library.library().kbc_xla_attention)
        jax.ffi.register_ffi_target(TARGET, handler, platform="CUDA")
    except RuntimeError as error:
        return f"JAX {jax.__version__} does not take the handler: {error}"
    return None


def refuse(problem):
    """Why the kernel cannot run an `Attention`, or `None`. An unknown device is no reason: where
    the compiled program turns out to run on a CPU, it takes the reference.
    """
    reason = device_reason(problem.device) or cuda.refuse_attention(problem)
    return reason or _registration_error()


def run(cache, query, key, value, index, scale, mask=None, rotary=None):
    """As `attend_next`, for a problem that was not refused."""
    for device in devices()[0]:
        library.load(device, compiler.ATTENTION)
    index = jnp.asarray(index, "int32")
    return _attend_once(float(scale), cache, query, key, value, index, mask, rotary)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # traced once for all layers
def _attend_once(scale, *operands):
    return _attend(scale, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, *operands):
    # The platform is not known while tracing.
    return jax.lax.platform_dependent(
        *operands,
        cuda=functools.partial(_ffi_call, scale),
        default=functools.partial(_reference, scale),
    )


def _forward(scale, *operands):
    return _attend(scale, *operands), operands


def _backward(scale, operands, gradients):
    return jax.vjp(functools.partial(_reference, scale), *operands)[1](gradients)


_attend.defvjp(_forward, _backward)


def _reference(scale, cache, query, key, value, index, mask, rotary):
    return REFERENCE.run(cache, query, key, value, index, scale, mask, rotary)


def _ffi_call(scale, cache, query, key, value, index, mask, rotary):
    cosines, sines = rotary or (np.zeros(0, np.float32),) * 2
    operands = (query, key, value, cosines, sines, np.zeros(0, bool) if mask is None else mask)
    operands = (*operands, jnp.reshape(index, 1))
    names = [name for name in ("key", "value", "key_scale", "value_scale") if name in cache]
    buffers = [cache[name] for name in names]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, *buffers)]
    aliases = {len(operands) + i: 1 + i for i in range(len(buffers))}
    call = jax.ffi.ffi_call(TARGET, results, input_output_aliases=aliases, vmap_method="sequential")
    y, *written = call(*operands, *buffers, scale=np.float64(scale))
    return y, dict(zip(names, written, strict=True))


CUDA = Kernel(cuda.NAME, refuse, run)
