"""The native CPU kernels in TensorFlow's graphs, models and files."""

import os

import numpy as np
import pytest
from helpers import BACKEND, packed_twin, relative_error, run_python

if BACKEND != "tensorflow":
    pytest.skip("the tensorflow backend is not the active one", allow_module_level=True)

import keras
import tensorflow as tf
from test_native_adapters import make_packed, packed_layer

from keras_bitnet import kernels
from keras_bitnet.kernels import native
from keras_bitnet.layers import BitConv2D
from keras_bitnet.quantizers.activations import ActivationInt8

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.reason()))

OP = "KerasBitnetMatmul"


def has_op(function, name=OP):
    graph = function.get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return any(node.op == name for node in nodes)


@pytest.mark.parametrize("shape", [(None, 100), (None, None, 100), (3, 100), (None, None), None])
def test_function_and_shape_inference(shape, rng):
    layer = packed_layer(rng)
    _, packed = make_packed(rng, 100, 33)
    if shape is None:  # even the rank is unknown
        call = kernels.select.TABLES[BACKEND][0].load().run
        function = lambda x: call(x, packed, ActivationInt8(), None)  # noqa: E731
    else:
        function = layer
    traced = tf.function(function, input_signature=[tf.TensorSpec(shape, "float32")])
    assert has_op(traced)
    inferred = traced.get_concrete_function().output_shapes
    assert inferred.as_list() == [*shape[:-1], 33] if shape else inferred.rank is None
    x = tf.random.normal((*(size or 3 for size in (shape or (3, 100))[:-1]), 100))
    np.testing.assert_array_equal(traced(x), function(x))


@pytest.mark.parametrize("shape", [(None, None, None, 4), (2, 7, 8, 4)])
def test_a_convolution_in_a_function(shape, rng):
    layer = BitConv2D(6, 3, strides=2, padding="same", norm="rms")
    layer.build(shape)
    layer = packed_twin(layer, shape)
    traced = tf.function(layer, input_signature=[tf.TensorSpec(shape, "float32")])
    assert has_op(traced, "KerasBitnetConv")
    inferred = traced.get_concrete_function().output_shapes.as_list()
    assert inferred == [shape[0], *(size and -(-size // 2) for size in shape[1:3]), 6]
    x = tf.random.normal([size or n for size, n in zip(shape, (2, 7, 8, 4), strict=True)])
    np.testing.assert_array_equal(traced(x), layer(x))

    @tf.function
    def slope(x):
        return tf.gradients(tf.reduce_sum(traced(x) ** 2), x)[0]

    with kernels.use_kernel("reference"), tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(layer(x) ** 2)
    assert relative_error(slope(x), tape.gradient(y, x)) < 1e-4


def test_xla_takes_the_reference(rng):
    layer = packed_layer(rng)
    x = tf.random.normal((5, 100))
    traced = tf.function(lambda x: layer(x), jit_compile=True)
    assert relative_error(traced(x), layer(x)) < 2e-6
    with kernels.use_kernel("native"), pytest.raises(ValueError, match="XLA compiles"):
        tf.function(lambda x: layer(x), jit_compile=True)(x)


@pytest.mark.parametrize("jit_compile", [False, True, "auto"])
def test_fit_and_predict(jit_compile, rng):
    model = keras.Sequential([keras.Input((100,)), packed_layer(rng, norm="rms")])
    model.compile("sgd", "mse", jit_compile=jit_compile)
    x = rng.normal(size=(64, 100)).astype("float32")
    losses = model.fit(x, np.zeros((64, 33)), epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert relative_error(model.predict(x, verbose=0), model(x)) < 2e-6
    assert np.isfinite(model.evaluate(x, np.zeros((64, 33)), verbose=0))


def test_gradient_in_a_function(rng):
    layer = packed_layer(rng)
    x = tf.random.normal((2, 5, 100))

    def gradients():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(layer(x) ** 2)
        return tape.gradient(y, [x, layer.bias.value])

    traced = tf.function(gradients)()
    with kernels.use_kernel("reference"):
        for actual, wanted in zip(traced, gradients(), strict=True):
            assert relative_error(actual, wanted) < 5e-6


LOAD = """
import json
{first}
import numpy as np, tensorflow as tf
model = tf.saved_model.load({path!r})
y = model.serve(np.load({x!r}))
print(json.dumps(y.numpy().tolist()))
"""


@pytest.mark.parametrize("kernel", ["native", "reference"])
def test_saved_model_in_a_fresh_process(kernel, rng, tmp_path):
    model = keras.Sequential([keras.Input((100,)), packed_layer(rng)])
    x = rng.normal(size=(5, 100)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    with kernels.use_kernel(kernel):
        model.export(str(tmp_path / "model"), verbose=False)
    first = "import keras_bitnet.kernels.tensorflow" if kernel == "native" else ""
    y = run_python(
        LOAD.format(first=first, path=str(tmp_path / "model"), x=str(tmp_path / "x.npy"))
    )
    assert relative_error(y, model(x)) < 2e-6


def test_saved_model_with_gradient(rng, tmp_path):
    layer = packed_layer(rng)
    module = tf.Module()
    module.layer = layer
    module.call = tf.function(lambda x: layer(x), input_signature=[tf.TensorSpec((None, 100))])
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    x = tf.random.normal((5, 100))
    found = []
    for call in (loaded.call, layer):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(call(x) ** 2)
        found.append(tape.gradient(y, x))
    assert relative_error(*found) < 2e-6


def test_keras_file(rng, tmp_path):
    model = keras.Sequential([keras.Input((100,)), packed_layer(rng)])
    model.save(tmp_path / "model.keras")
    x = rng.normal(size=(5, 100)).astype("float32")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(x), model(x))


def test_op_checks_its_operands(rng):
    from keras_bitnet.kernels import tensorflow as adapter

    _, packed = make_packed(rng, 100, 33)
    facts = {"bits": 2, "trits": 0, "group_size": 0, "activation_bits": 8, "per_tensor": 0,
             "offset": -1.0, "epsilon": 1e-5, "norm_epsilon": 1e-5}  # fmt: skip
    cases = ((50, 33, 0, "tiles must be"), (100, 50, 0, "tiles must be"), (100, 33, 7, "gain must"))
    for columns, bias, gain, message in cases:
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            adapter.MODULE.keras_bitnet_matmul(
                x=tf.ones((2, columns)), tiles=packed.tiles, scale=packed.scale,
                bias=tf.zeros(bias), x_scale=tf.zeros(0), gain=tf.zeros(gain), **facts,
            )  # fmt: skip


def test_threads_follow_tensorflow():
    code = """
import json, os
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)
from keras_bitnet.layers import BitLinear
layer = BitLinear(2048, packed=True)
layer.build((None, 2048))
x = tf.ones((64, 2048))
tf.linalg.matmul(x, tf.ones((2048, 2048)))
before = len(os.listdir("/proc/self/task"))
layer(x)
print(json.dumps(len(os.listdir("/proc/self/task")) - before))
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc on this system")
    assert run_python(code) == 0
