"""The native CPU kernels for JAX: an XLA FFI call."""

import numpy as np

from keras_bitnet.kernels import cpu, native
from keras_bitnet.kernels.jax_calls import Place, ffi_matmul, matmul, registration_error, result
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


def _ffi_call(facts, x, *operands):
    window = {} if facts.window is None else {"window": np.array(facts.window.numbers, np.int64)}
    trits = np.int64(facts.layout == "trits")
    return ffi_matmul(TARGET, result(facts, x), facts, x, *operands, trits=trits, **window)


def _reference(facts, x, tiles, scale, bias, x_scale):
    if facts.window is not None:
        x = facts.window.patches(x)
    return reference_matmul(x, facts.packed(tiles, scale), facts.quantizer, bias, x_scale)


PLACE = Place("cpu", _ffi_call, _reference)
NATIVE = Kernel(cpu.NAME, refuse, run, gathers=lambda: True)
