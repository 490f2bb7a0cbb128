"""Precisions that change while a model trains: when, what stays, and that it is resumed."""

import functools

import keras
import numpy as np
import pytest
from helpers import BACKEND, mean_error, trace_once
from keras import ops

from keras_bitnet import pack_model, quantize_model
from keras_bitnet.callbacks import AdaptivePrecision
from keras_bitnet.layers import BitEmbedding, BitLinear, BitSeparableConv2D
from keras_bitnet.models import BitNetBackbone
from keras_bitnet.quantizers import Int2, Int4, Int8, Ternary

JIT = [False] if BACKEND == "torch" else [False, True]  # torch.compile: one test, at the end
FAST = BACKEND == "jax"
RANDOM = np.random.default_rng(7)
X = RANDOM.normal(size=(16, 6)).astype("float32")
Y = RANDOM.normal(size=(16, 2)).astype("float32")


def make_model(quantizer="ternary", jit_compile=FAST, second=None, eagerly=False):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            BitLinear(8, activation="relu", weight_quantizer=quantizer, norm="rms", name="one"),
            BitLinear(2, weight_quantizer=second or quantizer, name="two"),
        ]
    )
    optimizer = keras.optimizers.AdamW(0.02, weight_decay=0.1)
    model.compile(optimizer, "mse", jit_compile=jit_compile, run_eagerly=eagerly)
    return model


def fit(model, *callbacks, epochs, **kwargs):
    kwargs = {"batch_size": 4, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **kwargs).history


def bits(model):
    return [round(layer.weight_quantizer.bits_per_weight, 2) for layer in model.layers]


class Watch(keras.callbacks.Callback):
    """Weights and the loss that the model computes, at the end of every epoch."""

    def __init__(self):
        super().__init__()
        self.bits, self.weights, self.logs = [], [], []

    def on_epoch_end(self, epoch, logs=None):
        model = self.model
        self.bits.append(bits(model))
        self.weights.append([ops.convert_to_numpy(w).copy() for w in model.weights])
        self.logs.append(dict(logs))


def by_hand(epochs, changes, **kwargs):
    """The same training with `fit` called anew, traced from scratch, wherever something changes."""
    model, losses = make_model(**kwargs), []
    for epoch in range(epochs):
        for name, quantizer in changes.get(epoch, {}).items():
            model.get_layer(name).change_precision(quantizer)
            model.train_function = None
            if BACKEND == "jax":
                import jax

                jax.clear_caches()
        losses += fit(model, epochs=epoch + 1, initial_epoch=epoch)["loss"]
    return model, losses


@pytest.mark.parametrize("jit_compile", JIT)
@pytest.mark.parametrize("eagerly", [False, True])
def test_the_compiled_step_follows(jit_compile, eagerly):
    if eagerly and jit_compile:
        pytest.skip("eager is not compiled")
    model, watch = make_model(jit_compile=jit_compile, eagerly=eagerly), Watch()
    callback = AdaptivePrecision(target=30, precisions=("ternary", "int4", "int8"), start=1)
    history = fit(model, callback, watch, epochs=4, validation_data=(X, Y))
    assert watch.bits == [[1.58, 1.58], [4, 4], [8, 8], [8, 8]]
    np.testing.assert_allclose(history["average_bits"], [np.log2(3), 4, 8, 8])
    assert history["precision_changes"] == [0, 2, 2, 0]
    changes = {1: {"one": "int4", "two": "int4"}, 2: {"one": "int8", "two": "int8"}}
    expected, losses = by_hand(4, changes)
    np.testing.assert_allclose(history["loss"], losses, rtol=2e-3)
    for ours, theirs in zip(model.weights, expected.weights, strict=True):
        ours, theirs = map(ops.convert_to_numpy, (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)
    # Validation in `fit` follows too, and so does `predict`.
    fresh = keras.models.clone_model(model)
    fresh.set_weights(model.get_weights())
    np.testing.assert_allclose(model.predict(X, verbose=0), fresh.predict(X, verbose=0), atol=1e-5)
    loss = float(np.mean((fresh.predict(X, verbose=0) - Y) ** 2))
    assert history["val_loss"][-1] == pytest.approx(loss, rel=1e-4)


def test_predict_made_before_follows():
    model = make_model()
    model.predict(X, verbose=0)
    model.evaluate(X, Y, verbose=0)
    fit(model, AdaptivePrecision(target=30, start=0), epochs=1)
    expected = ops.convert_to_numpy(model(X))
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, atol=1e-5)
    loss = float(np.mean((expected - Y) ** 2))
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(loss, rel=1e-4)


def test_lowers_what_is_better_than_needed_and_stays():
    model, watch = make_model("int8"), Watch()
    callback = AdaptivePrecision(target=12, hysteresis=3, precisions=("ternary", "int4", "int8"))
    fit(model, callback, watch, epochs=5)
    assert watch.bits == [[8, 8]] + [[4, 4]] * 4  # int4 has about 18 dB, ternary 6
    assert [(c["epoch"], c["before"], c["after"]) for c in callback.changes] == [(1, 8, 4)] * 2
    assert all(change["sqnr"] > 35 for change in callback.changes)


def test_hysteresis_keeps_a_layer_from_going_up_and_down():
    """int4 reaches the target, but not by the margin: it is neither raised nor gone down to."""
    model = make_model("int4")
    probe = AdaptivePrecision(target=0, precisions=("int4", "int8"), log_layers=True)
    history = fit(model, probe, epochs=2)
    reached = min(history[f"{layer.name}/sqnr"][-1] for layer in model.layers)
    assert 12 < reached < 30
    for start, expected in (("int4", [4, 4]), ("int8", [8, 8])):
        model = make_model(start)
        callback = AdaptivePrecision(target=reached - 6, hysteresis=20, precisions=("int4", "int8"))
        fit(model, callback, epochs=4)
        assert bits(model) == expected
        assert callback.changes == []


def test_bounds_schedule_and_filters():
    model, watch = make_model("ternary"), Watch()
    callback = AdaptivePrecision(
        target=90, min_bits=4, max_bits=4, start=2, every=2, filters="one", log_layers=True
    )
    history = fit(model, callback, watch, epochs=5)
    assert watch.bits == [[1.58, 1.58]] * 2 + [[4, 1.58]] * 3
    np.testing.assert_allclose(history["one/bits"], [np.log2(3)] * 2 + [4] * 3)


@pytest.mark.parametrize("budget", ["5 bits", "260 B"])
def test_a_budget_is_kept(budget):
    model, watch = make_model("ternary"), Watch()
    callback = AdaptivePrecision(target=30, budget=budget, precisions=("ternary", "int4", "int8"))
    history = fit(model, callback, watch, epochs=5)
    final = watch.bits[-1]
    assert sorted(final) != [8, 8]
    assert max(final) > 1.58
    if budget == "5 bits":
        assert max(history["average_bits"]) <= 5
    packed = pack_model(model, verbose=0)
    if budget != "5 bits":
        assert sum(ops.convert_to_numpy(w).nbytes for w in packed.weights) <= 260
    assert watch.bits[-2] == final  # it has settled


def test_a_model_over_its_budget_is_lowered():
    model = make_model("int8")
    callback = AdaptivePrecision(target=90, budget="4.5 bits", start=0, precisions=("int4", "int8"))
    history = fit(model, callback, epochs=2)
    assert max(history["average_bits"]) <= 4.5
    assert callback.changes


def test_products_are_measured_on_data():
    """A kernel row that meets no input does not count, however large it is."""
    x = X.copy()
    x[:, 0] = 0
    results = []
    for data in (None, x):
        layer = BitLinear(2, weight_quantizer="int4")
        model = keras.Sequential([keras.Input((6,)), layer])
        model.compile("sgd", "mse", jit_compile=False)
        kernel = ops.convert_to_numpy(layer.kernel).copy()
        kernel[0] *= 50
        layer.kernel.assign(kernel)
        callback = AdaptivePrecision(
            target=0, start=0, precisions=("int4", "int8"), data=data, log_layers=True
        )
        results.append(fit(model, callback, epochs=1)[f"{layer.name}/sqnr"][0])
    assert results[1] < results[0] - 10


@pytest.mark.parametrize("first", [True, False])
def test_resumes_after_backup(tmp_path, first):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3:
                raise KeyboardInterrupt

    def callbacks():
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        adaptive = AdaptivePrecision(target=30, start=2, precisions=("ternary", "int4", "int8"))
        return [adaptive, backup] if first else [backup, adaptive]

    whole, rest = Watch(), Watch()
    fit(make_model(), callbacks()[0 if first else 1], whole, epochs=6)
    assert whole.bits == [[1.58, 1.58]] * 2 + [[4, 4]] + [[8, 8]] * 3
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), *callbacks(), Interrupt(), epochs=6)
    model = make_model()
    history = fit(model, *callbacks(), rest, epochs=6)
    assert rest.bits == whole.bits[3:]
    for ours, theirs in zip(rest.weights[-1], whole.weights[-1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        history["loss"], [logs["loss"] for logs in whole.logs[3:]], rtol=1e-3
    )


def test_files_hold_the_precisions(tmp_path):
    model = make_model()
    callback = AdaptivePrecision(target=30, precisions=("ternary", "int4"))
    fit(model, callback, epochs=2)
    assert bits(model) == [4, 4]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    other = make_model()
    other.load_weights(tmp_path / "model.weights.h5")
    packed = pack_model(model, verbose=0)
    for one in (loaded, other, packed):
        assert bits(one) == [4, 4]
        np.testing.assert_allclose(*map(ops.convert_to_numpy, (one(X), model(X))), atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_a_checkpoint_of_an_earlier_epoch_brings_its_precisions_back(learned, tmp_path):
    """The first epoch too, before which nothing was changed."""
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "{epoch}.weights.h5", save_weights_only=True
    )
    model = make_model(Int4(scale="learned") if learned else "int4", jit_compile=False)
    outputs = []
    predict = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: outputs.append(model.predict(X, verbose=0))
    )
    adaptive = AdaptivePrecision(target=-99, hysteresis=0, precisions=("ternary", "int4"))
    fit(model, adaptive, checkpoint, predict, epochs=2)
    assert bits(model) == [1.58, 1.58]
    model.load_weights(tmp_path / "1.weights.h5")
    assert bits(model) == [4, 4]
    np.testing.assert_allclose(model.predict(X, verbose=0), outputs[0], rtol=1e-5, atol=1e-6)
    assert mean_error(outputs[1], outputs[0]) > 0.05


def test_learned_scales_start_again_from_the_kernel():
    model = make_model(Int4(scale="learned"))
    callback = AdaptivePrecision(target=30, precisions=("ternary", "int4", "int8"))
    fit(model, callback, epochs=2)
    assert bits(model) == [8, 8]
    assert model.get_layer("one").weight_quantizer == Int8(scale="learned")
    scale = ops.convert_to_numpy(model.get_layer("one").learned_scale())
    kernel = np.abs(ops.convert_to_numpy(model.get_layer("one").kernel)).max(0)
    np.testing.assert_allclose(scale[0] * 127, kernel, rtol=0.6)


def test_blocks_change_as_a_whole(tmp_path):
    inputs = keras.Input((7, 7, 2))
    x = BitSeparableConv2D(3, 3, name="block")(inputs)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    model.compile("sgd", "mse", jit_compile=False)
    x, y = RANDOM.normal(size=(4, 7, 7, 2)).astype("float32"), np.zeros((4, 3), "float32")
    callback = AdaptivePrecision(target=30, start=0, precisions=("ternary", "int4"))
    model.fit(x, y, epochs=1, callbacks=[callback], verbose=0)
    block = model.get_layer("block")
    assert [one.weight_quantizer for one in (block, block.depthwise, block.pointwise)] == [
        Int4()
    ] * 3
    packed = pack_model(model, verbose=0)
    assert packed.get_layer("block").pointwise.weight_quantizer == Int4()
    assert mean_error(*map(ops.convert_to_numpy, (packed(x), model(x)))) < 1e-2
    model.save_weights(tmp_path / "model.weights.h5")
    other = keras.Model.from_config(model.get_config())
    other.get_layer("block").change_precision("ternary")
    other.load_weights(tmp_path / "model.weights.h5")
    assert other.get_layer("block").weight_quantizer == Int4()
    np.testing.assert_allclose(*map(ops.convert_to_numpy, (other(x), model(x))), atol=1e-6)


def test_embeddings_and_attention():
    tokens = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(9, 8, name="table")(tokens)
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    model = quantize_model(keras.Model(tokens, x), "ternary", verbose=0)
    model.compile("sgd", "mse", jit_compile=False)
    x, y = RANDOM.integers(0, 9, (4, 5)).astype("int32"), np.zeros((4, 5, 8), "float32")
    callback = AdaptivePrecision(target=30, start=0, data=x, precisions=("ternary", "int8"))
    model.fit(x, y, epochs=1, callbacks=[callback], verbose=0)
    assert len(callback.changes) == 5
    table = model.get_layer("table")
    assert (type(table), table.weight_quantizer) == (BitEmbedding, Int8())
    packed = pack_model(model, verbose=0)
    assert mean_error(*map(ops.convert_to_numpy, (packed(x), model(x)))) < 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hysteresis": -1}, "hysteresis=-1"),
        ({"start": -1}, "start=-1"),
        ({"every": 0}, "every=0"),
        ({"precisions": ("int3",)}, "Received: 'int3'"),
        ({"min_bits": 5, "max_bits": 6}, "min_bits=5, max_bits=6"),
        ({"budget": "3ms"}, "budget='3ms'"),
        ({"budget": 3}, "budget=3"),
        ({"filters": "("}, "no valid regular expression"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptivePrecision(**arguments)


def test_refuses_when_training_begins():
    with pytest.raises(ValueError, match=r"lowest of `precisions` take 4.00 bits"):
        fit(make_model(), AdaptivePrecision(budget="2 bits", min_bits=4), epochs=1)
    with pytest.raises(ValueError, match=r"cannot change from Ternary.*to Int2"):
        fit(make_model(), AdaptivePrecision(precisions=("ternary", Int2())), epochs=1)
    with pytest.raises(ValueError, match="at least one layer"):
        fit(make_model(), AdaptivePrecision(filters="three"), epochs=1)
    packed = pack_model(make_model("int8"), verbose=0)
    with pytest.raises(ValueError, match="a packed layer cannot change"):
        packed.layers[0].change_precision(Ternary())
    backbone = BitNetBackbone(11, 1, 2, 1, 8, 16)
    backbone.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"BitNetBackbone .* has one precision"):
        backbone.fit(np.zeros((2, 3), "int32"), np.zeros((2, 3, 8)), verbose=0,
                     callbacks=[AdaptivePrecision()])  # fmt: skip


@pytest.mark.skipif(BACKEND != "torch", reason="the others are compiled in the tests above")
def test_changes_under_torch_compile(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model, watch = make_model(jit_compile=True), Watch()
    trace_once(model)
    fit(model, AdaptivePrecision(target=30, precisions=("ternary", "int8")), watch, epochs=2)
    _, losses = by_hand(2, {1: {"one": "int8", "two": "int8"}}, jit_compile=False)
    assert watch.bits == [[1.58, 1.58], [8, 8]]
    np.testing.assert_allclose([logs["loss"] for logs in watch.logs], losses, rtol=2e-3)
