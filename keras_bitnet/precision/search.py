"""From measured sensitivities and a budget to a plan: a multiple-choice knapsack."""

import math
import re

import keras
import numpy as np

from keras_bitnet.checks import check_built, check_choice
from keras_bitnet.filters import layer_filter
from keras_bitnet.precision.budget import Budget
from keras_bitnet.precision.costs import packed_bytes, weight_bits, weight_count
from keras_bitnet.precision.kernels import refusals
from keras_bitnet.precision.knapsack import check_scipy, solve
from keras_bitnet.precision.result import Choice, Point, PrecisionSearch
from keras_bitnet.report import probes
from keras_bitnet.report.data import batches, check_fit
from keras_bitnet.report.latency import benchmark_layers, unique_labels
from keras_bitnet.report.losses import loss_function
from keras_bitnet.report.macs import precision
from keras_bitnet.report.pairs import inner_layers, unit_pairs
from keras_bitnet.transforms.calibrate import calibrate
from keras_bitnet.transforms.precision_plan import PrecisionPlan, layer_arguments
from keras_bitnet.transforms.quantize import quantize_model, twin_of
from keras_bitnet.transforms.rewrite import named_layers

OBJECTIVES = ("output", "loss")
_CURVE_POINTS = 24
_CHANCE = 1e-2  # of the relative error of the outputs


def suggest_precision(
    model,
    data,
    budget,
    *,
    candidates=("ternary", "int4", "int8"),
    filters=None,
    objective=None,
    loss=None,
    memory="fastest",
    samples=256,
    batch_size=32,
    verbose=1,
):
    """Finds the precision of every layer that hurts the model least within a budget.

    Each layer alone is quantized to each candidate, and what this does to the outputs of the
    float model is measured on data. The errors of layers are taken to add up (small errors
    do, to first order), and the candidates are chosen that minimize their sum:

        min  sum_l error[l, c_l]   with   sum_l cost[l, c_l] <= budget

    solved to the optimum as an integer program. Where the fast kernels of this machine refuse
    a candidate and run another, it is not chosen, and the reason is kept. Candidates that treat
    their inputs (smoothing, kept channels, static scales) are calibrated on the data first;
    calibrate the model that is made from the plan as well.

    Args:
        model: A built float model; it is left as it is.
        data: Examples: inputs, a tuple `(x, y)`, or an iterable of batches of these.
        budget: `"1.2MB"` or `"300KiB"`: all weights in memory once packed, other layers
            included. `"4.5 bits"`: average of the codes of a weight, over the layers that can
            be quantized. `"3ms"`: the sum of the latencies of those layers for a batch of one,
            measured here. Or a `Budget`.
        candidates: Specs as in `quantize_model`; `None` stands for the float layer.
        filters: Which layers may be quantized, see `quantize_model`; others stay float.
        objective: `"output"`: squared error of the outputs over their square. `"loss"`: growth
            of the loss, for which `data` needs targets, but at least a hundredth of that error.
            By default `"loss"` with targets, else `"output"`.
        loss: A Keras loss or its name; that of the compiled model by default.
        memory: How the model will be packed, see `pack_model`: bytes, latencies and the kernels
            that are asked are those of that layout.
        samples: Examples to measure on.
        batch_size: Examples in a batch, where `data` holds arrays.
        verbose: 1 shows progress and the result, 0 nothing.

    Returns:
        A `PrecisionPlan` with a rule for each layer; its `search` tells what was measured and
        holds the Pareto curve.

    Raises:
        ValueError: The budget cannot be met (the message says what can), or an argument or
            the data is not what is accepted.
        ImportError: scipy is missing.

    Source:
        Dong et al. 2019, HAWQ (https://arxiv.org/abs/1905.03696), for sensitivity by layer;
        Hubara et al. 2021, AdaQuant (https://arxiv.org/abs/2006.10518), for the integer program.
    """
    check_built(model)
    check_scipy()
    check_choice("memory", memory, ("fastest", "smallest"))
    budget = Budget.of(budget)
    examples = batches(data, samples, batch_size)
    check_fit(model, examples)
    measure_loss = loss_function(model, loss, examples)
    if objective is None:
        objective = "output" if measure_loss is None else "loss"
    check_choice("objective", objective, OBJECTIVES)
    if objective == "loss" and measure_loss is None:
        raise ValueError(
            "`objective='loss'` needs targets in `data`, and a compiled model or `loss`. "
            f"Received: loss={loss!r}"
        )
    table = _Table(model, candidates, filters, memory)
    table.find_costs(budget.kind)
    table.check(budget)
    table.find_errors(examples, measure_loss, objective, verbose)
    result = _search(table, budget, objective)
    plan = table.plan(result)
    result.measured = _measure_plan(model, plan, examples, measure_loss)
    plan.search = result
    if verbose:
        result.show()
    return plan


class _Table:
    """Layers x candidates: the models in which a candidate is everywhere, costs and errors."""

    def __init__(self, model, candidates, filters, memory):
        self.model, self.filters, self.memory = model, filters, memory
        self.specs = [layer_arguments(spec) for spec in candidates]
        if not any(self.specs):
            raise ValueError(f"`candidates` must be a list of specs. Received: {candidates!r}")
        _check_targets(model, filters)
        self.twins = [
            quantize_model(model, spec, filters, verbose=0) for spec in self.specs if spec
        ]
        self._find_layers()
        self.choices = [self._choice(path) for path in self.layers]

    def _find_layers(self):
        """`pairs` of each twin and `layers`: those of every candidate by path."""
        self.pairs = [
            {
                path: pair
                for path, pair in unit_pairs(self.model, twin).items()
                if not inner_layers(pair[0])  # quantized before: it stays what it is
            }
            for twin in self.twins
        ]
        self.layers = {}
        for path, (old, _) in self.pairs[0].items():
            quantized = iter(self.pairs)
            self.layers[path] = [next(quantized)[path][1] if spec else old for spec in self.specs]

    def _choice(self, path):
        layers = self.layers[path]
        labels = unique_labels([precision(layer) for layer in layers])
        refused = {
            label: "; ".join(f"{kernel}: {reason}" for kernel, reason in found)
            for label, layer in zip(labels, layers, strict=True)
            if (found := refusals(layer, memory=self.memory))
        }
        return Choice(path, weight_count(self.pairs[0][path][1]), labels, refused=refused)

    def find_costs(self, kind):
        """Fills in the costs; `fixed` is that of all other layers."""
        self.fixed = 0.0
        if kind == "seconds":
            self._find_seconds()
            return
        total = sum(choice.weights for choice in self.choices)
        for choice in self.choices:
            layers = self.layers[choice.path]
            if kind == "bits":
                choice.costs = [weight_bits(layer) * choice.weights / total for layer in layers]
            else:
                choice.costs = [float(packed_bytes(layer, self.memory)) for layer in layers]
        if kind == "bytes":
            chosen = sum(packed_bytes(old) for old, _ in self.pairs[0].values())
            self.fixed = float(packed_bytes(self.model, self.memory) - chosen)

    def _find_seconds(self):
        specs = [spec for spec in self.specs if spec]
        report = benchmark_layers(
            self.model, specs, memory=self.memory, filters=self.filters, verbose=0
        )
        for choice in self.choices:
            rows = [row for row in report.rows if row.path == choice.path]
            choice.costs = [
                sum(row.calls * row.seconds[label]["median"] for row in rows)
                for label in choice.labels
            ]

    def check(self, budget):
        """Raises a `ValueError` where the budget cannot be met."""
        costs = np.array([choice.costs for choice in self.choices])
        self.allowed = np.array([_allowed(choice) for choice in self.choices])
        self.smallest = self.fixed + np.where(self.allowed, costs, np.inf).min(1).sum()
        self.largest = self.fixed + np.where(self.allowed, costs, -np.inf).max(1).sum()
        if self.smallest > budget.limit * (1 + 1e-9):
            raise ValueError(
                f"The budget cannot be met: the smallest that these candidates reach is "
                f"{budget.format(self.smallest)}. Allow more, or narrower candidates. "
                f"Received: budget={budget}"
            )

    def find_errors(self, examples, loss, objective, verbose):
        """Fills in what each candidate does to each layer."""
        twins = [calibrated(twin, examples) for twin in self.twins]
        pairs = [unit_pairs(self.model, twin) for twin in twins]
        pairs = [{path: found[path] for path in self.layers} for found in pairs]
        runs = len(examples) * (1 + len(twins) * (1 + len(self.layers)))
        progress = keras.utils.Progbar(runs, unit_name="run") if verbose else None
        report = (lambda: progress.add(1)) if progress else None
        base, _, alone = probes.effects(self.model, twins, examples, loss, report, pairs=pairs)
        for choice in self.choices:
            quantized = iter(alone)
            for spec in self.specs:
                if spec is None:
                    choice.add(0.0, math.inf, None if loss is None else 0.0)
                    continue
                effect = next(quantized)[choice.path]
                relative = effect.outputs.relative
                grown = None if loss is None else effect.mean_loss - base.mean_loss
                # A loss that falls or hardly grows is chance: it must not pay for an error
                # elsewhere, nor take a narrow width where a wider one is paid for.
                error = max(grown, _CHANCE * relative) if objective == "loss" else relative
                choice.add(error, effect.outputs.sqnr, grown)

    def plan(self, result):
        """The plan of the chosen candidates."""
        return PrecisionPlan(
            {
                f"^{re.escape(choice.path)}$": self.specs[choice.labels.index(choice.chosen)]
                for choice in result.choices
            }
        )


def _check_targets(model, filters):
    matches = layer_filter(filters)
    layers = [
        (path, layer) for path, layer in named_layers(model)
        if twin_of(layer) is not None and layer.quantization_mode is None
    ]  # fmt: skip
    if not any(matches(layer, path) for path, layer in layers):
        raise ValueError(
            f"Model '{model.name}' has no float layer that `quantize_model` would quantize and "
            f"`filters` lets through. Received: filters={filters!r}, "
            f"candidates={[path for path, _ in layers]}"
        )


def calibrated(model, examples):
    """A quantized model, or where layers treat their inputs a copy that has looked at the data."""
    layers = probes.bit_layers(model).values()
    if not any(x.smoothing is not None or x.kept_channels or x.static for x in layers):
        return model
    return calibrate(model, _Inputs(examples), static=False, verbose=0)


class _Inputs(keras.utils.PyDataset):
    """The inputs of a list of batches, to be read several times."""

    def __init__(self, examples):
        super().__init__()
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return (self.examples[index][0],)


def _search(table, budget, objective):
    errors = np.array([choice.errors for choice in table.choices])
    costs = np.array([choice.costs for choice in table.choices])
    if not np.isfinite(errors).all():
        raise ValueError(
            "The model gives a NaN or an infinity on `data`, in float or with a layer quantized."
        )

    def point(limit):
        chosen = solve(errors, costs, limit - table.fixed, table.allowed)
        rows = np.arange(len(chosen))
        labels = [choice.labels[c] for choice, c in zip(table.choices, chosen, strict=True)]
        cost = table.fixed + float(costs[rows, chosen].sum())
        return Point(cost, float(errors[rows, chosen].sum()), labels)

    best = point(budget.limit)
    limits = np.linspace(table.smallest, table.largest, _CURVE_POINTS) * (1 + 1e-9)
    for choice, label in zip(table.choices, best.labels, strict=True):
        choice.chosen = label
    return PrecisionSearch(
        objective=objective,
        kind=budget.kind,
        limit=budget.limit,
        cost=best.cost,
        error=best.error,
        smallest=float(table.smallest),
        largest=float(table.largest),
        choices=table.choices,
        curve=_pareto([best, *map(point, limits)]),
    )


def _allowed(choice):
    """Which candidates a fast kernel runs; all, where none runs any."""
    runs = [label not in choice.refused for label in choice.labels]
    return runs if any(runs) else [True] * len(runs)


def _pareto(points):
    """The points that no other beats in cost and error, by rising cost."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.error)):
        if not found or point.error < found[-1].error:
            found.append(point)
    return found


def _measure_plan(model, plan, examples, loss):
    """What the plan as a whole does to the outputs: the errors of layers only add up roughly."""
    if all(spec is None for _, spec in plan.rules):
        return {}
    twin = calibrated(quantize_model(model, plan, verbose=0), examples)
    base, (whole,), _ = probes.effects(
        model, twin, examples, loss, alone=False, pairs=[unit_pairs(model, twin)]
    )
    found = {"output_error": whole.outputs.relative, "output_sqnr": whole.outputs.sqnr}
    if loss is not None:
        found |= {"loss_float": base.mean_loss, "loss": whole.mean_loss}
    return found
