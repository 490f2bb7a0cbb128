"""What the kernels of JAX share: registration with XLA; the packed matmul around a call of one."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from keras import ops

from keras_bitnet.kernels.cpu import Activations, Facts, gradients
from keras_bitnet.kernels.jax_partition import partitioned

NOTHING = np.zeros(0, np.float32)  # what a handler takes for an operand that is not given


@functools.cache
def registration_error(library, symbol, target, platform):
    """Registers a function of a library with XLA, once. Returns why it could not, or `None`."""
    if not hasattr(jax, "ffi"):
        return f"JAX {jax.__version__} has no `jax.ffi`"
    try:
        # With the backend up, a handler of another version is refused; before, it breaks it.
        jax.local_devices(backend=platform.lower())
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(target, handler, platform=platform)
    except RuntimeError as error:
        return f"JAX {jax.__version__} does not take the handler: {error}"
    return None


class Place(NamedTuple):
    """Where a kernel runs, and what runs in its place where the program turns out not to be.

    Attributes:
        platform: `"cpu"` or `"cuda"`.
        call: The kernel, `call(facts, x, tiles, scale, bias, x_scale)`; the last two may be `None`.
        elsewhere: What computes the same on any platform.
    """

    platform: str
    call: Callable
    elsewhere: Callable


def matmul(place, x, packed, activation_quantizer, bias, activation_scale, window=None):
    """`keras_bitnet.ops.bit_matmul` by a kernel, with a gradient, under `vmap` and on meshes."""
    bias = None if bias is None else ops.convert_to_tensor(bias)
    if activation_scale is not None:
        activation_scale = ops.cast(activation_scale, "float32")
    facts = Facts.of(packed, activation_quantizer, window)
    return traced(place, facts, x, packed.tiles, packed.scale, bias, activation_scale)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def traced(place, facts, x, tiles, scale, bias, x_scale):
    """The same of what a program holds: arrays and facts."""
    bias = None if bias is None else bias.astype("float32")
    return _differentiable(place, facts, x, tiles, scale, bias, x_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(place, facts, x, tiles, scale, bias, x_scale):
    return _batched(place, facts)(x, tiles, scale, bias, x_scale)


def _forward(place, facts, x, *others):
    images = None if facts.window is None else x
    return _differentiable(place, facts, x, *others), (images, *others)


def _backward(place, facts, operands, dy):
    images, tiles, scale, bias, x_scale = operands
    dx, dbias = gradients(dy, facts.packed(tiles, scale))
    if facts.window is not None:
        dx = facts.window.scatter(dx, images)
    no_gradient = np.zeros(tiles.shape, jax.dtypes.float0)
    nothing = None if x_scale is None else jnp.zeros_like(x_scale)
    return dx, no_gradient, jnp.zeros_like(scale), None if bias is None else dbias, nothing


_differentiable.defvjp(_forward, _backward)


@functools.cache
def _batched(place, facts):
    """The call for one set of facts, with its rule for `vmap`."""

    @jax.custom_batching.custom_vmap
    def call(*operands):
        return partitioned(functools.partial(_on_platform, place), facts, *operands)

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


def _on_platform(place, facts, *operands):
    # The platform is not known while tracing.
    return jax.lax.platform_dependent(
        *operands,
        **{place.platform: functools.partial(place.call, facts)},
        default=functools.partial(place.elsewhere, facts),
    )


def ffi_matmul(target, results, facts, x, tiles, scale, bias, x_scale, **attributes):
    """The results of a registered handler of the packed matmul."""
    activations = Activations.of(facts.quantizer)
    return jax.ffi.ffi_call(target, results)(
        x,
        tiles,
        scale,
        NOTHING if bias is None else bias,
        NOTHING if x_scale is None else jnp.reshape(x_scale, 1),
        out_features=np.int64(facts.out_features),
        bits=np.int64(facts.bits),
        group_size=np.int64(facts.group_size or 0),
        activation_bits=np.int64(activations.bits),
        per_tensor=np.int64(activations.per_tensor),
        offset=np.float64(facts.offset),
        epsilon=np.float64(activations.epsilon),
        **attributes,
    )


def result(facts, x):
    """Shape and dtype of a product."""
    rows = x.shape[:-1] if facts.window is None else facts.window.positions(x.shape)
    return jax.ShapeDtypeStruct((*rows, facts.out_features), x.dtype)
