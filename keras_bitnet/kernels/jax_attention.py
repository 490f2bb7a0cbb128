"""Attention of new tokens to a cache for JAX: XLA FFI calls of the native library and CUDA's."""

import jax.numpy as jnp
import numpy as np

from keras_bitnet.kernels import cpu, native
from keras_bitnet.kernels.attention import REFERENCE
from keras_bitnet.kernels.jax_calls import (
    NOTHING,
    Operation,
    call_with_cache,
    registration_error,
    run_operation,
)
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
    operation = Operation(platform, _ffi_call, _reference, (target, float(scale)))
    index = jnp.asarray(index, "int32")
    return run_operation(operation, cache, query, key, value, index, mask, rotary)


def _reference(facts, cache, query, key, value, index, mask, rotary):
    _, scale = facts
    return REFERENCE.run(cache, query, key, value, index, scale, mask, rotary)


def _ffi_call(facts, cache, query, key, value, index, mask, rotary):
    target, scale = facts
    cosines, sines = rotary or (NOTHING, NOTHING)
    seen = np.zeros(0, bool) if mask is None else mask
    operands = (query, key, value, cosines, sines, seen, jnp.reshape(index, 1))
    return call_with_cache(target, operands, cache, scale=np.float64(scale))


NATIVE = Kernel(cpu.NAME, refuse, run)
