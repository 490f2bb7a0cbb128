"""The Metal kernels for PyTorch on Apple GPUs: the operator `keras_bitnet::metal_matmul`.

They have never run on a Mac: the tests execute the shader as C++ behind the host code of
`dispatch.py`, and the row stands back where the shader fails its check on the GPU it finds.
"""

import torch
from keras import ops

from keras_bitnet.kernels import cpu, torch_operators
from keras_bitnet.kernels.metal import dispatch
from keras_bitnet.kernels.select import Kernel

NAME = "metal"
DEVICE = "mps"
OBSTACLE = dispatch.obstacle()  # read once: `torch.compile` traces what reads it

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


torch_operators.define(
    _SCHEMA,
    _operator,
    "MPS",
    torch_operators.fake_matmul,
    torch_operators.matmul_gradient,
    torch_operators.matmul_context,
)

METAL = Kernel(NAME, refuse, run)
