"""Quantized layers."""

from keras_bitnet.layers.base import BitLayer
from keras_bitnet.layers.bit_einsum_dense import BitEinsumDense
from keras_bitnet.layers.bit_embedding import BitEmbedding, ReversibleBitEmbedding
from keras_bitnet.layers.bit_linear import BitLinear

__all__ = ["BitEinsumDense", "BitEmbedding", "BitLayer", "BitLinear", "ReversibleBitEmbedding"]
