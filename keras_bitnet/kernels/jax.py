"""The native CPU kernels for JAX: an XLA FFI call."""

from typing import Any

import numpy as np

from keras_bitnet.kernels import cpu, native
from keras_bitnet.kernels.jax_calls import (
    Place,
    ffi_matmul,
    joint_matmul,
    matmul,
    registration_error,
    result,
)
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.ops.reference import reference_matmul

TARGET = "keras_bitnet_matmul"


def refuse(problem):
    """Why the kernel cannot run a problem, or `None`."""
    reason = cpu.refuse(problem)
    return reason or registration_error(native.library(), "kbn_xla_matmul", TARGET, "cpu")


def run(x, packed, activation_quantizer, bias, activation_scale=None, norm=None, window=None):
    """As `keras_bitnet.ops.bit_matmul`, for a problem that was not refused; without a norm."""
    return matmul(PLACE, x, packed, activation_quantizer, bias, activation_scale, window)


def run_joint(x, packed, activation_quantizer, biases):
    """As `keras_bitnet.ops.joint_bit_matmul`, for weights that are alike."""
    if len(packed) > native.MAX_JOINT:
        return None
    return joint_matmul(PLACE, x, packed, activation_quantizer, biases)


def _ffi_call(facts, x, *operands):
    first, results = facts[0], tuple(result(own, x) for own in facts)
    attributes: dict[str, Any] = {"trits": np.int64(first.layout == "trits")}
    if first.window is not None:
        attributes["window"] = np.array(first.window.numbers, np.int64)
    return tuple(ffi_matmul(TARGET, results, first, x, *operands, **attributes))


def _reference(facts, x, tiles, scale, bias, x_scale):
    if facts.window is not None:
        x = facts.window.patches(x)
    return reference_matmul(x, facts.packed(tiles, scale), facts.quantizer, bias, x_scale)


PLACE = Place("cpu", _ffi_call, _reference)
NATIVE = Kernel(cpu.NAME, refuse, run, gathers=lambda: True, run_joint=run_joint)
