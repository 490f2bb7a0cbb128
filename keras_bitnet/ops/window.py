"""Where a convolution looks: padding, and one strided slice of the inputs for each tap."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import keras
from keras import ops

from keras_bitnet.checks import check_choice, check_count
from keras_bitnet.ops.magnitude import largest_magnitude

_PADDINGS = ("valid", "same", "causal")


@dataclasses.dataclass(frozen=True)
class Window:
    """The geometry of a convolution of any rank.

    Attributes:
        size, strides, dilation: Tuples of one positive integer for each spatial axis.
        padding: `"valid"`, `"same"` or `"causal"`; padding is zeros.
        channels_first: Whether the channels of inputs and outputs are axis 1, not the last.
        numbers: The geometry as 11 integers, attributes of a kernel: spatial axes, padding, then
            size, strides and dilation, each of three axes, first ones of 1.
    """

    size: tuple
    strides: tuple
    dilation: tuple
    padding: str
    channels_first: bool
    numbers: tuple = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        axes = len(self.size)
        of_axes = (self.size, self.strides, self.dilation)
        of_three = itertools.chain.from_iterable((1,) * (3 - axes) + sizes for sizes in of_axes)
        numbers = (axes, _PADDINGS.index(self.padding), *of_three)
        object.__setattr__(self, "numbers", numbers)  # once: small eager calls pass them on

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
    def count(self):
        """The number of taps: numbers of a patch for each channel."""
        return math.prod(self.size)

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

    @classmethod
    def of_numbers(cls, numbers):
        """The window of `numbers`, on inputs whose channels are last."""
        axes, padding, *of_three = numbers
        size, strides, dilation = (tuple(of_three[i : i + 3][3 - axes :]) for i in (0, 3, 6))
        return cls(size, strides, dilation, _PADDINGS[padding], channels_first=False)

    def channels_last(self, x):
        """Inputs `(batch, *spatial, channels)`, wherever the channels are."""
        return ops.moveaxis(x, 1, -1) if self.channels_first else x

    def restore(self, y):
        """Outputs `(batch, *spatial, channels)` in the data format of the inputs."""
        return ops.moveaxis(y, -1, 1) if self.channels_first else y

    # What follows takes and gives channels last.

    def positions(self, shape):
        """The shape `(..., *output spatial)` for inputs of a shape `(..., *spatial, channels)`."""
        axes = len(self.size)
        lengths = enumerate(shape[-1 - axes : -1])
        return (*shape[: -1 - axes], *(n and self._positions(axis, n) for axis, n in lengths))

    def patches(self, x):
        """What every output position sees: the taps side by side.

        Args:
            x: Tensor `(..., *spatial, channels)`.

        Returns:
            Tensor `(..., *output spatial, prod(size) * channels)`.
        """
        taps = self.taps(x)
        return taps[0] if len(taps) == 1 else ops.concatenate(taps, axis=-1)

    def taps(self, x):
        """What each tap of the kernel sees, in the order of the kernel.

        Args:
            x: Tensor `(..., *spatial, channels)`.

        Returns:
            List of `prod(size)` tensors `(..., *output spatial, channels)`.
        """
        x = self.padded(x)
        return [x[(..., *self._seen(starts), slice(None))] for starts in self._starts()]

    def largest(self, x, least, granularity):
        """The largest magnitude in each patch or in all of them, or `least`.

        Args:
            x: Float tensor `(..., *spatial, channels)`.
            least: Positive number.
            granularity: `"token"`: of each patch; else of all.

        Returns:
            Tensor `(..., *output spatial, 1)`, of all `(1, ..., 1)`, without a gradient.
        """
        seen = functools.reduce(ops.maximum, self.taps(largest_magnitude(x, -1, least)))
        axis = -1 if granularity == "token" else tuple(range(len(seen.shape)))
        return largest_magnitude(seen, axis, least)  # of a patch in the padding too

    def padded(self, x):
        """Inputs with the zeros of the padding around them."""
        if self.padding == "valid" or self.count == 1:
            return x
        pads = [self.padding_of(axis, length) for axis, length in enumerate(self._lengths(x))]
        return ops.pad(x, [*[(0, 0)] * (len(x.shape) - len(pads) - 1), *pads, (0, 0)])

    def scatter(self, patches, x):
        """The transpose of `patches`, its gradient: each number back to where it was seen.

        Args:
            patches: Tensor `(..., *output spatial, prod(size) * channels)`.
            x: The inputs; only their shape counts.

        Returns:
            Tensor of the shape of `x`, the dtype of `patches`.
        """
        lengths, channels = self._lengths(x), ops.shape(x)[-1]
        total: Any = 0
        for i, starts in enumerate(self._starts()):
            part = patches[..., i * channels : (i + 1) * channels]
            for axis, start in enumerate(starts):
                # A stride may leave over what no tap sees, fewer numbers than it is long.
                after = self._span(axis) - 1 - start
                part = _spread(part, axis - len(starts) - 1, self.strides[axis], start, after)
            total = total + part
        first = [self.padding_of(axis, length)[0] for axis, length in enumerate(lengths)]
        inside = [slice(i, i + length) for i, length in zip(first, lengths, strict=True)]
        return total[(..., *inside, slice(None))]

    def _lengths(self, x):
        return ops.shape(x)[-1 - len(self.size) : -1]

    def _starts(self):
        """Of each tap where it looks first on every axis of the padded inputs."""
        for tap in itertools.product(*map(range, self.size)):
            yield [i * step for i, step in zip(tap, self.dilation, strict=True)]

    def _seen(self, starts):
        """What a tap sees, as slices of the axes of the padded inputs, however long those are."""
        for axis, start in enumerate(starts):
            after = self._span(axis) - 1 - start  # of the window behind the tap
            yield slice(start, -after or None, self.strides[axis])

    def output_shape(self, input_shape, channels):
        """Shape of the outputs for inputs of a shape, with so many output channels.

        Raises:
            ValueError: The window is larger than the inputs.
        """
        spatial = input_shape[2:] if self.channels_first else input_shape[1:-1]
        lengths = self.positions((*spatial, channels))
        if any(length is not None and length <= 0 for length in lengths):
            raise ValueError(
                f"A window of kernel_size={self.size} and dilation_rate={self.dilation} does not "
                f"fit in the inputs. Received: input_shape={tuple(input_shape)}"
            )
        if self.channels_first:
            return (input_shape[0], channels, *lengths)
        return (input_shape[0], *lengths, channels)

    def _span(self, axis):
        return self.dilation[axis] * (self.size[axis] - 1) + 1

    def _positions(self, axis, length):
        if self.padding == "valid":
            length = length - self._span(axis) + 1
        return (length + self.strides[axis] - 1) // self.strides[axis]

    def padding_of(self, axis, length):
        """Zeros before and after; a length that is known only at run time is a tensor."""
        if self._span(axis) == 1:
            return (0, 0)
        if self.padding == "causal":
            return (self._span(axis) - 1, 0)
        total = (self._positions(axis, length) - 1) * self.strides[axis] + self._span(axis) - length
        total = ops.maximum(total, 0) if ops.is_tensor(total) else max(total, 0)
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


def _spread(x, axis, stride, before, after):
    """Numbers along a negative axis, `stride` apart, with zeros between, before and after them."""
    if stride > 1:
        shape = list(ops.shape(x))
        shape[axis] *= stride
        x = ops.reshape(ops.stack([x, *[ops.zeros_like(x)] * (stride - 1)], axis=axis), shape)
    widths = [(0, 0)] * len(x.shape)
    widths[axis] = (before, after)
    return ops.pad(x, widths)


def _sizes(name, value, rank):
    sizes = value if isinstance(value, (tuple, list)) else (value,) * rank
    if len(sizes) != rank:
        raise ValueError(
            f"`{name}` must be an integer or a tuple of {rank}. Received: {name}={value!r}"
        )
    for size in sizes:
        check_count(name, size)
    return tuple(sizes)
