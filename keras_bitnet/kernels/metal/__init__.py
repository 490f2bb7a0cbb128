"""The Metal kernels for PyTorch on Apple GPUs: the operator `keras_bitnet::metal_matmul`.

They have never run on a Mac: the tests execute the shader as C++ behind the host code of
`dispatch.py`, and the row stands back where the shader fails its check on the GPU it finds.
"""

import keras
import torch
from keras import ops

from keras_bitnet.kernels import cpu
from keras_bitnet.kernels.metal import dispatch
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.ops.packed_tensor import PackedTensor

NAME = "metal"
DEVICE = "mps"
OBSTACLE = dispatch.obstacle()  # read once: `torch.compile` traces what reads it

_OPERATOR = "keras_bitnet::metal_matmul"
_SCHEMA = (
    "metal_matmul(Tensor x, Tensor tiles, Tensor scale, Tensor? bias, Tensor? activation_scale, "
    "int out_features, int bits, int group_size, int activation_bits, str granularity, "
    "float offset, float epsilon) -> Tensor"
)


def refuse(problem):
    """Why the kernels cannot run a problem, or `None`."""
    if OBSTACLE is not None:
        return OBSTACLE
    if problem.device and not problem.device.startswith(DEVICE):
        return f"the activations are on {problem.device!r}, not on an Apple GPU ('mps')"
    if problem.layout != "tiles":
        return f"weights in the layout {problem.layout!r}; accepted: 'tiles'"
    return cpu.refuse_operands(problem)


def run(x, packed, activation_quantizer, bias, activation_scale=None):
    """As `keras_bitnet.ops.bit_matmul`, for a problem that was not refused."""
    return torch.ops.keras_bitnet.metal_matmul(
        x.contiguous(),
        ops.convert_to_tensor(packed.tiles),
        ops.convert_to_tensor(packed.scale),
        None if bias is None else ops.cast(bias, "float32"),
        None if activation_scale is None else ops.convert_to_tensor(activation_scale),
        packed.out_features,
        packed.bits,
        packed.group_size or 0,
        activation_quantizer.bits,
        activation_quantizer.granularity,
        packed.offset,
        activation_quantizer.epsilon,
    )


def _operator(*operands):
    return dispatch.matmul(dispatch.library(), *operands)


def _fake(x, tiles, scale, bias, activation_scale, out_features, *attributes):
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_context(ctx, inputs, output):
    x, tiles, scale, bias, _, out_features, bits, group_size, _, _, offset, _ = inputs
    ctx.save_for_backward(tiles, scale)
    ctx.has_bias = bias is not None
    ctx.facts = (offset, bits, x.shape[-1], out_features, group_size or None)


def _backward(ctx, dy):
    with keras.device(dy.device.type):  # where the operator ran, whatever Keras's default device
        dx, dbias = cpu.gradients(dy, PackedTensor(*ctx.saved_tensors, *ctx.facts))
    return dx, None, None, dbias if ctx.has_bias else None, *[None] * 8


# What a `torch.library.Library` defines goes away with it.
_fragment = torch.library.Library("keras_bitnet", "FRAGMENT")
_fragment.define(_SCHEMA)
_fragment.impl("metal_matmul", _operator, "MPS")
torch.library.register_fake(_OPERATOR, _fake)
torch.library.register_autograd(_OPERATOR, _backward, setup_context=_setup_context)

METAL = Kernel(NAME, refuse, run)
