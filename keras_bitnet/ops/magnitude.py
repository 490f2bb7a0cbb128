"""The largest magnitude, on every backend of an empty batch too."""

import keras
from keras import ops

from keras_bitnet.ops.constants import constant_like

BACKEND = keras.backend.backend()


def largest_magnitude(x, axis, least):
    """`max(max |x|, least)` along axes that stay, `least` where there is nothing.

    Args:
        x: Float tensor.
        axis: Axis, or tuple of them: all axes by name, for ONNX.
        least: Positive number.

    Returns:
        Tensor that broadcasts with `x`, without a gradient.
    """
    x = ops.abs(ops.stop_gradient(x))
    if BACKEND == "torch":
        # `torch.compile` does not trace through `ops.max`; `initial` costs a copy to the device,
        # and Keras 3.15 has the largest of nothing on the CPU.
        largest = (ops.sum if 0 in x.shape else ops.amax)(x, axis=axis, keepdims=True)
        return ops.maximum(largest, constant_like(largest, least))
    return ops.max(x, axis=axis, keepdims=True, initial=least)
