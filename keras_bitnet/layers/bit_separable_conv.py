"""Low-bit separable convolutions: a depthwise one, then a pointwise one."""

from typing import Any, ClassVar

import keras
from keras import activations

from keras_bitnet.layers.bit_conv import BitConv, BitConv1D, BitConv2D
from keras_bitnet.layers.bit_depthwise_conv import BitDepthwiseConv1D, BitDepthwiseConv2D
from keras_bitnet.layers.block import BitBlock
from keras_bitnet.layers.kernel_weights import assign_copy
from keras_bitnet.layers.shared_arguments import under_own_names


class BitSeparableConv(BitBlock):
    """Base of `BitSeparableConv1D` and `BitSeparableConv2D`: depthwise, then pointwise.

        y = activation(pointwise(depthwise(x)))

    Both kernels are low-bit; the pointwise one, which does nearly all of the work, is a packed
    matrix product without patches.

    Args:
        filters: Positive integer, number of output channels.
        kernel_size, strides, dilation_rate, padding, data_format, depth_multiplier: Of the
            depthwise convolution, see `BitDepthwiseConv`.
        activation: Activation function, none by default.
        use_bias: Whether a bias is added at the end.
        depthwise_initializer, depthwise_regularizer, depthwise_constraint: Of the first kernel.
        pointwise_initializer, pointwise_regularizer, pointwise_constraint: Of the second.
        bias_initializer, bias_regularizer, bias_constraint: Of the bias.
        activity_regularizer: Of the output.
        weight_quantizer, activation_quantizer, quantization_strength, packed: Of both, see
            `keras_bitnet.layers.BitLayer`.
        projection_norm, norm_epsilon: A norm between the two, see `BitBlock`.
        **kwargs: `name`, `dtype`, `trainable` of any Keras layer.

    Source:
        The layer is that of Keras; the quantization that of `BitLinear`.
    """

    depthwise_class: Any = None
    pointwise_class: Any = None
    own_names: ClassVar = {
        **BitBlock.own_names,
        "kernel_initializer": "depthwise_initializer",
        "kernel_regularizer": "depthwise_regularizer",
        "kernel_constraint": "depthwise_constraint",
    }

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        padding="valid",
        data_format=None,
        dilation_rate=1,
        depth_multiplier=1,
        activation=None,
        use_bias=True,
        depthwise_initializer="glorot_uniform",
        pointwise_initializer="glorot_uniform",
        bias_initializer="zeros",
        depthwise_regularizer=None,
        pointwise_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        depthwise_constraint=None,
        pointwise_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(
            kernel_initializer=depthwise_initializer,
            kernel_regularizer=depthwise_regularizer,
            kernel_constraint=depthwise_constraint,
            bias_initializer=bias_initializer,
            bias_regularizer=bias_regularizer,
            bias_constraint=bias_constraint,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        arguments = self.layer_arguments()
        self.depthwise = self.depthwise_class(
            kernel_size,
            strides,
            padding,
            depth_multiplier,
            data_format,
            dilation_rate,
            use_bias=False,
            name="depthwise",
            **under_own_names(self.depthwise_class, arguments),
        )
        arguments |= {
            "kernel_initializer": pointwise_initializer,
            "kernel_regularizer": pointwise_regularizer,
            "kernel_constraint": pointwise_constraint,
        }
        self.pointwise: BitConv = self.pointwise_class(
            filters,
            1,
            data_format=self.depthwise.window.data_format,
            activation=activation,
            use_bias=use_bias,
            name="pointwise",
            **arguments,
        )

    def build(self, input_shape):
        """Creates the weights for inputs of this shape."""
        self.depthwise.build(input_shape)
        self.pointwise.build(self.depthwise.compute_output_shape(input_shape))

    def call(self, inputs):
        """Computes the convolutions; see the class."""
        return self.pointwise(self.depthwise(inputs))

    def compute_output_shape(self, input_shape):
        """Those of the depthwise convolution, with `filters` channels."""
        return self.depthwise.window.output_shape(input_shape, self.pointwise.filters)

    def take_weights(self, layer):
        """Copies the weights of a Keras `SeparableConv`."""
        self.depthwise.take_kernel(layer.depthwise_kernel)
        self.pointwise.take_kernel(layer.pointwise_kernel)
        if layer.bias is not None:
            assign_copy(self.pointwise.bias, layer.bias)
        for inner in (self.depthwise, self.pointwise):
            inner.mark_untrained()

    def get_config(self):
        """The arguments of the constructor."""
        first, second = self.depthwise, self.pointwise.get_config()
        kinds = ("initializer", "regularizer", "constraint")
        return {
            **super().get_config(),
            **first.window.get_config(),
            **{f"pointwise_{kind}": second[f"kernel_{kind}"] for kind in kinds},
            "filters": self.pointwise.filters,
            "depth_multiplier": first.depth_multiplier,
            "activation": activations.serialize(self.pointwise.activation),
            "use_bias": self.pointwise.use_bias,
        }


@keras.saving.register_keras_serializable("keras_bitnet")
class BitSeparableConv1D(BitSeparableConv):
    """`keras.layers.SeparableConv1D` with low-bit kernels; see `BitSeparableConv`."""

    depthwise_class = BitDepthwiseConv1D
    pointwise_class = BitConv1D


@keras.saving.register_keras_serializable("keras_bitnet")
class BitSeparableConv2D(BitSeparableConv):
    """`keras.layers.SeparableConv2D` with low-bit kernels; see `BitSeparableConv`."""

    depthwise_class = BitDepthwiseConv2D
    pointwise_class = BitConv2D
