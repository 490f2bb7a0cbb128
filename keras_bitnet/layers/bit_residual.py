"""BitResidual: adds a branch to the stream of a residual network."""

from typing import Any

import keras
from keras import initializers, ops

from keras_bitnet import quantizers
from keras_bitnet.checks import check_choice
from keras_bitnet.quantizers import ActivationQuantizer

SCALES = ("fixed", "learned", "channel")


@keras.saving.register_keras_serializable("keras_bitnet")
class StreamInt16(ActivationQuantizer):
    """16-bit fake quantization of a residual stream; no kernel multiplies with it."""

    name = "int16"
    bits = 16
    highest = 32767


@keras.saving.register_keras_serializable("keras_bitnet")
class BitResidual(keras.Layer):
    """Adds a branch to a stream, which can be rounded to 8 or 16 bits.

        y = quantize(stream + scale * branch)

    Args:
        stream_quantizer: `None`: the stream stays as it is. `"int8"`, `"int16"` or an
            `ActivationQuantizer` without a static scale: the sum is rounded to its grid, the
            gradient passes unchanged.
        branch_scale: Float, the scale or where it starts.
        scale: `"fixed"`; `"learned"`: one trained number; `"channel"`: one for each feature.
        **kwargs: `name`, `dtype`, `trainable` of any Keras layer.

    Call arguments:
        inputs: List `[stream, branch]` of tensors whose shapes broadcast.

    Raises:
        ValueError: The shapes do not broadcast, or an argument is none of these.

    Source:
        Touvron et al. 2021, LayerScale (https://arxiv.org/abs/2103.17239), the scale of each
        feature.
    """

    def __init__(self, stream_quantizer=None, branch_scale=1.0, scale="fixed", **kwargs):
        super().__init__(**kwargs)
        check_choice("scale", scale, SCALES)
        self.stream_quantizer = (
            StreamInt16()
            if stream_quantizer == "int16"
            else quantizers.get_activation(stream_quantizer)
        )
        if getattr(self.stream_quantizer, "granularity", None) == "static":
            raise ValueError(
                "A stream takes no static scale: round it per 'token' or 'tensor'. "
                f"Received: stream_quantizer={self.stream_quantizer}"
            )
        self.branch_scale = float(branch_scale)
        self.scale = scale
        self.scale_weight: Any = None
        self.supports_masking = True

    def build(self, input_shape):
        """Creates the trained scale for the shapes `[stream, branch]`."""
        shape = self.compute_output_shape(input_shape)
        if self.scale != "fixed":
            self.scale_weight = self.add_weight(
                name="scale",
                shape=(shape[-1],) if self.scale == "channel" else (),
                initializer=initializers.Constant(self.branch_scale),
            )

    def call(self, inputs):
        """Maps `[stream, branch]` to their sum; see the class."""
        stream, branch = inputs
        if self.scale_weight is not None:
            branch = branch * ops.cast(self.scale_weight, branch.dtype)
        elif self.branch_scale != 1:
            branch = branch * self.branch_scale
        y = ops.add(stream, branch)
        return y if self.stream_quantizer is None else self.stream_quantizer.fake_quantize(y)

    def compute_mask(self, inputs, previous_mask):
        """The mask of the stream."""
        return previous_mask[0] if isinstance(previous_mask, list) else previous_mask

    def compute_output_shape(self, input_shape):
        """The shape that stream and branch broadcast to."""
        if len(input_shape) != 2 or not all(isinstance(s, (tuple, list)) for s in input_shape):
            raise ValueError(
                "`BitResidual` takes a list `[stream, branch]`. "
                f"Received: inputs of shape {input_shape}"
            )
        stream, branch = (tuple(shape) for shape in input_shape)
        try:
            return ops.add(keras.KerasTensor(stream), keras.KerasTensor(branch)).shape
        except ValueError as error:
            raise ValueError(
                "The shapes of stream and branch do not broadcast. "
                f"Received: stream of shape {stream}, branch of shape {branch}"
            ) from error

    def get_config(self):
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "stream_quantizer": quantizers.serialize(self.stream_quantizer),
            "branch_scale": self.branch_scale,
            "scale": self.scale,
        }
