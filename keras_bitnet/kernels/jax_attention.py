"""Attention of one new token to a cache for JAX: XLA FFI calls of the native library and CUDA's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from keras_bitnet.kernels import cpu, native
from keras_bitnet.kernels.attention import CACHE, REFERENCE
from keras_bitnet.kernels.jax_calls import NOTHING, registration_error
from keras_bitnet.kernels.select import Kernel

TARGET = "keras_bitnet_attention"


def refuse(problem):
    """Why the kernel cannot run an `Attention`, or `None`."""
    reason = cpu.refuse_attention(problem)
    return reason or registration_error(native.library(), "kbn_xla_attend", TARGET, "cpu")


def run(*arguments):
    """As `attend_next`, for a problem that was not refused."""
    return attend("cpu", TARGET, *arguments)


def attend(platform, target, cache, query, key, value, index, scale, mask=None, rotary=None):
    """`attend_next` by a registered handler, differentiable as the reference.

    Args:
        platform: Where the handler runs, `"cpu"` or `"cuda"`. Where the compiled program turns out
            to run elsewhere, it takes the reference.
        target: Its name with XLA.
        cache, query, key, value, index, scale, mask, rotary: See `attend_next`.
    """
    index = jnp.asarray(index, "int32")
    where = (platform, target, float(scale))
    return _attend_once(where, cache, query, key, value, index, mask, rotary)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # traced once for all layers
def _attend_once(where, *operands):
    return _attend(where, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(where, *operands):
    platform, *call = where
    # The platform is not known while tracing.
    return jax.lax.platform_dependent(
        *operands,
        **{platform: functools.partial(_ffi_call, *call)},
        default=functools.partial(_reference, where),
    )


def _forward(where, *operands):
    return _attend(where, *operands), operands


def _backward(where, operands, gradients):
    return jax.vjp(functools.partial(_reference, where), *operands)[1](gradients)


_attend.defvjp(_forward, _backward)


def _reference(where, cache, query, key, value, index, mask, rotary):
    return REFERENCE.run(cache, query, key, value, index, where[-1], mask, rotary)


def _ffi_call(target, scale, cache, query, key, value, index, mask, rotary):
    cosines, sines = rotary or (NOTHING, NOTHING)
    seen = np.zeros(0, bool) if mask is None else mask
    operands = (query, key, value, cosines, sines, seen, jnp.reshape(index, 1))
    names = [name for name in CACHE if name in cache]
    buffers = [cache[name] for name in names]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, *buffers)]
    aliases = {len(operands) + i: 1 + i for i in range(len(buffers))}
    call = jax.ffi.ffi_call(target, results, input_output_aliases=aliases, vmap_method="sequential")
    y, *written = call(*operands, *buffers, scale=np.float64(scale))
    return y, dict(zip(names, written, strict=True))


NATIVE = Kernel(cpu.NAME, refuse, run)
