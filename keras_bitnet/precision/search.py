"""From measured sensitivities and a budget to a plan: a multiple-choice knapsack."""

import numpy as np

from keras_bitnet.checks import check_built, check_choice
from keras_bitnet.layers.kernel_weights import MEMORY
from keras_bitnet.precision.budget import Budget
from keras_bitnet.precision.knapsack import check_scipy, solve
from keras_bitnet.precision.result import Point, PrecisionSearch
from keras_bitnet.precision.table import Table, calibrated, whole_measures
from keras_bitnet.report import probes
from keras_bitnet.report.data import batches, check_fit
from keras_bitnet.report.losses import loss_function
from keras_bitnet.report.pairs import unit_pairs
from keras_bitnet.transforms.quantize import quantize_model

OBJECTIVES = ("output", "loss")
_CURVE_POINTS = 24


def suggest_precision(
    model,
    data,
    budget,
    *,
    precisions=("ternary", "int4", "int8"),
    filters=None,
    objective=None,
    loss=None,
    memory="fastest",
    samples=256,
    batch_size=32,
    verbose=1,
):
    """Finds the precision of every layer that hurts the model least within a budget.

    Each layer alone is quantized to each precision, and what this does to the outputs of the
    float model is measured on data. The errors of layers are taken to add up (small errors
    do, to first order), and the precisions are chosen that minimize their sum:

        min  sum_l error[l, c_l]   with   sum_l cost[l, c_l] <= budget

    solved to the optimum as an integer program. The plan is then measured as a whole, and if one
    precision everywhere fits the budget as well and is better, it is taken instead.

    Where the fast kernels of this machine refuse a precision and run another, it is not chosen,
    and the reason is kept. Precisions that treat their inputs (smoothing, kept channels, static
    scales) are calibrated on the data first; calibrate the model made from the plan as well.

    Args:
        model: A built float model; it is left as it is.
        data: Examples: inputs, a tuple `(x, y)`, or an iterable of batches of these.
        budget: `"1.2MB"` or `"300KiB"`: all weights in memory once packed, other layers
            included. `"4.5 bits"`: average of the codes of a weight, over the layers that can
            be quantized. `"3ms"`: the sum of the latencies of those layers for a batch of one,
            measured here. Or a `Budget`.
        precisions: Specs as in `quantize_model`; `None` stands for the float layer.
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
    check_choice("memory", memory, MEMORY)
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
    table = Table(model, precisions, filters, memory)
    table.find_costs(budget.kind)
    table.check(budget)
    table.find_errors(examples, measure_loss, objective, verbose)
    result = _search(table, budget, objective)
    plan = table.plan(result)
    result.measured = _measure_plan(model, plan, examples, measure_loss)
    if table.take_better_uniform(result):
        plan = table.plan(result)
    plan.search = result
    if verbose:
        result.show()
    return plan


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
        model, twin, examples, [unit_pairs(model, twin)], loss, alone=False
    )
    return whole_measures(base, whole)
