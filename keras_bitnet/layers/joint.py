"""Layers of the same inputs: where they are packed, their products are one operation."""

import threading
from typing import Any

from keras_bitnet.ops.bit_matmul import joint_bit_matmul


class _Scope(threading.local):  # as in `keras_bitnet.kernels.select`
    products: Any = None


_scope = _Scope()


def call_jointly(layers, x):
    """The outputs of some layers for the same inputs, `[layer(x) for layer in layers]`.

    The products of packed layers that quantize their inputs alike, and do nothing else to them
    first, are computed together; each layer then takes its own where it would multiply.

    Args:
        layers: Built Keras layers.
        x: Tensor `(..., in_features)`.

    Returns:
        List of tensors.
    """
    outer = _scope.products
    _scope.products = _products(layers, x)
    try:
        return [layer(x) for layer in layers]
    finally:
        _scope.products = outer


def joint_product(layer, x):
    """What a layer's kernel makes of inputs `x` if that was computed with others', or `None`."""
    found = _scope.products
    if found is None or found[0] is not x:
        return None
    return found[1].get(id(layer))


def _products(layers, x):
    """The inputs and the products by the layers' ids, or `None`: each multiplies by itself."""
    if not all(getattr(layer, "multiplies_alone", lambda x: False)(x) for layer in layers):
        return None
    quantizer = layers[0].activation_quantizer
    if any(layer.activation_quantizer != quantizer for layer in layers):
        return None
    packed = [layer.packed_kernel for layer in layers]
    biases = [layer.row_bias() for layer in layers]
    results = joint_bit_matmul(x, packed, quantizer, biases)
    return x, {id(layer): y for layer, y in zip(layers, results, strict=True)}
