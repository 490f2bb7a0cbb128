"""Numbers as tensors, without a copy from the host."""

from keras import ops


def constant(number, dtype):
    """A tensor of no axes that holds a number.

    On PyTorch `ops.convert_to_tensor` copies the number to the device, for which the host waits
    until all work queued before is done; CUDA graphs refuse it.

    Args:
        number: Python number that the dtype holds.
        dtype: Name of a dtype.

    Returns:
        Tensor of shape `()`.
    """
    return ops.zeros((), dtype) + number


def constant_like(x, number):
    """A tensor of the shape and dtype of `x` that holds a number everywhere.

    On PyTorch `ops.full_like`, and `ops.maximum` or `ops.clip` of a number, do what `constant`
    avoids.

    Args:
        x: Float tensor.
        number: Python number that its dtype holds.

    Returns:
        Tensor of the shape of `x`.
    """
    return ops.zeros_like(x) + number
