"""Root mean square norm by the native CPU library, for TensorFlow: one op and its gradient."""

import tensorflow as tf

from keras_bitnet.kernels import cpu
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.kernels.tensorflow import MODULE, reason


def refuse(problem):
    """Why the kernel cannot run a `Norm` here, or `None`; asked while tracing."""
    return cpu.refuse_norm(problem) or reason(problem)


def run(x, scale, epsilon):
    """As `rms_norm`, for a problem that was not refused."""
    scale = tf.cast(scale, "float32")
    return MODULE.keras_bitnet_rms_norm(x=x, scale=scale, epsilon=epsilon)


def _gradient(op, dy):
    """With `n = x * r`: `dn = dy * scale`, `dx = r * (dn - n * mean(dn * n))`."""
    x, scale = tf.cast(op.inputs[0], "float32"), op.inputs[1]
    wide = tf.cast(dy, "float32")
    r = tf.math.rsqrt(tf.reduce_mean(x * x, -1, keepdims=True) + op.get_attr("epsilon"))
    n, dn = x * r, wide * scale
    dx = r * (dn - n * tf.reduce_mean(dn * n, -1, keepdims=True))
    return tf.cast(dx, dy.dtype), tf.reduce_sum(tf.reshape(wide * n, (-1, tf.size(scale))), 0)


if MODULE is not None:
    tf.RegisterGradient("KerasBitnetRmsNorm")(_gradient)

NATIVE = Kernel(cpu.NAME, refuse, run)
