"""BitNetBackbone: the decoder of BitNet b1.58 and of ternary models of the Llama family."""

import keras
from keras import ops

from keras_bitnet import quantizers
from keras_bitnet.checks import check_count
from keras_bitnet.layers.bit_embedding import BitEmbedding
from keras_bitnet.layers.bit_linear import BitLinear
from keras_bitnet.layers.bit_transformer_decoder import BitTransformerDecoder
from keras_bitnet.layers.block import BitBlock
from keras_bitnet.layers.decode_at_once import chain_of, decode_at_once, decode_together
from keras_bitnet.layers.key_value_cache import make_caches
from keras_bitnet.layers.large_weights import UntouchedZeros
from keras_bitnet.layers.rotary import rotary_tables
from keras_bitnet.models.presets import preset


@keras.saving.register_keras_serializable("keras_bitnet")
class BitNetBackbone(BitBlock, keras.Model):
    """Token embedding, low-bit decoder blocks and a final norm.

    With the defaults it is BitNet b1.58 2B4T's architecture; with `sub_norm=None,
    activation="silu"` that of Llama, as Falcon-E, Falcon3-1.58bit and others have it. Its
    weights exist as soon as it is made. With `packed=True` they are made packed: the 2B4T
    preset then takes 0.52 GB besides its embedding, and no float kernel exists at any time.

    Where the weights are, and their names in Hugging Face and GGUF files (`N` a block; a
    quantized layer holds `kernel`, packed `kernel_tiles` and `kernel_scale`; kernels are the
    transpose of Hugging Face's `[out, in]`, heads unfolded):

    | Here | Hugging Face | GGUF |
    |---|---|---|
    | `token_embedding` | `model.embed_tokens.weight` | `token_embd.weight` |
    | `decoder_layers[N].attention_norm.scale` | `model.layers.N.input_layernorm.weight` | `blk.N.attn_norm.weight` |
    | `decoder_layers[N].attention.query_dense` | `model.layers.N.self_attn.q_proj.weight` | `blk.N.attn_q.weight` |
    | `decoder_layers[N].attention.key_dense` | `model.layers.N.self_attn.k_proj.weight` | `blk.N.attn_k.weight` |
    | `decoder_layers[N].attention.value_dense` | `model.layers.N.self_attn.v_proj.weight` | `blk.N.attn_v.weight` |
    | `decoder_layers[N].attention.output_dense.normalization.scale` | `model.layers.N.self_attn.attn_sub_norm.weight` | `blk.N.attn_sub_norm.weight` |
    | `decoder_layers[N].attention.output_dense` | `model.layers.N.self_attn.o_proj.weight` | `blk.N.attn_output.weight` |
    | `decoder_layers[N].feed_forward_norm.scale` | `model.layers.N.post_attention_layernorm.weight` | `blk.N.ffn_norm.weight` |
    | `decoder_layers[N].feed_forward.gate_dense` | `model.layers.N.mlp.gate_proj.weight` | `blk.N.ffn_gate.weight` |
    | `decoder_layers[N].feed_forward.up_dense` | `model.layers.N.mlp.up_proj.weight` | `blk.N.ffn_up.weight` |
    | `decoder_layers[N].feed_forward.down_dense.normalization.scale` | `model.layers.N.mlp.ffn_sub_norm.weight` | `blk.N.ffn_sub_norm.weight` |
    | `decoder_layers[N].feed_forward.down_dense` | `model.layers.N.mlp.down_proj.weight` | `blk.N.ffn_down.weight` |
    | `layer_norm.scale` | `model.norm.weight` | `output_norm.weight` |
    | `output_projection`, not tied | `lm_head.weight` | `output.weight` |

    `token_embedding` is a `keras.layers.Embedding` (`embeddings`, `[tokens, hidden]`) or a
    `BitEmbedding`; `output_projection` a `keras.layers.Dense` or a `BitLinear`, or `None`.
    `projection_norm="rms"` adds the norms `<projection>.rms_norm.weight` of some checkpoints, in
    `<projection>.normalization.scale`.

    Args:
        vocabulary_size: Number of tokens.
        num_layers: Number of decoder blocks.
        num_query_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads.
        hidden_dim: Size of the stream.
        intermediate_dim: Size inside the feed-forward blocks.
        head_dim: Size of a head, `hidden_dim / num_query_heads` by default.
        activation, gated, sub_norm, use_bias: See `BitTransformerDecoder`.
        rope_max_wavelength, rope_scaling_factor: The rotary embedding, see
            `BitGroupedQueryAttention`.
        sliding_window: Tokens that a query may see, or `None`.
        tie_word_embeddings: Whether `logits` uses the table of the tokens.
        embedding_quantizer: Weight quantizer of the embedding and, if there is one, the output
            projection, such as `"int8"`; `None` keeps them float. A name stands for a scale per
            token. Their products use `activation_quantizer`.
        max_sequence_length: Longest sequence the model was made for.
        dropout, seed: See `BitTransformerDecoder`.
        kernel_initializer: Of every kernel and table, normal with a deviation of 0.02 by default.
        weight_quantizer, activation_quantizer, projection_norm, norm_epsilon,
            quantization_strength, packed, initializers, regularizers, constraints: See
            `keras_bitnet.layers.BitBlock`.
        **kwargs: `name`, `dtype`, `trainable` of any Keras model.

    Call arguments:
        inputs: Dictionary of `"token_ids"`, integers `(batch, length)`, and `"padding_mask"`,
            `(batch, length)`, true where a token is no padding; padding may be on either side.
            The mask may be left out, and then the dictionary too.

    Returns:
        Hidden states `(batch, length, hidden_dim)`.

    Raises:
        ValueError: An argument is out of range; the message says what is accepted.

    Source:
        Ma et al. 2025, BitNet b1.58 2B4T (https://arxiv.org/abs/2504.12285).
    """  # noqa: E501 (a table)

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        num_query_heads,
        num_key_value_heads,
        hidden_dim,
        intermediate_dim,
        head_dim=None,
        activation="relu2",
        gated=True,
        sub_norm="rms",
        use_bias=False,
        rope_max_wavelength=500000.0,
        rope_scaling_factor=1.0,
        sliding_window=None,
        tie_word_embeddings=True,
        embedding_quantizer=None,
        max_sequence_length=4096,
        dropout=0.0,
        seed=None,
        kernel_initializer=None,
        **kwargs,
    ):
        initializer = kernel_initializer or keras.initializers.RandomNormal(stddev=0.02)
        super().__init__(kernel_initializer=initializer, **kwargs)
        check_count("vocabulary_size", vocabulary_size)
        check_count("num_layers", num_layers)
        check_count("num_query_heads", num_query_heads)
        check_count("hidden_dim", hidden_dim)
        check_count("max_sequence_length", max_sequence_length)
        self.vocabulary_size = vocabulary_size
        self.num_layers = num_layers
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.head_dim = head_dim or hidden_dim // num_query_heads
        self.sub_norm = sub_norm
        self.use_bias = use_bias
        self.rope_max_wavelength = rope_max_wavelength
        self.rope_scaling_factor = rope_scaling_factor
        self.sliding_window = sliding_window
        self.tie_word_embeddings = tie_word_embeddings
        self.embedding_quantizer = _embedding_quantizer(embedding_quantizer)
        self.max_sequence_length = max_sequence_length
        self.dropout = dropout
        self.seed = seed
        self.token_embedding = self._make_embedding()
        self.decoder_layers = [
            BitTransformerDecoder(
                intermediate_dim,
                num_query_heads,
                num_key_value_heads,
                head_dim=self.head_dim,
                activation=activation,
                gated=gated,
                sub_norm=sub_norm,
                use_bias=use_bias,
                rope_max_wavelength=rope_max_wavelength,
                rope_scaling_factor=rope_scaling_factor,
                sliding_window=sliding_window,
                dropout=dropout,
                seed=seed,
                name=f"decoder_layer_{i}",
                **self.block_arguments(),
            )
            for i in range(num_layers)
        ]
        self.layer_norm = self.make_norm("rms", "layer_norm")
        self.output_projection = None if tie_word_embeddings else self._make_output_projection()
        self.build()

    def _table_arguments(self):
        names = ("activation_quantizer", "quantization_strength", "packed", "dtype")
        arguments = self.block_arguments()
        chosen = {name: arguments[name] for name in names}
        return {**chosen, "weight_quantizer": self.embedding_quantizer}

    def _make_embedding(self):
        sizes, name = (self.vocabulary_size, self.hidden_dim), "token_embedding"
        initializer = self._table_initializer()
        if self.embedding_quantizer is not None:
            return BitEmbedding(*sizes, initializer, name=name, **self._table_arguments())
        # Of the dtype of its variable: the gradient of a row is a sum over all places of its token,
        # which 16 bits cannot add up.
        return keras.layers.Embedding(*sizes, initializer, name=name, dtype=self.variable_dtype)

    def _table_initializer(self):
        """A packed model waits for its weights, and random ones take memory several times."""
        packed = self.packed
        return UntouchedZeros() if packed else self.block_arguments()["kernel_initializer"]

    def _embed(self, token_ids):
        return ops.cast(self.token_embedding(token_ids), self.compute_dtype)

    def _make_output_projection(self):
        fixed = {
            "use_bias": False,
            "kernel_initializer": self._table_initializer(),
            "name": "output_projection",
        }
        if self.embedding_quantizer is not None:
            return BitLinear(self.vocabulary_size, **fixed, **self._table_arguments())
        return keras.layers.Dense(self.vocabulary_size, dtype=self.dtype_policy, **fixed)

    def build(self, input_shape=None):
        """Creates the weights; the shape of the inputs does not matter."""
        if self.built:  # type: ignore[has-type]
            return
        shape = (None, None, self.hidden_dim)
        self.token_embedding.build((None, None))
        for layer in (*self.decoder_layers, self.layer_norm, self.output_projection):
            if layer is not None:
                layer.build(shape)
        self.built = True

    def call(self, inputs, training=None, attention_layer=None):
        """Maps tokens to hidden states; see the class.

        With the index of a block as `attention_layer`, returns `(hidden_states, attention)`: the
        queries, keys and values of this block too, `(batch, length, heads, head_dim)` each.
        """
        token_ids, padding_mask = tokens_and_mask(inputs)
        if padding_mask is None:
            positions = ops.arange(ops.shape(token_ids)[1], dtype="int32")[None]
        else:
            padding_mask = ops.cast(padding_mask, "bool")
            positions = ops.cumsum(ops.cast(padding_mask, "int32"), axis=1) - 1
            positions = ops.maximum(positions, 0)
        rotary = self.rotary_tables(positions)
        x, attention = self._embed(token_ids), None
        watched = None if attention_layer is None else self.decoder_layers[attention_layer]
        for layer in self.decoder_layers:
            if layer is watched:
                y = layer.attention_norm(x)
                attention = layer.attention.project(y, y, rotary=rotary)
            x = layer(x, padding_mask=padding_mask, rotary=rotary, training=training)
        return self.layer_norm(x) if watched is None else (self.layer_norm(x), attention)

    def call_with_cache(self, token_ids, cache, cache_index, padding=None, chain=None):
        """Runs new tokens after those in the cache.

        Args:
            token_ids: Integers `(batch, length)`.
            cache: What `make_cache` gave, or the last call.
            cache_index: How many tokens the cache holds: the Python integer 0 for the first
                call, then an integer or an integer scalar tensor.
            padding: Integers `(batch,)`: padding tokens on the left, or `None` for none.
            chain: The number of a chain, see `chain_of_blocks`, or `None`.

        Returns:
            `(hidden_states, cache)`.
        """
        length, total = token_ids.shape[1], cache[0]["key"].shape[2]
        at = ops.arange(length, dtype="int32")[None] + cache_index  # (1, length)
        sources = ops.arange(total, dtype="int32")[None, None]
        mask = sources <= at[..., None]
        if padding is not None:
            padding = ops.cast(padding, "int32")[:, None]
            seen = sources >= padding[..., None]
            # A query of padding sees itself: of nothing, some backends would make NaN.
            mask = ops.logical_and(mask, ops.logical_or(seen, sources == at[..., None]))
            at = ops.maximum(at - padding, 0)
        rotary = self.rotary_tables(at)
        x, caches = self._embed(token_ids), []
        if chain is not None:
            given = (mask, None, rotary, cache[0], cache_index)
            at_once = decode_at_once(self.decoder_layers[0], x, *given, chain)
            if at_once is not None:
                x, first = at_once
                return self.layer_norm(x), [first, *cache[1:]]
        if self._has_plain_blocks():
            y = decode_together(self.decoder_layers, x, mask, rotary, cache, cache_index)
            if y is not None:
                return self.layer_norm(y), cache
        for layer, layer_cache in zip(self.decoder_layers, cache, strict=True):
            x, layer_cache = layer(
                x, attention_mask=mask, rotary=rotary, cache=layer_cache, cache_index=cache_index
            )
            caches.append(layer_cache)
        return self.layer_norm(x), caches

    def make_cache(self, batch, length, dtype=None):
        """Empty caches for `batch` sequences of up to `length` tokens, one for each block.

        Args:
            batch: Sequences.
            length: Tokens.
            dtype: A float dtype, the compute dtype by default, or `"int8"`.
        """
        sizes = (batch, length, self.num_key_value_heads, self.head_dim)
        return make_caches(len(self.decoder_layers), *sizes, dtype or self.compute_dtype)

    def chain_of_blocks(self, cache):
        """What lets one operator of a processor decode a token by all blocks (decision note 13).

        Args:
            cache: What `call_with_cache` gave. As long as the chain is used it and the weights stay
                where they are: the operator writes into the very memory of this cache.

        Returns:
            An object whose `number` is the `chain` of `call_with_cache`, or `None`.
        """
        return chain_of(self.decoder_layers, cache) if self._has_plain_blocks() else None

    def _has_plain_blocks(self):
        return all(type(layer) is BitTransformerDecoder for layer in self.decoder_layers)

    def rotary_tables(self, positions):
        """Cosines and sines for positions `(batch or 1, length)`, shared by all blocks."""
        return rotary_tables(
            positions, self.head_dim, self.rope_max_wavelength, self.rope_scaling_factor
        )

    def logits(self, hidden_states):
        """Scores `(..., vocabulary_size)` of the next token."""
        if self.output_projection is not None:
            return self.output_projection(hidden_states)
        if isinstance(self.token_embedding, BitEmbedding):
            return self.token_embedding.product(hidden_states)
        table = ops.cast(self.token_embedding.embeddings, hidden_states.dtype)
        return ops.matmul(hidden_states, ops.transpose(table))

    @classmethod
    def from_preset(cls, name, **arguments):
        """The architecture of a preset with random weights (`packed=True`: with zeros).

        Args:
            name: A key of `keras_bitnet.models.PRESETS`, such as `"bitnet_b1_58_2b_4t"`.
            **arguments: Arguments of the class, those of the preset too.
        """
        return cls(**{**preset(name), **arguments})

    @staticmethod
    def get_layout_map(device_mesh, model_dim="model"):
        """A `keras.distribution.LayoutMap` that splits heads and feed-forward over devices.

        Args:
            device_mesh: `keras.distribution.DeviceMesh` with an axis `model_dim`.
            model_dim: Name of that axis.
        """
        rows = {
            "token_embedding/(embeddings|kernel)": (model_dim, None),
            "output_projection/kernel": (None, model_dim),
            "attention/(query|key|value|gate)/kernel": (None, model_dim, None),
            "attention/attention_output/kernel": (model_dim, None, None),
            "feed_forward/(gate|up)/kernel": (None, model_dim),
            "feed_forward/down/kernel": (model_dim, None),
            # Packed, a token's activations share a scale: they come together before every product.
            "kernel_tiles": (model_dim, None, None, None),
        }
        layout = keras.distribution.LayoutMap(device_mesh)
        for path, axes in rows.items():
            layout[f".*{path}$"] = axes  # Keras 3.15 matches whole paths, others search in them
        return layout

    def get_config(self):
        """The arguments of the constructor."""
        # Of the class, as a layer in which some are replaced describes itself otherwise.
        block = BitTransformerDecoder.get_config(self.decoder_layers[0])
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "num_layers": self.num_layers,
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "hidden_dim": self.hidden_dim,
            "intermediate_dim": self.intermediate_dim,
            "head_dim": self.head_dim,
            "activation": block["activation"],
            "gated": block["gated"],
            "sub_norm": self.sub_norm,
            "use_bias": self.use_bias,
            "rope_max_wavelength": self.rope_max_wavelength,
            "rope_scaling_factor": self.rope_scaling_factor,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
            "embedding_quantizer": quantizers.serialize(self.embedding_quantizer),
            "max_sequence_length": self.max_sequence_length,
            "dropout": self.dropout,
            "seed": self.seed,
        }


def _embedding_quantizer(quantizer):
    if isinstance(quantizer, str):
        return type(quantizers.get(quantizer))(granularity="channel")
    return quantizers.get(quantizer)


def tokens_and_mask(inputs):
    """Token ids, and the padding mask or `None`, of what a model is called on."""
    if isinstance(inputs, dict):
        if "token_ids" not in inputs:
            raise ValueError(
                "Expected inputs {'token_ids', 'padding_mask'}. "
                f"Received: the keys {sorted(inputs)}"
            )
        return inputs["token_ids"], inputs.get("padding_mask")
    return inputs, None
