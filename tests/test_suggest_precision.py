"""The search: optimal, within its budget to the byte, and clear about what it cannot do."""

import itertools
import json
import warnings
import xml.etree.ElementTree

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_bitnet import PrecisionPlan, benchmark_layers, pack_model, quantize_model
from keras_bitnet import suggest_precision as suggest
from keras_bitnet.kernels import select
from keras_bitnet.layers import BitLinear
from keras_bitnet.precision import Budget
from keras_bitnet.precision.knapsack import solve
from keras_bitnet.quantizers import Int2

RANDOM = np.random.default_rng(3)
X = RANDOM.normal(size=(24, 20)).astype("float32")
Y = RANDOM.integers(0, 3, 24)


def make_mlp():
    model = keras.Sequential(
        [
            keras.Input((20,)),
            layers.Dense(33, "relu", name="a"),
            layers.Dense(16, "relu", name="b"),
            layers.Dense(3, name="c"),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def make_tokens():
    """A tied embedding, used in both directions, and one that is only looked up."""
    tokens = keras.Input((6,), dtype="int32")
    tied = layers.ReversibleEmbedding(20, 8, name="tied")
    x = layers.Add()([tied(tokens), layers.Embedding(20, 8, name="lookup")(tokens)])
    x = layers.Dense(8, name="dense")(x)
    return keras.Model(tokens, tied(x, reverse=True))


def make_images():
    return keras.Sequential(
        [
            keras.Input((7, 7, 3)),
            layers.SeparableConv2D(8, 3, name="separable"),
            layers.Conv2D(4, 3, name="conv"),
            layers.Flatten(),
            layers.Dense(3, name="dense"),
        ]
    )


MODELS = {
    "mlp": (make_mlp, X),
    "tokens": (make_tokens, RANDOM.integers(0, 20, (8, 6)).astype("int32")),
    "images": (make_images, RANDOM.normal(size=(4, 7, 7, 3)).astype("float32")),
}


def weights_of(model):
    return [ops.convert_to_numpy(w).copy() for w in model.weights]


def same(model, weights):
    return all(map(np.array_equal, weights_of(model), weights))


# -- the knapsack ----------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_the_knapsack_is_optimal(rng, spread):
    for _ in range(12):
        errors = 10 ** (spread * rng.uniform(-1, 0, (4, 3)))
        costs = rng.uniform(1, 5, (4, 3))
        choices = list(itertools.product(range(3), repeat=4))
        total = np.array([costs[range(4), c].sum() for c in choices])
        lost = np.array([errors[range(4), c].sum() for c in choices])
        limit = rng.uniform(total.min(), total.max())
        chosen = solve(errors, costs, limit)
        assert costs[range(4), chosen].sum() <= limit * (1 + 1e-8)
        best = lost[total <= limit].min()
        assert errors[range(4), chosen].sum() == pytest.approx(best, rel=1e-6)


def test_the_knapsack_takes_the_cheaper_of_equals_and_only_what_is_allowed():
    errors, costs = np.zeros((2, 3)), np.array([[3.0, 1, 2]] * 2)
    assert solve(errors, costs, 6).tolist() == [1, 1]
    allowed = np.array([[True, False, True], [False, True, False]])
    assert solve(errors, costs, 6, allowed).tolist() == [2, 1]


# -- budgets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["fastest", "smallest"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_the_packed_model(name, memory):
    make, x = MODELS[name]
    model = make()
    before = weights_of(model)
    wide = suggest(model, x, "1 MB", memory=memory, objective="output", verbose=0).search
    assert same(model, before)
    assert wide.smallest < wide.largest == wide.cost
    budget = (wide.smallest + wide.largest) / 2
    plan = suggest(model, x, f"{budget} B", memory=memory, objective="output", verbose=0)
    packed = pack_quietly(quantize_model(model, plan, verbose=0), memory)
    stored = sum(ops.convert_to_numpy(w).nbytes for w in packed.weights)
    assert stored == plan.search.cost <= budget
    assert len(plan.search.choices) == 3


def pack_quietly(model, memory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pack_model(model, memory=memory, verbose=0)


def test_bits_count_codes_and_more_room_is_used():
    model = make_mlp()
    plans = [
        suggest(model, X, f"{bits} bits", precisions=["ternary", "int4", "int8", None],
                objective="output", verbose=0)
        for bits in (1.6, 5, 40)
    ]  # fmt: skip
    searches = [plan.search for plan in plans]
    assert {c.chosen for c in searches[0].choices} == {"W1.58A8"}
    assert searches[0].cost == pytest.approx(np.log2(3))
    assert {c.chosen for c in searches[2].choices} == {"float32"}
    assert searches[2].error == 0
    assert 1.6 < searches[1].cost <= 5
    sizes, bits = [660, 528, 48], {"W1.58A8": np.log2(3), "W4A8": 4, "W8A8": 8, "float32": 32}
    mean = np.average([bits[c.chosen] for c in searches[1].choices], weights=sizes)
    assert searches[1].cost == pytest.approx(mean)
    assert searches[0].error > searches[1].error > searches[2].error
    curve = searches[1].curve
    assert [p.cost for p in curve] == sorted(p.cost for p in curve)
    assert [p.error for p in curve] == sorted((p.error for p in curve), reverse=True)


def test_errors_are_those_of_one_layer_alone():
    model = make_mlp()
    search = suggest(model, (X, Y), "40 bits", precisions=["ternary", "int8"], verbose=0).search
    expected = ops.convert_to_numpy(model(X)).astype("float64")
    for choice in search.choices:
        alone = quantize_model(model, PrecisionPlan({f"^{choice.path}$": "ternary"}), verbose=0)
        noise = ops.convert_to_numpy(alone(X)) - expected
        sqnr = 10 * np.log10(np.square(expected).sum() / np.square(noise).sum())
        assert choice.sqnr[0] == pytest.approx(sqnr, abs=1e-2)
        grown = alone.evaluate(X, Y, verbose=0) - model.evaluate(X, Y, verbose=0)
        assert choice.loss_changes[0] == pytest.approx(grown, abs=2e-3)
        relative = np.square(noise).sum() / np.square(expected).sum()
        assert choice.errors[0] == pytest.approx(max(grown, 0.01 * relative), abs=2e-3)
        assert choice.sqnr[1] > choice.sqnr[0] + 15
    assert search.objective == "loss"
    assert set(search.measured) == {"output_error", "output_sqnr", "loss", "loss_float"}


def test_a_latency_budget_is_kept_by_what_was_measured():
    model = make_mlp()
    search = suggest(model, X, "1 s", objective="output", verbose=0).search
    assert search.kind == "seconds"
    assert {c.chosen for c in search.choices} == {"W8A8"}
    assert search.cost == pytest.approx(sum(c.costs[2] for c in search.choices))
    assert all(0 < cost < 1 for c in search.choices for cost in c.costs)


def test_layers_that_treat_their_inputs_are_calibrated_first():
    """An outlier channel spoils 4-bit activations, unless it is kept apart or smoothed away."""
    x = X.copy()
    x[:, 5] *= 60
    plain = {"weight_quantizer": "int8", "activation_quantizer": "int4"}
    kinds = [plain, {**plain, "kept_channels": 1}, {**plain, "smoothing": 0.5}]
    plan = suggest(make_mlp(), x, "20 bits", precisions=kinds, filters="^a$", objective="output",
                   verbose=0)  # fmt: skip
    (choice,) = plan.search.choices
    bare, kept, smoothed = choice.sqnr
    assert kept > bare + 6
    assert smoothed > bare + 3
    assert choice.costs[1] == pytest.approx(8 + 16 / 20)


def test_precisions_that_kernels_refuse_are_passed_over(monkeypatch):
    def refuse(problem):
        return "no kernel of 4 bits" if problem.bits == 4 else None

    fast = select.Kernel("fast", refuse, select.reference_matmul)
    monkeypatch.setattr(select, "TABLES", {keras.backend.backend(): (fast, select.REFERENCE)})
    search = suggest(make_mlp(), X, "6 bits", objective="output", verbose=0).search
    assert "W4A8" not in {choice.chosen for choice in search.choices}
    assert search.choices[0].refused == {"W4A8": "fast: no kernel of 4 bits"}
    assert "W4A8 of a was passed over: fast: no kernel of 4 bits" in str(search)


def test_the_report_is_a_table_json_and_a_picture(tmp_path):
    search = suggest(make_mlp(), X, "4 bits", precisions=["ternary", "int8", None],
                     objective="output", verbose=0).search  # fmt: skip
    content = json.loads(search.to_json())
    assert [choice["path"] for choice in content["choices"]] == ["a", "b", "c"]
    assert content["choices"][0]["sqnr"][-1] is None  # float: no noise
    assert all(word in str(search) for word in ("W1.58A8", "float32", "4.00 bits allowed"))
    search.plot(tmp_path / "curve.svg")
    picture = xml.etree.ElementTree.parse(tmp_path / "curve.svg").getroot()
    circles = [node for node in picture.iter() if node.tag.endswith("circle")]
    assert len(circles) >= len(search.curve)


def test_the_plan_is_never_worse_than_one_candidate_everywhere():
    """Errors of layers only add up roughly, so both are measured as a whole."""
    model = keras.Sequential([keras.Input((20,)), layers.Dense(16, name="a")])
    model.add(layers.Dense(3, name="b"))
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        for layer in model.layers:
            layer.kernel.assign(keras.random.normal(layer.kernel.shape))
        search = suggest(model, X, "2 bits", precisions=["binary", "ternary", Int2(), "int8"],
                         objective="output", verbose=0).search  # fmt: skip
        for quantizer in ("binary", "ternary", Int2()):
            outputs = quantize_model(model, quantizer, verbose=0)(X)
            noise = ops.convert_to_numpy(outputs) - ops.convert_to_numpy(model(X))
            error = np.square(noise).sum() / np.square(ops.convert_to_numpy(model(X))).sum()
            assert search.measured["output_error"] <= error * 1.001


# -- what it refuses -------------------------------------------------------------------------

NOT_A_NUMBER = X.copy()
NOT_A_NUMBER[3, 4] = np.nan
BAD = {
    "infeasible": (X, "1 bits", {}, r"smallest that these precisions reach is 1.58 bits"),
    "infeasible bytes": (X, "9 B", {}, r"cannot be met.*Received: budget=9 B"),
    "no unit": (X, 4.5, {}, "Received: budget=4.5"),
    "no number": (X, "-3 bits", {}, "Received: budget='-3 bits'"),
    "empty": (X[:0], "4 bits", {}, "holds no examples"),
    "empty list": ([], "4 bits", {}, "holds no examples. Received: list"),
    "empty generator": (iter(()), "4 bits", {}, "holds no examples"),
    "none": (None, "4 bits", {}, "Received: None"),
    "nan": (NOT_A_NUMBER, "4 bits", {}, "holds a NaN or an infinity"),
    "shape": (X[:, :7], "4 bits", {}, r"does not fit model.*\(1, 7\)"),
    "structure": ({"a": X}, "4 bits", {}, "does not fit model"),
    "lengths": ((X, Y[:5]), "4 bits", {}, r"shapes \[\(24, 20\), \(5,\)\]"),
    "no targets": (X, "4 bits", {"objective": "loss"}, "needs targets"),
    "objective": (X, "4 bits", {"objective": "speed"}, "objective='speed'"),
    "memory": (X, "4 bits", {"memory": "small"}, "memory='small'"),
    "precisions": (X, "4 bits", {"precisions": [None]}, "must be a list of specs"),
    "filters": (X, "4 bits", {"filters": "nowhere"}, r"layers=\['a', 'b', 'c'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_is_wrong_and_changes_nothing(name):
    data, budget, arguments, message = BAD[name]
    model = make_mlp()
    before, call = weights_of(model), keras.Layer.__call__
    with pytest.raises(ValueError, match=message):
        suggest(model, data, budget, verbose=0, **arguments)
    assert same(model, before)
    assert keras.Layer.__call__ is call


def test_refuses_a_model_that_gives_nan_and_one_that_is_not_built():
    model = make_mlp()
    model.layers[1].kernel.assign(np.full((33, 16), np.nan))
    with pytest.raises(ValueError, match="gives a NaN"):
        suggest(model, X, "4 bits", objective="output", verbose=0)
    with pytest.raises(ValueError, match="has no weights yet"):
        suggest(keras.Sequential([layers.Dense(3)]), X, "4 bits", verbose=0)


def test_layers_that_are_quantized_already_are_left_out():
    model = keras.Sequential(
        [keras.Input((20,)), BitLinear(16, name="old"), layers.Dense(3, name="new")]
    )
    plan = suggest(model, X, "4 bits", verbose=0)
    assert [choice.path for choice in plan.search.choices] == ["new"]
    assert [pattern for pattern, _ in plan.rules] == ["^new$"]


@pytest.mark.parametrize(
    ("text", "limit", "kind"),
    [("4.5 bits", 4.5, "bits"), ("1.2MB", 1.2e6, "bytes"), ("300 KiB", 300 * 1024, "bytes"),
     ("2000 bytes", 2000, "bytes"), ("1e3 b", 1e3, "bytes"), ("3ms", 3e-3, "seconds"),
     ("250 us", 250e-6, "seconds")],
)  # fmt: skip
def test_budgets(text, limit, kind):
    budget = Budget.of(text)
    assert (budget.limit, budget.kind) == (pytest.approx(limit), kind)
    assert Budget.of(budget) is budget


# -- latencies -------------------------------------------------------------------------------


def test_every_layer_is_timed_at_every_precision():
    report = benchmark_layers(make_tokens(), ["ternary", "int8"], repeats=2, verbose=0)
    found = {(row.path, row.input_shape): row for row in report.rows}
    assert set(found) == {
        ("tied", (1, 6)), ("tied", (1, 6, 8)), ("lookup", (1, 6)), ("dense", (1, 6, 8)),
    }  # fmt: skip
    for row in report.rows:
        labels = {"W1.58A32", "W8A32"} if row.path == "lookup" else {"W1.58A8", "W8A8"}
        assert set(row.seconds) == {"float32", *labels}
        assert all(value["median"] > 0 for value in row.seconds.values())
        assert set(row.kernels) == (set() if row.path == "lookup" else labels)
    assert report.backend == keras.backend.backend()
    assert len(json.loads(report.to_json())["rows"]) == 4
    assert "lookup (Embedding)" in str(report)


def test_equal_layers_are_timed_once_and_calls_are_counted():
    inputs = keras.Input((8,))
    shared = layers.Dense(8, name="shared")
    outputs = layers.Dense(8, name="other")(shared(shared(inputs)))
    rows = benchmark_layers(keras.Model(inputs, outputs), ["int4"], repeats=2, verbose=0).rows
    assert [(row.path, row.calls) for row in rows] == [("shared", 2), ("other", 1)]
    assert rows[0].seconds == rows[1].seconds


def test_quantized_and_treated_layers_are_timed_too():
    kinds = {"activation_quantizer": "static_int8", "rotation": "hadamard", "kept_channels": 2}
    model = quantize_model(make_mlp(), kinds, verbose=0)
    rows = benchmark_layers(model, ["ternary"], memory="smallest", repeats=2, verbose=0).rows
    assert [set(row.seconds) for row in rows] == [{"W1.58A8"}] * 3
    images = quantize_model(make_images(), "int4", verbose=0)
    rows = benchmark_layers(images, ["int8", "int8"], repeats=2, verbose=0).rows
    assert [(row.path, *row.seconds) for row in rows] == [
        (path, "W8A8", "W8A8_1") for path in ("separable", "conv", "dense")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precisions": []}, "must be a list of specs"),
        ({"filters": "nowhere"}, "no layer to measure"),
        ({"repeats": 0}, "repeats=0"),
        ({"batch_size": "2"}, "batch_size='2'"),
        ({"memory": "small"}, "memory='small'"),
    ],
)
def test_benchmark_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark_layers(make_mlp(), verbose=0, **arguments)
