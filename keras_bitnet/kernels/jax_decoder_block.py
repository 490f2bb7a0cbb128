"""A block of a decoder for one new token by the native CPU library, for JAX: one XLA FFI call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from keras_bitnet.kernels import native
from keras_bitnet.kernels.attention import CACHE
from keras_bitnet.kernels.decoder_block import operands, reference
from keras_bitnet.kernels.jax_calls import registration_error

TARGET = "keras_bitnet_decode_block"


def find():
    """`run`, or `None` where it cannot: it is no operation of a mesh."""
    if jax.device_count() > 1:
        return None
    failed = registration_error(native.library(), "kbn_xla_decode", TARGET, "cpu")
    return None if failed else run


def run(facts, x, weights, cache, index, mask, rotary):
    """As `keras_bitnet.kernels.decoder_block.reference`, differentiable as it."""
    return _decode_once(facts, x, weights, cache, jnp.asarray(index, "int32"), mask, rotary)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # traced once for all blocks
def _decode_once(facts, *tensors):
    return _decode(facts, *tensors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(facts, *tensors):
    # The platform is not known while tracing.
    return jax.lax.platform_dependent(
        *tensors,
        cpu=functools.partial(_ffi_call, facts),
        default=functools.partial(reference, facts),
    )


def _forward(facts, *tensors):
    return _decode(facts, *tensors), tensors


def _backward(facts, tensors, gradients):
    return jax.vjp(functools.partial(reference, facts), *tensors)[1](gradients)


_decode.defvjp(_forward, _backward)


def _ffi_call(facts, x, weights, cache, index, mask, rotary):
    given = operands(x, weights, jnp.reshape(index, 1), mask, rotary, lambda d: np.zeros(0, d))
    names = [name for name in CACHE if name in cache]
    buffers = [cache[name] for name in names]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (x, *buffers)]
    aliases = {len(given) + i: 1 + i for i in range(len(buffers))}
    call = jax.ffi.ffi_call(TARGET, results, input_output_aliases=aliases, vmap_method="sequential")
    types = {int: np.int64, float: np.float64}
    attributes = {name: types[type(v)](v) for name, v in facts.attributes.items()}
    y, *written = call(*given, *buffers, per_tensor=np.int64(0), **attributes)
    return y, dict(zip(names, written, strict=True))
