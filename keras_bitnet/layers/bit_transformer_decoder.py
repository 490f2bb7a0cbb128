"""BitTransformerDecoder: one block of a decoder-only low-bit transformer."""

from typing import Any

import keras

from keras_bitnet.checks import check_choice, check_count
from keras_bitnet.layers.base import NORMS
from keras_bitnet.layers.bit_feed_forward import BitFeedForward
from keras_bitnet.layers.bit_grouped_query_attention import BitGroupedQueryAttention
from keras_bitnet.layers.block import BitBlock
from keras_bitnet.layers.decode_at_once import decode_at_once
from keras_bitnet.layers.key_value_cache import TakesCache, untouched


@keras.saving.register_keras_serializable("keras_bitnet")
class BitTransformerDecoder(TakesCache, BitBlock):
    """Causal attention and feed-forward, each behind a norm and added to the stream.

        x = x + attention(norm(x))
        y = x + feed_forward(norm(x))

    With the defaults it is the block of BitNet b1.58; with `sub_norm=None, activation="silu"`
    that of Llama.

    Args:
        intermediate_dim: Size inside the feed-forward block.
        num_query_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads, `num_query_heads` by default.
        head_dim: Size of a head, features / `num_query_heads` by default.
        activation, gated: See `BitFeedForward`.
        norm: `"rms"` or `"layer"`: the norms before attention and feed-forward.
        sub_norm: `None`, `"rms"` or `"layer"`: the norms before the last projection of each.
        use_bias: Whether the projections have biases.
        rope_max_wavelength, rope_scaling_factor, sliding_window, flash_attention: See
            `BitGroupedQueryAttention`.
        dropout: Dropout rate of attention weights and feed-forward.
        seed: Seed of the dropout.
        weight_quantizer, activation_quantizer, projection_norm, norm_epsilon,
            quantization_strength, packed, initializers, regularizers, constraints: See
            `keras_bitnet.layers.BitBlock`.
        **kwargs: `name`, `dtype`, `trainable` of any Keras layer.

    Call arguments:
        inputs: `(batch, length, features)`.
        padding_mask: Boolean `(batch, length)`: tokens that are no padding. Without one, and
            without `attention_mask`, the mask of the inputs is it, where Keras passes one.
        attention_mask, positions, rotary, cache, cache_index: See `BitGroupedQueryAttention`.

    Returns:
        `(batch, length, features)`; with `cache`, `(output, cache)`.

    Raises:
        ValueError: An argument is out of range; the message says what is accepted.

    Source:
        Ma et al. 2025, BitNet b1.58 2B4T (https://arxiv.org/abs/2504.12285).
    """

    def __init__(
        self,
        intermediate_dim,
        num_query_heads,
        num_key_value_heads=None,
        head_dim=None,
        activation="relu2",
        gated=True,
        norm="rms",
        sub_norm="rms",
        use_bias=False,
        rope_max_wavelength=10000.0,
        rope_scaling_factor=1.0,
        sliding_window=None,
        flash_attention=None,
        dropout=0.0,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_choice("norm", norm, tuple(NORMS))
        check_count("num_query_heads", num_query_heads)
        self.supports_masking = True
        self.intermediate_dim = intermediate_dim
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads or num_query_heads
        self.head_dim = head_dim
        self.norm = norm
        self.sub_norm = sub_norm
        self.use_bias = use_bias
        self.rope_max_wavelength = rope_max_wavelength
        self.rope_scaling_factor = rope_scaling_factor
        self.sliding_window = sliding_window
        self.flash_attention = flash_attention
        self.dropout = dropout
        self.seed = seed
        self.feed_forward = BitFeedForward(
            intermediate_dim,
            activation=activation,
            gated=gated,
            use_bias=use_bias,
            dropout=dropout,
            sub_norm=sub_norm,
            seed=seed,
            name="feed_forward",
            **self.block_arguments(),
        )
        self.attention: Any = None  # the size of its heads may be that of the inputs
        self.attention_norm = self.make_norm(norm, "attention_norm")
        self.feed_forward_norm = self.make_norm(norm, "feed_forward_norm")

    def build(self, input_shape):
        """Creates the weights for inputs `(batch, length, features)`."""
        if self.head_dim is None and input_shape[-1] % self.num_query_heads:
            raise ValueError(
                "Without `head_dim` the features must be a multiple of `num_query_heads`. "
                f"Received: features={input_shape[-1]}, num_query_heads={self.num_query_heads}"
            )
        self.attention = BitGroupedQueryAttention(
            self.head_dim or input_shape[-1] // self.num_query_heads,
            self.num_query_heads,
            self.num_key_value_heads,
            dropout=self.dropout,
            use_bias=self.use_bias,
            sliding_window=self.sliding_window,
            flash_attention=self.flash_attention,
            seed=self.seed,
            sub_norm=self.sub_norm,
            rope_max_wavelength=self.rope_max_wavelength,
            rope_scaling_factor=self.rope_scaling_factor,
            name="attention",
            **self.block_arguments(),
        )
        self.attention_norm.build(input_shape)
        self.attention.build(input_shape, input_shape)
        self.feed_forward_norm.build(input_shape)
        self.feed_forward.build(input_shape)

    def call(
        self,
        inputs,
        padding_mask=None,
        attention_mask=None,
        positions=None,
        rotary=None,
        cache=None,
        cache_index=None,
        training=None,
        mask=None,
    ):
        """Computes the block; see the class."""
        if padding_mask is None and attention_mask is None:
            padding_mask = mask
        cache = untouched(cache)
        if cache is not None and padding_mask is None and not training:
            at_once = decode_at_once(
                self, inputs, attention_mask, positions, rotary, cache, cache_index
            )
            if at_once is not None:
                return at_once
        x = self.attention_norm(inputs)
        y = self.attention(
            x,
            x,
            # Keys only: a query of padding that may see nothing would give NaN.
            value_mask=padding_mask,
            attention_mask=attention_mask,
            use_causal_mask=attention_mask is None,
            positions=positions,
            rotary=rotary,
            cache=cache,
            cache_index=cache_index,
            training=training,
        )
        if cache is not None:
            y, cache = y
        x = inputs + y
        y = x + self.feed_forward(self.feed_forward_norm(x), training=training)
        return y if cache is None else (y, cache)

    def compute_output_shape(self, input_shape):
        """The shape of the inputs."""
        return input_shape

    def get_config(self):
        """The arguments of the constructor."""
        # Of the class, as a layer in which some are replaced describes itself otherwise.
        feed_forward = BitFeedForward.get_config(self.feed_forward)
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "activation": feed_forward["activation"],
            "gated": feed_forward["gated"],
            "norm": self.norm,
            "sub_norm": self.sub_norm,
            "use_bias": self.use_bias,
            "rope_max_wavelength": self.rope_max_wavelength,
            "rope_scaling_factor": self.rope_scaling_factor,
            "sliding_window": self.sliding_window,
            "flash_attention": self.flash_attention,
            "dropout": self.dropout,
            "seed": self.seed,
        }
