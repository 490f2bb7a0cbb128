"""A packed product in an ONNX graph: traced as a placeholder, lowered to `MatMulNBits`.

Imported where PyTorch and onnxscript are there.
"""

import dataclasses
from typing import Any

import numpy as np
import onnx_ir
import torch
from keras import ops
from onnxscript import opset18

from keras_bitnet.interop.codecs import matmul_nbits
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.ops import layout

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
PLACEHOLDER = "keras_bitnet::PackedProduct"
BLOCK_SIZES = (32, 64, 128)
GUARD = 127.0
_KEPT = ("K", "N", "block_size", "accuracy_level")  # attributes that both operators have


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the inputs of a product lie in blocks.

    Attributes:
        group: Inputs that share a scale.
        groups: How many such there are.
        size: Places of a block, the guard included.
        guards: 1 where the last place of a block is the constant `GUARD`, else 0.
    """

    group: int
    groups: int
    size: int
    guards: int

    @classmethod
    def smallest(cls, packed, guards):
        """The blocks of a packed tensor that take the fewest bytes."""
        group = packed.group_size or packed.in_features
        bits = max(packed.bits, matmul_nbits.BITS[0])
        choices = [cls(group, -(-packed.in_features // group), n, guards) for n in BLOCK_SIZES]
        return min(choices, key=lambda b: b.per_group * (b.size * bits // 8 + 4))

    @property
    def per_group(self):
        """Blocks of a group."""
        return -(-self.group // (self.size - self.guards))

    @property
    def count(self):
        """Blocks of all inputs."""
        return self.groups * self.per_group

    def arrange(self, x, pad, reshape, guard):
        """Brings the last axis from inputs to blocks, padded with zeros.

        Args:
            x: Tensor or array `(..., in_features)`.
            pad: `pad(x, count, value)` appends to the last axis.
            reshape: `reshape(x, shape)`.
            guard: What stands in the place of the guard.

        Returns:
            `(..., count, size)`.
        """
        *leading, in_features = x.shape
        x = pad(x, self.groups * self.group - in_features, 0)
        x = reshape(x, (*leading, self.groups, self.group))
        x = pad(x, self.per_group * (self.size - self.guards) - self.group, 0)
        x = reshape(x, (*leading, self.count, self.size - self.guards))
        return pad(x, self.guards, guard)


def kernel(accuracy_level):
    """The row that traces products; see `to_onnx` for the argument."""
    return Kernel("onnx", lambda problem: None, lambda *args: _trace(accuracy_level, *args))


def _trace(accuracy_level, x, packed, activation_quantizer, bias=None, activation_scale=None):
    """As `ops.bit_matmul`."""
    x = ops.cast(x, "float32")
    x_scale, level = None, accuracy_level
    if activation_quantizer is not None:
        codes, x_scale = activation_quantizer.quantize(x, activation_scale)
        x, level = ops.cast(codes, "float32"), 4
    blocks = Blocks.smallest(packed, guards=int(x_scale is not None))
    arranged = blocks.arrange(x, _pad_tensor, torch.reshape, GUARD)
    factor, half = _factor_and_half(packed)
    y = torch.onnx.ops.symbolic(
        PLACEHOLDER,
        (arranged.flatten(-2), packed.tiles, packed.scale),
        attrs={
            "K": blocks.count * blocks.size,
            "N": packed.out_features,
            "block_size": blocks.size,
            "accuracy_level": level,
            **_attributes(packed, blocks),
        },
        dtype=torch.float32,
        shape=(*x.shape[:-1], packed.out_features),
        version=1,
    ).to(x.device)  # PyTorch takes it for one of the CPU
    scale = packed.scale * factor
    if packed.group_size is None:
        y = (y + half * x.sum(-1, keepdim=True) if half else y) * scale[0]
    elif half:
        inputs = _pad_tensor(x, blocks.groups * blocks.group - packed.in_features, 0)
        sums = inputs.reshape(*x.shape[:-1], blocks.groups, blocks.group).sum(-1)
        y = y + half * torch.matmul(sums, scale.expand(-1, packed.out_features))
    y = y if x_scale is None else y * x_scale
    return y if bias is None else y + ops.cast(bias, "float32")


def _factor_and_half(packed):
    """`code + offset = factor * (level + half)` with levels that are whole."""
    if packed.bits == 1:
        return 0.5, 0.0  # -1/2 and 1/2 are half of -1 and 1
    return 1.0, packed.offset % 1


def _attributes(packed, blocks):
    factor, half = _factor_and_half(packed)
    return {
        "bits": packed.bits, "offset": packed.offset, "in_features": packed.in_features,
        "layout": packed.layout, "grouped": int(packed.group_size is not None),
        "group": blocks.group, "groups": blocks.groups, "guards": blocks.guards,
        "factor": factor, "half": half,
    }  # fmt: skip


def _pad_tensor(x, count, value):
    return torch.nn.functional.pad(x, (0, count), value=value) if count else x


def _pad_array(x, count, value):
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)], constant_values=value)


# -- after tracing -------------------------------------------------------------------------


def lower_products(model):
    """Makes the placeholders of a model `MatMulNBits`, in place.

    Args:
        model: `onnx_ir.Model`.
    """
    graph = model.graph
    made: dict = {}  # of layers that are called more than once
    for node in list(graph):
        if f"{node.domain}::{node.op_type}" != PLACEHOLDER:
            continue
        x, tiles, scale = node.inputs
        if tiles.name not in made:
            made[tiles.name] = _initializers(graph, tiles, scale, node.attributes)
        weights, scales, bits = made[tiles.name]
        kept = {name: node.attributes[name].value for name in _KEPT}
        product = onnx_ir.node(
            OPERATOR, [x, weights, scales], {**kept, "bits": bits}, domain=DOMAIN, name=node.name
        )
        onnx_ir.convenience.replace_nodes_and_values(
            graph, node, [node], [product], node.outputs, product.outputs
        )
    model.opset_imports.pop(PLACEHOLDER.partition("::")[0], None)
    model.opset_imports[DOMAIN] = 1
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)


def _initializers(graph, tiles, scale, attributes):
    value = {name: attribute.value for name, attribute in attributes.items()}
    blocks = Blocks(value["group"], value["groups"], value["block_size"], value["guards"])
    size = (value["in_features"], value["N"])
    packed_codes = ops.convert_to_tensor(tiles.const_value.numpy())
    codes = ops.convert_to_numpy(layout.unpack(packed_codes, value["bits"], *size, value["layout"]))
    levels = (codes.T + value["offset"]) / value["factor"] - value["half"]
    bits = matmul_nbits.width(levels)
    arranged = blocks.arrange(levels.astype(np.int16), _pad_array, np.reshape, 0)
    packed = matmul_nbits.pack_blocks(arranged, bits)
    scales = np.ones((size[1], blocks.count), np.float32)
    if value["grouped"]:
        per_group = scale.const_value.numpy().T * np.float32(value["factor"])
        scales *= np.repeat(per_group, blocks.per_group, axis=1)
    name = tiles.name
    return (*(_initializer(graph, f"{name}.{suffix}", array)
              for suffix, array in (("blocks", packed), ("scales", scales))), bits)  # fmt: skip


def _initializer(graph, name, array):
    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name))
    value.shape, value.dtype = onnx_ir.Shape(array.shape), onnx_ir.tensor(array).dtype
    graph.register_initializer(value)
    return value


def _shift_right(x, count):
    """Logical, as that of unsigned integers is: the exporter's own is that of signed ones."""
    return opset18.BitShift(x, opset18.CastLike(count, x), direction="RIGHT")


def _squeeze(x, dim):
    """Nothing where the axis is free: traced with another size than 1, it stays."""
    if x.shape[dim] != 1:
        return opset18.Identity(x)
    axes: Any = opset18.Constant(value_ints=[dim])
    return opset18.Squeeze(x, axes)


def _rms_norm(x, normalized_shape, weight, eps):
    """What PyTorch makes of a norm on a GPU; it gives what the gradient takes too."""
    axes: Any = opset18.Constant(value_ints=list(range(-len(normalized_shape), 0)))
    epsilon: Any = opset18.Constant(value_float=eps)
    square = opset18.ReduceMean(opset18.Mul(x, x), axes)
    inverse = opset18.Reciprocal(opset18.Sqrt(opset18.Add(square, epsilon)))
    return opset18.Mul(opset18.Mul(x, inverse), weight), inverse


# Operators that the exporter translates wrongly, or not at all.
TRANSLATIONS = {
    torch.ops.aten._fused_rms_norm.default: _rms_norm,
    torch.ops.aten.squeeze.dim: _squeeze,
    torch.ops.aten.bitwise_right_shift.Tensor: _shift_right,
    torch.ops.aten.bitwise_right_shift.Tensor_Scalar: _shift_right,
}
