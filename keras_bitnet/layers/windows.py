"""Where a convolution looks: padding, and one strided slice of the inputs for each tap."""

import dataclasses
import itertools
import math

import keras
from keras import ops

from keras_bitnet.checks import check_choice, check_count


@dataclasses.dataclass(frozen=True)
class Window:
    """The geometry of a convolution of any rank.

    Attributes:
        size, strides, dilation: Tuples of one positive integer for each spatial axis.
        padding: `"valid"`, `"same"` or `"causal"`; padding is zeros.
        channels_first: Whether the channels of inputs and outputs are axis 1, not the last.
    """

    size: tuple
    strides: tuple
    dilation: tuple
    padding: str
    channels_first: bool

    @classmethod
    def of(cls, rank, kernel_size, strides, dilation_rate, padding, data_format):
        """Reads and checks the arguments of a Keras convolution.

        Raises:
            ValueError: One of them is not what Keras takes.
        """
        padding = padding.lower() if isinstance(padding, str) else padding
        check_choice("padding", padding, ("valid", "same", *(("causal",) if rank == 1 else ())))
        data_format = data_format or keras.config.image_data_format()
        check_choice("data_format", data_format, ("channels_last", "channels_first"))
        return cls(
            _sizes("kernel_size", kernel_size, rank),
            _sizes("strides", strides, rank),
            _sizes("dilation_rate", dilation_rate, rank),
            padding,
            data_format == "channels_first",
        )

    @property
    def data_format(self):
        """`"channels_first"` or `"channels_last"`."""
        return "channels_first" if self.channels_first else "channels_last"

    def channels(self, input_shape):
        """The number of channels of inputs of this shape.

        Raises:
            ValueError: It is not known, or the rank is not that of the window.
        """
        if len(input_shape) != len(self.size) + 2:
            raise ValueError(
                f"Inputs have {len(self.size)} spatial axes, a batch axis and one of channels. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        channels = input_shape[1 if self.channels_first else -1]
        if channels is None:
            raise ValueError(
                "The number of channels must be known. "
                f"Received: input_shape={tuple(input_shape)}, data_format={self.data_format!r}"
            )
        return channels

    def taps(self, x):
        """What each tap of the kernel sees, in the order of the kernel.

        Args:
            x: Tensor `(batch, *spatial, channels)`, or with the channels first.

        Returns:
            List of `prod(size)` tensors `(batch, *output spatial, channels)`.
        """
        lengths = self._lengths(x)
        x = self.padded(x)
        ends = [
            (self._outputs(axis, length) - 1) * self.strides[axis] + 1
            for axis, length in enumerate(lengths)
        ]
        return [self._slice(x, tap, ends) for tap in itertools.product(*map(range, self.size))]

    def padded(self, x):
        """Inputs with the channels last and the zeros of the padding around them."""
        lengths = self._lengths(x)
        if self.channels_first:
            x = ops.moveaxis(x, 1, -1)
        if self.padding == "valid" or math.prod(self.size) == 1:
            return x
        pads = [self._pad(axis, length) for axis, length in enumerate(lengths)]
        return ops.pad(x, [(0, 0), *pads, (0, 0)])

    def _lengths(self, x):
        shape = ops.shape(x)
        return shape[2:] if self.channels_first else shape[1:-1]

    def _slice(self, x, tap, ends):
        starts = [i * step for i, step in zip(tap, self.dilation, strict=True)]
        spatial = [slice(start, start + end, stride) for start, end, stride
                   in zip(starts, ends, self.strides, strict=True)]  # fmt: skip
        return x[(slice(None), *spatial, slice(None))]

    def output_shape(self, input_shape, channels):
        """Shape of the outputs for inputs of a shape, with so many output channels.

        Raises:
            ValueError: The window is larger than the inputs.
        """
        spatial = input_shape[2:] if self.channels_first else input_shape[1:-1]
        lengths = [
            None if length is None else self._outputs(axis, length)
            for axis, length in enumerate(spatial)
        ]
        if any(length is not None and length <= 0 for length in lengths):
            raise ValueError(
                f"A window of kernel_size={self.size} and dilation_rate={self.dilation} does not "
                f"fit in the inputs. Received: input_shape={tuple(input_shape)}"
            )
        if self.channels_first:
            return (input_shape[0], channels, *lengths)
        return (input_shape[0], *lengths, channels)

    def restore(self, y):
        """Outputs `(batch, *spatial, channels)` in the data format of the inputs."""
        return ops.moveaxis(y, -1, 1) if self.channels_first else y

    def _span(self, axis):
        return self.dilation[axis] * (self.size[axis] - 1) + 1

    def _outputs(self, axis, length):
        if self.padding == "valid":
            length = length - self._span(axis) + 1
        return (length + self.strides[axis] - 1) // self.strides[axis]

    def _pad(self, axis, length):
        """Zeros before and after; a length that is known only at run time is a tensor."""
        if self._span(axis) == 1:
            return (0, 0)
        if self.padding == "causal":
            return (self._span(axis) - 1, 0)
        total = (self._outputs(axis, length) - 1) * self.strides[axis] + self._span(axis) - length
        total = max(total, 0) if isinstance(total, int) else ops.maximum(total, 0)
        return (total // 2, total - total // 2)

    def get_config(self):
        """The arguments of a Keras convolution."""
        return {
            "kernel_size": self.size,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation,
        }


def _sizes(name, value, rank):
    sizes = value if isinstance(value, (tuple, list)) else (value,) * rank
    if len(sizes) != rank:
        raise ValueError(
            f"`{name}` must be an integer or a tuple of {rank}. Received: {name}={value!r}"
        )
    for size in sizes:
        check_count(name, size)
    return tuple(sizes)
