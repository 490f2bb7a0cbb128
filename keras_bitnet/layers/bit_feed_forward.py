"""BitFeedForward: the feed-forward block of low-bit transformers."""

from typing import Any

import keras
from keras import activations, ops

from keras_bitnet.checks import check_choice, check_count
from keras_bitnet.layers.base import NORMS
from keras_bitnet.layers.bit_linear import BitLinear
from keras_bitnet.layers.block import BitBlock
from keras_bitnet.layers.joint import call_jointly


@keras.saving.register_keras_serializable("keras_bitnet")
def relu_squared(x):
    """`max(x, 0) ** 2`, the activation of BitNet b1.58. It overflows float16.

    Source:
        So et al. 2021, Primer (https://arxiv.org/abs/2109.08668).
    """
    x = ops.relu(x)
    return x * x  # PyTorch's fuser takes no square


@keras.saving.register_keras_serializable("keras_bitnet")
class BitFeedForward(BitBlock):
    """Two or three low-bit projections with an activation between.

        gated:  y = down(sub_norm(activation(gate(x)) * up(x)))
        plain:  y = down(sub_norm(activation(up(x))))

    Args:
        intermediate_dim: Positive integer, size between the projections.
        activation: `"relu2"` is `max(x, 0) ** 2`; else any activation function of Keras:
            `"silu"` (gated: SwiGLU), `"gelu"`, ...
        gated: Whether a third projection is multiplied in.
        use_bias: Whether the projections have biases.
        dropout: Dropout rate of the result.
        sub_norm: `None`, `"rms"` or `"layer"`: a trained norm of the inputs of the last
            projection, `ffn_sub_norm` of BitNet b1.58.
        seed: Seed of the dropout.
        weight_quantizer, activation_quantizer, projection_norm, norm_epsilon,
            quantization_strength, packed, initializers, regularizers, constraints: See
            `keras_bitnet.layers.BitBlock`.
        **kwargs: `name`, `dtype`, `trainable` of any Keras layer.

    Input shape:
        `(batch, ..., features)`, which is the output shape too.

    Raises:
        ValueError: An argument is out of range; the message says what is accepted.

    Source:
        Shazeer 2020, GLU Variants (https://arxiv.org/abs/2002.05202); Ma et al. 2025, BitNet
        b1.58 2B4T (https://arxiv.org/abs/2504.12285).
    """

    def __init__(
        self,
        intermediate_dim,
        activation="relu2",
        gated=True,
        use_bias=False,
        dropout=0.0,
        sub_norm=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_count("intermediate_dim", intermediate_dim)
        check_choice("sub_norm", sub_norm, (None, *NORMS))
        self.supports_masking = True
        self.intermediate_dim = intermediate_dim
        self.activation = relu_squared if activation == "relu2" else activations.get(activation)
        self.gated = gated
        self.use_bias = use_bias
        self.dropout = dropout
        self.sub_norm = sub_norm
        self.seed = seed
        self.gate_dense = self._projection(intermediate_dim, "gate") if gated else None
        self.up_dense = self._projection(intermediate_dim, "up")
        self.down_dense: Any = None  # its size is that of the inputs
        self.dropout_layer = keras.layers.Dropout(dropout, seed=seed, dtype=self.dtype_policy)

    def _projection(self, units, name, norm=None):
        return BitLinear(units, use_bias=self.use_bias, name=name, **self.layer_arguments(norm))

    def build(self, input_shape):
        """Creates the weights for inputs `(batch, ..., features)`."""
        if self.gate_dense is not None:
            self.gate_dense.build(input_shape)
        self.up_dense.build(input_shape)
        self.down_dense = self._projection(input_shape[-1], "down", self.sub_norm)
        self.down_dense.build((*input_shape[:-1], self.intermediate_dim))

    def call(self, inputs, training=None):
        """Maps `(batch, ..., features)` to the same shape."""
        if self.gate_dense is None:
            x = self.activation(self.up_dense(inputs))
        else:
            gate, up = call_jointly([self.gate_dense, self.up_dense], inputs)
            x = self.activation(gate) * up
        y = self.down_dense(x)
        return self.dropout_layer(y, training=training) if self.dropout else y

    def compute_output_shape(self, input_shape):
        """The shape of the inputs."""
        return input_shape

    def get_config(self):
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "activation": activations.serialize(self.activation),
            "gated": self.gated,
            "use_bias": self.use_bias,
            "dropout": self.dropout,
            "sub_norm": self.sub_norm,
            "seed": self.seed,
        }
