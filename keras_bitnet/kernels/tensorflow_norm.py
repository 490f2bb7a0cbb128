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
    x, scale = op.inputs
    return cpu.norm_gradients(dy, x, scale, op.get_attr("epsilon"))


if MODULE is not None:
    tf.RegisterGradient("KerasBitnetRmsNorm")(_gradient)

NATIVE = Kernel(cpu.NAME, refuse, run)
