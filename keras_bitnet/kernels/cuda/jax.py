"""The CUDA kernels for JAX: an XLA FFI call with a gradient and a batching rule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from keras import ops

from keras_bitnet.kernels import cuda
from keras_bitnet.kernels.cpu import Facts, gradients
from keras_bitnet.kernels.cuda import library
from keras_bitnet.kernels.jax_partition import partitioned
from keras_bitnet.kernels.select import REFERENCE, Kernel, Problem

TARGET = "keras_bitnet_matmul_cuda"


@functools.cache
def devices():
    """Numbers of the CUDA devices of this process, as the driver counts, and why there are none."""
    if not hasattr(jax, "ffi"):
        return (), f"JAX {jax.__version__} has no `jax.ffi`"
    try:
        found = tuple(device.local_hardware_id for device in jax.local_devices(backend="cuda"))
    except RuntimeError:
        return (), "JAX sees no CUDA device"
    for number in found:
        reason = library.reason(number)
        if reason is not None:
            return (), reason
    try:
        handler = jax.ffi.pycapsule(library.library().kbc_xla_matmul)
        jax.ffi.register_ffi_target(TARGET, handler, platform="CUDA")
    except RuntimeError as error:
        return (), f"JAX {jax.__version__} does not take the handler: {error}"
    return found, None


def device_reason(device):
    """Why no kernel runs on a device of JAX, given by its name, or `None`. An unknown device is no
    reason: where the compiled program turns out to run on a CPU, it takes what runs there.
    """
    name = (device or "cuda").lower()
    if "cuda" not in name and "gpu" not in name:
        return f"the values are on {device!r}, not on a CUDA device"
    return devices()[1]


def refuse(problem):
    """Why the kernel cannot run a problem, or `None`."""
    if not problem.static_shape:
        return "the shape of the activations is not known while tracing"
    return device_reason(problem.device) or cuda.refuse(problem)


def run(x, packed, activation_quantizer, bias, activation_scale=None):
    """As `keras_bitnet.ops.bit_matmul`, for a problem that was not refused."""
    for device in devices()[0]:
        library.load(device, packed.bits)
    bias = None if bias is None else ops.convert_to_tensor(bias)
    if activation_scale is not None:
        activation_scale = ops.cast(activation_scale, "float32")
    facts = Facts.of(packed, activation_quantizer)
    return _matmul(x, packed.tiles, packed.scale, bias, activation_scale, facts)


@functools.partial(jax.jit, static_argnames="facts", inline=True)
def _matmul(x, tiles, scale, bias, x_scale, facts):
    bias = None if bias is None else bias.astype("float32")
    return _differentiable(x, tiles, scale, bias, x_scale, facts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _differentiable(x, tiles, scale, bias, x_scale, facts):
    return _batched(facts)(x, tiles, scale, bias, x_scale)


def _forward(x, tiles, scale, bias, x_scale, facts):
    y = _differentiable(x, tiles, scale, bias, x_scale, facts)
    return y, (tiles, scale, bias, x_scale)


def _backward(facts, operands, dy):
    tiles, scale, bias, x_scale = operands
    dx, dbias = gradients(dy, facts.packed(tiles, scale))
    no_gradient = np.zeros(tiles.shape, jax.dtypes.float0)
    nothing = None if x_scale is None else jnp.zeros_like(x_scale)
    return dx, no_gradient, jnp.zeros_like(scale), None if bias is None else dbias, nothing


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
        cuda=functools.partial(_ffi_call, facts),
        default=functools.partial(_elsewhere, facts),
    )


def _ffi_call(facts, x, tiles, scale, bias, x_scale):
    y = jax.ShapeDtypeStruct((*x.shape[:-1], facts.out_features), x.dtype)
    workspace = jax.ShapeDtypeStruct((_workspace(facts, y, scale),), jnp.uint8)
    nothing = np.zeros(0, np.float32)
    return jax.ffi.ffi_call(TARGET, (y, workspace))(
        x,
        tiles,
        scale,
        nothing if bias is None else bias,
        nothing if x_scale is None else jnp.reshape(x_scale, 1),
        out_features=np.int64(facts.out_features),
        bits=np.int64(facts.bits),
        group_size=np.int64(facts.group_size or 0),
        activation_bits=np.int64(facts.quantizer.bits),
        per_tensor=np.int64(facts.per_tensor),
        offset=np.float64(facts.offset),
        epsilon=np.float64(facts.quantizer.epsilon),
    )[0]


def _workspace(facts, y, scale):
    problem = library.MatmulStruct(
        rows=int(np.prod(y.shape[:-1])),
        in_features=facts.in_features,
        out_features=facts.out_features,
        group_size=facts.group_size or 0,
        bits=facts.bits,
        per_tensor=facts.per_tensor,
    )
    return library.workspace(problem)


def _elsewhere(facts, x, tiles, scale, bias, x_scale):
    """What runs where the program is not compiled for CUDA: the CPU's kernel or the reference."""
    from keras_bitnet.kernels.jax import NATIVE

    packed = facts.packed(tiles, scale)
    problem = dataclasses.replace(Problem.of(x, packed, facts.quantizer), device=None)
    row = REFERENCE if NATIVE.refuse(problem) else NATIVE
    return row.run(x, packed, facts.quantizer, bias, x_scale)


CUDA = Kernel(cuda.NAME, refuse, run)
