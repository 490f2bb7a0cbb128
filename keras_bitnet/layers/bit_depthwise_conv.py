"""Low-bit depthwise convolutions: a filter of its own for each channel."""

from typing import Any, ClassVar

import keras
from keras import ops

from keras_bitnet.checks import check_count
from keras_bitnet.layers.base import BitLayer
from keras_bitnet.layers.inputs import UNTREATED
from keras_bitnet.ops.window import Window


class BitDepthwiseConv(BitLayer):
    """Base of `BitDepthwiseConv1D` and `BitDepthwiseConv2D`: a low-bit filter for each channel.

        y[p, c, m] = activation(sum_t quantize(patch[p])[t, c] * quantize(kernel)[t, c, m] + bias)

    A patch, all channels of all taps that one output position sees, is one token to the
    activation quantizer. The kernel is the matrix `(prod(kernel_size), channels *
    depth_multiplier)`, so `granularity="channel"` is a scale for each filter.

    Packed, the bytes are packed, and the kernel is unpacked at each call: there is no matrix
    product to speed up, one multiplication for each value of the patches, and the kernel is
    smaller than the activations by far. Sums are float32, whatever the dtype of the layer.

    Args:
        kernel_size, strides, dilation_rate: Positive integer, or one for each spatial axis.
        padding: `"valid"` or `"same"`.
        depth_multiplier: Positive integer, filters for each input channel.
        data_format: `"channels_last"` or `"channels_first"`, that of the Keras config by default.
        activation: Activation function, none by default.
        use_bias: Whether a bias is added.
        depthwise_initializer, bias_initializer: Initializers of the weights.
        depthwise_regularizer, bias_regularizer, activity_regularizer: Regularizers.
        depthwise_constraint, bias_constraint: Constraints.
        weight_quantizer, activation_quantizer, quantization_strength, packed: See
            `keras_bitnet.layers.BitLayer`. There is no norm in the layer, and no LoRA.
        **kwargs: `name`, `dtype`, `trainable` of any Keras layer.

    Input shape:
        `(batch, *spatial, channels)`, or `(batch, channels, *spatial)`.

    Output shape:
        `(batch, *new spatial, channels * depth_multiplier)`, or with the channels first.

    Raises:
        ValueError: An argument is out of range; the message says what is accepted.

    Source:
        The layer is that of Keras; the quantization that of `BitLinear`.
    """

    rank = 0
    takes_static = False
    own_names: ClassVar = {
        "kernel_initializer": "depthwise_initializer",
        "kernel_regularizer": "depthwise_regularizer",
        "kernel_constraint": "depthwise_constraint",
        **dict.fromkeys(("norm", "norm_position", "norm_epsilon", "lora_rank", "lora_alpha")),
        **UNTREATED,
    }

    def __init__(
        self,
        kernel_size,
        strides=1,
        padding="valid",
        depth_multiplier=1,
        data_format=None,
        dilation_rate=1,
        activation=None,
        use_bias=True,
        depthwise_initializer="glorot_uniform",
        bias_initializer="zeros",
        depthwise_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        depthwise_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(
            activation=activation,
            kernel_initializer=depthwise_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=depthwise_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=depthwise_constraint,
            bias_constraint=bias_constraint,
            **kwargs,
        )
        if self.static:
            raise ValueError(
                f"{type(self).__name__} takes no static activations: quantize them per 'token' or "
                f"'tensor'. Received: activation_quantizer={self.activation_quantizer}"
            )
        check_count("depth_multiplier", depth_multiplier)
        self.depth_multiplier = depth_multiplier
        self.use_bias = use_bias
        self.window = Window.of(
            self.rank, kernel_size, strides, dilation_rate, padding, data_format
        )
        self.input_spec: Any = keras.layers.InputSpec(ndim=self.rank + 2)

    def build(self, input_shape):
        """Creates the weights for inputs of this shape."""
        channels = self.window.channels(input_shape)
        self.compute_output_shape(input_shape)  # checks that the window fits
        filters = channels * self.depth_multiplier
        kernel_shape = (*self.window.size, channels, self.depth_multiplier)
        self.build_kernel(self.window.count, filters, kernel_shape)
        if self.use_bias:
            self.build_bias((filters,))
        axis = 1 if self.window.channels_first else -1
        self.input_spec = keras.layers.InputSpec(ndim=self.rank + 2, axes={axis: channels})

    def call(self, inputs):
        """Computes the convolution; see the class."""
        x = self.window.channels_last(self.floating(inputs))
        matrix = ops.cast(self.matrix_in_use(x.dtype), "float32")
        y = 0
        for i, tap in enumerate(self._quantized_taps(ops.cast(x, "float32"))):
            if self.depth_multiplier > 1:
                tap = ops.repeat(tap, self.depth_multiplier, axis=-1)
            y = y + tap * matrix[i]
        y = ops.cast(y, x.dtype)
        y = self.window.restore(y if self.bias is None else ops.add(y, self.bias))
        return y if self.activation is None else self.activation(y)

    def _quantized_taps(self, x):
        """What each tap sees, quantized with the scale of its patch: no patch lies in memory."""
        quantizer, taps = self.activation_quantizer, self.window.taps(x)
        if quantizer is None:
            return taps
        strength = None if self.packed else ops.convert_to_tensor(self.quantization_strength)
        if quantizer.formula != "absmax":  # one of the user's sees whole patches
            patches = quantizer.fake_quantize(ops.concatenate(taps, axis=-1), strength=strength)
            return ops.split(patches, len(taps), axis=-1)
        largest = self.window.largest(x, quantizer.epsilon, quantizer.granularity)
        return [quantizer.fake_quantize_part(tap, largest, strength) for tap in taps]

    def enable_lora(self, *args, **kwargs):
        """Raises: as in Keras, a depthwise convolution has no low-rank adaptation."""
        raise ValueError(f"{type(self).__name__} has no LoRA: its kernel is no matrix product.")

    def compute_output_shape(self, input_shape):
        """See the class."""
        filters = self.window.channels(input_shape) * self.depth_multiplier
        return self.window.output_shape(input_shape, filters)

    def get_config(self):
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            **self.window.get_config(),
            "depth_multiplier": self.depth_multiplier,
            "use_bias": self.use_bias,
        }


@keras.saving.register_keras_serializable("keras_bitnet")
class BitDepthwiseConv1D(BitDepthwiseConv):
    """`keras.layers.DepthwiseConv1D` with a low-bit kernel; see `BitDepthwiseConv`."""

    rank = 1


@keras.saving.register_keras_serializable("keras_bitnet")
class BitDepthwiseConv2D(BitDepthwiseConv):
    """`keras.layers.DepthwiseConv2D` with a low-bit kernel; see `BitDepthwiseConv`."""

    rank = 2
