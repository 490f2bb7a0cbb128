import keras
import numpy as np
import pytest
from helpers import BACKEND, gradient, to_numpy
from keras import ops

from keras_bitnet.layers import BitResidual
from keras_bitnet.quantizers import ActivationInt8


def test_plain_is_add(rng):
    x, y = rng.normal(size=(2, 2, 3, 4)).astype("float32")
    np.testing.assert_array_equal(to_numpy(BitResidual()([x, y])), x + y)
    assert BitResidual().compute_output_shape([(None, 3, 1), (4,)]) == (None, 3, 4)


@pytest.mark.parametrize(("name", "highest"), [("int8", 127), ("int16", 32767)])
def test_stream_is_on_the_grid_and_gradient_passes(name, highest, rng):
    layer = BitResidual(name, branch_scale=0.5)
    x, y = rng.normal(size=(2, 2, 3, 8)).astype("float32")
    total = x + 0.5 * y
    scale = np.abs(total).max(-1, keepdims=True) / highest
    z = to_numpy(layer([x, y]))
    np.testing.assert_allclose(z / scale, np.rint(total / scale), rtol=1e-4, atol=1e-2)
    branch = gradient(lambda v: ops.sum(layer([ops.convert_to_tensor(x), v])), y)
    np.testing.assert_allclose(branch, np.full_like(y, 0.5), rtol=1e-6)
    again = BitResidual.from_config(layer.get_config())
    np.testing.assert_array_equal(to_numpy(again([x, y])), z)


@pytest.mark.parametrize(("scale", "shape"), [("learned", ()), ("channel", (8,))])
def test_scale_trains_and_saves(scale, shape, rng, tmp_path):
    a, b = keras.Input((8,)), keras.Input((8,))
    layer = BitResidual(ActivationInt8(), branch_scale=0.1, scale=scale)
    model = keras.Model([a, b], layer([a, b]))
    assert tuple(layer.scale_weight.shape) == shape
    x, y = rng.normal(size=(2, 64, 8)).astype("float32")
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit([x, y], x + 2 * y, epochs=30, verbose=0)
    np.testing.assert_allclose(to_numpy(layer.scale_weight), np.full(shape, 2.0), atol=0.2)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(to_numpy(again([x, y])), to_numpy(model([x, y])))


def test_mask_is_that_of_the_stream():
    x = keras.layers.Embedding(10, 8, mask_zero=True)(np.array([[1, 2, 0]]))
    y = BitResidual()([x, keras.layers.Dense(8)(x)])
    np.testing.assert_array_equal(to_numpy(y._keras_mask), [[True, True, False]])


@pytest.mark.skipif(BACKEND != "jax", reason="XLA reports its buffers through JAX")
def test_no_extra_copy_under_jit():
    import jax

    layer = BitResidual(branch_scale=0.5)
    x = np.ones((256, 256), "float32")
    layer([x, x])
    compiled = jax.jit(lambda a, b: layer([a, b])).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitResidual("int3"), "Received: 'int3'"),
        (lambda: BitResidual("static_int8"), "takes no static scale"),
        (lambda: BitResidual(scale="row"), "scale='row'"),
        (
            lambda: BitResidual()([np.ones((2, 3)), np.ones((2, 4))]),
            r"stream of shape \(2, 3\), branch of shape \(2, 4\)",
        ),
        (lambda: BitResidual()(np.ones((2, 3))), r"a list `\[stream, branch\]`"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
