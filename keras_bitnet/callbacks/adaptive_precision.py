"""The precision of every layer follows its measured error while the model trains."""

import contextlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bitnet import quantizers
from keras_bitnet.callbacks.common import find_bit_layers, rebuild_functions, student_of
from keras_bitnet.callbacks.statistics import Probe, signal_to_noise
from keras_bitnet.checks import check_count, check_number
from keras_bitnet.filters import layer_filter
from keras_bitnet.layers.block import BitBlock
from keras_bitnet.precision.budget import Budget
from keras_bitnet.precision.costs import packed_bytes, weight_bits, weight_count
from keras_bitnet.report.pairs import inner_layers, outermost_units
from keras_bitnet.transforms.precision_plan import PRECISIONS

_ROWS = 1024  # of inputs of a layer that are kept to measure on


class AdaptivePrecision(keras.callbacks.Callback):
    """Raises or lowers the precision of layers during `fit`, from the error that they make.

    The error of a layer is the signal-to-quantization-noise ratio (SQNR) in dB of its kernel

        10 log10(sum w^2 / sum (w - quantize(w))^2)

    or, with `data`, that of its product on these inputs, quantized as in training. Before an
    epoch, in this order:

    - a layer outside of `[min_bits, max_bits]` goes to the nearest precision inside;
    - a layer that would still have `target + hysteresis` dB one precision lower goes there;
    - a layer below `target` goes one precision up, the worst first, as far as `budget` allows;
    - while the model is over the budget, the layer that keeps the most dB goes one down.

    Effects: calls `change_precision` of the layers and compiles the steps again, in epochs that
    change something only; kernels, other weights and the state of the optimizer stay. A block
    whose arguments say what all layers in it are (such as `BitTransformerDecoder`) changes
    as a whole. Writes `logs["average_bits"]`, over the weights of these layers, and
    `logs["precision_changes"]`, the number of them before this epoch.

    All depends on the weights, the present precisions and the epoch alone, and files of weights
    say what the precisions are, so training resumed with `keras.callbacks.BackupAndRestore` goes
    on where it was, and `save` and `pack_model` give the model with the precisions that it has.
    `keras.callbacks.ModelCheckpoint` keeps the best epoch with its precisions, and `load_weights`
    brings them back; `EarlyStopping(restore_best_weights=True)` keeps numbers only, which then have
    the precisions of the last epoch: give it a `start_from_epoch` after which none changes.

    Args:
        target: SQNR in dB below which a precision is raised. Kernels have about 4 to 6 dB at 1
            and 1.58 bits, 8 at 2, 18 at 4 and 43 at 8.
        hysteresis: dB above `target` that a lower precision must still reach, so that layers do
            not go up and down.
        precisions: Names of weight quantizers, with a learned scale where the layer has one and
            with a computed scale otherwise, or `WeightQuantizer`s.
        min_bits: Least bits of a weight (1.58 for ternary).
        max_bits: Most bits of a weight.
        budget: `"3 bits"` (average over the weights of these layers) or `"40kB"` (all weights
            of the model once packed), or `None`: no limit.
        data: A small batch of inputs of the model, to measure products, or `None`: kernels.
        start: First epoch in which precisions may change (the first of all is 0).
        every: Epochs between two looks.
        filters: Which layers, see `keras_bitnet.quantize_model`; all by default.
        log_layers: Whether the logs also get `path/bits` and `path/sqnr` of each layer.

    Attributes:
        changes: List of dictionaries `epoch`, `layer`, `before`, `after` (bits of a weight) and
            `sqnr` (dB before the change), of this process.

    Raises:
        ValueError: An argument is out of range; or, when training begins, the model has no layer
            to adapt, a quantizer of `precisions` does not suit one, or the budget cannot be met.

    Source:
        Ours; the error per layer is that of HAWQ-like searches, see `suggest_precision`, which
        finds the best precisions for a model that is trained already.
    """

    def __init__(
        self,
        target=10.0,
        hysteresis=3.0,
        *,
        precisions=PRECISIONS,
        min_bits=1,
        max_bits=8,
        budget=None,
        data=None,
        start=1,
        every=1,
        filters=None,
        log_layers=False,
    ):
        super().__init__()
        check_number("target", target, "[-inf, inf]")
        check_number("hysteresis", hysteresis, "[0, inf]")
        check_number("min_bits", min_bits, "[0, inf]")
        check_number("max_bits", max_bits, "[0, inf]")
        check_count("start", start, least=0)
        check_count("every", every)
        layer_filter(filters)  # says now what is wrong with it
        self.precisions = _within(precisions, min_bits, max_bits)
        self.budget: Any = None if budget is None else Budget.of(budget)
        if self.budget is not None and self.budget.kind == "seconds":
            raise ValueError(
                "`budget` must be a size, such as '3 bits' or '40kB': latencies change from one "
                f"measurement to the next. Received: budget={budget!r}"
            )
        self.target = float(target)
        self.hysteresis = float(hysteresis)
        self.data = data
        self.start = start
        self.every = every
        self.filters = filters
        self.log_layers = log_layers
        self.changes: list[dict[str, Any]] = []
        self.units: list[_Unit] = []
        self._changed = 0

    def on_train_begin(self, logs=None):
        """Finds the layers and checks that the precisions suit them and the budget can be met."""
        model = self.model
        self.units = [
            _Unit(path, layer, self.precisions) for path, layer in _units(model, self.filters)
        ]
        for unit in self.units:
            unit.layer.save_precisions()
        self._total = sum(unit.weights for unit in self.units)
        self._fixed = packed_bytes(model) - sum(packed_bytes(unit.layer) for unit in self.units)
        if self.budget is not None:
            smallest = self._cost({unit: unit.precisions[0] for unit in self.units})
            if smallest > self.budget.limit * (1 + 1e-9):
                raise ValueError(
                    f"The budget cannot be met: the lowest of `precisions` take "
                    f"{self.budget.format(smallest)}. Received: budget={self.budget}"
                )

    def on_epoch_begin(self, epoch, logs=None):
        """Measures, and changes precisions."""
        model = self.model  # on JAX this brings the state back into the variables
        restored = [unit.follow() for unit in self.units]  # what a backup brought
        self._changed = 0
        if epoch >= self.start and (epoch - self.start) % self.every == 0:
            self._adapt(model, epoch)
        if self._changed or any(restored):
            rebuild_functions(model)

    def on_train_end(self, logs=None):
        """Weights that are loaded now may bring other precisions: nothing compiled stays."""
        rebuild_functions(self.model)

    def _adapt(self, model, epoch):
        inputs = _record(model, self.data, self.units)
        measure = _Measure(inputs)
        for unit, quantizer in self._decide(measure).items():
            before = unit.quantizer
            if quantizer == before:
                continue
            self.changes.append(
                {
                    "epoch": epoch, "layer": unit.path, "before": before.bits_per_weight,
                    "after": quantizer.bits_per_weight, "sqnr": measure(unit, before),
                }
            )  # fmt: skip
            unit.change(quantizer)
            self._changed += 1
        for unit in self.units:
            unit.sqnr = measure(unit, unit.quantizer)

    def _decide(self, measure):
        """The quantizer of every unit."""
        found = {unit: unit.inside(unit.quantizer) for unit in self.units}
        waiting = []
        for unit, present in found.items():
            lower = unit.lower(present)
            if lower and measure(unit, lower) >= self.target + self.hysteresis:
                found[unit] = lower
            elif measure(unit, present) < self.target and unit.higher(present):
                waiting.append(unit)
        for unit in sorted(waiting, key=lambda unit: measure(unit, found[unit])):
            raised = {**found, unit: unit.higher(found[unit])}
            if self._fits(raised):
                found = raised
        while not self._fits(found):
            lowered = {unit: unit.lower(present) for unit, present in found.items()}
            unit = max(
                (unit for unit, lower in lowered.items() if lower),
                key=lambda unit: measure(unit, lowered[unit]),
            )
            found[unit] = lowered[unit]
        return found

    def _fits(self, found):
        return self.budget is None or self._cost(found) <= self.budget.limit * (1 + 1e-9)

    def _cost(self, found):
        if self.budget.kind == "bits":
            return self._average_bits(found)
        return self._fixed + sum(
            packed_bytes(unit.layer, quantizer=quantizer) for unit, quantizer in found.items()
        )

    def _average_bits(self, found):
        bits = sum(weight_bits(unit.layer, q) * unit.weights for unit, q in found.items())
        return bits / self._total

    def on_epoch_end(self, epoch, logs=None):
        """Writes the precisions to the logs."""
        if logs is None:
            return
        logs["average_bits"] = self._average_bits({unit: unit.quantizer for unit in self.units})
        logs["precision_changes"] = self._changed
        if self.log_layers:
            for unit in self.units:
                logs[f"{unit.path}/bits"] = unit.quantizer.bits_per_weight
                if unit.sqnr is not None:
                    logs[f"{unit.path}/sqnr"] = unit.sqnr


def _within(precisions, min_bits, max_bits):
    """The precisions within the bounds, names or quantizers, narrow to wide."""
    known = [precisions] if isinstance(precisions, str) else list(precisions)
    found = sorted(
        ((spec, quantizers.get(spec).bits_per_weight) for spec in known), key=lambda pair: pair[1]
    )
    inside = [(spec, bits) for spec, bits in found if min_bits - 0.01 <= bits <= max_bits + 0.01]
    if not inside:
        raise ValueError(
            "None of `precisions` lies between `min_bits` and `max_bits`. Received: "
            f"precisions={precisions!r}, min_bits={min_bits}, max_bits={max_bits}"
        )
    return [spec for spec, _ in inside]


def _units(model, filters):
    """`(path, layer)` of what has a precision of its own: the outermost blocks, other layers."""
    wanted, model = find_bit_layers(model, filters), student_of(model)
    units = list(outermost_units(model, BitBlock))
    for layer in (model, *(layer for _, layer in units)):
        if isinstance(layer, BitBlock) and isinstance(layer, keras.Model):
            raise ValueError(
                f"{type(layer).__name__} '{layer.name}' has one precision for all of its layers "
                "in its config: they cannot differ. Adapt a model of other blocks."
            )
    found = [
        (path, layer)
        for path, layer in units
        if (inner := inner_layers(layer)) and all(one in wanted for one in inner)
    ]
    if not found:
        raise ValueError(
            "`filters` must let through every layer of a block, or none. "
            f"Received: filters={filters!r}"
        )
    return found


class _Unit:
    """A layer or block that changes as a whole, with the precisions that it can have."""

    def __init__(self, path, layer, precisions):
        self.path = path
        self.layer = layer
        self.inner = inner_layers(layer)
        self.weights = weight_count(layer)
        self.quantizer = layer.weight_quantizer
        self.precisions = [self._suited(spec) for spec in precisions]
        self.sqnr = None

    def _suited(self, spec):
        present, found = self.quantizer, quantizers.get(spec)
        if isinstance(spec, str):
            if found.bits_per_weight == present.bits_per_weight:
                return present
            if present.learned:
                arguments = {"granularity": present.granularity, "group_size": present.group_size}
                return type(found)(scale="learned", **arguments)
            return type(found)(scale="absmax") if found.learned else found
        for layer in self.inner:
            layer.check_precision(found)
        return found

    def lower(self, present):
        """The next lower precision, or `None`."""
        bits = present.bits_per_weight
        return next((q for q in reversed(self.precisions) if q.bits_per_weight < bits), None)

    def higher(self, present):
        """The next higher precision, or `None`."""
        bits = present.bits_per_weight
        return next((q for q in self.precisions if q.bits_per_weight > bits), None)

    def inside(self, present):
        """The precision itself, or the nearest possible one where it lies outside."""
        low, high = self.precisions[0], self.precisions[-1]
        if present.bits_per_weight < low.bits_per_weight:
            return low
        return high if present.bits_per_weight > high.bits_per_weight else present

    def change(self, quantizer):
        self.layer.change_precision(quantizer)
        self.quantizer = quantizer

    def follow(self):
        """Whether the layer has another precision than before, loaded from a file."""
        if self.layer.weight_quantizer == self.quantizer:
            return False
        self.quantizer = self.layer.weight_quantizer
        return True


class _Inputs(Probe):
    """The first rows of what the activation quantizer of a layer sees."""

    rows: Any = None

    def look(self, x):
        if self.rows is None:
            x = ops.cast(self.layer.quantizer_inputs(x), "float32")
            self.rows = ops.reshape(x, (-1, x.shape[-1]))[:_ROWS]


def _record(model, data, units):
    """Inputs of the layers by `id`, where `data` is given and the layer has a product."""
    if data is None:
        return {}
    probes = [_Inputs(layer) for unit in units for layer in unit.inner]
    with contextlib.ExitStack() as stack:
        for probe in probes:
            stack.enter_context(probe)
        model(data, training=False)
    return {id(probe.layer): probe.rows for probe in probes}


class _Measure:
    """SQNR in dB of a unit at a precision, each measured once."""

    def __init__(self, inputs):
        self.inputs = inputs
        self.found: dict = {}

    def __call__(self, unit, quantizer):
        key = id(unit), quantizer
        if key not in self.found:
            powers = [self._powers(layer, quantizer) for layer in unit.inner]
            self.found[key] = signal_to_noise(*np.sum(powers, axis=0))
        return self.found[key]

    def _powers(self, layer, quantizer):
        matrix = layer.without_kept_rows(layer.kernel_matrix())
        scale = layer.learned_scale() if quantizer == layer.weight_quantizer else None
        rounded = quantizer.dequantize(quantizer.quantize(matrix, scale))
        x = self.inputs.get(id(layer))
        if x is not None:
            seen = x if layer.activation_quantizer is None else layer.fake_quantize_inputs(x)
            matrix, rounded = ops.matmul(x, matrix), ops.matmul(seen, rounded)
        expected, actual = (ops.convert_to_numpy(y).astype("float64") for y in (matrix, rounded))
        return np.square(expected).sum(), np.square(expected - actual).sum()
