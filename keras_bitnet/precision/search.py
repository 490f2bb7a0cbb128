"""From measured sensitivities and a budget to a plan: a multiple-choice knapsack."""

import importlib.util
import re

import keras
import numpy as np

from keras_bitnet.checks import check_built, check_choice
from keras_bitnet.precision.budget import Budget
from keras_bitnet.precision.kernels import refusals
from keras_bitnet.precision.result import Choice, Point, PrecisionSearch
from keras_bitnet.report import probes
from keras_bitnet.report.data import batches
from keras_bitnet.report.latency import benchmark_layers, unique_labels
from keras_bitnet.report.losses import loss_function
from keras_bitnet.report.macs import precision
from keras_bitnet.report.summary import summary
from keras_bitnet.transforms.precision_plan import PrecisionPlan, layer_arguments
from keras_bitnet.transforms.quantize import quantize_model

OBJECTIVES = ("output", "loss")
_CURVE_POINTS = 24


def suggest_precision(
    model,
    data,
    budget,
    *,
    candidates=("ternary", "int4", "int8"),
    filters=None,
    objective=None,
    loss=None,
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
    a candidate and run another, it is not chosen, and the reason is kept.

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
            of the loss, for which `data` needs targets. By default `"loss"` with targets, else
            `"output"`.
        loss: A Keras loss or its name; that of the compiled model by default.
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
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("This needs scipy: `pip install 'keras-bitnet[precision]'`.")
    budget = Budget.of(budget)
    examples = batches(data, samples, batch_size)
    measure_loss = loss_function(model, loss, examples)
    if objective is None:
        objective = "output" if measure_loss is None else "loss"
    check_choice("objective", objective, OBJECTIVES)
    if objective == "loss" and measure_loss is None:
        raise ValueError(
            "`objective='loss'` needs targets in `data`, and a compiled model or `loss`. "
            f"Received: loss={loss!r}"
        )
    table = _Table(model, candidates, filters)
    table.find_costs(budget.kind)
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

    def __init__(self, model, candidates, filters):
        self.model, self.filters = model, filters
        self.specs = [layer_arguments(spec) for spec in candidates]
        if not any(self.specs):
            raise ValueError(f"`candidates` must be a list of specs. Received: {candidates!r}")
        self.models = [
            model if spec is None else quantize_model(model, spec, filters, verbose=0)
            for spec in self.specs
        ]
        self.twins = [twin for twin, spec in zip(self.models, self.specs, strict=True) if spec]
        pairs = [probes.layer_pairs(model, twin) for twin in self.twins]
        self.paths = list(pairs[0])
        self.choices = []
        for path in self.paths:
            quantized = iter(pairs)
            layers = [
                pairs[0][path][0] if spec is None else next(quantized)[path][1]
                for spec in self.specs
            ]
            labels = unique_labels([precision(layer) for layer in layers])
            refused = {
                label: "; ".join(f"{kernel}: {reason}" for kernel, reason in found)
                for label, layer, spec in zip(labels, layers, self.specs, strict=True)
                if spec and (found := refusals(layer))
            }
            size = pairs[0][path][1].in_features * pairs[0][path][1].out_features
            self.choices.append(Choice(path, size, labels, refused=refused))

    def find_costs(self, kind):
        """Fills in the costs; `fixed` is that of all other layers."""
        self.fixed = 0.0
        if kind == "seconds":
            self._find_seconds()
            return
        summaries = [summary(model, as_data=True) for model in self.models]
        rows = [{row.path: row for row in data.rows} for data in summaries]
        total = sum(choice.weights for choice in self.choices)
        for choice in self.choices:
            found = [candidate[choice.path] for candidate in rows]
            if kind == "bits":
                choice.costs = [row.weight_bits * choice.weights / total for row in found]
            else:
                choice.costs = [float(row.bytes_packed) for row in found]
        if kind == "bytes":
            chosen = sum(choice.costs[0] for choice in self.choices)
            self.fixed = float(summaries[0].totals.bytes_packed) - chosen

    def _find_seconds(self):
        specs = [spec for spec in self.specs if spec]
        report = benchmark_layers(self.model, specs, filters=self.filters, verbose=0)
        for choice in self.choices:
            rows = [row for row in report.rows if row.path == choice.path]
            choice.costs = [
                sum(row.calls * row.seconds[label]["median"] for row in rows)
                for label in choice.labels
            ]

    def find_errors(self, examples, loss, objective, verbose):
        """Fills in what each candidate does to each layer."""
        runs = len(examples) * (1 + len(self.twins) * (1 + len(self.paths)))
        progress = keras.utils.Progbar(runs, unit_name="run") if verbose else None
        report = (lambda: progress.add(1)) if progress else None
        base, _, alone = probes.effects(self.model, self.twins, examples, loss, report)
        for choice in self.choices:
            quantized = iter(alone)
            for spec in self.specs:
                if spec is None:
                    choice.errors.append(0.0)
                    continue
                effect = next(quantized)[choice.path]
                grown = effect.mean_loss - base.mean_loss if objective == "loss" else None
                # A loss that falls is chance: it must not pay for an error elsewhere.
                choice.errors.append(effect.outputs.relative if grown is None else max(grown, 0.0))

    def plan(self, result):
        """The plan of the chosen candidates."""
        return PrecisionPlan(
            {
                f"^{re.escape(choice.path)}$": self.specs[choice.labels.index(choice.chosen)]
                for choice in result.choices
            }
        )


def _search(table, budget, objective):
    errors = np.array([choice.errors for choice in table.choices])
    costs = np.array([choice.costs for choice in table.choices])
    allowed = np.array([_allowed(choice) for choice in table.choices])
    if not np.isfinite(errors).all():
        raise ValueError(
            "The model gives a NaN or an infinity on `data`, in float or with a layer quantized."
        )
    smallest = table.fixed + np.where(allowed, costs, np.inf).min(1).sum()
    largest = table.fixed + np.where(allowed, costs, -np.inf).max(1).sum()
    if smallest > budget.limit * (1 + 1e-9):
        raise ValueError(
            f"The budget cannot be met: the smallest that these candidates reach is "
            f"{budget.format(smallest)}. Allow more, or narrower candidates. "
            f"Received: budget={budget}"
        )

    def point(limit):
        chosen = solve(errors, costs, limit - table.fixed, allowed)
        rows = np.arange(len(chosen))
        labels = [choice.labels[c] for choice, c in zip(table.choices, chosen, strict=True)]
        cost = table.fixed + float(costs[rows, chosen].sum())
        return Point(cost, float(errors[rows, chosen].sum()), labels)

    best = point(budget.limit)
    limits = np.linspace(smallest, largest, _CURVE_POINTS) * (1 + 1e-9)
    for choice, label in zip(table.choices, best.labels, strict=True):
        choice.chosen = label
    return PrecisionSearch(
        objective=objective,
        kind=budget.kind,
        limit=budget.limit,
        cost=best.cost,
        error=best.error,
        smallest=float(smallest),
        largest=float(largest),
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


def solve(errors, costs, limit, allowed=None):
    """The multiple-choice knapsack: one candidate a layer, least error within a limit.

    Args:
        errors: Array `(layers, candidates)`.
        costs: Array likewise.
        limit: The sum of the costs must not exceed it; it can be met.
        allowed: Array of booleans likewise, all by default.

    Returns:
        Array of integers `(layers,)`: the candidates.
    """
    import scipy.optimize

    layers, candidates = errors.shape
    allowed = np.ones(errors.shape, bool) if allowed is None else allowed
    # Scaled to 1, so that tolerances mean the same; among equal errors the cheaper one.
    cheaper = 1e-6 * costs / max(costs.max(), 1e-30)
    weights = errors / max(errors.max(), 1e-30) + cheaper
    unit = max(limit, 1e-30)
    one_each = np.kron(np.eye(layers), np.ones(candidates))
    result = scipy.optimize.milp(
        weights.ravel(),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(costs.ravel()[None] / unit, -np.inf, 1 + 1e-9),
        ],
        integrality=np.ones(errors.size),
        bounds=scipy.optimize.Bounds(0, allowed.ravel().astype(float)),
        options={"mip_rel_gap": 0},
    )
    if result.x is None:
        raise ValueError(f"The precisions could not be chosen: {result.message}")
    return result.x.reshape(layers, candidates).argmax(1)


def _measure_plan(model, plan, examples, loss):
    """What the plan as a whole does to the outputs: the errors of layers only add up roughly."""
    if all(spec is None for _, spec in plan.rules):
        return {}
    base, (whole,), _ = probes.effects(
        model, quantize_model(model, plan, verbose=0), examples, loss, alone=False
    )
    found = {"output_error": whole.outputs.relative, "output_sqnr": whole.outputs.sqnr}
    if loss is not None:
        found |= {"loss_float": base.mean_loss, "loss": whole.mean_loss}
    return found
