"""Statistics of quantized layers: their values, and where they go."""

import csv
import importlib.machinery
import sys
import types

import keras
import numpy as np
import pytest
from helpers import BACKEND, decibel
from keras import ops

from keras_bitnet.callbacks import (
    QuantizationStats,
    activation_statistics,
    layer_statistics,
    quantization_stats,
    writers,
)
from keras_bitnet.callbacks.statistics import layer_codes
from keras_bitnet.layers import BitLinear
from keras_bitnet.quantizers import Ternary

X = np.random.default_rng(5).normal(size=(8, 6)).astype("float32")


def built(kernel, **kwargs):
    kernel = np.asarray(kernel, "float32")
    layer = BitLinear(kernel.shape[1], **kwargs)
    layer.build((None, kernel.shape[0]))
    layer.kernel.assign(kernel)
    layer.reset_scale()
    return layer


def make_model(learning_rate=0.1, jit_compile=BACKEND == "jax"):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    inner = keras.Sequential([keras.Input((6,)), BitLinear(5, norm="rms", name="deep")], name="in")
    last = BitLinear(3, weight_quantizer="int8", activation_quantizer=None, name="last")
    model = keras.Sequential([keras.Input((6,)), inner, last])
    model.compile(keras.optimizers.SGD(learning_rate), "mse", jit_compile=jit_compile)
    return model


def fit(model, *callbacks, epochs=2, **kwargs):
    y = np.ones((8, 3), "float32")
    kwargs = {"batch_size": 4, "verbose": 0, **kwargs}
    return model.fit(X, y, epochs=epochs, callbacks=list(callbacks), **kwargs).history


# -- the functions -----------------------------------------------------------------------


def test_ternary_statistics_by_hand():
    kernel = np.array([[0.9, -0.1], [-0.5, 0.1], [-0.4, 0.4]], "float32")
    found = layer_statistics(built(kernel))
    scale = np.mean(np.abs(kernel))  # 0.4
    rounded = np.array([[0.4, 0], [-0.4, 0], [-0.4, 0.4]])
    assert found["share_zero"] == pytest.approx(2 / 6)
    assert found["share_lowest"] == pytest.approx(2 / 6)
    assert found["share_highest"] == pytest.approx(2 / 6)
    assert found["saturation"] == pytest.approx(1 / 6)  # 0.9 alone lies beyond 1.5 x 0.4
    assert found["absmax"] == pytest.approx(0.9)
    assert found["scale"] == pytest.approx(scale)
    assert found["weight_sqnr"] == pytest.approx(decibel(kernel, kernel - rounded), rel=1e-4)
    assert found["flip_rate"] is None


def test_flip_rate():
    layer = built([[0.9, -0.1], [-0.5, 0.1]])
    codes = layer_codes(layer)
    assert layer_statistics(layer, codes)["flip_rate"] == 0
    layer.kernel.assign([[0.9, -0.1], [0.5, 0.1]])
    assert layer_statistics(layer, codes)["flip_rate"] == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match=r"Received: previous_codes.shape=\(1, 2\)"):
        layer_statistics(layer, codes[:1])


@pytest.mark.parametrize("quantizer", ["binary", "int2", "int4", "int8"])
def test_other_grids(quantizer):
    kernel = np.random.default_rng(2).normal(size=(70, 8)).astype("float32")
    layer = built(kernel, weight_quantizer=quantizer)
    found = layer_statistics(layer)
    rounded = ops.convert_to_numpy(layer.fake_quantized_matrix())
    assert found["weight_sqnr"] == pytest.approx(decibel(kernel, kernel - rounded), rel=1e-3)
    codes = layer_codes(layer)
    ends = (1, 15) if quantizer == "int4" else (1, 255) if quantizer == "int8" else None
    lowest, highest = ends or (codes.min(), codes.max())
    assert found["share_lowest"] == pytest.approx(np.mean(codes == lowest))
    assert found["share_highest"] == pytest.approx(np.mean(codes == highest))
    assert (found["share_zero"] == 0) == (quantizer in ("binary", "int2"))
    assert (found["saturation"] > 0) == (quantizer == "binary")  # the others reach the largest


def test_groups_and_zeros():
    kernel = np.zeros((70, 2), "float32")
    kernel[:32] = 4.0
    found = layer_statistics(built(kernel, weight_quantizer=Ternary(group_size=32)))
    assert found["weight_sqnr"] == float("inf")
    assert found["share_zero"] == pytest.approx(38 / 70)
    assert layer_statistics(built(np.zeros((4, 2))))["weight_sqnr"] == float("inf")


def test_a_layer_without_float_kernel():
    layer = BitLinear(2, packed=True)
    layer.build((None, 4))
    with pytest.raises(ValueError, match=r"no float kernel.*packed=True"):
        layer_statistics(layer)


def test_activation_statistics():
    model = make_model()
    deep, last = model.get_layer("in").get_layer("deep"), model.get_layer("last")
    found = activation_statistics(model, X, [deep, last])
    seen = ops.convert_to_numpy(deep.normalization(X))
    rounded = ops.convert_to_numpy(deep.activation_quantizer.fake_quantize(ops.array(seen)))
    assert found[0]["activation_absmax"] == pytest.approx(np.abs(seen).max(), rel=1e-5)
    assert found[0]["activation_sqnr"] == pytest.approx(decibel(seen, seen - rounded), rel=1e-3)
    hidden = ops.convert_to_numpy(model.get_layer("in")(X))
    assert found[1] == {"activation_absmax": pytest.approx(np.abs(hidden).max(), rel=1e-5)}
    for layer in (deep, last):
        assert "product" not in vars(layer)
    unused = built(np.ones((6, 2)))
    assert activation_statistics(model, X, [unused]) == [{}]


def test_a_failing_model_leaves_no_probe():
    model = make_model()
    last = model.get_layer("last")
    with pytest.raises(Exception):  # noqa: B017, PT011 (each backend has its own)
        activation_statistics(model, X[:, :2], [last])
    assert "product" not in vars(last)


# -- the callback ------------------------------------------------------------------------


@pytest.mark.parametrize("jit_compile", [False] if BACKEND == "torch" else [False, True])
def test_logs_and_statistics(jit_compile):
    model = make_model(jit_compile=jit_compile)
    log = ("flip_rate", "weight_sqnr", "activation_sqnr")
    stats = QuantizationStats(data=X, log=log, log_layers=True)
    start = [layer_codes(layer) for layer in (model.layers[0].layers[0], model.layers[1])]
    history = fit(model, stats, epochs=1, validation_data=(X, np.ones((8, 3))))
    deep, last = stats.statistics
    assert (deep["epoch"], deep["layer"], last["layer"]) == (0, "in/deep", "last")
    for row, layer, codes in zip(
        stats.statistics, (model.layers[0].layers[0], model.layers[1]), start, strict=True
    ):
        expected = layer_statistics(layer, codes)
        assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert last["flip_rate"] > 0
    assert history["flip_rate"] == [pytest.approx((deep["flip_rate"] + last["flip_rate"]) / 2)]
    assert history["last/flip_rate"] == [last["flip_rate"]]
    assert history["activation_sqnr"] == [deep["activation_sqnr"]]
    assert "last/activation_sqnr" not in history
    assert "share_zero" not in history


def test_no_flips_without_training():
    history = fit(make_model(learning_rate=0.0), QuantizationStats())
    assert history["flip_rate"] == [0, 0]
    assert set(history) == {"loss", "share_zero", "flip_rate", "weight_sqnr"}


def test_names_that_repeat():
    class Pair(keras.Model):  # Keras takes two layers of one name here alone
        def __init__(self):
            super().__init__()
            self.first, self.second = BitLinear(6, name="same"), BitLinear(3, name="same")

        def call(self, x):
            return self.second(self.first(x))

    model = Pair()
    model(X)
    model.compile("sgd", "mse")
    stats = QuantizationStats(log_layers=True, log=["scale"])
    history = fit(model, stats, epochs=1)
    labels = [row["layer"] for row in stats.statistics]
    assert labels == ["same", "same_1"]
    assert {f"{label}/scale" for label in labels} < set(history)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_one_header_and_resumes(tmp_path):
    path = tmp_path / "folder" / "stats.csv"
    model = make_model()
    stats = QuantizationStats(data=X, csv_path=path)
    fit(model, stats, epochs=2)
    with open(path, "a") as file:
        file.write("2,in/deep,0.1")  # the writing of a row was interrupted
    fit(model, QuantizationStats(data=X, csv_path=path), epochs=3, initial_epoch=2)
    rows = rows_of(path)
    assert [(row["epoch"], row["layer"]) for row in rows] == [
        (str(epoch), layer) for epoch in range(3) for layer in ("in/deep", "last")
    ]
    assert float(rows[2]["scale"]) == stats.statistics[0]["scale"]
    assert rows[1]["activation_sqnr"] == ""
    with pytest.raises(ValueError, match="holds other columns"):
        fit(model, QuantizationStats(csv_path=path))


class FakeWriter:
    def __init__(self, log_dir):
        self.log_dir, self.scalars, self.closed = log_dir, [], False
        FakeWriter.last = self

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_tensorboard_through_tensorboardx(tmp_path, monkeypatch):
    fake = types.ModuleType("tensorboardX")
    fake.SummaryWriter = FakeWriter
    fake.__spec__ = importlib.machinery.ModuleSpec("tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    stats = QuantizationStats(log_dir=tmp_path)
    fit(make_model(), stats)
    writer = FakeWriter.last
    assert writer.closed
    assert writer.log_dir == str(tmp_path)
    assert ("last/scale", stats.statistics[1]["scale"], 1) in writer.scalars
    assert len(writer.scalars) == 2 * 2 * len(stats.columns)


def test_tensorboard_needs_a_writer(monkeypatch):
    monkeypatch.setattr(writers, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install tensorboardX"):
        QuantizationStats(log_dir="logs")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="importing TensorFlow takes long")
def test_tensorboard_through_tensorflow(tmp_path, monkeypatch):
    import tensorflow as tf

    found = writers.find_spec
    monkeypatch.setattr(
        writers, "find_spec", lambda name: found(name) if name == "tensorflow" else None
    )
    stats = QuantizationStats(log_dir=tmp_path)
    fit(make_model(), stats, epochs=1)
    (path,) = tmp_path.iterdir()
    events = [
        (value.tag, tf.make_ndarray(value.tensor).item(), event.step)
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    ]
    assert len(events) == 2 * len(stats.columns)
    assert ("last/scale", pytest.approx(stats.statistics[1]["scale"]), 0) in events


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log": ["entropy"]}, r"names out of \('share_zero'.*Received: log=\['entropy'\]"),
        ({"log": ["activation_sqnr"]}, "activations need `data`"),
        ({"log": "scale"}, "Received: log='scale'"),
        ({"filters": 1}, "Received: 1 of type int"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationStats(**arguments)


def test_statistics_are_known():
    found = layer_statistics(built(np.ones((4, 2))))
    assert tuple(found) == quantization_stats.WEIGHT_STATISTICS
