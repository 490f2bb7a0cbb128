"""Straight-through estimators: the forward value of one tensor, the gradient of another."""

from keras import ops


def straight_through(x, value):
    """Returns `value` in the forward pass and passes the gradient to `x` unchanged.

    `y = stop_gradient(value) + (x - stop_gradient(x))`. The bracket is exactly zero, so
    `y` holds the very bits of `value` in float32, bfloat16 and float16, eager or compiled.
    The more common `x + stop_gradient(value - x)` rounds twice and does not.

    Args:
        x: Float tensor, any shape: where the gradient goes. Where it holds an infinity or
            a NaN, the result is NaN.
        value: Tensor of the shape and dtype of `x`: the forward value.

    Returns:
        Tensor of the shape of `x`.

    Source:
        Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic
        Neurons for Conditional Computation" (https://arxiv.org/abs/1308.3432).
    """
    x, value = ops.convert_to_tensor(x), ops.convert_to_tensor(value)
    return ops.stop_gradient(value) + (x - ops.stop_gradient(x))


def blend(x, quantized, strength):
    """Mixes a float tensor with its quantized twin: 0 is all float, 1 all quantized.

    `(1 - strength) * x + strength * quantized`, and exactly `quantized` from 1 on.

    Args:
        x: Float tensor.
        quantized: Tensor of the same shape and dtype.
        strength: Scalar tensor in [0, 1], or `None` for 1.

    Returns:
        Tensor of the shape of `x`.
    """
    if strength is None:
        return quantized
    strength = ops.cast(strength, x.dtype)
    mixed = (1 - strength) * x + strength * quantized
    return ops.where(strength >= 1, quantized, mixed)


def scale_gradient(x, factor):
    """Returns `x` unchanged and multiplies its gradient by the constant `factor`."""
    return straight_through(x * factor, x)
