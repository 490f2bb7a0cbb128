"""The native CPU kernels for JAX: an XLA FFI call with a gradient and a batching rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from keras import ops

from keras_bitnet.kernels import cpu, native
from keras_bitnet.kernels.jax_partition import partitioned
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.ops.reference import reference_matmul

TARGET = "keras_bitnet_matmul"


@functools.cache
def _registration_error():
    """Registers the handler with XLA, once. Returns why it could not, or `None`."""
    if not hasattr(jax, "ffi"):
        return f"JAX {jax.__version__} has no `jax.ffi`"
    try:
        # With the backend up, a handler of another version is refused; before, it breaks it.
        jax.devices("cpu")
        handler = jax.ffi.pycapsule(native.library().kbn_xla_matmul)
        jax.ffi.register_ffi_target(TARGET, handler, platform="cpu")
    except RuntimeError as error:
        return f"JAX {jax.__version__} does not take the handler: {error}"
    return None


def refuse(problem):
    """Why the kernel cannot run a problem, or `None`."""
    return cpu.refuse(problem) or _registration_error()


def run(x, packed, activation_quantizer, bias, activation_scale=None):
    """As `keras_bitnet.ops.bit_matmul`, for a problem that was not refused."""
    bias = None if bias is None else ops.convert_to_tensor(bias)
    facts = cpu.Facts.of(packed, activation_quantizer)
    return _matmul(x, packed.tiles, packed.scale, bias, activation_scale, facts)


@functools.partial(jax.jit, static_argnames="facts", inline=True)
def _matmul(x, tiles, scale, bias, x_scale, facts):
    bias = None if bias is None else bias.astype("float32")
    return _differentiable(x, tiles, scale, bias, x_scale, facts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _differentiable(x, tiles, scale, bias, x_scale, facts):
    return _batched(facts)(x, tiles, scale, bias, x_scale)


def _forward(x, tiles, scale, bias, x_scale, facts):
    operands = (tiles, scale, bias, x_scale)
    return _differentiable(x, *operands, facts), operands


def _backward(facts, operands, dy):
    tiles, scale, bias, x_scale = operands
    dx, dbias = cpu.gradients(dy, facts.packed(tiles, scale))
    no_gradient = np.zeros(tiles.shape, jax.dtypes.float0)
    zero = jnp.zeros_like(scale), None if x_scale is None else jnp.zeros_like(x_scale)
    return dx, no_gradient, zero[0], None if bias is None else dbias, zero[1]


_differentiable.defvjp(_forward, _backward)


@functools.cache
def _batched(facts):
    """The call for one set of facts, with its rule for `vmap`."""

    @jax.custom_batching.custom_vmap
    def call(*operands):
        return partitioned(_on_platform, facts, *operands)

    @call.def_vmap
    def rule(axis_size, batched, *operands):
        if not any(batched[1:]) and not facts.per_tensor:
            return call(*operands), True  # the new axis of x is one more leading axis
        mapped = [operand for operand, own in zip(operands, batched, strict=True) if own]

        def one(slices):
            slices = iter(slices)
            pairs = zip(operands, batched, strict=True)
            return call(*(next(slices) if own else operand for operand, own in pairs))

        return jax.lax.map(one, mapped), True

    return call


def _on_platform(facts, *operands):
    # The platform is not known while tracing.
    return jax.lax.platform_dependent(
        *operands,
        cpu=functools.partial(_ffi_call, facts),
        default=functools.partial(_reference, facts),
    )


def _ffi_call(facts, x, tiles, scale, bias, x_scale):
    none = np.zeros(0, np.float32)
    result = jax.ShapeDtypeStruct((*x.shape[:-1], facts.out_features), x.dtype)
    return jax.ffi.ffi_call(TARGET, result)(
        x,
        tiles,
        scale,
        none if bias is None else bias,
        none if x_scale is None else jnp.reshape(x_scale, 1),
        out_features=np.int64(facts.out_features),
        bits=np.int64(facts.bits),
        trits=np.int64(facts.layout == "trits"),
        group_size=np.int64(facts.group_size or 0),
        activation_bits=np.int64(facts.quantizer.bits),
        per_tensor=np.int64(facts.per_tensor),
        offset=np.float64(facts.offset),
        epsilon=np.float64(facts.quantizer.epsilon),
    )


def _reference(facts, x, tiles, scale, bias, x_scale):
    return reference_matmul(x, facts.packed(tiles, scale), facts.quantizer, bias, x_scale)


NATIVE = Kernel(cpu.NAME, refuse, run)
