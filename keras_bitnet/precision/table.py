"""What every precision does to every layer, and what it costs: the table of a search."""

import math
import re

import keras
import numpy as np

from keras_bitnet.filters import layer_filter
from keras_bitnet.precision.costs import packed_bytes, weight_bits, weight_count
from keras_bitnet.precision.kernels import refusals
from keras_bitnet.precision.result import Choice
from keras_bitnet.report import probes
from keras_bitnet.report.latency import benchmark_layers
from keras_bitnet.report.macs import precision
from keras_bitnet.report.pairs import inner_layers, unit_pairs
from keras_bitnet.transforms.calibrate import calibrate
from keras_bitnet.transforms.precision_plan import PrecisionPlan, layer_arguments
from keras_bitnet.transforms.quantize import quantize_model, twin_of
from keras_bitnet.transforms.rewrite import named_layers, unique_names

_CHANCE = 1e-2  # of the relative error of the outputs


class Table:
    """Layers x precisions: the models in which one is everywhere, costs and errors."""

    def __init__(self, model, precisions, filters, memory):
        self.model, self.filters, self.memory = model, filters, memory
        self.specs = [layer_arguments(spec) for spec in precisions]
        if not any(self.specs):
            raise ValueError(f"`precisions` must be a list of specs. Received: {precisions!r}")
        _check_targets(model, filters)
        self.twins = [
            quantize_model(model, spec, filters, verbose=0) for spec in self.specs if spec
        ]
        self._find_layers()
        self.choices = [self._choice(path) for path in self.layers]

    def _find_layers(self):
        """`pairs` of each twin and `layers`: those of every precision by path."""
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
        labels = unique_names(precision(layer) for layer in layers)
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
                f"The budget cannot be met: the smallest that these precisions reach is "
                f"{budget.format(self.smallest)}. Allow more, or narrower precisions. "
                f"Received: budget={budget}"
            )

    def find_errors(self, examples, loss, objective, verbose):
        """Fills in what each precision does to each layer."""
        twins = [calibrated(twin, examples) for twin in self.twins]
        pairs = [unit_pairs(self.model, twin) for twin in twins]
        pairs = [{path: found[path] for path in self.layers} for found in pairs]
        runs = len(examples) * (1 + len(twins) * (1 + len(self.layers)))
        progress = keras.utils.Progbar(runs, unit_name="run") if verbose else None
        report = (lambda: progress.add(1)) if progress else None
        base, self.uniform, alone = probes.effects(self.model, twins, examples, pairs, loss, report)
        self.base = base
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

    def take_better_uniform(self, result):
        """Puts one precision everywhere where that fits and, as a whole, is better than the plan.

        Errors only add up roughly, so that this can be. Returns whether it was.
        """
        measured = [whole_measures(self.base, whole) for whole in self.uniform]
        indices = [i for i, spec in enumerate(self.specs) if spec]
        name = "loss" if result.objective == "loss" else "output_error"
        best = result.measured.get(name, -math.inf)
        taken = None
        for i, found in zip(indices, measured, strict=True):
            cost = self.fixed + sum(choice.costs[i] for choice in self.choices)
            fits = cost <= result.limit * (1 + 1e-9) and self.allowed[:, i].all()
            if fits and found[name] < best:
                taken, best = i, found[name]
                result.cost, result.measured = cost, found
        if taken is None:
            return False
        result.error = sum(choice.errors[taken] for choice in self.choices)
        for choice in self.choices:
            choice.chosen = choice.labels[taken]
        return True

    def plan(self, result):
        """The plan of the chosen precisions."""
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
            f"layers={[path for path, _ in layers]}"
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


def _allowed(choice):
    """Which precisions a fast kernel runs; all, where none runs any."""
    runs = [label not in choice.refused for label in choice.labels]
    return runs if any(runs) else [True] * len(runs)


def whole_measures(base, whole):
    """What quantizing all layers together does, as `PrecisionSearch.measured`."""
    found = {"output_error": whole.outputs.relative, "output_sqnr": whole.outputs.sqnr}
    if whole.mean_loss is not None:
        found |= {"loss_float": base.mean_loss, "loss": whole.mean_loss}
    return found
