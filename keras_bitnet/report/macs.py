"""Multiply-accumulates of a call, by precision: one row of a table for each type of layer.

A count is that of one example. It includes products with the zeros of a padded border, as is
usual, and no additions of a bias, no norms, no activations. What has no row is not counted.
"""

import math
from typing import Any

import keras
from keras import layers

from keras_bitnet.layers import BitEmbedding, BitLayer, ReversibleBitEmbedding
from keras_bitnet.layers.block import BitBlock


def format_bits(bits):
    """Bits for people: 1.58, 4, 32."""
    return f"{bits:.3g}"


def precision(layer):
    """The name of the precision that a layer multiplies in: `W1.58A8`, `float32`, `int8`."""
    if isinstance(layer, (BitLayer, BitBlock)):
        activations = layer.activation_quantizer
        bits = dtype_bits(layer.compute_dtype) if activations is None else activations.bits
        return f"W{format_bits(layer.weight_quantizer.bits_per_weight)}A{bits}"
    return getattr(layer, "quantization_mode", None) or layer.compute_dtype


def dtype_bits(dtype):
    """Bits of a value of a dtype given by name."""
    name = keras.backend.standardize_dtype(dtype)
    digits = "".join(c if c.isdigit() else " " for c in name).split()
    return int(digits[0]) if digits else 8


def is_low_bit(name):
    """Whether a precision is that of a quantized product."""
    return not name.startswith(("float", "bfloat")) or name.startswith("float8")


def count_macs(call):
    """The multiply-accumulates of one call of a layer, without those of the layers in it.

    Args:
        call: `keras_bitnet.report.calls.Call`.

    Returns:
        Counts by `precision`, `{}` for a layer that does not multiply, or `None` where the
        number is not known.
    """
    layer = call.layer
    row = _row(layer)
    if row is None:
        return None if _may_multiply(layer) else {}
    try:
        counts = row(layer, call)
    except TypeError:  # arithmetic with an unknown size
        return None
    if isinstance(counts, int):
        counts = {precision(layer): counts}
    return counts


def _row(layer):
    """The row of the nearest class, unless the layer computes something else than that class."""
    ancestors: tuple[Any, ...] = type(layer).__mro__
    for cls in ancestors:
        if cls in MACS:
            own_call = cls is not BitLayer and type(layer).call is not cls.call
            return None if own_call else MACS[cls]
    return None


def _may_multiply(layer):
    own = [*layer._trainable_variables, *layer._non_trainable_variables]
    known = any(cls in MACS for cls in type(layer).__mro__)
    return known or any(len(variable.shape) >= 2 for variable in own)


def _bit_layer(layer, call):
    size = layer.in_features * layer.out_features
    rows = math.prod(call.output) // layer.out_features
    counts = {precision(layer): rows * size}
    if layer.lora_enabled:
        low_rank = rows * layer.lora_rank * (layer.in_features + layer.out_features)
        counts[layer.compute_dtype] = counts.get(layer.compute_dtype, 0) + low_rank
    return counts


def _dense(layer, call):
    return math.prod(call.output) * call.input[-1]


def _einsum_dense(layer, call):
    operands, output = layer.equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    before, ellipsis, after = inputs.partition("...")
    sizes = dict(zip(before, call.input, strict=False))
    if ellipsis:
        sizes |= dict(zip(reversed(after), reversed(call.input), strict=False))
    summed = [axis for axis in before + after if axis not in output]
    if not set(summed) <= set(kernel):
        return None
    return math.prod(call.output) * math.prod(sizes[axis] for axis in summed)


def _conv(layer, call):
    taps = math.prod(layer.kernel_size)
    return math.prod(call.output) * taps * (_channels(layer, call.input) // layer.groups)


def _depthwise_conv(layer, call):
    return math.prod(call.output) * math.prod(layer.kernel_size)


def _separable_conv(layer, call):
    positions = math.prod(call.output) // layer.filters
    between = _channels(layer, call.input) * layer.depth_multiplier
    return positions * between * (math.prod(layer.kernel_size) + layer.filters)


def _channels(layer, shape):
    return shape[-1 if layer.data_format == "channels_last" else 1]


def _reversible_embedding(layer, call):
    return math.prod(call.output) * call.input[-1] if call.arguments.get("reverse") else {}


def _reversible_bit_embedding(layer, call):
    table = layer.embedding if layer.tie_weights else layer.reverse_projection
    return _bit_layer(table, call) if call.arguments.get("reverse") else {}


def _no_product(layer, call):
    return {}


def _attention(layer, call):
    query, value = call.input[:2]
    return query[0] * query[1] * value[1] * (query[-1] + value[-1])


def _multi_head_attention(layer, call):
    query, value = call.arguments["query"], call.arguments["value"]
    if tuple(layer.attention_axes) != tuple(range(1, len(query) - 1)):
        return None
    scores = query[0] * math.prod(query[1:-1]) * math.prod(value[1:-1])
    return scores * layer.num_heads * (layer.key_dim + layer.value_dim)


def _grouped_query_attention(layer, call):
    query, value = call.arguments["query"], call.arguments["value"]
    return query[0] * query[1] * value[1] * layer.num_query_heads * 2 * layer.head_dim


MACS: dict[Any, Any] = {
    BitLayer: _bit_layer,
    BitEmbedding: _no_product,
    ReversibleBitEmbedding: _reversible_bit_embedding,
    layers.Dense: _dense,
    layers.EinsumDense: _einsum_dense,
    layers.Conv1D: _conv,
    layers.Conv2D: _conv,
    layers.Conv3D: _conv,
    layers.DepthwiseConv1D: _depthwise_conv,
    layers.DepthwiseConv2D: _depthwise_conv,
    layers.SeparableConv1D: _separable_conv,
    layers.SeparableConv2D: _separable_conv,
    layers.Attention: _attention,
    layers.MultiHeadAttention: _multi_head_attention,
    layers.GroupQueryAttention: _grouped_query_attention,
    layers.ReversibleEmbedding: _reversible_embedding,
    layers.Embedding: _no_product,
}
