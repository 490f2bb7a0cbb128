"""The summary says what packing stores, and counts multiply-accumulates that can be checked."""

import json
import math
import sys
import threading

import keras
import numpy as np
import pytest
from helpers import once
from keras import layers

import keras_bitnet
from keras_bitnet import pack_model, quantize_model
from keras_bitnet.layers import BitEinsumDense, BitLayer, BitLinear
from keras_bitnet.quantizers import Ternary
from keras_bitnet.report.calls import intercepted

QUANTIZERS = ["binary", "ternary", "int2", "int4", "int8", Ternary(group_size=32)]


def data_of(model, **kwargs):
    return keras_bitnet.summary(model, as_data=True, **kwargs)


def row_of(model, path, **kwargs):
    return next(row for row in data_of(model, **kwargs).rows if row.path == path)


def macs_of(layer, input_shape):
    """The one row of a model that is just this layer."""
    inputs = keras.Input(input_shape)
    return data_of(keras.Model(inputs, layer(inputs))).rows[0].macs


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (100, 31), (257, 16)], ids=str)
def test_packed_bytes_are_those_that_packing_stores(quantizer, shape):
    k, n = shape
    model = keras.Sequential([keras.Input((k,)), BitLinear(n, weight_quantizer=quantizer)])
    packed = pack_model(model, verbose=0)
    layer = packed.layers[0]
    stored = layer.packed_kernel.nbytes + 4 * n
    before, after = data_of(model), data_of(packed)
    assert before.totals.bytes_packed == stored
    assert after.totals.bytes_packed == after.totals.bytes_stored == stored
    assert before.totals.parameters == after.totals.parameters == k * n + n
    assert before.totals.bytes_float32 == after.totals.bytes_float32 == 4 * (k * n + n)
    variables = sum(np.asarray(keras.ops.convert_to_numpy(v)).nbytes for v in model.weights)
    assert before.totals.bytes_stored == variables


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_disk_bytes_are_those_that_saving_writes(quantizer):
    model = keras.Sequential([keras.Input((33,)), BitLinear(20, weight_quantizer=quantizer)])
    packed = pack_model(model, verbose=0)
    store = {}
    packed.layers[0].save_own_variables(store)
    written = sum(np.asarray(keras.ops.convert_to_numpy(value)).nbytes for value in store.values())
    assert data_of(model).totals.bytes_on_disk == written
    assert data_of(packed).totals.bytes_on_disk == written


def test_bits_state_and_strength():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            BitLinear(8, norm="rms", quantization_strength=0.25, name="a"),
            BitLinear(4, weight_quantizer="int4", activation_quantizer=None, name="b"),
            layers.Dense(2, name="c"),
            layers.ReLU(name="d"),
        ]
    )
    a, b, c, d = data_of(model).rows
    assert (a.weight_bits, a.activation_bits, a.state) == (math.log2(3), 8, "QAT")
    assert a.strength == 0.25
    assert a.parameters_by_precision == {"W1.58": 64, "float32": 8 + 8}
    assert (b.weight_bits, b.activation_bits) == (4, 32)
    assert b.macs_by_precision == {"W4A32": 32}
    assert (c.weight_bits, c.activation_bits, c.state, c.strength) == (32, 32, "", None)
    assert (d.weight_bits, d.activation_bits, d.parameters, d.macs) == (None, None, 0, 0)
    model.layers[0].quantization_strength.assign(1.0)
    packed = row_of(pack_model(model, verbose=0), "a")
    assert (packed.state, packed.strength, packed.weight_bits) == ("packed", None, math.log2(3))


def test_macs_by_precision_and_low_bit_share():
    model = keras.Sequential(
        [keras.Input((5, 12)), BitLinear(16), layers.Dense(4), layers.Flatten(), layers.Dense(3)]
    )
    totals = data_of(model).totals
    assert totals.macs_by_precision == {"W1.58A8": 5 * 12 * 16, "float32": 5 * 16 * 4 + 20 * 3}
    assert totals.macs == 960 + 380
    assert totals.low_bit_share == pytest.approx(960 / 1340)
    assert totals.not_counted == []


def test_mixed_precision_is_named():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4, dtype="mixed_bfloat16"),
            BitLinear(2, activation_quantizer=None, dtype="mixed_bfloat16"),
        ]
    )
    dense, bit = data_of(model).rows
    assert (dense.weight_bits, dense.activation_bits) == (32, 16)
    assert dense.macs_by_precision == {"bfloat16": 24}
    assert bit.macs_by_precision == {"W1.58A16": 8}


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (layers.Dense(7), (3, 4, 5), 3 * 4 * 5 * 7),
        (layers.EinsumDense("abc,cde->abde", (6, 3, 2)), (6, 5), 6 * 5 * 3 * 2),
        (layers.EinsumDense("...x,xy->...y", 4), (6, 5), 6 * 5 * 4),
        (layers.EinsumDense("ab...,bc->ac...", (4, None)), (5, 6), 6 * 5 * 4),
        (layers.EinsumDense("abc,bce->ae", 4), (6, 5), 6 * 5 * 4),
        (BitEinsumDense("abc,cde->abde", (6, 3, 2)), (6, 5), 6 * 5 * 3 * 2),
        (BitEinsumDense("abc,bce->ae", 4), (6, 5), 6 * 5 * 4),
        (layers.Conv1D(4, 3), (10, 5), 8 * 4 * 3 * 5),
        (layers.Conv2D(4, 3, strides=2, padding="same"), (9, 9, 6), 25 * 4 * 9 * 6),
        (layers.Conv2D(4, (1, 3), groups=2), (9, 9, 6), 9 * 7 * 4 * 3 * 3),
        (layers.Conv3D(2, 2), (4, 4, 4, 3), 27 * 2 * 8 * 3),
        (layers.DepthwiseConv1D(3, depth_multiplier=2), (10, 5), 8 * 10 * 3),
        (layers.DepthwiseConv2D(3), (9, 9, 6), 49 * 6 * 9),
        (layers.SeparableConv2D(4, 3, depth_multiplier=2), (9, 9, 6), 49 * 12 * 9 + 49 * 12 * 4),
        (layers.SeparableConv1D(4, 3), (10, 5), 8 * 5 * 3 + 8 * 5 * 4),
        (layers.MaxPooling2D(), (8, 8, 2), 0),
        (layers.BatchNormalization(), (8,), 0),
        (layers.Conv2DTranspose(4, 3), (9, 9, 6), None),
        (layers.LSTM(4), (9, 6), 0),
    ],
    ids=lambda value: value.__class__.__name__ if isinstance(value, keras.Layer) else str(value),
)
def test_macs_of_a_layer(layer, shape, macs):
    assert macs_of(layer, shape) == macs


def test_attention_counts_projections_and_scores():
    query, value = keras.Input((10, 16)), keras.Input((7, 16))
    attention = layers.MultiHeadAttention(4, 8, name="att")
    data = data_of(keras.Model([query, value], attention(query, value)))
    macs = {row.path: row.macs for row in data.rows}
    assert macs == {
        "att": 4 * 10 * 7 * (8 + 8),
        "att/query": 10 * 16 * 32,
        "att/key": 7 * 16 * 32,
        "att/value": 7 * 16 * 32,
        "att/attention_output": 10 * 32 * 16,
    }
    (row,) = data_of(keras.Model([query, value], attention(query, value)), depth=0).rows
    assert row.macs == sum(macs.values())
    grouped = layers.GroupQueryAttention(head_dim=8, num_query_heads=4, num_key_value_heads=2)
    model = keras.Model([query, value], grouped(query, value))
    assert row_of(model, grouped.name).macs == 4 * 10 * 7 * 2 * 8


def test_quantized_attention_is_listed_and_rolled_up():
    inputs = keras.Input((6, 16))
    outputs = layers.MultiHeadAttention(2, 8, name="att")(inputs, inputs)
    model = quantize_model(keras.Model(inputs, outputs), verbose=0)
    inner = [row for row in data_of(model).rows if row.depth == 1]
    assert {row.path for row in inner} == {
        f"att/{name}" for name in ("query", "key", "value", "attention_output")
    }
    assert {(row.type, row.macs) for row in inner} == {("BitEinsumDense", 6 * 16 * 16)}
    (rolled,) = data_of(model, depth=0).rows
    assert rolled.parameters == model.layers[1].count_params() - 4  # the strengths
    assert (rolled.weight_bits, rolled.activation_bits, rolled.state) == (math.log2(3), 8, "QAT")
    assert data_of(model, depth=0).totals == data_of(model).totals


def test_shared_layer_counts_weights_once_and_macs_every_time():
    inputs = keras.Input((8,))
    dense = layers.Dense(8, name="shared")
    model = keras.Model(inputs, dense(dense(inputs)))
    (row,) = data_of(model).rows
    assert (row.calls, row.parameters, row.macs) == (2, 72, 2 * 64)


def test_nested_models_and_shared_ones():
    inner = keras.Sequential([keras.Input((8,)), BitLinear(8, name="a")], name="inner")
    inputs = keras.Input((8,))
    model = keras.Model(inputs, layers.Dense(2, name="head")(inner(inner(inputs))))
    data = data_of(model)
    assert [(row.path, row.depth, row.macs) for row in data.rows] == [
        ("inner", 0, 0),
        ("inner/a", 1, 128),
        ("head", 0, 16),
    ]
    rolled = data_of(model, depth=0)
    assert [(row.path, row.macs, row.state) for row in rolled.rows] == [
        ("inner", 128, "QAT"),
        ("head", 16, ""),
    ]
    assert rolled.totals == data.totals


@keras.saving.register_keras_serializable("test_summary")
class Block(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = BitLinear(4, name="first")
        self.more = [layers.Dense(3, name="second")]

    def call(self, x):
        return self.more[0](self.first(x))


def test_subclassed_model():
    model = Block()
    model(np.zeros((2, 6), "float32"))
    assert {row.path: row.macs for row in data_of(model).rows} == {"first": 24, "second": 12}
    deep = data_of(model, input_shape=(None, 5, 6))
    assert {row.path: row.macs for row in deep.rows} == {"first": 120, "second": 60}


def test_unknown_sizes_give_no_number():
    model = keras.Sequential(
        [keras.Input((None, 8)), BitLinear(4), layers.GlobalAveragePooling1D(), layers.Dense(2)]
    )
    data = data_of(model)
    assert [row.macs for row in data.rows] == [None, 0, 8]
    assert data.rows[0].output_shape == (None, None, 4)
    assert data.totals.not_counted == [data.rows[0].path]
    known = data_of(model, input_shape=(None, 10, 8))
    assert [row.macs for row in known.rows] == [320, 0, 8]


@pytest.mark.parametrize("wrap", [layers.TimeDistributed, lambda x: layers.Bidirectional(x)])
def test_layers_in_a_loop_give_no_number(wrap):
    inner = layers.Dense(4) if wrap is layers.TimeDistributed else layers.LSTM(4)
    inputs = keras.Input((5, 3))
    totals = data_of(keras.Model(inputs, wrap(inner)(inputs))).totals
    assert totals.macs == 0
    assert totals.not_counted


class Twice(layers.Dense):
    def call(self, inputs):
        return super().call(inputs) + super().call(inputs)


def test_a_subclass_that_computes_something_else_gives_no_number():
    inputs = keras.Input((5,))
    totals = data_of(keras.Model(inputs, Twice(3)(inputs))).totals
    assert (totals.macs, len(totals.not_counted)) == (0, 1)


def test_any_quantized_layer_is_counted():
    class Tall(BitLayer):
        def build(self, input_shape):
            self.build_kernel(input_shape[-1], 6)

        def call(self, x):
            return self.product(x)

    inputs = keras.Input((4, 5))
    (row,) = data_of(keras.Model(inputs, Tall()(inputs))).rows
    assert row.macs_by_precision == {"W1.58A8": 4 * 5 * 6}


def test_lora_is_counted_in_float():
    model = keras.Sequential([keras.Input((8,)), BitLinear(6, lora_rank=2, use_bias=False)])
    (row,) = data_of(model).rows
    assert row.macs_by_precision == {"W1.58A8": 48, "float32": 2 * (8 + 6)}
    assert row.parameters_by_precision == {"W1.58": 48, "float32": 2 * (8 + 6)}


def test_model_that_cannot_run_says_why():
    class Fixed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)
            self.dense.build((None, 4))
            self.built = True

        def call(self, x):
            return self.dense(x)

    data = data_of(Fixed())
    assert "input_shape" in data.totals.reason
    assert (data.rows[0].macs, data.rows[0].parameters) == (None, 15)
    assert "not known" in str(data)


def test_unbuilt_model_and_other_objects_are_refused():
    with pytest.raises(ValueError, match="Build it"):
        keras_bitnet.summary(keras.Sequential([BitLinear(3)]))
    with pytest.raises(ValueError, match="Received: int"):
        keras_bitnet.summary(3)


def test_json_holds_everything():
    model = keras.Sequential([keras.Input((8,)), BitLinear(4), layers.Dropout(0.5)])
    data = data_of(model)
    content = json.loads(data.to_json())
    assert content["totals"]["macs_by_precision"] == {"W1.58A8": 32}
    assert [row["type"] for row in content["rows"]] == ["BitLinear", "Dropout"]
    assert content["rows"][0]["weight_bits"] == math.log2(3)


def test_printing(capsys, monkeypatch):
    model = keras.Sequential([keras.Input((8,)), BitLinear(4, name="bits")], name="net")
    texts = []
    assert keras_bitnet.summary(model, print_fn=texts.append) is None
    assert len(texts) == 1
    assert all(part in texts[0] for part in ("Model: net", "bits (BitLinear)", "1.58/8", "W1.58A8"))
    keras_bitnet.summary(model)
    with_rich = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich", None)
    keras_bitnet.summary(model)
    plain = capsys.readouterr().out
    for out in (with_rich, plain):
        assert "bits (BitLinear)" in out
        assert "1.58/8" in out
        assert "100.0% low-bit" in out


@once
def test_summaries_of_several_threads_see_their_own_calls():
    stock, seen = keras.Layer.__call__, []
    model = keras.Sequential([keras.Input((4,)), BitLinear(3)])
    expected = data_of(model)
    found = []
    other = threading.Thread(target=lambda: found.append(data_of(model)))
    caller = threading.Thread(target=lambda: model(np.ones((1, 4), "float32")))

    def handle(stock, layer, args, kwargs):
        seen.append(layer)
        return stock(layer, *args, **kwargs)

    with intercepted(handle):
        other.start()
        caller.start()
        caller.join()
    other.join()
    assert not seen
    assert found == [expected]
    assert keras.Layer.__call__ is stock
