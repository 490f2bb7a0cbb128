"""From float to quantized to frozen codes: what training may still change, and what not."""

import functools

import keras
import numpy as np
import pytest
from helpers import BACKEND, trace_once
from keras import ops

from keras_bitnet.callbacks import QATModeSwitch
from keras_bitnet.callbacks.statistics import layer_codes
from keras_bitnet.layers import BitLinear
from keras_bitnet.quantizers import Int4

JIT = [False] if BACKEND == "torch" else [False, True]  # torch.compile: one test, at the end
FAST = BACKEND == "jax"  # JAX is fast when compiled, the others are when not
RANDOM = np.random.default_rng(7)
X = RANDOM.normal(size=(16, 6)).astype("float32")
Y = RANDOM.normal(size=(16, 2)).astype("float32")

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1),
    "accumulate": lambda: keras.optimizers.Adam(0.05, clipnorm=1.0, gradient_accumulation_steps=2),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.AdamW(0.05, weight_decay=0.1), initial_scale=8.0
    ),
}


def make_model(optimizer="adamw", jit_compile=FAST):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    learned = Int4(scale="learned")
    model = keras.Sequential(
        [
            keras.Input((6,)),
            BitLinear(8, activation="relu", norm="rms", name="one"),
            BitLinear(2, weight_quantizer=learned, name="two"),
        ]
    )
    model.compile(OPTIMIZERS[optimizer](), "mse", jit_compile=jit_compile)
    return model


def fit(model, *callbacks, epochs, **kwargs):
    kwargs = {"batch_size": 4, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **kwargs).history


class Watch(keras.callbacks.Callback):
    """Weights, codes and strengths at the end of every epoch."""

    def __init__(self):
        super().__init__()
        self.weights, self.codes, self.strengths, self.steps = [], [], [], []

    def on_epoch_end(self, epoch, logs=None):
        model = self.model
        bits = [model.get_layer(name) for name in ("one", "two")]
        self.weights.append({w.path: ops.convert_to_numpy(w).copy() for w in model.weights})
        self.codes.append([layer_codes(layer).copy() for layer in bits])
        self.strengths.append([float(ops.convert_to_numpy(b.quantization_strength)) for b in bits])
        self.steps.append(int(ops.convert_to_numpy(model.optimizer.iterations)))


def moved(watch, start, end):
    before, after = watch.weights[start], watch.weights[end]
    return {path for path in before if not np.array_equal(before[path], after[path])}


KERNELS = {"one/kernel", "two/kernel", "two/kernel_log2_scale"}
OTHERS = {"one/bias", "one/normalization/scale", "two/bias"}


def short(paths):
    return {path.removeprefix("sequential/") for path in paths}


def check_frozen_after(watch, epoch):
    last = len(watch.weights) - 1
    assert short(moved(watch, 0, epoch)) >= KERNELS
    assert short(moved(watch, epoch, last)) == OTHERS
    for codes in watch.codes[epoch + 1 :]:
        for frozen, now in zip(watch.codes[epoch], codes, strict=True):
            np.testing.assert_array_equal(frozen, now)


@pytest.mark.parametrize(
    ("optimizer", "jit_compile"),
    [*((name, FAST) for name in OPTIMIZERS), *(("sgd", jit) for jit in JIT if jit != FAST)],
)
def test_frozen_codes_stay_bit_identical(optimizer, jit_compile):
    model, watch = make_model(optimizer, jit_compile), Watch()
    history = fit(model, QATModeSwitch(epoch=1, freeze_epoch=3), watch, epochs=5)
    assert watch.strengths == [[0, 0], [1, 1], [1, 1], [1, 1], [1, 1]]
    assert history["quantization_strength"] == [0, 1, 1, 1, 1]
    check_frozen_after(watch, 2)
    assert np.diff(watch.steps).tolist() == [watch.steps[0]] * 4


def test_other_weights_train_as_if_the_kernels_had_never_been_trainable():
    """Freezing must keep momenta, step count and learning rate of everything else."""
    model, watch = make_model(), Watch()
    fit(model, QATModeSwitch(epoch=0, freeze_epoch=2), watch, epochs=4)

    reference, seen = make_model(), Watch()
    restore = Restore(from_epoch=2, names=KERNELS)
    fit(reference, restore, seen, epochs=4)
    for path, value in watch.weights[-1].items():
        np.testing.assert_allclose(value, seen.weights[-1][path], rtol=2e-5, atol=2e-6)


class Restore(keras.callbacks.Callback):
    """Freezes the slow way: puts the old values back before every step."""

    def __init__(self, from_epoch, names):
        super().__init__()
        self.from_epoch, self.names, self.values = from_epoch, names, None

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.from_epoch:
            weights = [w for w in self.model.weights if short({w.path}) & self.names]
            self.values = [(w, ops.convert_to_numpy(w).copy()) for w in weights]

    def on_train_batch_begin(self, batch, logs=None):
        if self.values and self.model:
            for weight, value in self.values:
                weight.assign(value)

    def on_epoch_end(self, epoch, logs=None):
        self.on_train_batch_begin(0)


def test_resumes_frozen_after_backup(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 4:
                raise KeyboardInterrupt

    def callbacks():
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        return [QATModeSwitch(epoch=1, freeze_epoch=3), backup]

    whole, first, rest = Watch(), Watch(), Watch()
    fit(make_model(), callbacks()[0], whole, epochs=6)
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), *callbacks(), first, Interrupt(), epochs=6)
    fit(make_model(), *callbacks(), rest, epochs=6)
    assert rest.steps == whole.steps[4:]
    for frozen, now in zip(first.codes[-1], rest.codes[-1], strict=True):
        np.testing.assert_array_equal(frozen, now)
    for path, value in rest.weights[-1].items():
        np.testing.assert_allclose(value, whole.weights[-1][path], rtol=1e-5, atol=1e-6)


def test_a_frozen_model_saves_and_loads_with_its_optimizer(tmp_path):
    model = make_model("loss_scale")
    fit(model, QATModeSwitch(epoch=0, freeze_epoch=1), epochs=2)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.optimizer.variables) == len(model.optimizer.variables)
    for ours, theirs in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs))
    np.testing.assert_allclose(model.predict(X, verbose=0), loaded.predict(X, verbose=0), atol=1e-6)
    watch = Watch()
    fit(loaded, QATModeSwitch(epoch=0, freeze_epoch=1), watch, epochs=4, initial_epoch=2)
    assert short(moved(watch, 0, 1)) == OTHERS


def test_fit_goes_on_without_the_callback_and_evaluates():
    model, watch = make_model(), Watch()
    fit(model, QATModeSwitch(epoch=0, freeze_epoch=1), epochs=2, validation_data=(X, Y))
    fit(model, watch, epochs=2, validation_data=(X, Y))
    assert short(moved(watch, 0, 1)) == OTHERS


def test_switch_at_a_step():
    class Strengths(keras.callbacks.Callback):
        seen = ()

        def on_train_batch_end(self, batch, logs=None):
            strength = self.model.get_layer("one").quantization_strength
            self.seen = (*self.seen, float(ops.convert_to_numpy(strength)))

    model, strengths = make_model(), Strengths()
    fit(model, QATModeSwitch(step=6, freeze_epoch=0), strengths, epochs=3)
    assert strengths.seen == (0,) * 6 + (1,) * 6
    assert not model.get_layer("one").kernel.trainable  # froze at epoch 2, the first quantized
    assert model.get_layer("one").bias.trainable


class Fake(keras.callbacks.Callback):
    """Puts given values into the logs."""

    def __init__(self, name, values):
        super().__init__()
        self.name, self.values = name, values

    def on_epoch_end(self, epoch, logs=None):
        if self.values[epoch] is not None:
            logs[self.name] = self.values[epoch]


@pytest.mark.parametrize(
    ("name", "mode", "values"),
    [
        ("val_loss", "auto", [0.9, 0.5, 0.7, 0.2]),
        ("val_accuracy", "auto", [0.1, 0.5, 0.2, 0.9]),
        ("score", "max", [0.1, 0.6, 0.2, 0.9]),
    ],
)
def test_switch_on_a_monitored_value(name, mode, values):
    model, watch = make_model(), Watch()
    switch = QATModeSwitch(monitor=name, threshold=0.5, mode=mode)
    history = fit(model, Fake(name, values), switch, watch, epochs=4)
    assert history["quantization_strength"] == [0, 0, 1, 1]
    again = Watch()  # resumed later: the saved strength tells
    switch = QATModeSwitch(monitor=name, threshold=0.5, mode=mode)
    fit(model, Fake(name, [None] * 6), switch, again, epochs=6, initial_epoch=4)
    assert again.strengths == [[1, 1], [1, 1]]


def test_a_monitored_value_that_is_missing_warns():
    switch = QATModeSwitch(monitor="val_los", threshold=0.5)
    with pytest.warns(UserWarning, match=r"'val_los'.*Available: \['loss'"):
        fit(make_model(), switch, epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Exactly one of"),
        ({"epoch": 1, "step": 2}, "Received: epoch=1, step=2"),
        ({"epoch": -1}, "Received: epoch=-1"),
        ({"step": 2.5}, "Received: step=2.5"),
        ({"monitor": "loss"}, "Received: monitor='loss', threshold=None"),
        ({"epoch": 1, "threshold": 0.5}, "go together"),
        ({"monitor": "loss", "threshold": 1, "mode": "low"}, "Received: mode='low'"),
        ({"epoch": 3, "freeze_epoch": 2}, "Received: epoch=3, freeze_epoch=2"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        QATModeSwitch(**arguments)


def test_refuses_to_freeze_moving_averages():
    model = make_model()
    model.compile(keras.optimizers.SGD(0.1, use_ema=True), "mse")
    with pytest.raises(ValueError, match=r"SGD\(use_ema=True\)"):
        fit(model, QATModeSwitch(epoch=0, freeze_epoch=1), epochs=1)


@pytest.mark.skipif(BACKEND != "torch", reason="the others are compiled in the tests above")
def test_freezing_under_torch_compile(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model, watch = make_model("sgd", jit_compile=True), Watch()
    trace_once(model)
    fit(model, QATModeSwitch(epoch=1, freeze_epoch=2), watch, epochs=3)
    check_frozen_after(watch, 1)
