"""The native CPU kernels for TensorFlow: ops of a product, of joint ones and of a convolution.

Importing this module registers them. A process that loads a SavedModel which holds one imports
`keras_bitnet.kernels.tensorflow` first, or the model is exported with the reference, see
`keras_bitnet.kernels.use_kernel`.
"""

import ctypes
import functools

import tensorflow as tf
from keras import ops
from tensorflow.python.ops import control_flow_util

from keras_bitnet.kernels import cpu, native
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.ops.packed_tensor import PackedTensor
from keras_bitnet.ops.window import Window

_OP, _JOINT_OP, _CONV_OP = "KerasBitnetMatmul", "KerasBitnetJointMatmul", "KerasBitnetConv"


def refuse(problem):
    """Why the kernel cannot run a problem here, or `None`; asked while tracing."""
    return cpu.refuse(problem) or reason(problem)


def reason(problem):
    """Why no op of the library can run here, whatever it computes, or `None`."""
    if _error is not None:
        return _error
    if not problem.device and tf.config.list_logical_devices("GPU"):
        return "there is a GPU and the activations may be on it; use `tf.device` or `keras.device`"
    graph = tf.compat.v1.get_default_graph()
    if not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(graph):
        return "XLA compiles this function and cannot call the op; `jit_compile=False` runs it"
    return None


def run(x, packed, activation_quantizer, bias, activation_scale=None, norm=None, window=None):
    """As `keras_bitnet.ops.bit_matmul`, for a problem that was not refused."""
    none = _zeros(0)
    gain, norm_epsilon = norm or (none, 0.0)
    tiles, scale, bias = _weight(packed, bias)
    operands = {
        "x": x,
        "tiles": tiles,
        "scale": scale,
        "bias": bias,
        "x_scale": none if activation_scale is None else tf.reshape(activation_scale, (1,)),
        "gain": tf.cast(gain, "float32"),
        **_attributes(packed, activation_quantizer),
        "norm_epsilon": norm_epsilon,
    }
    if window is None:
        return MODULE.keras_bitnet_matmul(**operands)
    y = MODULE.keras_bitnet_conv(**operands, window=window.numbers)
    if not tf.executing_eagerly() and x.shape.rank is not None:
        y.set_shape((*window.positions(x.shape), packed.out_features))
    return y


def run_joint(x, packed, activation_quantizer, biases):
    """As `keras_bitnet.ops.joint_bit_matmul`, for weights that are alike."""
    if len(packed) > native.MAX_JOINT:
        return None
    none = _zeros(0)
    tiles, scale, bias = zip(*map(_weight, packed, biases), strict=True)
    return MODULE.keras_bitnet_joint_matmul(
        x=x,
        tiles=tiles,
        scale=scale,
        bias=bias,
        x_scale=none,
        gain=none,
        **_attributes(packed[0], activation_quantizer),
        norm_epsilon=0.0,
    )


def _weight(packed, bias):
    """The operands of one weight."""
    bias = _zeros(packed.out_features) if bias is None else ops.cast(bias, "float32")
    return _tensor(packed.tiles), _tensor(packed.scale), bias


def _tensor(array):
    """A tensor of codes or scales; the ops would take the slow path for a variable."""
    unwatched = isinstance(array, tf.Variable) and not array.trainable and tf.executing_eagerly()
    return read_variable(array) if unwatched else tf.convert_to_tensor(array)


def read_variable(variable):
    """The tensor of a variable that no tape watches: to convert it takes some times as long."""
    if isinstance(variable, tf.distribute.DistributedValues):
        return tf.convert_to_tensor(variable)
    return tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)


def _attributes(packed, activation_quantizer):
    """The attributes of a product that come from its weight and its activations."""
    activations = cpu.Activations.of(activation_quantizer)
    return {
        "bits": packed.bits,
        "trits": int(packed.layout == "trits"),
        "group_size": packed.group_size or 0,
        "activation_bits": activations.bits,
        "per_tensor": int(activations.per_tensor),
        "offset": packed.offset,
        "epsilon": activations.epsilon,
    }


def _zeros(size):
    """What stands for a missing operand; the op reads the number of outputs off its bias."""
    if tf.executing_eagerly():
        return _eager_zeros(size)
    return tf.zeros((size,))


@functools.cache
def _eager_zeros(size):
    return tf.zeros((size,))


def _gradient(op, *dys):
    x, *others, gain = op.inputs
    tiles, scales, biases = (others[i * len(dys) : (i + 1) * len(dys)] for i in range(3))
    window = Window.of_numbers(op.get_attr("window")) if op.type == _CONV_OP else None
    in_features = x.shape[-1] * (1 if window is None else window.count)
    offset, bits, group_size = map(op.get_attr, ("offset", "bits", "group_size"))
    layout = "trits" if op.get_attr("trits") else "tiles"
    packed = [
        PackedTensor(codes, scale, offset, bits, in_features, size, group_size or None, layout)
        for codes, scale, size in zip(tiles, scales, (b.shape[0] for b in biases), strict=True)
    ]
    dx, dbiases = cpu.gradients(dys, packed)
    dgain = None
    if gain.shape[0] != 0:
        rows = x if window is None else window.patches(x)
        dx, dgain = cpu.norm_gradients(dx, rows, gain, op.get_attr("norm_epsilon"))
    if window is not None:
        dx = window.scatter(dx, x)
    return dx, *[None] * (2 * len(dys)), *dbiases, None, dgain


def _load():
    """Registers the op. Returns TensorFlow's module with its wrapper, and what went wrong."""
    path = native.library_path("libbitnet_tf")
    if native.library() is None or not path.exists():
        return None, f"this installation has no {path.name}"
    try:
        module = tf.load_op_library(str(path))
    except (tf.errors.OpError, RuntimeError) as error:
        return None, f"TensorFlow {tf.__version__} does not load {path.name}: {error}"
    library = ctypes.CDLL(str(path))
    library.kbn_tensorflow_error.restype = ctypes.c_char_p
    refusal = library.kbn_tensorflow_error().decode()
    if refusal:
        return None, f"TensorFlow {tf.__version__} does not take the op: {refusal}"
    # TensorFlow fixes this number when it starts; 0 leaves it to the machine.
    library.kbn_tensorflow_set_threads(tf.config.threading.get_intra_op_parallelism_threads())
    for op in (_OP, _JOINT_OP, _CONV_OP):
        tf.RegisterGradient(op)(_gradient)
    return module, None


# TensorFlow's wrappers of the ops, or `None` and why.
MODULE, _error = _load()

NATIVE = Kernel(
    cpu.NAME,
    refuse,
    run,
    normalizes=cpu.normalizes,
    gathers=lambda: True,
    run_joint=run_joint,
)
