"""Quantized layers."""

from keras_bitnet.layers.base import BitLayer
from keras_bitnet.layers.bit_linear import BitLinear

__all__ = ["BitLayer", "BitLinear"]
