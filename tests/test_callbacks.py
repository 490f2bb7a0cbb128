"""Schedules of strength, learning rate and weight decay, seen from inside the training step."""

import functools

import keras
import numpy as np
import pytest
from helpers import BACKEND, trace_once
from keras import ops

from keras_bitnet.callbacks import QuantizationScheduler, TwoStageSchedule
from keras_bitnet.layers import BitLinear

JIT = [False] if BACKEND == "torch" else [False, True]  # torch.compile: one test, at the end
FAST = BACKEND == "jax"  # JAX is fast when compiled, the others are when not


def mean_output(y_true, y_pred):
    return ops.mean(y_pred)


def bit_layer(name="bit", **kwargs):
    return BitLinear(1, use_bias=False, activation_quantizer=None, name=name, **kwargs)


def probe_model(optimizer=None, jit_compile=FAST, loss=mean_output, nested=False):
    """Kernel (0.2, 1) quantizes to (0, 0.6): on inputs (1, 0) the loss is 0.2 (1 - strength)."""
    keras.backend.clear_session(free_memory=False)
    layer = bit_layer()
    stack = [keras.Sequential([keras.Input((2,)), layer], name="inner") if nested else layer]
    model = keras.Sequential([keras.Input((2,)), *stack])
    layer.kernel.assign([[0.2], [1.0]])
    model.compile(optimizer or keras.optimizers.SGD(0.0), loss=loss, jit_compile=jit_compile)
    return model, layer


class Seen(keras.callbacks.Callback):
    """The strength that each training step computed with, from its loss."""

    def __init__(self):
        super().__init__()
        self.strengths = []

    def on_epoch_begin(self, epoch, logs=None):
        self.total, self.count = 0.0, 0

    def on_train_batch_end(self, batch, logs=None):
        self.count += 1
        loss = logs["loss"] * self.count - self.total
        self.total += loss
        self.strengths.append(1 - loss / 0.2)


class Interrupt(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.at = (epoch, batch)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise KeyboardInterrupt


def fit(model, *callbacks, epochs=1, steps=4, **kwargs):
    x = np.tile([[1.0, 0.0]], (2 * steps, 1)).astype("float32")
    y = np.zeros((2 * steps, 1), "float32")
    kwargs = {"batch_size": 2, "verbose": 0, **kwargs}
    return model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **kwargs).history


# -- QuantizationScheduler ---------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_schedules_hit_both_ends_exactly(schedule):
    scheduler = QuantizationScheduler(start=2, end=10, schedule=schedule)
    values = [scheduler.strength_at(t) for t in range(13)]
    assert values[:3] == [0, 0, 0]
    assert values[10:] == [1, 1, 1]
    assert values == sorted(values)
    assert values[6] == pytest.approx(0.5)


@pytest.mark.parametrize(("nested", "jit_compile"), [(True, FAST), *((False, jit) for jit in JIT)])
def test_training_sees_the_strength_of_the_epoch(nested, jit_compile):
    model, _ = probe_model(jit_compile=jit_compile, nested=nested)
    seen = Seen()
    history = fit(model, QuantizationScheduler(start=1, end=3), seen, epochs=5, steps=2)
    expected = [0, 0, 0.5, 1, 1]
    np.testing.assert_allclose(seen.strengths, np.repeat(expected, 2), atol=1e-5)
    assert history["quantization_strength"] == expected


def test_training_sees_the_strength_of_the_step():
    model, layer = probe_model()
    seen = Seen()
    fit(model, QuantizationScheduler(end=8, update_freq=1), seen, epochs=3)
    np.testing.assert_allclose(seen.strengths, np.minimum(np.arange(12) / 8, 1), atol=1e-5)
    assert float(ops.convert_to_numpy(layer.quantization_strength)) == 1.0


def test_steps_between_updates_and_an_exact_end():
    model, _ = probe_model()
    seen = Seen()
    fit(model, QuantizationScheduler(end=7, update_freq=3), seen, epochs=1, steps=10)
    expected = np.array([0, 0, 0, 3, 3, 3, 6, 7, 7, 7]) / 7
    np.testing.assert_allclose(seen.strengths, expected, atol=1e-5)


@pytest.mark.skipif(BACKEND == "torch", reason="torch has no steps_per_execution")
def test_several_steps_in_one_execution():
    model, _ = probe_model()
    model.compile(keras.optimizers.SGD(0.0), loss=mean_output, steps_per_execution=2)
    history = fit(model, QuantizationScheduler(end=4, update_freq=1), epochs=2)
    np.testing.assert_allclose(history["loss"], [0.2 * (1 + 0.5) / 2, 0], atol=1e-6)


def test_initial_epoch():
    model, _ = probe_model()
    seen = Seen()
    fit(model, QuantizationScheduler(end=4), seen, epochs=4, steps=1, initial_epoch=2)
    np.testing.assert_allclose(seen.strengths, [0.5, 0.75], atol=1e-5)


@pytest.mark.parametrize("update_freq", ["epoch", 1])
def test_resumes_after_backup(tmp_path, update_freq):
    def callbacks():
        end = 4 if update_freq == "epoch" else 16
        scheduler = QuantizationScheduler(end=end, update_freq=update_freq)
        # The scheduler comes first: it must not rely on the state before the restoration.
        return [scheduler, keras.callbacks.BackupAndRestore(tmp_path / "backup")]

    whole, first, rest = Seen(), Seen(), Seen()
    fit(probe_model()[0], callbacks()[0], whole, epochs=5)
    with pytest.raises(KeyboardInterrupt):
        fit(probe_model()[0], *callbacks(), first, Interrupt(2, 1), epochs=5)
    fit(probe_model()[0], *callbacks(), rest, epochs=5)
    np.testing.assert_allclose(first.strengths[:8] + rest.strengths, whole.strengths, atol=1e-5)


def test_filters_and_shared_layers():
    keras.backend.clear_session(free_memory=False)
    x = keras.Input((1,))
    shared, other = bit_layer("shared"), bit_layer("other")
    model = keras.Model(x, other(shared(shared(x))))
    model.compile("sgd", "mse")
    for filters, expected in (
        ("oth", [1, 0]),
        (["^shared$"], [0, 1]),
        (lambda layer: True, [0, 0]),
    ):
        for layer in (shared, other):
            layer.quantization_strength.assign(1.0)
        scheduler = QuantizationScheduler(end=2, filters=filters)
        model.fit(np.ones((2, 1)), np.ones((2, 1)), verbose=0, callbacks=[scheduler])
        strengths = [
            float(ops.convert_to_numpy(layer.quantization_strength)) for layer in (shared, other)
        ]
        assert strengths == expected
    with pytest.raises(ValueError, match=r"matched by `filters`.*nothing"):
        fit_one(model, QuantizationScheduler(end=2, filters="nothing"))


def test_filters_see_the_paths_of_quantize_model():
    inner = keras.Sequential([keras.Input((1,)), bit_layer("layer")], name="inner")
    model = keras.Sequential([keras.Input((1,)), inner, bit_layer("layer")], name="outer")
    model.compile("sgd", "mse")
    for filters, expected in (("^layer$", [1, 0]), ("^inner/", [0, 1])):
        scheduler = QuantizationScheduler(end=2, filters=filters)
        fit_one(model, scheduler)
        strengths = [layer.quantization_strength for layer in (inner.layers[0], model.layers[1])]
        assert [float(ops.convert_to_numpy(strength)) for strength in strengths] == expected
        for strength in strengths:
            strength.assign(1.0)


def fit_one(model, callback):
    return model.fit(np.ones((2, 1)), np.ones((2, 1)), verbose=0, callbacks=[callback])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"end": 0}, "Received: end=0"),
        ({"start": 3, "end": 3}, "Received: start=3, end=3"),
        ({"start": -1, "end": 2}, "Received: start=-1"),
        ({"end": 2, "schedule": "steps"}, r"one of \('linear'.*Received: schedule='steps'"),
        ({"end": 2, "update_freq": 0}, "Received: update_freq=0"),
        ({"end": 2, "update_freq": "batch"}, "Received: update_freq='batch'"),
        ({"end": 2, "filters": 3}, "Received: 3 of type int"),
    ],
)
def test_scheduler_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationScheduler(**arguments)


def test_models_without_layers_and_unbuilt_models():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"at least one layer of `keras_bitnet.layers`"):
        fit_one(model, QuantizationScheduler(end=2))
    if BACKEND == "tensorflow":  # the others build before training begins
        model = keras.Sequential([bit_layer()])
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match="must be built before"):
            fit_one(model, QuantizationScheduler(end=2))


# -- TwoStageSchedule --------------------------------------------------------------------


def no_loss(y_true, y_pred):
    return ops.mean(y_pred) * 0.0


class Shrinking(keras.callbacks.Callback):
    """Where the loss is 0, a step multiplies the kernel by 1 - learning rate * weight decay."""

    def __init__(self):
        super().__init__()
        self.factors = []

    def on_train_batch_begin(self, batch, logs=None):
        self.old = self.weight()

    def on_train_batch_end(self, batch, logs=None):
        self.factors.append(self.weight() / self.old)

    def weight(self):
        return float(ops.convert_to_numpy(self.model.trainable_variables[0])[1, 0])


def expected_rates(total, warmup, switch, peak, second):
    for t in range(total):
        if t < warmup:
            yield peak * (t + 1) / (warmup + 1)
        elif t < switch:
            yield peak * (total - t) / (total - warmup)
        else:
            yield second * (total - t) / (total - switch)


def schedule(**kwargs):
    return TwoStageSchedule(
        0.5, **{"second_learning_rate": 0.1, "update_freq": 1, "warmup_steps": 2, **kwargs}
    )


@pytest.mark.parametrize(
    ("second_decay", "jit_compile"), [(0.2, FAST), *((0.0, jit) for jit in JIT)]
)
def test_two_stages_reach_the_weights(second_decay, jit_compile):
    optimizer = keras.optimizers.SGD(0.3, weight_decay=0.9)
    model, _ = probe_model(optimizer, jit_compile, loss=no_loss)
    seen = Shrinking()
    two_stage = schedule(weight_decay=0.4, second_weight_decay=second_decay)
    history = fit(model, two_stage, seen, epochs=3)
    rates = np.array(list(expected_rates(12, 2, 6, 0.5, 0.1)))
    decays = np.repeat([0.4, second_decay], 6)
    np.testing.assert_allclose(seen.factors, 1 - rates * decays, rtol=1e-5)
    np.testing.assert_allclose(history["weight_decay"], [0.4, second_decay, second_decay])
    np.testing.assert_allclose(history["learning_rate"], rates[3::4], rtol=1e-6)


def test_the_switch_is_exact_and_compiles_once(monkeypatch):
    model, _ = probe_model(keras.optimizers.SGD(0.3, weight_decay=0.4), loss=no_loss)
    made = []
    original = model.make_train_function
    monkeypatch.setattr(
        model, "make_train_function", lambda force=False: (made.append(force), original(force))[1]
    )
    seen = Shrinking()
    two_stage = schedule(weight_decay=0.4, update_freq=50, warmup_steps=0, switch=0.7)
    fit(model, two_stage, seen, epochs=2, steps=10)
    assert made.count(True) == 1
    np.testing.assert_array_equal(np.array(seen.factors) < 1, np.arange(20) < 14)


@pytest.mark.parametrize("jit_compile", JIT)
def test_decay_stops_although_the_old_function_is_kept(jit_compile):
    class Keep(Shrinking):
        kept = ()

        def on_train_batch_begin(self, batch, logs=None):
            self.kept = (*self.kept, self.model.train_function)
            super().on_train_batch_begin(batch, logs)

    model, _ = probe_model(keras.optimizers.SGD(0.3, weight_decay=0.4), jit_compile, loss=no_loss)
    seen = Keep()
    fit(model, seen, schedule(weight_decay=0.4), epochs=1, steps=8)
    np.testing.assert_array_equal(np.array(seen.factors) < 1, np.arange(8) < 4)
    assert "train_step" not in vars(model)


def test_two_stage_resumes_after_backup(tmp_path):
    def parts():
        model, _ = probe_model(keras.optimizers.AdamW(0.3, weight_decay=0.4), loss=no_loss)
        return model, schedule(weight_decay=0.4), Shrinking()

    model, two_stage, whole = parts()
    fit(model, two_stage, whole, epochs=4)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    model, two_stage, first = parts()
    with pytest.raises(KeyboardInterrupt):
        fit(model, two_stage, backup, first, Interrupt(2, 2), epochs=4)
    model, two_stage, rest = parts()
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    fit(model, two_stage, backup, rest, epochs=4)
    np.testing.assert_allclose(first.factors[:8] + rest.factors, whole.factors, rtol=1e-6)
    assert min(whole.factors[:8]) < 1
    assert set(whole.factors[8:]) == {1.0}


def test_two_stage_through_a_loss_scale_optimizer():
    inner = keras.optimizers.SGD(0.3, weight_decay=0.4)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    model, _ = probe_model(optimizer, loss=no_loss)
    seen = Shrinking()
    fit(model, schedule(weight_decay=0.2, warmup_steps=0), seen, steps=8)
    rates = np.array(list(expected_rates(8, 0, 4, 0.5, 0.1)))
    np.testing.assert_allclose(seen.factors, 1 - rates * np.repeat([0.2, 0], 4), rtol=1e-5)


def test_two_stage_counts_accumulated_steps():
    optimizer = keras.optimizers.SGD(0.3, weight_decay=0.4, gradient_accumulation_steps=2)
    model, _ = probe_model(optimizer, loss=no_loss)
    seen = Shrinking()
    fit(model, schedule(weight_decay=0.4, warmup_steps=0), seen, steps=16)
    np.testing.assert_array_equal(np.array(seen.factors[1::2]) < 1, np.arange(8) < 4)


def test_default_second_rate_is_a_drop():
    two_stage = TwoStageSchedule(1.5e-3, total_steps=1000, weight_decay=None)
    model, _ = probe_model()
    fit(model, two_stage)
    rates = [two_stage.learning_rate_at(t) for t in (0, 500, 750, 1000, 1200)]
    np.testing.assert_allclose(rates, [1.5e-3, 0.5e-3, 0.25e-3, 0, 0])
    assert two_stage.learning_rate_at(499) == pytest.approx(0.75e-3, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, "Received: learning_rate=0"),
        ({"second_learning_rate": -1}, "Received: second_learning_rate=-1"),
        ({"weight_decay": -0.1}, "Received: weight_decay=-0.1"),
        ({"switch": 1}, "Received: switch=1"),
        ({"total_steps": 0}, "Received: total_steps=0"),
        ({"warmup_steps": -1}, "Received: warmup_steps=-1"),
        ({"update_freq": 1.5}, "Received: update_freq=1.5"),
    ],
)
def test_two_stage_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        TwoStageSchedule(**{"learning_rate": 0.1, **arguments})


def test_two_stage_refuses_optimizers_and_lengths():
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    with pytest.raises(ValueError, match="compile the optimizer with a float"):
        fit(probe_model(keras.optimizers.SGD(rate))[0], schedule())
    model, _ = probe_model()
    with pytest.raises(ValueError, match="warmup_steps=2, switch at step 2 of 4"):
        fit(model, schedule())
    fit(model)
    with pytest.raises(ValueError, match=r"made 4 steps already.*total_steps=4"):
        fit(model, schedule(warmup_steps=0))
    model, _ = probe_model()
    del model.optimizer.weight_decay
    with pytest.raises(ValueError, match=r"no `weight_decay`.*optimizer=SGD"):
        fit(model, schedule(warmup_steps=0))

    two_stage = schedule()
    two_stage.set_params({"epochs": 3, "steps": None})
    two_stage.set_model(probe_model()[0])
    with pytest.raises(ValueError, match="number of steps of an epoch is unknown"):
        two_stage.on_train_begin()


@pytest.mark.skipif(BACKEND != "torch", reason="the others are compiled in the tests above")
def test_both_under_torch_compile(monkeypatch):
    # What matters is what dynamo captures; generating code with inductor takes a minute more.
    import torch

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    optimizer = keras.optimizers.SGD(0.3, weight_decay=0.4)
    model, layer = probe_model(optimizer, jit_compile=True, loss=no_loss)
    trace_once(model)
    seen, scheduler = Shrinking(), QuantizationScheduler(end=4, update_freq=1)
    fit(model, scheduler, schedule(weight_decay=0.4, warmup_steps=0), seen, steps=6)
    assert float(ops.convert_to_numpy(layer.quantization_strength)) == 1.0
    rates = np.array(list(expected_rates(6, 0, 3, 0.5, 0.1)))
    np.testing.assert_allclose(seen.factors, 1 - rates * np.repeat([0.4, 0], 3), rtol=1e-5)
