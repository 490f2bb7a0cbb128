"""A block of a decoder for new tokens by the CUDA kernels, for JAX: one XLA FFI call.

Its norms are one kernel each with the additions and the activation beside them, its attention is
that of the kernels for a prompt too, and XLA has one call to start where the layers are twenty.
"""

import jax
import jax.numpy as jnp

from keras_bitnet.kernels.cpu import DTYPES
from keras_bitnet.kernels.cuda import compiler, library
from keras_bitnet.kernels.cuda.jax import devices
from keras_bitnet.kernels.decoder_block import WEIGHTS, reference
from keras_bitnet.kernels.jax_calls import Operation, registration_error, run_operation
from keras_bitnet.kernels.jax_decoder_block import call_block

TARGET = "keras_bitnet_decode_block_cuda"


def find():
    """`run`, or `None` where it cannot: it is no operation of a mesh."""
    if jax.device_count() > 1:
        return None
    failed = registration_error(library.library(), "kbc_xla_decode", TARGET, "CUDA")
    return None if failed else run


def run(facts, x, weights, cache, index, mask, rotary):
    """As `keras_bitnet.kernels.decoder_block.reference`, differentiable as it."""
    for device in devices()[0]:
        for kind in (facts.weights[0].bits, compiler.ATTENTION, compiler.NORM):
            library.load(device, kind)
    operation = Operation("cuda", _ffi_call, reference, facts)
    return run_operation(operation, x, weights, cache, jnp.asarray(index, "int32"), mask, rotary)


def _ffi_call(facts, x, weights, cache, *others):
    workspace = _workspace(facts, x, cache)
    return call_block(TARGET, facts, x, weights, cache, *others, workspace=workspace)


def _workspace(facts, x, cache):
    batch, tokens, features = x.shape
    _, key_heads, length, head_dim = cache["key"].shape
    given = facts.attributes
    same = ("heads", "intermediate", "bits", "group_size", "activation_bits")
    problem = library.DecodeStruct(
        blocks=1,
        batch=batch,
        tokens=tokens,
        length=length,
        features=features,
        key_heads=key_heads,
        head_dim=head_dim,
        dtype=DTYPES.index(x.dtype.name),
        gated=len(facts.weights) == len(WEIGHTS),
        **{name: given[name] for name in same},
    )
    return library.workspace(problem)
