"""A block of a decoder for new tokens by the native CPU library, for JAX: one XLA FFI call."""

import jax
import jax.numpy as jnp
import numpy as np

from keras_bitnet.kernels import native
from keras_bitnet.kernels.decoder_block import operands, reference
from keras_bitnet.kernels.jax_calls import (
    Operation,
    call_with_cache,
    registration_error,
    run_operation,
)

TARGET = "keras_bitnet_decode_block"


def find():
    """`run`, or `None` where it cannot: it is no operation of a mesh."""
    if jax.device_count() > 1:
        return None
    failed = registration_error(native.library(), "kbn_xla_decode", TARGET, "cpu")
    return None if failed else run


def run(facts, x, weights, cache, index, mask, rotary):
    """As `keras_bitnet.kernels.decoder_block.reference`, differentiable as it."""
    operation = Operation("cpu", _ffi_call, reference, facts)
    return run_operation(operation, x, weights, cache, jnp.asarray(index, "int32"), mask, rotary)


def _ffi_call(facts, *tensors):
    return call_block(TARGET, facts, *tensors, per_tensor=np.int64(0))


def call_block(target, facts, x, weights, cache, index, mask, rotary, **options):
    """A registered handler of a block; other options are those of `call_with_cache`."""
    given = operands(x, weights, jnp.reshape(index, 1), mask, rotary, lambda d: np.zeros(0, d))
    types = {int: np.int64, float: np.float64}
    attributes = {name: types[type(v)](v) for name, v in facts.attributes.items()}
    return call_with_cache(target, given, cache, **attributes, **options)
