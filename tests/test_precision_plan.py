"""Plans: rules by path, JSON and Keras serialization, what `quantize_model` makes of them."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_bitnet import PrecisionPlan, quantize_model
from keras_bitnet.kernels import select
from keras_bitnet.layers import BitEmbedding, BitLinear
from keras_bitnet.precision import runnable_plan
from keras_bitnet.quantizers import ActivationInt4, Int2, Int4, Int8, Ternary

SPECS = [
    "ternary",
    None,
    Int4(granularity="tensor"),
    Ternary(scale="learned"),
    {"weight_quantizer": Int8(group_size=32), "activation_quantizer": ActivationInt4()},
    {"activation_quantizer": None, "norm": "rms"},
    {"weight_quantizer": Int2(levels="integer"), "rotation": "hadamard", "kept_channels": 2},
]


def make_model():
    inputs = keras.Input((6, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="mha")(inputs, inputs)
    x = keras.layers.Dense(8, "relu", name="body")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_is_the_same_after_json_and_keras(spec, tmp_path):
    plan = PrecisionPlan({"attention/": spec, "^head$": "int8"}, default=spec)
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    config = keras.saving.serialize_keras_object(plan)
    assert keras.saving.deserialize_keras_object(config) == plan
    plan.save(tmp_path / "plan.json")
    loaded = PrecisionPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    assert loaded.spec_for("encoder/attention/query") == plan.spec_for("x/attention/key")
    assert eval(repr(plan), {"PrecisionPlan": PrecisionPlan}) == plan


def test_the_first_rule_that_matches_decides():
    plan = PrecisionPlan([("mha/query", "int4"), ("mha/", "int8"), ("^head$", None)], "ternary")
    model = quantize_model(make_model(), plan, verbose=0)
    found = {
        inner: getattr(model.get_layer("mha"), f"_{inner}_dense") for inner in ("query", "key")
    }
    assert found["query"].weight_quantizer == Int4()
    assert found["key"].weight_quantizer == Int8()
    assert model.get_layer("body").weight_quantizer == Ternary()
    assert type(model.get_layer("head")) is keras.layers.Dense


def test_a_quantized_model_saves_without_the_plan(tmp_path):
    plan = PrecisionPlan({"mha/": Int4(group_size=32), "body": {"norm": "rms"}})
    model = quantize_model(make_model(), plan, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("body").norm == "rms"
    x = np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32")
    np.testing.assert_allclose(*map(ops.convert_to_numpy, (model(x), loaded(x))), atol=1e-6)


def test_warns_of_rules_that_match_nothing():
    with pytest.warns(UserWarning, match=r"match no layer: \['haed'\].*'head'"):
        quantize_model(make_model(), PrecisionPlan({"haed": "int4"}, "ternary"), verbose=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a(": "int4"},), r"no valid regular expression.*Received: 'a\('"),
        (({3: "int4"},), "begins with a regular expression. Received: 3"),
        (({"a": "int3"},), "The spec of 'a' is not valid.*Received: 'int3'"),
        (({"a": {"weight": "int4"}},), r"Received: \['weight'\]"),
        (({"a": {"activation_quantizer": "int5"}},), "Received: 'int5'"),
        ((["ab"],), "list of such pairs. Received"),
        (({}, "nope"), "The spec of the default is not valid"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrecisionPlan(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "Expected JSON with"),
        ("[1]", "Expected JSON with"),
        ('{"format": "keras_bitnet.PrecisionPlan", "version": 7}', "Received: version=7"),
        ('{"format": "keras_bitnet.PrecisionPlan", "version": 1, "rule": {}}', r"\['rule'\]"),
        ("{", "holds no precision plan"),
    ],
)
def test_files_that_hold_no_plan(text, message, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        PrecisionPlan.load(tmp_path / "plan.json")


def refusing(*bits):
    """A table whose one fast kernel refuses these widths."""

    def refuse(problem):
        if problem.activation_bits is None:
            return "the activations are float"
        return f"no kernel of {problem.bits} bits" if problem.bits in bits else None

    fast = select.Kernel("fast", refuse, select.reference_matmul)
    return {keras.backend.backend(): (fast, select.REFERENCE)}


def test_what_kernels_refuse_falls_to_the_next_width(monkeypatch):
    monkeypatch.setattr(select, "TABLES", refusing(1, 2))
    plan = PrecisionPlan({"head": None, "body": "int8"}, default={"weight_quantizer": "binary"})
    found, falls = runnable_plan(make_model(), plan)
    assert {fall.path for fall in falls} == {
        f"mha/{name}" for name in ("query", "key", "value", "attention_output")
    }
    assert {(fall.wanted, fall.taken) for fall in falls} == {("binary", "int4")}
    assert falls[0].reasons == (
        ("binary/fast", "no kernel of 1 bits"),
        ("ternary/fast", "no kernel of 2 bits"),
        ("int2/fast", "no kernel of 2 bits"),
    )
    assert found.spec_for("mha/query") == PrecisionPlan(default="int4").default
    assert found.spec_for("body") == plan.spec_for("body")
    assert found.spec_for("head") is None


def test_where_no_width_runs_the_plan_stays(monkeypatch):
    monkeypatch.setattr(select, "TABLES", refusing(1, 2, 4, 8))
    found, falls = runnable_plan(make_model(), PrecisionPlan(default="ternary"))
    assert falls == []
    assert found.spec_for("body") == PrecisionPlan(default="ternary").default


def test_layers_that_use_no_kernel_fall_nowhere(monkeypatch):
    """A lookup and a depthwise convolution; the pointwise product of a separable one falls."""
    monkeypatch.setattr(select, "TABLES", refusing(2))
    tokens = keras.Sequential([keras.Input((5,), dtype="int32"), keras.layers.Embedding(9, 4)])
    assert runnable_plan(tokens, PrecisionPlan(default="ternary"))[1] == []
    images = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.DepthwiseConv2D(3, name="deep"),
            keras.layers.SeparableConv2D(4, 3, name="separable"),
        ]
    )
    falls = runnable_plan(images, PrecisionPlan(default="ternary"))[1]
    assert [(fall.path, fall.taken) for fall in falls] == [("separable", "int4")]


def test_a_plan_for_layers_that_lack_some_arguments():
    plan = PrecisionPlan(default={"norm": "rms", "activation_quantizer": "int4"})
    model = keras.Sequential(
        [keras.Input((5,), dtype="int32"), keras.layers.Embedding(9, 4), keras.layers.Dense(2)]
    )
    embedding, dense = quantize_model(model, plan, verbose=0).layers
    assert (type(embedding), embedding.activation_quantizer) == (BitEmbedding, None)
    assert (type(dense), dense.norm) == (BitLinear, "rms")
    assert dense.activation_quantizer == ActivationInt4()
