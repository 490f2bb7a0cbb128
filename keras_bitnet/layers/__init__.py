"""Quantized layers."""

from keras_bitnet.layers.base import BitLayer
from keras_bitnet.layers.bit_conv import BitConv, BitConv1D, BitConv2D, BitConv3D
from keras_bitnet.layers.bit_depthwise_conv import (
    BitDepthwiseConv,
    BitDepthwiseConv1D,
    BitDepthwiseConv2D,
)
from keras_bitnet.layers.bit_einsum_dense import BitEinsumDense
from keras_bitnet.layers.bit_embedding import BitEmbedding, ReversibleBitEmbedding
from keras_bitnet.layers.bit_feed_forward import BitFeedForward, relu_squared
from keras_bitnet.layers.bit_grouped_query_attention import BitGroupedQueryAttention
from keras_bitnet.layers.bit_linear import BitLinear
from keras_bitnet.layers.bit_multi_head_attention import BitMultiHeadAttention
from keras_bitnet.layers.bit_residual import BitResidual
from keras_bitnet.layers.bit_separable_conv import (
    BitSeparableConv,
    BitSeparableConv1D,
    BitSeparableConv2D,
)
from keras_bitnet.layers.bit_transformer_decoder import BitTransformerDecoder
from keras_bitnet.layers.bit_transformer_encoder import BitTransformerEncoder
from keras_bitnet.layers.block import BitBlock
from keras_bitnet.layers.key_value_cache import make_cache

__all__ = [
    "BitBlock",
    "BitConv",
    "BitConv1D",
    "BitConv2D",
    "BitConv3D",
    "BitDepthwiseConv",
    "BitDepthwiseConv1D",
    "BitDepthwiseConv2D",
    "BitEinsumDense",
    "BitEmbedding",
    "BitFeedForward",
    "BitGroupedQueryAttention",
    "BitLayer",
    "BitLinear",
    "BitMultiHeadAttention",
    "BitResidual",
    "BitSeparableConv",
    "BitSeparableConv1D",
    "BitSeparableConv2D",
    "BitTransformerDecoder",
    "BitTransformerEncoder",
    "ReversibleBitEmbedding",
    "make_cache",
    "relu_squared",
]
