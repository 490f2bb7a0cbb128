"""What the kernels of JAX share: registration with XLA; the packed matmul around a call of one."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from keras import ops

from keras_bitnet.kernels.attention import CACHE
from keras_bitnet.kernels.cpu import Activations, Facts
from keras_bitnet.kernels.jax_partition import partitioned

NOTHING = np.zeros(0, np.float32)  # what a handler takes for an operand that is not given


@functools.cache
def registration_error(library, symbol, target, platform):
    """Registers a function of a library with XLA, once. Returns why it could not, or `None`."""
    try:
        # With the backend up, a handler of another version is refused; before, it breaks it.
        jax.local_devices(backend=platform.lower())
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(target, handler, platform=platform)
    except RuntimeError as error:
        return f"JAX {jax.__version__} does not take the handler: {error}"
    return None


class Operation(NamedTuple):
    """A handler and what it means, hashable.

    Attributes:
        platform: Where the handler runs, `"cpu"` or `"cuda"`.
        call: The handler, `call(facts, *tensors)`.
        reference: The same in operations of JAX.
        facts: The static side of both.
    """

    platform: str
    call: Callable
    reference: Callable
    facts: tuple


@functools.partial(jax.jit, static_argnums=0, inline=True)  # traced once for all layers
def run_operation(operation, *tensors):
    """An operation, differentiable as its reference, which runs where the handler does not."""
    return _as_reference(operation, *tensors)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _as_reference(operation, *tensors):
    # The platform is not known while tracing.
    return jax.lax.platform_dependent(
        *tensors,
        **{operation.platform: functools.partial(operation.call, operation.facts)},
        default=functools.partial(operation.reference, operation.facts),
    )


@_as_reference.defjvp
def _tangents_of_reference(operation, tensors, tangents):
    reference = _recomputed(functools.partial(operation.reference, operation.facts))
    return _as_reference(operation, *tensors), jax.jvp(reference, tensors, tangents)[1]


def _recomputed(function):
    """A function of which a gradient keeps the arguments, not what is made of them on the way."""
    return jax.checkpoint(function, prevent_cse=False)


def call_with_cache(target, operands, cache, workspace=0, **attributes):
    """A handler that writes into a cache.

    Args:
        target: Its name.
        operands: What it takes before the cache; its result is like the first.
        cache: A cache of `keras_bitnet.layers.key_value_cache`.
        workspace: Bytes that it needs beside its results.
        **attributes: NumPy scalars.

    Returns:
        `(y, cache)`.
    """
    names = [name for name in CACHE if name in cache]
    buffers = [cache[name] for name in names]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (operands[0], *buffers)]
    if workspace:
        results.append(jax.ShapeDtypeStruct((workspace,), jnp.uint8))
    aliases = {len(operands) + i: 1 + i for i in range(len(buffers))}
    call = jax.ffi.ffi_call(target, results, input_output_aliases=aliases, vmap_method="sequential")
    y, *written = call(*operands, *buffers, **attributes)
    return y, dict(zip(names, written[: len(names)], strict=True))


class Place(NamedTuple):
    """Where a kernel runs, and what runs in its place where the program turns out not to be.

    Attributes:
        platform: `"cpu"` or `"cuda"`.
        call: The kernel, `call(facts, x, weights, x_scale)`: a result for each weight, whose facts
            and arrays `(tiles, scale, bias or None)` come in tuples. `x_scale` may be `None`.
        elsewhere: What computes the result of one weight on any platform,
            `elsewhere(facts, x, tiles, scale, bias, x_scale)`.
    """

    platform: str
    call: Callable
    elsewhere: Callable


def matmul(place, x, packed, activation_quantizer, bias, activation_scale, window=None):
    """`keras_bitnet.ops.bit_matmul` by a kernel, with a gradient, under `vmap` and on meshes."""
    if activation_scale is not None:
        activation_scale = ops.cast(activation_scale, "float32")
    facts, weight = Facts.of(packed, activation_quantizer, window), _arrays(packed, bias)
    return traced(place, (facts,), x, (weight,), activation_scale)[0]


def joint_matmul(place, x, packed, activation_quantizer, biases):
    """`keras_bitnet.ops.joint_bit_matmul` by a kernel, or `None`: it is no operation of a mesh."""
    if jax.device_count() > 1:
        return None
    facts = tuple(Facts.of(weight, activation_quantizer) for weight in packed)
    weights = tuple(map(_arrays, packed, biases))
    return list(traced(place, facts, x, weights, None))


def _arrays(packed, bias):
    return packed.tiles, packed.scale, None if bias is None else ops.convert_to_tensor(bias)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def traced(place, facts, x, weights, x_scale):
    """The same of what a program holds: arrays and facts, of one weight or more."""
    weights = tuple(
        (tiles, scale, None if bias is None else bias.astype("float32"))
        for tiles, scale, bias in weights
    )
    return _differentiable(place, facts, x, weights, x_scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _differentiable(place, facts, x, weights, x_scale):
    return _batched(place, facts)(x, weights, x_scale)


@functools.partial(_differentiable.defjvp, symbolic_zeros=True)
def _tangents(place, facts, operands, tangents):
    """Straight-through, of activations and biases; codes and scales are constants."""
    results = _differentiable(place, facts, *operands)
    _, weights, _ = operands
    dx, dweights, _ = tangents
    dys = []
    for own, y, (tiles, scale, _), (_, _, dbias) in zip(
        facts, results, weights, dweights, strict=True
    ):
        dy = jnp.zeros(y.shape, "float32")
        if not isinstance(dx, SymbolicZero):
            dy = _recomputed(functools.partial(_float_product, own))(dx, tiles, scale)
        if not (dbias is None or isinstance(dbias, SymbolicZero)):
            dy = dy + dbias
        dys.append(dy.astype(y.dtype))
    return results, tuple(dys)


def _float_product(facts, x, tiles, scale):
    if facts.window is not None:
        x = facts.window.patches(x)
    return ops.matmul(x.astype("float32"), facts.packed(tiles, scale).dequantize())


@functools.cache
def _batched(place, facts):
    """The call for one set of facts, with its rule for `vmap`."""

    @jax.custom_batching.custom_vmap
    def call(x, weights, x_scale):
        function = functools.partial(_on_platform, place)
        if len(facts) > 1:
            return function(facts, x, weights, x_scale)
        return (partitioned(_of_one(function), facts[0], x, *weights[0], x_scale),)

    @call.def_vmap
    def rule(axis_size, batched, *operands):
        own = jax.tree.leaves(batched)
        if own[0] and not any(own[1:]) and not facts[0].per_tensor:
            # The new axis of x is one more leading axis.
            return call(*operands), (True,) * len(facts)
        leaves, tree = jax.tree.flatten(operands)
        mapped = [leaf for leaf, is_own in zip(leaves, own, strict=True) if is_own]

        def one(slices):
            slices = iter(slices)
            pairs = zip(leaves, own, strict=True)
            operands = [next(slices) if is_own else leaf for leaf, is_own in pairs]
            return call(*jax.tree.unflatten(tree, operands))

        return jax.lax.map(one, mapped), (True,) * len(facts)

    return call


def _of_one(function):
    """A function of several weights as that of one which `partitioned` takes."""

    def call(facts, x, tiles, scale, bias, x_scale):
        return function((facts,), x, ((tiles, scale, bias),), x_scale)[0]

    return call


def _on_platform(place, facts, *operands):
    # The platform is not known while tracing.
    return jax.lax.platform_dependent(
        *operands,
        **{place.platform: functools.partial(place.call, facts)},
        default=functools.partial(_elsewhere, place, facts),
    )


def _elsewhere(place, facts, x, weights, x_scale):
    pairs = zip(facts, weights, strict=True)
    return tuple(place.elsewhere(own, x, *weight, x_scale) for own, weight in pairs)


def ffi_matmul(target, results, facts, x, weights, x_scale, **attributes):
    """The results of a registered handler of the packed matmul.

    Args:
        target: Its name.
        results: Shapes and dtypes of what it returns.
        facts: What is said by `Facts` that are alike in it.
        x, weights, x_scale: As `Place.call` takes them.
        **attributes: Others of the handler.
    """
    activations = Activations.of(facts.quantizer)
    return jax.ffi.ffi_call(target, results)(
        x,
        *(NOTHING if array is None else array for weight in weights for array in weight),
        NOTHING if x_scale is None else jnp.reshape(x_scale, 1),
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
