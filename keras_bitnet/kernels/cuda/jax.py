"""The CUDA kernels for JAX: an XLA FFI call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from keras_bitnet.kernels import cuda
from keras_bitnet.kernels.cpu import DTYPES, Activations
from keras_bitnet.kernels.cuda import library
from keras_bitnet.kernels.jax import NATIVE
from keras_bitnet.kernels.jax_calls import (
    Place,
    ffi_matmul,
    joint_matmul,
    matmul,
    registration_error,
    result,
)
from keras_bitnet.kernels.select import REFERENCE, Kernel, Problem

TARGET = "keras_bitnet_matmul_cuda"


@functools.cache
def devices():
    """Numbers of the CUDA devices of this process, as the driver counts, and why there are none."""
    try:
        found = tuple(device.local_hardware_id for device in jax.local_devices(backend="cuda"))
    except RuntimeError:
        return (), "JAX sees no CUDA device"
    for number in found:
        reason = library.reason(number)
        if reason is not None:
            return (), reason
    reason = registration_error(library.library(), "kbc_xla_matmul", TARGET, "CUDA")
    return (found, None) if reason is None else ((), reason)


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
    return matmul(PLACE, x, packed, activation_quantizer, bias, activation_scale)


def run_joint(x, packed, activation_quantizer, biases):
    """As `keras_bitnet.ops.joint_bit_matmul`, for weights that are alike."""
    if len(packed) > library.MAX_JOINT:
        return None
    for device in devices()[0]:
        library.load(device, packed[0].bits)
    return joint_matmul(PLACE, x, packed, activation_quantizer, biases)


def _ffi_call(facts, x, *operands):
    first, results = facts[0], [result(own, x) for own in facts]
    workspace = jax.ShapeDtypeStruct((_workspace(first, results[0]),), jnp.uint8)
    return tuple(ffi_matmul(TARGET, (*results, workspace), first, x, *operands)[:-1])


def _workspace(facts, y):
    problem = library.MatmulStruct(
        rows=int(np.prod(y.shape[:-1])),
        in_features=facts.in_features,
        out_features=facts.out_features,
        group_size=facts.group_size or 0,
        bits=facts.bits,
        dtype=DTYPES.index(y.dtype.name),
        activation_bits=Activations.of(facts.quantizer).bits,
        per_tensor=facts.per_tensor,
    )
    return library.workspace(problem)


def _elsewhere(facts, x, tiles, scale, bias, x_scale):
    """What runs where the program is not compiled for CUDA: the CPU's kernel or the reference."""
    packed = facts.packed(tiles, scale)
    problem = dataclasses.replace(Problem.of(x, packed, facts.quantizer), device=None)
    row = REFERENCE if NATIVE.refuse(problem) else NATIVE
    return row.run(x, packed, facts.quantizer, bias, x_scale)


PLACE = Place("cuda", _ffi_call, _elsewhere)
CUDA = Kernel(cuda.NAME, refuse, run, run_joint=run_joint)
