"""Low-bit convolutions: a product of patches with the kernel as a matrix."""

import math
from typing import Any

import keras
from keras import ops

from keras_bitnet.checks import check_count
from keras_bitnet.layers.base import BitLayer
from keras_bitnet.ops.window import Window

_FEW_POSITIONS = 128  # decision note 10


class BitConv(BitLayer):
    """Base of `BitConv1D`, `BitConv2D` and `BitConv3D`: convolutions with a low-bit kernel.

        y[p] = activation(quantize(patch[p]) @ quantize(kernel) + bias)

    A patch, all that one output position sees, is one token to the activation quantizer, and
    a norm before the product is one of patches; the kernel is the matrix
    `(prod(kernel_size) * channels / groups, filters)`. Training and packed inference multiply the
    same rows. With float activations, and in training with one scale for all of them (`"tensor"`
    or `"static"`), nothing needs a patch, and the backend convolves: that trains fastest. (A packed
    kernel it must unpack, so up to 128 output positions are multiplied all the same.) Padding is
    zeros. A kernel of size 1 makes no patches. Groups cost as much time as a convolution
    without groups, and a share of its memory.

    Args:
        filters: Positive integer, number of output channels.
        kernel_size, strides, dilation_rate: Positive integer, or one for each spatial axis.
        padding: `"valid"` or `"same"`, for `BitConv1D` also `"causal"`.
        data_format: `"channels_last"` or `"channels_first"`, that of the Keras config by default.
        groups: Positive integer that divides the channels of inputs and outputs.
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
        `(batch, *spatial, channels)`, or `(batch, channels, *spatial)`.

    Output shape:
        `(batch, *new spatial, filters)`, or `(batch, filters, *new spatial)`.

    Raises:
        ValueError: An argument is out of range; the message says what is accepted.

    Source:
        The layer is that of Keras; the quantization that of `BitLinear`.
    """

    rank = 0

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        padding="valid",
        data_format=None,
        dilation_rate=1,
        groups=1,
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
        check_count("filters", filters)
        check_count("groups", groups)
        if filters % groups:
            raise ValueError(
                "`filters` must be divisible by `groups`. "
                f"Received: filters={filters}, groups={groups}"
            )
        self.filters = filters
        self.groups = groups
        self.use_bias = use_bias
        self.window = Window.of(
            self.rank, kernel_size, strides, dilation_rate, padding, data_format
        )
        if max(self.window.strides) > 1 and max(self.window.dilation) > 1:
            raise ValueError(
                "`strides > 1` does not go with `dilation_rate > 1`. "
                f"Received: strides={strides}, dilation_rate={dilation_rate}"
            )
        self.input_spec: Any = keras.layers.InputSpec(ndim=self.rank + 2)

    def build(self, input_shape):
        """Creates the weights for inputs of this shape."""
        channels = self.window.channels(input_shape)
        self.compute_output_shape(input_shape)  # checks that the window fits
        if channels % self.groups:
            raise ValueError(
                "The number of input channels must be divisible by `groups`. "
                f"Received: groups={self.groups}, input_shape={tuple(input_shape)}"
            )
        kernel_shape = (*self.window.size, channels // self.groups, self.filters)
        self.build_kernel(math.prod(kernel_shape[:-1]), self.filters, kernel_shape)
        if self.use_bias:
            self.build_bias((self.filters,))
        axis = 1 if self.window.channels_first else -1
        self.input_spec = keras.layers.InputSpec(ndim=self.rank + 2, axes={axis: channels})
        if self.lora_rank:
            self.enable_lora(self.lora_rank, self.lora_alpha)

    def call(self, inputs):
        """Computes the convolution; see the class."""
        x = self.window.channels_last(self.floating(inputs))
        if self._convolves and not (self.packed and self._few_positions(x)):
            y = self._convolution(x)
        elif self.packed and self._plain:
            y = self.product(x, self.window)
        else:
            y = self.product(self._patches(x))
        y = self.window.restore(y)
        return y if self.activation is None else self.activation(y)

    @property
    def _plain(self):
        """Whether nothing is done to patches but a norm and to quantize them."""
        patches = self.groups == 1 and self.window.count > 1
        return patches and self.quantized_alone and not self.lora_enabled and self._look is None

    @property
    def _convolves(self):
        """Whether the backend can convolve, which is faster: no patch has a scale of its own."""
        quantizer = self.activation_quantizer
        one_scale = quantizer is None or (
            quantizer.granularity != "token" and quantizer.formula == "absmax" and not self.packed
        )
        return one_scale and self._plain and not self._norm_first

    def _few_positions(self, x):
        """Whether to unpack the kernel would take longer than the product with the packed one."""
        sizes = x.shape[:-1]
        known = all(isinstance(size, int) for size in sizes)
        return known and math.prod(self.window.positions(x.shape)) <= _FEW_POSITIONS

    def _convolution(self, x):
        dtype = x.dtype
        matrix = self.matrix_in_use(dtype)
        y = ops.conv(
            self.window.padded(ops.cast(self._quantized_pixels(x), dtype)),
            ops.cast(self.matrix_to_kernel(matrix), dtype),
            strides=list(self.window.strides),
            dilation_rate=self.window.dilation,
            data_format="channels_last",
        )
        if self.bias is not None:
            y = ops.add(y, self.bias)
        return y if self.normalization is None else self.normalization(y)

    def _quantized_pixels(self, x):
        quantizer = self.activation_quantizer
        if quantizer is None:
            return x
        strength = ops.convert_to_tensor(self.quantization_strength)
        if self.static:
            return self.fake_quantize_inputs(x, strength)
        x = ops.cast(x, "float32")
        largest = self.window.largest(x, quantizer.epsilon, quantizer.granularity)
        return quantizer.fake_quantize_part(x, largest, strength)

    def patches(self, inputs):
        """What every output position sees.

        Args:
            inputs: Tensor of the input shape.

        Returns:
            Tensor `(batch, *new spatial, in_features)`; with groups
            `(batch, *new spatial, groups, in_features)`.
        """
        return self._patches(self.window.channels_last(inputs))

    def _patches(self, x):
        if self.groups == 1:
            return self.window.patches(x)
        return ops.concatenate([_split(t, self.groups) for t in self.window.taps(x)], axis=-1)

    def shape_outputs(self, y):
        """Keeps of the outputs of each group of inputs `(..., groups, filters)` its own."""
        if self.groups == 1:
            return y
        size = self.filters // self.groups
        own = [y[..., i, i * size : (i + 1) * size] for i in range(self.groups)]
        return ops.concatenate(own, axis=-1)

    def compute_output_shape(self, input_shape):
        """See the class."""
        return self.window.output_shape(input_shape, self.filters)

    def get_config(self):
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "filters": self.filters,
            **self.window.get_config(),
            "groups": self.groups,
            "use_bias": self.use_bias,
        }


def _split(x, groups):
    """`(..., channels)` to `(..., groups, channels / groups)`."""
    *leading, channels = ops.shape(x)
    return ops.reshape(x, (*leading, groups, channels // groups))


@keras.saving.register_keras_serializable("keras_bitnet")
class BitConv1D(BitConv):
    """`keras.layers.Conv1D` with a low-bit kernel and quantized inputs; see `BitConv`.

    Example:
    >>> BitConv1D(64, 3, padding="causal", dilation_rate=2)
    """

    rank = 1


@keras.saving.register_keras_serializable("keras_bitnet")
class BitConv2D(BitConv):
    """`keras.layers.Conv2D` with a low-bit kernel and quantized inputs; see `BitConv`.

    Example:
    >>> BitConv2D(64, 3, strides=2, padding="same", activation="relu", norm="rms")
    """

    rank = 2


@keras.saving.register_keras_serializable("keras_bitnet")
class BitConv3D(BitConv):
    """`keras.layers.Conv3D` with a low-bit kernel and quantized inputs; see `BitConv`.

    Example:
    >>> BitConv3D(16, (1, 3, 3), padding="same")
    """

    rank = 3
