"""BitLinear: the dense layer of low-bit networks."""

import keras

from keras_bitnet.checks import check_count
from keras_bitnet.layers.base import BitLayer


@keras.saving.register_keras_serializable("keras_bitnet")
class BitLinear(BitLayer):
    """`keras.layers.Dense` with a low-bit kernel and quantized inputs.

        y = activation(quantize(norm(x)) @ quantize(kernel) + bias)

    It trains with quantization in the forward pass and a straight-through gradient, and after
    `keras_bitnet.pack_model` computes the same from packed codes.

    Args:
        units: Positive integer, size of the output.
        activation: Activation function, none by default.
        use_bias: Whether a bias is added.
        kernel_initializer, bias_initializer: Initializers of the weights.
        kernel_regularizer, bias_regularizer, activity_regularizer: Regularizers.
        kernel_constraint, bias_constraint: Constraints.
        lora_rank, lora_alpha: Low-rank adaptation, see `enable_lora`.
        weight_quantizer, activation_quantizer, norm, norm_position, norm_epsilon,
            quantization_strength, packed: See `keras_bitnet.layers.BitLayer`.
        **kwargs: `name`, `dtype`, `trainable` of any Keras layer.

    Input shape:
        `(batch, ..., in_features)`.

    Output shape:
        `(batch, ..., units)`.

    Raises:
        ValueError: An argument is out of range; the message says what is accepted.

    Example:
    >>> model = keras.Sequential([
    ...     keras.Input((784,)),
    ...     BitLinear(128, activation="relu", norm="rms"),
    ...     BitLinear(10, norm="rms"),
    ... ])

    Source:
        Ma et al. 2024, BitNet b1.58 (https://arxiv.org/abs/2402.17764). The norm inside the
        layer (`norm="rms"`) is that of BitNet; it is off by default so that `BitLinear` can
        take the place of `Dense`.
    """

    def __init__(
        self,
        units,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        lora_rank=None,
        lora_alpha=None,
        **kwargs,
    ):
        check_count("units", units)
        super().__init__(
            activation=activation,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            activity_regularizer=activity_regularizer,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            **kwargs,
        )
        self.units = units
        self.use_bias = use_bias
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True

    def build(self, input_shape):
        """Creates the weights for inputs of shape `(batch, ..., in_features)`."""
        in_features = input_shape[-1]
        if in_features is None:
            raise ValueError(
                "The last axis of the inputs of `BitLinear` must be known. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        self.build_kernel(in_features, self.units)
        if self.use_bias:
            self.build_bias((self.units,))
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: in_features})
        if self.lora_rank:
            self.enable_lora(self.lora_rank, self.lora_alpha)

    def call(self, inputs):
        """Maps `(batch, ..., in_features)` to `(batch, ..., units)`."""
        y = self.product(self.floating(inputs))
        return y if self.activation is None else self.activation(y)

    def compute_output_shape(self, input_shape):
        """`(batch, ..., units)`."""
        return (*input_shape[:-1], self.units)

    def get_config(self):
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "units": self.units,
            "use_bias": self.use_bias,
        }
