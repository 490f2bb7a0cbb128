"""BitTransformerEncoder: the block of BERT and ViT with low-bit products."""

from typing import Any, ClassVar

import keras
from keras import ops

from keras_bitnet.checks import check_choice, check_count
from keras_bitnet.layers.base import NORMS
from keras_bitnet.layers.bit_feed_forward import BitFeedForward
from keras_bitnet.layers.bit_multi_head_attention import BitMultiHeadAttention
from keras_bitnet.layers.bit_residual import BitResidual
from keras_bitnet.layers.block import BitBlock


@keras.saving.register_keras_serializable("keras_bitnet")
class BitTransformerEncoder(BitBlock):
    """Self-attention and a feed-forward network, each added to the stream.

        norm before:  x = x + attention(norm(x)),   y = x + feed_forward(norm(x))
        norm after:   x = norm(x + attention(x)),   y = norm(x + feed_forward(x))

    Args:
        intermediate_dim: Positive integer, inner size of the feed-forward network.
        num_heads: Positive integer, at most the number of features.
        dropout: Dropout rate of the attention scores and of both results.
        activation: Activation of the feed-forward network; `"relu2"` is `max(x, 0) ** 2`.
        layer_norm_epsilon: Added to the variance in every norm inside.
        normalize_first: Whether the norm is before attention and network, or after the sums.
        norm: `"layer"` or `"rms"`: the norm of the block.
        sub_norm: `None`, `"rms"` or `"layer"`: a norm of the inputs of the last projection of
            attention and network, as in BitNet b1.58.
        stream_quantizer: `None`, `"int8"`, `"int16"`: the sums are rounded, see `BitResidual`.
        flash_attention: As in `keras.layers.MultiHeadAttention`.
        seed: Seed of the dropout.
        weight_quantizer, activation_quantizer, projection_norm, quantization_strength, packed,
            initializers, regularizers, constraints: See `keras_bitnet.layers.BitBlock`.
        **kwargs: `name`, `dtype`, `trainable` of any Keras layer.

    Call arguments:
        inputs: Tensor `(batch, length, features)`.
        padding_mask: Boolean `(batch, length)`: which positions are no padding; by default the
            mask of the inputs.
        attention_mask: Boolean `(batch, length, length)`: what may see what.
        return_attention_scores: Whether to return `(outputs, scores)`.

    Raises:
        ValueError: An argument is out of range; the message says what is accepted.

    Source:
        Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762); arguments as in
        `keras_hub.layers.TransformerEncoder`.
    """

    own_names: ClassVar = {**BitBlock.own_names, "norm_epsilon": "layer_norm_epsilon"}

    def __init__(
        self,
        intermediate_dim,
        num_heads,
        dropout=0.0,
        activation="relu",
        layer_norm_epsilon=1e-5,
        normalize_first=False,
        norm="layer",
        sub_norm=None,
        stream_quantizer=None,
        flash_attention=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(norm_epsilon=layer_norm_epsilon, **kwargs)
        check_choice("norm", norm, tuple(NORMS))
        check_count("num_heads", num_heads)
        self.supports_masking = True
        self.num_heads = num_heads
        self.dropout = dropout
        self.normalize_first = normalize_first
        self.norm = norm
        self.sub_norm = sub_norm
        self.flash_attention = flash_attention
        self.seed = seed
        self.feed_forward = BitFeedForward(
            intermediate_dim,
            activation=activation,
            gated=False,
            use_bias=True,
            dropout=dropout,
            sub_norm=sub_norm,
            seed=seed,
            name="feed_forward",
            **self.block_arguments(),
        )
        self.attention: Any = None  # the size of its heads is that of the inputs
        self.dropout_layer = keras.layers.Dropout(dropout, seed=seed, dtype=self.dtype_policy)
        self.attention_norm = self.make_norm(norm, "attention_norm")
        self.feed_forward_norm = self.make_norm(norm, "feed_forward_norm")
        residual = {"stream_quantizer": stream_quantizer, "dtype": self.dtype_policy}
        self.attention_residual = BitResidual(name="attention_residual", **residual)
        self.feed_forward_residual = BitResidual(name="feed_forward_residual", **residual)

    def build(self, input_shape):
        """Creates the weights for inputs `(batch, length, features)`."""
        size = input_shape[-1] // self.num_heads
        if size == 0:
            raise ValueError(
                "The features must be at least as many as the heads. "
                f"Received: features={input_shape[-1]}, num_heads={self.num_heads}"
            )
        self.attention = BitMultiHeadAttention(
            self.num_heads,
            size,
            dropout=self.dropout,
            flash_attention=self.flash_attention,
            sub_norm=self.sub_norm,
            seed=self.seed,
            name="attention",
            **self.block_arguments(),
        )
        self.attention.build(input_shape, input_shape)
        self.attention_norm.build(input_shape)
        self.feed_forward.build(input_shape)
        self.feed_forward_norm.build(input_shape)

    def call(
        self,
        inputs,
        padding_mask=None,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
        mask=None,
    ):
        """Computes the block; see the class."""
        seen = _merge_masks(mask if padding_mask is None else padding_mask, attention_mask)
        x = self.attention_norm(inputs) if self.normalize_first else inputs
        y = self.attention(
            x,
            x,
            attention_mask=seen,
            training=training,
            return_attention_scores=return_attention_scores,
        )
        y, scores = y if return_attention_scores else (y, None)
        y = self.dropout_layer(y, training=training)
        stream = self.attention_residual([inputs, y])
        if not self.normalize_first:
            stream = self.attention_norm(stream)
        x = self.feed_forward_norm(stream) if self.normalize_first else stream
        y = self.feed_forward_residual([stream, self.feed_forward(x, training=training)])
        if not self.normalize_first:
            y = self.feed_forward_norm(y)
        return (y, scores) if return_attention_scores else y

    def compute_output_shape(self, input_shape):
        """The shape of the inputs."""
        return input_shape

    def get_config(self):
        """The arguments of the constructor."""
        feed_forward = BitFeedForward.get_config(self.feed_forward)
        return {
            **super().get_config(),
            "intermediate_dim": feed_forward["intermediate_dim"],
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "activation": feed_forward["activation"],
            "normalize_first": self.normalize_first,
            "norm": self.norm,
            "sub_norm": self.sub_norm,
            "stream_quantizer": self.attention_residual.get_config()["stream_quantizer"],
            "flash_attention": self.flash_attention,
            "seed": self.seed,
        }


def _merge_masks(padding_mask, attention_mask):
    """One mask `(batch, 1 or length, length)` of what may be seen, or `None`."""
    if padding_mask is None:
        return attention_mask
    padding_mask = ops.cast(padding_mask, "bool")[:, None, :]
    if attention_mask is None:
        return padding_mask
    return ops.logical_and(padding_mask, ops.cast(attention_mask, "bool"))
