"""What a layer costs: bits of its codes, and bytes in memory once packed."""

import math

from keras_bitnet.layers.kernel_weights import layout_for
from keras_bitnet.ops import layout
from keras_bitnet.report.macs import dtype_bits
from keras_bitnet.report.pairs import inner_layers

_NOT_PACKED = ("kernel", "kernel_log2_scale", "quantization_strength")


def weight_count(layer):
    """Numbers in the kernels of a quantized layer."""
    return sum(inner.in_features * inner.out_features for inner in inner_layers(layer))


def weight_bits(layer, quantizer=None):
    """Bits of a weight of a layer, on average over its kernels, kept rows included.

    Args:
        layer: A Keras layer or a quantized one.
        quantizer: Weight quantizer in place of that of the layer.
    """
    inner = inner_layers(layer)
    if not inner:
        return float(dtype_bits(layer.variable_dtype))
    bits = sum(
        one.out_features
        * (one.in_features * (quantizer or one.weight_quantizer).bits_per_weight
           + one.kept_channels * one.kept_bits)
        for one in inner
    )  # fmt: skip
    return bits / weight_count(layer)


def packed_bytes(layer, memory="fastest", quantizer=None):
    """Bytes of all weights of a layer after `pack_model(memory=...)`; of a float one as they are.

    Args:
        layer: A Keras layer or model, in which quantized layers are not packed.
        memory: As in `pack_model`.
        quantizer: Weight quantizer in place of that of the layer.
    """
    inner = inner_layers(layer)
    replaced = {id(getattr(one, name)) for one in inner for name in _NOT_PACKED}
    kept = {id(v): v for v in layer.weights if id(v) not in replaced}.values()
    rest = sum(math.prod(v.shape) * dtype_bits(v.dtype) // 8 for v in kept)
    return rest + sum(
        _kernel_bytes(one, memory, quantizer or one.weight_quantizer) for one in inner
    )


def _kernel_bytes(layer, memory, quantizer):
    size = (layer.in_features, layer.out_features)
    shape = layout.tiles_shape(*size, quantizer.bits, layout_for(memory, quantizer))
    return math.prod(shape) + 4 * math.prod(quantizer.scale_shape(*size)) + layer.kept_bytes
