"""What the native CPU rows of the three backends share; each adds its own way into the library."""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

from keras import ops

from keras_bitnet.kernels import native
from keras_bitnet.ops.packed_tensor import PackedTensor

NAME = "native"
NO_LIBRARY = native.reason()  # read once: `torch.compile` traces what reads it
DTYPES = ("float32", "bfloat16", "float16")


def refuse(problem):
    """Why the native library cannot run a problem, or `None`.

    Args:
        problem: `keras_bitnet.kernels.Problem`. An unknown device is no reason: JAX takes the
            reference where the compiled program turns out not to run on a CPU.
    """
    return _refuse_place(problem) or refuse_operands(split(problem))


def split(problem):
    """The problem of quantized activations that a kernel makes of one whose activations are float.

    They become whole numbers of 8 bits, several to one. Another problem is returned as it is.
    """
    if problem.activation_bits is not None:
        return problem
    tokens = {"activation_granularity": "token", "activation_formula": "absmax"}
    return dataclasses.replace(problem, activation_bits=8, **tokens)


def _refuse_place(problem):
    if NO_LIBRARY is not None:
        return NO_LIBRARY
    if problem.device and not problem.device.lower().endswith(_CPU_DEVICES):
        return f"the activations are on {problem.device!r}, not on the CPU"
    return None


def refuse_norm(problem):
    """Why the native library cannot compute a `keras_bitnet.kernels.norm.Norm`, or `None`."""
    return refuse_norm_operands(problem) or _refuse_place(problem)


def refuse_norm_operands(problem):
    """Why no kernel can compute a `Norm`, on whatever device, or `None`."""
    if problem.dtype not in DTYPES:
        return f"numbers of dtype {problem.dtype}; accepted: {', '.join(DTYPES)}"
    return None


def refuse_attention(problem):
    """Why the native library cannot compute an attention to a cache, or `None`.

    Args:
        problem: `keras_bitnet.kernels.attention.Attention`. An unknown device is no reason, see
            `refuse`.
    """
    return _refuse_place(problem) or refuse_attention_operands(problem)


def refuse_attention_operands(problem):
    """Why no kernel can compute an attention to a cache, on whatever device, or `None`."""
    if problem.dtype not in DTYPES:
        return f"queries of dtype {problem.dtype}; accepted: {', '.join(DTYPES)}"
    if problem.cache_dtype not in (*DTYPES, "int8"):
        return f"a cache of dtype {problem.cache_dtype}; accepted: {', '.join(DTYPES)}, int8"
    if problem.gradient:
        return "the queries need a gradient"
    return None


def refuse_operands(problem):
    """Why no kernel with int32 sums of codes can run a problem, on whatever device, or `None`."""
    reason = refuse_formula(problem)
    if reason is not None:
        return reason
    summed = min(problem.in_features, problem.group_size or problem.in_features)
    longest = (2**31 - 1) // (128 << problem.bits)  # a code weighs at most 2**bits
    if summed > longest:
        return f"{summed} inputs could leave the range of int32 sums; accepted: {longest}"
    return None


def refuse_formula(problem):
    """Why no kernel that multiplies integers can run a problem, on whatever device, or `None`."""
    if problem.activation_bits is None:
        return "the activations are float: the kernel multiplies integers"
    if problem.activation_bits not in (4, 8):
        return f"activations of {problem.activation_bits} bits; accepted: 4, 8"
    if problem.activation_formula != "absmax":
        return f"activations quantized by {problem.activation_formula}; accepted: absmax"
    if problem.activation_granularity not in ("token", "tensor", "static"):
        return f"activation granularity {problem.activation_granularity!r}"
    if problem.dtype not in DTYPES:
        return f"activations of dtype {problem.dtype}; accepted: {', '.join(DTYPES)}"
    if problem.group_size is not None and problem.group_size % 32:
        return f"group_size={problem.group_size} is not a multiple of 32"
    return None


# Of a CPU tensor the three backends say "cpu", "cpu:0", "TFRT_CPU_0" and
# "/job:localhost/replica:0/task:0/device:CPU:0"; "meta" is torch's for shapes without data.
_CPU_DEVICES = ("cpu", "cpu:0", "cpu_0", "meta")


def normalizes(activation_quantizer):
    """Whether the native library normalizes what it quantizes so: row by row, as a norm is."""
    return not Activations.of(activation_quantizer).per_tensor


class Activations(NamedTuple):
    """How a kernel takes the activations, as attributes of a call.

    Attributes:
        bits: 8 or 4; 0: they stay float.
        per_tensor: Whether all rows share a scale.
        epsilon: Lower bound of the absolute maximum of a token.
    """

    bits: int
    per_tensor: bool
    epsilon: float

    @classmethod
    def of(cls, quantizer):
        """Those of an `ActivationQuantizer`, or of `None`."""
        if quantizer is None:
            return cls(0, False, 0.0)
        return cls(quantizer.bits, quantizer.granularity == "tensor", quantizer.epsilon)


class Facts(NamedTuple):
    """The static side of one call, hashable: all but the tensors.

    Attributes:
        in_features: Inner size.
        out_features: Outputs.
        bits: Storage bits of a weight.
        group_size: Inputs that share a scale, or `None`.
        offset: `w = scale * (code + offset)`.
        layout: `"tiles"` or `"trits"`.
        quantizer: The `ActivationQuantizer`, or `None`.
        window: The `keras_bitnet.ops.window.Window` of a convolution, or `None`.
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int | None
    offset: float
    layout: str
    quantizer: Any
    window: Any

    @classmethod
    def of(cls, packed, quantizer, window=None):
        """The facts of a `PackedTensor`, an activation quantizer and a window."""
        return cls(
            packed.in_features,
            packed.out_features,
            packed.bits,
            packed.group_size,
            packed.offset,
            packed.layout,
            quantizer,
            window,
        )

    def packed(self, tiles, scale):
        """The `PackedTensor` that these facts describe."""
        return PackedTensor(
            tiles,
            scale,
            self.offset,
            self.bits,
            self.in_features,
            self.out_features,
            self.group_size,
            self.layout,
        )

    @property
    def per_tensor(self):
        """Whether all rows of the activations share a scale."""
        return Activations.of(self.quantizer).per_tensor


def gradients(dys, packed):
    """The straight-through gradients of matmuls of the same activations, those that autodiff gives
    the reference.

        dx = sum over weights of dy @ dequantize(packed)^T,   dbias = sum over rows of dy

    Args:
        dys: Float tensors `(..., out_features)`, one for each weight.
        packed: `PackedTensor`s; their codes and scales are constants here.

    Returns:
        `(dx, dbiases)`: `(..., in_features)` of the dtype of `dys`, a list of
        `float32 (out_features,)`.
    """
    parts, dbiases = [], []
    for dy, weight in zip(dys, packed, strict=True):
        dtype = dy.dtype
        dy = ops.cast(dy, "float32")
        dx = ops.matmul(dy, ops.transpose(weight.dequantize()))
        parts.append(ops.cast(dx, dtype))
        dbiases.append(ops.sum(dy, axis=tuple(range(len(dy.shape) - 1))))
    return functools.reduce(operator.add, parts), dbiases


def norm_gradients(dy, x, gain, epsilon):
    """The gradients of an RMS norm over the last axis.

        n = x / sqrt(mean(x^2) + epsilon),   y = n * gain,   dn = dy * gain
        dx = (dn - n * mean(dn * n)) / sqrt(mean(x^2) + epsilon),   dgain = sum over rows of dy * n

    Args:
        dy: Float tensor `(..., features)`.
        x: Float tensor `(..., features)`.
        gain: `float32 (features,)`.
        epsilon: Added to the mean.

    Returns:
        `(dx, dgain)`: of the dtype of `dy`, and `float32 (features,)`.
    """
    dtype = dy.dtype
    dy, x = ops.cast(dy, "float32"), ops.cast(x, "float32")
    r = ops.rsqrt(ops.mean(x * x, axis=-1, keepdims=True) + epsilon)
    n, dn = x * r, dy * gain
    dx = r * (dn - n * ops.mean(dn * n, axis=-1, keepdims=True))
    return ops.cast(dx, dtype), ops.sum(dy * n, axis=tuple(range(len(dy.shape) - 1)))
