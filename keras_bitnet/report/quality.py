"""What quantization does to one layer: its weights, its inputs, its outputs."""

import contextlib
import dataclasses
import itertools

import numpy as np

from keras_bitnet.callbacks.statistics import Probe
from keras_bitnet.report import pairs, probes
from keras_bitnet.report.macs import precision
from keras_bitnet.report.outliers import (
    Outliers,
    Rows,
    channel_maxima,
    compare_treatments,
    find_outliers,
)

BINS = 48
_MOST_LEVELS = 16  # shown in a histogram
_OUTLIER_WEIGHT = 6.0  # standard deviations


@dataclasses.dataclass
class Errors:
    """How far an array is from what it should be: see `Comparison`; `sqnr` in dB."""

    sqnr: float
    cosine: float
    mse: float
    max_error: float

    @classmethod
    def of(cls, comparison):
        """Those of a `Comparison`."""
        return cls(comparison.sqnr, comparison.cosine, comparison.mse, comparison.largest)


@dataclasses.dataclass
class Histogram:
    """Counts of equal bins from `low` to `high`, and the quantization levels if they are few."""

    low: float
    high: float
    counts: list[int]
    levels: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class LayerQuality:
    """One quantized layer.

    Attributes:
        path: Where it is in the model.
        type: Its class.
        precision: `"W1.58A8"`.
        weights: Numbers in the kernel that are quantized: kept channels are left out.
        weight: `Errors` of these.
        share_zero: Share of the weights that are quantized to 0.
        weight_outliers: Share of the weights more than 6 standard deviations from 0.
        input_absmax: Largest magnitude that the activation quantizer sees, `None` for a lookup.
        input_sqnr: SQNR of the quantized inputs in dB, `None` where they stay float.
        outliers: `Outliers`, or `None`: no input channel has a largest magnitude more than 6
            times the median of the channels.
        output: `Errors` of the outputs in the quantized model, all layers before included.
        sensitivity: Squared error of the outputs of the model over their square, when only this
            layer is quantized.
        loss_change: Growth of the loss then, `None` without targets.
        weight_histogram: Of the float kernel, with the quantization levels.
        input_histogram: Of the inputs that are quantized, or `None`.
        channels: Largest magnitude of each input channel that the quantizer sees.
    """

    path: str
    type: str
    precision: str
    weights: int
    weight: Errors
    share_zero: float
    weight_outliers: float
    input_absmax: float | None
    input_sqnr: float | None
    outliers: Outliers | None
    output: Errors
    sensitivity: float
    loss_change: float | None
    weight_histogram: Histogram
    input_histogram: Histogram | None
    channels: list[float]


class Measured:
    """Runs two models side by side and keeps what is seen of each pair of layers.

    Args:
        reference: The float model.
        model: The quantized one.
        found: `{path: (float layer, quantized layer)}`.
        inputs: List of batches of inputs.
    """

    def __init__(self, reference, model, found, inputs):
        self.outputs = {path: probes.Comparison() for path in found}
        self.calls = dict.fromkeys(found, 0)
        self.probes = {
            path: [InputProbe(layer, len(inputs)) for layer in pairs.inner_layers(new)]
            for path, (_, new) in found.items()
        }
        with contextlib.ExitStack() as stack:
            for probe in itertools.chain(*self.probes.values()):
                stack.enter_context(probe)
            for x in inputs:
                self._compare(reference, model, found, x)

    def _compare(self, reference, model, found, x):
        _, expected = probes.run_and_record(reference, x, [old for old, _ in found.values()])
        _, actual = probes.run_and_record(model, x, [new for _, new in found.values()])
        for path, (old, new) in found.items():
            outputs = expected[id(old)], actual[id(new)]
            if len(outputs[0]) != len(outputs[1]):
                raise ValueError(
                    f"The models call layer '{path}' not equally often, so they do not belong "
                    f"together. Received: {len(outputs[0])} calls in the reference, "
                    f"{len(outputs[1])} in the quantized model"
                )
            self.calls[path] += len(outputs[0])
            for pair in zip(*outputs, strict=True):
                first, second = map(pairs.array, pair)
                if first.shape != second.shape:
                    raise ValueError(
                        f"Layer '{path}' of the model is no twin of that of the reference. "
                        f"Received: outputs of shapes {second.shape} and {first.shape}"
                    )
                self.outputs[path].add(first, second)


class InputProbe(Probe):
    """Adds a histogram, the largest magnitude of every input, and a few rows of them."""

    def __init__(self, layer, batches):
        super().__init__(layer)
        self.counts = np.zeros(BINS, int)
        self.high = 0.0
        self.channels = np.zeros(layer.in_features, "float32")
        self.rows = Rows(layer, batches)

    def look(self, x):
        """Takes in the inputs of one use."""
        super().look(x)
        self.rows.add(pairs.array(self.layer.normalize_inputs(x)))
        values = pairs.array(self.layer.quantizer_inputs(x))
        if not np.isfinite(values).all():
            raise ValueError(
                f"The inputs of layer '{self.layer.name}' hold a NaN or an infinity, which the "
                "quantized model makes of `data`."
            )
        magnitudes = np.abs(values).reshape(-1, values.shape[-1])
        self.channels = np.maximum(self.channels, magnitudes.max(axis=0, initial=0.0))
        self._widen(float(magnitudes.max(initial=0.0)))
        if self.high:
            self.counts += np.histogram(values, BINS, (-self.high, self.high))[0]

    def _widen(self, largest):
        """Makes room for a magnitude: bins are added together, two and two."""
        self.high = self.high or largest
        while self.high < largest:
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(axis=1), BINS // 4)
            self.high *= 2

    def histogram(self):
        """A `Histogram`, or `None` where nothing was seen; without empty bins at its ends.

        Zero stays in the middle, or at the left where nothing is below it.
        """
        filled = np.flatnonzero(self.counts)
        if not len(filled):
            return None
        margin = min(filled[0], BINS - 1 - filled[-1])
        high = self.high * (1 - 2 * margin / BINS)
        if filled[0] >= BINS // 2:
            return Histogram(0.0, high, self.counts[BINS // 2 : BINS - margin].tolist())
        return Histogram(-high, high, self.counts[margin : BINS - margin].tolist())


def layer_quality(path, pair, measured, effect, base):
    """The `LayerQuality` of a pair.

    Args:
        path: Where the layer is.
        pair: `(float layer, quantized layer)`.
        measured: The `Measured`.
        effect: `Effect` of the layer alone.
        base: `Effect` of the float model.
    """
    old, new = pair
    matrices = pairs.kernels(old, new)
    inner = list(zip(pairs.inner_layers(new), measured.probes[path], matrices, strict=True))
    weight = probes.Comparison()
    expected, actual = (
        np.concatenate([pairs.quantized_rows(layer, both[i]).ravel() for layer, _, both in inner])
        for i in (0, 1)
    )
    weight.add(expected, actual)
    seen = next((probe for _, probe, _ in inner if probe.used), None)
    statistics = {} if seen is None else seen.statistics()
    grown = None if effect.mean_loss is None else effect.mean_loss - base.mean_loss
    return LayerQuality(
        path=path,
        type=type(new).__name__,
        precision=precision(inner[0][0]),
        weights=expected.size,
        weight=Errors.of(weight),
        share_zero=float(np.mean(actual == 0)),
        weight_outliers=float(np.mean(np.abs(expected) > _OUTLIER_WEIGHT * expected.std())),
        input_absmax=statistics.get("activation_absmax"),
        input_sqnr=statistics.get("activation_sqnr"),
        outliers=_outliers(inner),
        output=Errors.of(measured.outputs[path]),
        sensitivity=effect.outputs.relative,
        loss_change=grown,
        weight_histogram=_weight_histogram(expected, actual),
        input_histogram=None if seen is None else seen.histogram(),
        channels=[] if seen is None else channel_maxima(seen.layer, seen.channels).tolist(),
    )


def _outliers(inner):
    """Those of the first layer that has any."""
    for layer, probe, (matrix, _) in inner:
        found = find_outliers(layer, probe.channels)
        if found is not None:
            compare_treatments(found, layer, matrix, probe.rows.array())
            return found
    return None


def _weight_histogram(expected, actual):
    high = float(np.max(np.abs(expected), initial=0.0)) or 1.0
    levels = np.unique(actual)
    shown = levels.tolist() if len(levels) <= _MOST_LEVELS else []
    counts = np.histogram(expected, BINS, (-high, high))[0]
    return Histogram(-high, high, counts.tolist(), shown)
