"""Quantized layers."""

from keras_bitnet.layers.base import BitLayer
from keras_bitnet.layers.bit_einsum_dense import BitEinsumDense
from keras_bitnet.layers.bit_embedding import BitEmbedding, ReversibleBitEmbedding
from keras_bitnet.layers.bit_feed_forward import BitFeedForward, relu_squared
from keras_bitnet.layers.bit_grouped_query_attention import BitGroupedQueryAttention
from keras_bitnet.layers.bit_linear import BitLinear
from keras_bitnet.layers.bit_transformer_decoder import BitTransformerDecoder
from keras_bitnet.layers.block import BitBlock
from keras_bitnet.layers.key_value_cache import make_cache

__all__ = [
    "BitBlock",
    "BitEinsumDense",
    "BitEmbedding",
    "BitFeedForward",
    "BitGroupedQueryAttention",
    "BitLayer",
    "BitLinear",
    "BitTransformerDecoder",
    "ReversibleBitEmbedding",
    "make_cache",
    "relu_squared",
]
