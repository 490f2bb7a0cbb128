"""BitGroupedQueryAttention: attention with low-bit projections, rotary positions and a cache."""

from typing import Any

import keras
from keras import ops

from keras_bitnet.checks import check_choice, check_count, check_number
from keras_bitnet.layers import key_value_cache
from keras_bitnet.layers.base import NORMS
from keras_bitnet.layers.bit_einsum_dense import BitEinsumDense
from keras_bitnet.layers.block import BitBlock
from keras_bitnet.layers.joint import call_jointly
from keras_bitnet.layers.rotary import rotary_tables, rotate


@keras.saving.register_keras_serializable("keras_bitnet")
class BitGroupedQueryAttention(key_value_cache.TakesCache, BitBlock):
    """`keras.layers.GroupQueryAttention` with low-bit projections.

        attention = softmax(rotate(query) rotate(key)^T / sqrt(head_dim)) value
        y = output_projection(sub_norm(attention))

    Args:
        head_dim: Size of each attention head.
        num_query_heads: Number of query heads, a multiple of `num_key_value_heads`.
        num_key_value_heads: Number of key and value heads.
        dropout: Dropout rate of the attention weights.
        use_bias: Whether the projections have biases.
        sliding_window: Tokens that a query may see on each side, itself included, or `None`.
        flash_attention: As in Keras: `None` uses flash attention where it can be.
        use_gate: Whether a sigmoid of a fourth projection multiplies the attention output.
        seed: Seed of the dropout.
        sub_norm: `None`, `"rms"` or `"layer"`: a trained norm of the inputs of the output
            projection, `attn_sub_norm` of BitNet b1.58.
        rope_max_wavelength: Base of a rotary embedding of queries and keys, or `None`: no
            positions.
        rope_scaling_factor: Positions are divided by it.
        weight_quantizer, activation_quantizer, projection_norm, norm_epsilon,
            quantization_strength, packed, initializers, regularizers, constraints: See
            `keras_bitnet.layers.BitBlock`.
        **kwargs: `name`, `dtype`, `trainable`, `activity_regularizer` of any Keras layer.

    Call arguments:
        query: `(batch, target_length, features)`.
        value: `(batch, source_length, features)`.
        key: As `value`, which it is by default.
        query_mask, value_mask, key_mask: Boolean `(batch, length)`: tokens that are no padding.
        attention_mask: Boolean `(batch, target_length, source_length)`: what each query may see.
        return_attention_scores: Whether to return `(output, scores)`; without a cache only.
        use_causal_mask: Whether queries may not see later tokens.
        positions: Integers `(batch or 1, target_length)` for the rotary embedding; 0, 1, 2, ...
            by default.
        rotary: What `rotary_tables` gave for the positions, in their place: computed once for
            many layers.
        cache: A cache of `keras_bitnet.layers.make_cache`. The keys and values of this call are
            written at `cache_index`; the queries see what `attention_mask`, then of the length
            of the cache, lets them of the tokens up to the last new one, by default every token
            up to their own.
        cache_index: A Python integer, or an integer scalar tensor. At the integer 0 the keys are
            those of this call alone, and attention is that of a call without cache.

    Returns:
        `(batch, target_length, features)`; with `cache`, `(output, cache)`.

    Raises:
        ValueError: An argument is out of range; the message says what is accepted.

    Source:
        Ainslie et al. 2023, GQA (https://arxiv.org/abs/2305.13245); the layer is that of Keras.
        Sub-norm: Ma et al. 2025, BitNet b1.58 2B4T (https://arxiv.org/abs/2504.12285).
    """

    def __init__(
        self,
        head_dim,
        num_query_heads,
        num_key_value_heads,
        dropout=0.0,
        use_bias=True,
        sliding_window=None,
        flash_attention=None,
        use_gate=False,
        seed=None,
        sub_norm=None,
        rope_max_wavelength=None,
        rope_scaling_factor=1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_heads(head_dim, num_query_heads, num_key_value_heads, rope_max_wavelength)
        check_choice("sub_norm", sub_norm, (None, *NORMS))
        if sliding_window is not None:
            check_count("sliding_window", sliding_window)
        if flash_attention and dropout:
            raise ValueError(
                f"Flash attention has no dropout. Received: flash_attention=True, dropout={dropout}"
            )
        self.supports_masking = True
        self.head_dim = head_dim
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.dropout = dropout
        self.use_bias = use_bias
        self.sliding_window = sliding_window
        self.flash_attention = flash_attention
        self.use_gate = use_gate
        self.seed = seed
        self.sub_norm = sub_norm
        self.rope_max_wavelength = rope_max_wavelength
        check_number("rope_scaling_factor", rope_scaling_factor, "(0, inf)")
        self.rope_scaling_factor = float(rope_scaling_factor)
        self.query_dense = self._projection(num_query_heads, "query")
        self.key_dense = self._projection(num_key_value_heads, "key")
        self.value_dense = self._projection(num_key_value_heads, "value")
        self.gate_dense = (
            self._projection(num_query_heads, "gate", activation="sigmoid") if use_gate else None
        )
        self.output_dense: Any = None  # its size is that of the queries
        self.dropout_layer = keras.layers.Dropout(dropout, seed=seed, dtype=self.dtype_policy)

    def _projection(self, heads, name, activation=None):
        return BitEinsumDense(
            "abc,cde->abde",
            (None, heads, self.head_dim),
            activation=activation,
            bias_axes="de" if self.use_bias else None,
            name=name,
            **self.layer_arguments(),
        )

    def build(self, query_shape, value_shape, key_shape=None):
        """Creates the weights for inputs of these shapes."""
        self.query_dense.build(query_shape)
        self.key_dense.build(key_shape or value_shape)
        self.value_dense.build(value_shape)
        if self.gate_dense is not None:
            self.gate_dense.build(query_shape)
        self.output_dense = BitEinsumDense(
            "abde,dec->abc",
            (None, query_shape[-1]),
            bias_axes="c" if self.use_bias else None,
            name="attention_output",
            **self.layer_arguments(self.sub_norm),
        )
        self.output_dense.build((None, None, self.num_query_heads, self.head_dim))

    def call(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        positions=None,
        rotary=None,
        cache=None,
        cache_index=None,
    ):
        """Computes the attention; see the class."""
        cache = key_value_cache.untouched(cache)
        if return_attention_scores and cache is not None:
            raise ValueError(
                "`return_attention_scores` does not go with a `cache`. "
                "Received: return_attention_scores=True and a cache"
            )
        gate = None if self.gate_dense is None else self.gate_dense(query)
        rotary = self.rotary_of_call(
            query.shape[1] or ops.shape(query)[1], positions, rotary, cache_index
        )
        query, key, value = self._project(query, value, key)
        masks = {"query": query_mask, "value": value_mask, "key": key_mask}
        scores = None
        if cache is None or (isinstance(cache_index, int) and cache_index == 0):
            query, key = _turned(query, key, rotary)
            causal = use_causal_mask
            if cache is not None:
                cache = key_value_cache.write(cache, key, value, 0)
                causal = causal or attention_mask is None
            if attention_mask is not None:
                attention_mask = attention_mask[..., : key.shape[1]]
            y, scores = self._attend(
                query, key, value, masks, attention_mask, causal, training, return_attention_scores
            )
        else:
            mask = self.mask_of_cache(attention_mask, query.shape[1], cache, cache_index)
            y, cache = key_value_cache.attend_next(
                cache, query, key, value, cache_index, self.head_dim**-0.5, mask, rotary
            )
        y = self.output_dense(y if gate is None else y * gate)
        if return_attention_scores:
            return y, scores
        return y if cache is None else (y, cache)

    def project(self, query, value, key=None, rotary=None):
        """Queries, keys and values as they meet: `(batch, length, heads, head_dim)` each.

        Their inner products are the "attention relations" that distillation can compare.
        """
        rotary = self.rotary_of_call(query.shape[1] or ops.shape(query)[1], None, rotary, None)
        query, key, value = self._project(query, value, key)
        return *_turned(query, key, rotary), value

    def _project(self, query, value, key):
        key = value if key is None else key
        if key is query and value is query:
            return call_jointly([self.query_dense, self.key_dense, self.value_dense], query)
        return self.query_dense(query), self.key_dense(key), self.value_dense(value)

    def rotary_of_call(self, length, positions, rotary, cache_index):
        """The tables for queries and keys, or `None` where they are not turned."""
        if self.rope_max_wavelength is None:
            return None
        if rotary is None:
            if positions is None:
                first = 0 if cache_index is None else cache_index
                positions = ops.arange(length, dtype="int32")[None] + first
            rotary = self.rotary_tables(positions)
        return rotary

    def rotary_tables(self, positions):
        """The tables of the rotary embedding of this layer for positions `(..., length)`."""
        return rotary_tables(
            positions, self.head_dim, self.rope_max_wavelength, self.rope_scaling_factor
        )

    def _attend(self, query, key, value, masks, mask, causal, training, return_scores):
        repeats = self.num_query_heads // self.num_key_value_heads
        key, value = (ops.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (key, value))
        only_causal = causal and mask is None and not self.sliding_window
        only_causal = only_causal and all(m is None for m in masks.values())
        if not only_causal:
            mask = self._mask(query, key, masks, mask, causal)
        dropout = self.dropout > 0 and training
        if not (dropout or return_scores):
            y = ops.dot_product_attention(
                query,
                key,
                value,
                mask=mask,
                scale=self.head_dim**-0.5,
                is_causal=only_causal,
                flash_attention=self.flash_attention,
            )
            return y, None
        if only_causal:
            mask = self._mask(query, key, masks, mask, causal)
        query = query * ops.cast(self.head_dim**-0.5, query.dtype)
        scores = ops.einsum("bqhd,bkhd->bhqk", query, key)
        if mask is not None:
            large = -1e9 if scores.dtype != "float16" else -3e4
            scores = ops.where(mask, scores, ops.cast(large, scores.dtype))
        scores = ops.softmax(scores)
        weights = self.dropout_layer(scores, training=training)
        return ops.einsum("bhqk,bkhd->bqhd", weights, value), scores

    def _mask(self, query, key, masks, mask, causal):
        """All masks as one, boolean `(batch or 1, heads or 1, target, source)`, or `None`."""
        targets, sources = ops.shape(query)[1], ops.shape(key)[1]
        parts = []
        if mask is not None:
            mask = ops.cast(mask, "bool")
            parts.append(mask if len(mask.shape) == 4 else mask[:, None])
        if masks["query"] is not None:
            parts.append(ops.cast(masks["query"], "bool")[:, None, :, None])
        for name in ("value", "key"):
            if masks[name] is not None:
                parts.append(ops.cast(masks[name], "bool")[:, None, None, :])
        # With a dtype, as a size that is free in an export has none that Keras knows.
        at, to = (ops.arange(size, dtype="int32") for size in (targets, sources))
        apart = at[:, None] - to[None]
        if causal:
            parts.append((apart >= 0)[None, None])
        if self.sliding_window:
            parts.append((ops.abs(apart) < self.sliding_window)[None, None])
        merged = None
        for part in parts:
            merged = part if merged is None else ops.logical_and(merged, part)
        return merged

    def mask_of_cache(self, mask, targets, cache, cache_index):
        """With the window, if there is one; `None` is every token up to a query's own."""
        if not self.sliding_window:
            return mask
        sources = ops.arange(cache["key"].shape[2])[None, None]
        ends = ops.arange(targets)[None, :, None] + cache_index
        near = ops.abs(ends - sources) < self.sliding_window
        return ops.logical_and(near, sources <= ends if mask is None else mask)

    def compute_output_shape(self, query_shape, value_shape, key_shape=None):
        """The shape of the queries."""
        return query_shape

    def get_config(self):
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "head_dim": self.head_dim,
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "sliding_window": self.sliding_window,
            "flash_attention": self.flash_attention,
            "use_gate": self.use_gate,
            "seed": self.seed,
            "sub_norm": self.sub_norm,
            "rope_max_wavelength": self.rope_max_wavelength,
            "rope_scaling_factor": self.rope_scaling_factor,
        }


def _turned(query, key, rotary):
    return (query, key) if rotary is None else (rotate(query, rotary), rotate(key, rotary))


def _check_heads(head_dim, num_query_heads, num_key_value_heads, rope_max_wavelength):
    check_count("head_dim", head_dim)
    check_count("num_query_heads", num_query_heads)
    check_count("num_key_value_heads", num_key_value_heads)
    if num_query_heads % num_key_value_heads:
        raise ValueError(
            "`num_query_heads` must be a multiple of `num_key_value_heads`. Received: "
            f"num_query_heads={num_query_heads}, num_key_value_heads={num_key_value_heads}"
        )
    if rope_max_wavelength is not None:
        check_number("rope_max_wavelength", rope_max_wavelength, "(0, inf)")
        if head_dim % 2:
            raise ValueError(
                f"A rotary embedding needs an even `head_dim`. Received: head_dim={head_dim}"
            )
