"""BitMultiHeadAttention: Keras's attention with low-bit projections."""

import keras

from keras_bitnet.checks import check_choice
from keras_bitnet.layers.base import NORMS
from keras_bitnet.layers.bit_einsum_dense import BitEinsumDense
from keras_bitnet.layers.block import BitBlock


@keras.saving.register_keras_serializable("keras_bitnet")
class BitMultiHeadAttention(BitBlock, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` with low-bit projections.

        y = output(sub_norm(softmax(query key^T / sqrt(key_dim)) value))

    The projections are `BitEinsumDense`; what is between them, masks and flash attention too,
    is Keras's own code in the compute dtype.

    Args:
        num_heads, key_dim, value_dim, dropout, use_bias, output_shape, attention_axes,
            flash_attention, seed: As in `keras.layers.MultiHeadAttention`, and what else the
            installed Keras takes there (`sliding_window`, `use_gate`).
        sub_norm: `None`, `"rms"` or `"layer"`: a trained norm of the inputs of the last
            projection, all heads together, `attn_sub_norm` of BitNet b1.58.
        weight_quantizer, activation_quantizer, projection_norm, norm_epsilon,
            quantization_strength, packed, initializers, regularizers, constraints: Of the
            projections, see `keras_bitnet.layers.BitBlock`.
        **kwargs: `name`, `dtype`, `trainable` of any Keras layer.

    Call arguments:
        As in `keras.layers.MultiHeadAttention`.

    Raises:
        ValueError: An argument is out of range; the message says what is accepted.

    Source:
        Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762). Sub-norm: Ma et al. 2025, BitNet
        b1.58 2B4T (https://arxiv.org/abs/2504.12285).
    """

    def __init__(self, num_heads, key_dim, value_dim=None, dropout=0.0, *, sub_norm=None, **kwargs):
        sizes = {"num_heads": num_heads, "key_dim": key_dim, "value_dim": value_dim}
        super().__init__(**sizes, dropout=dropout, **kwargs)
        check_choice("sub_norm", sub_norm, (None, *NORMS))
        self.sub_norm = sub_norm
        if self.value_dim != self.key_dim and not self._flash_attention:
            # JAX's fused attention takes equal sizes only, and Keras's layer fails there. On the
            # instance: Keras keeps its causal fast path from a class that overrides the method.
            self._compute_attention = self._attend_with_scores

    def build(self, query_shape, value_shape, key_shape=None):
        """Creates the projections for inputs of these shapes."""
        key_shape = value_shape if key_shape is None else key_shape
        if value_shape[1:-1] != key_shape[1:-1]:
            raise ValueError(
                "All axes of `value` and `key` but the last must be equal. "
                f"Received: value_shape={value_shape}, key_shape={key_shape}"
            )
        self._query_dense = self._projection(self.key_dim, "query", query_shape)
        self._key_dense = self._projection(self.key_dim, "key", key_shape)
        self._value_dense = self._projection(self.value_dim, "value", value_shape)
        if getattr(self, "_use_gate", False):
            self._gate_dense = self._projection(self.value_dim, "gate", query_shape, "sigmoid")
        self._build_attention(len(value_shape) + 1)
        self._output_dense = self._output_projection(query_shape)

    def _attend_with_scores(self, query, key, value, mask=None, training=None, _=False, **kwargs):
        return super()._compute_attention(query, key, value, mask, training, True, **kwargs)

    def _projection(self, size, name, input_shape, activation=None):
        dense = BitEinsumDense(
            "...a,abc->...bc",
            (self.num_heads, size),
            activation=activation,
            bias_axes="bc" if self.use_bias else None,
            name=name,
            activity_regularizer=self._activity_regularizer,
            **self.layer_arguments(),
        )
        dense.build(input_shape)
        return dense

    def _output_projection(self, query_shape):
        sizes = self._output_shape or (query_shape[-1],)
        added = "cdefghij"[: len(sizes)]
        dense = BitEinsumDense(
            f"...ab,ab{added}->...{added}",
            tuple(sizes),
            bias_axes=added if self.use_bias else None,
            name="attention_output",
            activity_regularizer=self._activity_regularizer,
            **self.layer_arguments(self.sub_norm),
        )
        dense.build((*query_shape[:-1], self.num_heads, self.value_dim))
        return dense

    def get_config(self):
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "flash_attention": self._flash_attention,
            "sub_norm": self.sub_norm,
        }
