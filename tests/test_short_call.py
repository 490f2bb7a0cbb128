"""Eager calls that pass by `keras.Layer.__call__`, and those that must not."""

import contextlib

import keras
import numpy as np
import pytest
from helpers import BACKEND, gradient, to_numpy
from keras import ops

from keras_bitnet.layers import BitConv2D, BitEinsumDense, BitLinear, short_call


@pytest.fixture
def long_calls(monkeypatch):
    """The layers that `keras.Layer.__call__` was asked about, in a list that can be cleared."""
    seen, call = [], keras.Layer.__call__

    def counted(layer, *args, **kwargs):
        seen.append(layer)
        return call(layer, *args, **kwargs)

    monkeypatch.setattr(keras.Layer, "__call__", counted)
    monkeypatch.setattr(short_call, "_STOCK", counted)
    return seen


def packed(layer=None, shape=(None, 16), **arguments):
    """A packed layer with random weights, `BitLinear` by default."""
    layer = layer or BitLinear(8, packed=True, **arguments)
    layer.build(shape)
    fill(layer)
    return layer


def fill(layer):
    rng = np.random.default_rng(0)
    for weight in layer.weights:
        value = rng.integers(0, 3, tuple(weight.shape)) * 0x15
        if weight.dtype != "uint8":
            value = 1 + rng.random(tuple(weight.shape))
        weight.assign(value.astype("uint8" if weight.dtype == "uint8" else "float32"))


def inputs(*shape, dtype="float32"):
    return ops.cast(np.random.default_rng(1).standard_normal(shape), dtype)


def traced(function):
    """A function as its backend compiles it; PyTorch's way has tests of its own."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function


def leaks_are_errors():
    """JAX's check that nothing outlives the function that is traced."""
    if BACKEND != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.checking_leaks()


def same(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(
        to_numpy(ops.cast(a, "float32")), to_numpy(ops.cast(b, "float32"))
    )


@pytest.mark.parametrize("norm", [None, "rms"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_call_is_short(long_calls, norm, dtype):
    layer, x = packed(norm=norm, activation="relu", dtype=dtype), inputs(3, 16, dtype=dtype)
    first = layer(x)
    assert long_calls == [layer]
    same(layer(x), first)
    same(layer(x, training=False), first)
    same(layer(inputs(3, 16, dtype=dtype)), first)
    assert long_calls == [layer]


def test_some_kinds_of_inputs_are_remembered(long_calls):
    layer = packed()
    for rows in (*range(1, 10), *range(9, 1, -1), 1):
        assert layer(inputs(rows, 16)).shape == (rows, 8)
    assert long_calls == [layer] * 10  # nine kinds, and the first again, which was forgotten


def test_layers_of_other_shapes_too(long_calls):
    for layer, shape in (
        (BitConv2D(4, 3, packed=True), (2, 6, 6, 3)),
        (BitEinsumDense("abc,cd->abd", (None, 8), packed=True), (2, 5, 16)),
    ):
        layer, x = packed(layer, shape), inputs(*shape)
        first = layer(x)
        del long_calls[:]
        same(layer(x), first)
        assert not long_calls


def test_a_model_profits(long_calls):
    model = keras.Sequential(
        [keras.Input((16,)), BitLinear(8, packed=True), BitLinear(4, packed=True)]
    )
    for layer in model.layers:
        fill(layer)
    x = inputs(5, 16)
    first = model(x, training=False)
    del long_calls[:]
    same(model(x, training=False), first)
    assert long_calls == [model]


def test_traced_functions_of_it_are_right():
    layer, x = packed(), inputs(3, 16)
    short_call._probe.cache_clear()
    with leaks_are_errors():  # the first call that asks is one of a tensor that a function holds
        wanted = to_numpy(traced(lambda y: layer(x) + y)(ops.zeros((3, 8))))
    for _ in range(2):
        np.testing.assert_allclose(to_numpy(layer(x)), wanted, rtol=1e-6)
        np.testing.assert_allclose(to_numpy(traced(layer)(x)), wanted, rtol=1e-6)


def test_a_stateless_call_may_be_the_first(long_calls):
    layer, x = packed(), inputs(3, 16)
    values = [[v.value for v in w] for w in (layer.trainable_weights, layer.non_trainable_weights)]
    short_call._probe.cache_clear()
    first, _ = layer.stateless_call(*values, x)
    same(layer(x), first)
    assert long_calls == [layer]


def test_gradients_flow_through_it(long_calls):
    layer, x = packed(), inputs(3, 16)
    wanted = gradient(lambda x: ops.sum(layer(x) ** 2), x)
    layer(x)
    same(gradient(lambda x: ops.sum(layer(x) ** 2), x), wanted)
    if BACKEND == "tensorflow":  # that of PyTorch holds the variables, JAX traces both
        import tensorflow as tf

        del long_calls[:]
        with tf.GradientTape() as tape:
            y = layer(x)
        np.testing.assert_array_equal(tape.gradient(y, layer.bias.value), np.full(8, 3.0))
        assert not long_calls


def test_what_keras_checks_it_still_does(long_calls):
    layer = packed()
    layer(inputs(3, 16))
    for wrong in ((3, 15), (16,)):
        with pytest.raises(ValueError, match="incompatible with the layer"):
            layer(inputs(*wrong))
    assert layer(np.ones((3, 16))).shape == (3, 8)
    assert layer(inputs(3, 16, dtype="float64")).dtype == layer(inputs(3, 16)).dtype
    assert isinstance(layer(keras.KerasTensor((3, 16))), keras.KerasTensor)


def test_masks_go_on():
    layer, x = packed(), inputs(2, 5, 16)
    layer(x)
    layer(x)
    x._keras_mask = mask = ops.ones((2, 5), "bool")
    assert layer(x)._keras_mask is mask


def test_a_mask_that_a_subclass_finds_goes_on():
    class Finds(BitLinear):
        def compute_mask(self, inputs, previous_mask):
            return ops.any(inputs != 0, axis=-1)

    layer, x = packed(Finds(8, packed=True)), inputs(2, 5, 16)
    for _ in range(3):
        assert layer(x)._keras_mask.shape == (2, 5)


def test_what_takes_the_place_of_the_call_sees_it(monkeypatch):
    layer, x, seen = packed(), inputs(3, 16), []
    layer(x)
    monkeypatch.setattr(keras.Layer, "__call__", lambda *arguments: seen.append(arguments))
    layer(x)
    assert seen == [(layer, x)]


def test_a_scope_of_another_dtype_holds():
    layer, x = packed(norm="rms", dtype="float32"), inputs(3, 16)

    class Around(keras.Layer):  # Keras then autocasts weights, but those of a layer of one dtype
        def call(self, anything):
            return layer(x)

    alone, around = layer(x), Around(dtype="mixed_bfloat16")
    for _ in range(2):
        same(around(ops.ones((1,))), alone)
        same(layer(x), alone)


def test_mixed_precision_is_left_to_keras(long_calls):
    layer, x = packed(norm="rms", dtype="mixed_bfloat16"), inputs(3, 16, dtype="bfloat16")
    first = layer(x)
    same(layer(x), first)
    assert long_calls == [layer, layer]


def test_a_loss_of_activities_counts():
    layer, x = packed(), inputs(3, 16)
    layer(x)
    layer(x)
    layer.activity_regularizer = keras.regularizers.L2(1.0)
    layer(x)
    assert len(layer.losses) == 1


def test_losses_that_a_subclass_adds_do_not_pile_up():
    class Adds(BitLinear):
        def call(self, inputs):
            y = super().call(inputs)
            self.add_loss(ops.mean(y))
            return y

    layer, x = packed(Adds(8, packed=True)), inputs(3, 16)
    for _ in range(3):
        layer(x)
        assert len(layer.losses) == 1


def test_a_layer_in_a_subclass_is_told_of_training():
    class Drops(BitLinear):
        def __init__(self, units, **kwargs):
            super().__init__(units, **kwargs)
            self.dropout = keras.layers.Dropout(0.9, seed=1)

        def call(self, inputs):
            return self.dropout(super().call(inputs))

    layer, x = packed(Drops(8, packed=True)), inputs(3, 16)
    for _ in range(3):
        assert to_numpy(layer(x)).all()
        assert not to_numpy(layer(x, training=True)).all()


def test_a_subclass_that_takes_training_is_told():
    told = []

    class Told(BitLinear):
        def call(self, inputs, training=None):
            told.append(training)
            return super().call(inputs)

    layer = packed(Told(8, packed=True))
    model = keras.Sequential([layer])
    for training in (False, False, True):
        model(inputs(3, 16), training=training)
    assert told == [False, False, True]


def test_a_layer_as_activation_is_told_too():
    class Counts(keras.Layer):
        def call(self, x, training=None):
            return x + (1.0 if training else 0.0)

    class Frozen(keras.Layer):
        def call(self, x, training=None):
            return layer(x, training=False)

    layer, x = packed(activation=Counts()), inputs(3, 16)
    plain = layer(x)
    for _ in range(2):
        same(layer(x, training=True), plain + 1)
        same(Frozen()(x, training=True), plain)


@pytest.mark.skipif(BACKEND != "torch", reason="hooks are PyTorch's")
def test_hooks_of_the_module_run():
    layer, x, seen = packed(), inputs(3, 16), []
    layer(x)
    layer.register_forward_hook(lambda *call: seen.append(call))
    layer(x)
    assert len(seen) == 1


def test_another_policy_is_noticed(long_calls):
    layer, x = packed(use_bias=False), inputs(3, 16)
    layer(x)
    layer.dtype_policy = "bfloat16"
    assert keras.backend.standardize_dtype(layer(x).dtype) == "bfloat16"
    assert long_calls == [layer, layer]
