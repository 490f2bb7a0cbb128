"""Input channels that are much larger than the others, and which treatment of them helps."""

import dataclasses
import math
from typing import Any

import numpy as np
from keras import ops

from keras_bitnet.layers import BitLinear
from keras_bitnet.quantizers import StaticActivation
from keras_bitnet.report.pairs import array, untreated
from keras_bitnet.report.probes import Comparison
from keras_bitnet.transforms.calibrate import smoothing_factors
from keras_bitnet.transforms.observers import BINS, METHODS, Seen

RATIO = 6.0  # times the median of the channels
PERCENTILE = 99.9
_GAIN = 1.0  # dB that a treatment must bring, and may lack of the best
_COLUMNS = 512  # outputs on which treatments are compared
_NUMBERS = 2**18  # inputs of a layer that are held for it


@dataclasses.dataclass
class OutlierChannel:
    """One channel: its index, its largest magnitude, and that over the median of the channels."""

    index: int
    absmax: float
    ratio: float


@dataclasses.dataclass
class Outliers:
    """The outlier channels of the inputs of a layer, as its activation quantizer sees them.

    Attributes:
        channels: A list of `OutlierChannel`, the largest first. Of a convolution, channels of the
            image.
        median: Median over the channels of their largest magnitude; channels of zeros left out.
        columns: How many inputs of the product they are: a convolution has one for each tap.
        product_sqnr: SQNR in dB of the product of quantized inputs and quantized kernel, without
            training, by treatment: `"none"` (as the layer is), `"smoothing"`, `"mse"` and
            `"percentile"` (static scales that clip), `"rotation"`, `"kept_channels"`. Empty where
            the layer takes none.
        suggestion: The first of them within 1 dB of the best one, or `None` where none brings 1
            dB.
        how: What to write for it.
    """

    channels: list[OutlierChannel]
    median: float
    columns: int
    product_sqnr: dict[str, float] = dataclasses.field(default_factory=dict)
    suggestion: str | None = None
    how: str = ""


def find_outliers(layer, absmax):
    """The outlier channels of a layer.

    Args:
        layer: The `BitLayer`.
        absmax: Array of the largest magnitude of each of its inputs, `(in_features,)`.

    Returns:
        `Outliers`, or `None`: there is none.
    """
    largest = channel_maxima(layer, absmax)
    if not largest.any():
        return None
    median = float(np.median(largest[largest > 0]))
    indices = [int(i) for i in np.argsort(-largest, kind="stable") if largest[i] > RATIO * median]
    if not indices:
        return None
    channels = [OutlierChannel(i, float(largest[i]), float(largest[i]) / median) for i in indices]
    return Outliers(channels, median, columns=len(indices) * (len(absmax) // len(largest)))


def channel_maxima(layer, absmax):
    """The largest magnitude of each channel, those of the taps of a convolution as one."""
    taps = math.prod(layer.window.size) if hasattr(layer, "window") else 1
    return absmax.reshape(taps, -1).max(axis=0)


class Rows:
    """Keeps a few rows of the inputs of a layer, evenly from all batches."""

    def __init__(self, layer, batches):
        self.count = max(1, min(256, _NUMBERS // layer.in_features) // batches)
        self.parts = []

    def add(self, x):
        """Takes some of the rows of an array `(..., in_features)`."""
        rows = x.reshape(-1, x.shape[-1])
        self.parts.append(rows[:: max(1, len(rows) // self.count)][: self.count])

    def array(self):
        """What was kept, `(rows, in_features)`."""
        return np.concatenate(self.parts)


def compare_treatments(outliers, layer, matrix, x):
    """Fills in what the treatments do: measured, on rows of the inputs.

    Args:
        outliers: The `Outliers` of the layer.
        layer: The `BitLayer`.
        matrix: Its float kernel for treated inputs, `(in_features, out_features)`.
        x: Rows of its inputs after its norm, `(rows, in_features)`.
    """
    quantizer = layer.activation_quantizer
    if quantizer is None or layer.own_names.get("smoothing", "") is None:
        return
    matrix = matrix[:, :: -(-matrix.shape[1] // _COLUMNS)]
    trial = _Trial(layer, matrix, array(untreated(layer, matrix)), x)
    for name, measure in _TREATMENTS.items():
        twin = measure(trial, outliers)
        if twin is not None:
            outliers.product_sqnr[name] = trial.sqnr(twin)
    now = outliers.product_sqnr["none"]
    best = max(outliers.product_sqnr.values())
    if best >= now + _GAIN:
        outliers.suggestion = next(
            name
            for name, sqnr in outliers.product_sqnr.items()
            if name != "none" and sqnr >= max(best - _GAIN, now + _GAIN)
        )
        outliers.how = _HOW[outliers.suggestion].format(columns=outliers.columns)


@dataclasses.dataclass
class _Trial:
    """A layer as one product, to be treated otherwise: `x @ plain` in float."""

    layer: Any
    matrix: np.ndarray
    plain: np.ndarray
    x: np.ndarray

    def twin(self, matrix, activation_quantizer=None, **treatment):
        """A `BitLinear` with a kernel."""
        layer = self.layer
        if activation_quantizer is None:
            activation_quantizer = layer.activation_quantizer
        twin = BitLinear(
            matrix.shape[1],
            use_bias=False,
            kernel_initializer="zeros",
            weight_quantizer=layer.weight_quantizer,
            activation_quantizer=activation_quantizer,
            dtype="float32",
            **treatment,
        )
        twin.build((None, layer.in_features))
        twin.kernel.assign(matrix)
        return twin  # a static scale of 0 stands for that of the inputs at hand

    def sqnr(self, twin):
        """SQNR of the product of a twin, in dB."""
        twin.reset_scale()
        found = Comparison()
        found.add(self.x @ self.plain, array(twin(self.x)))
        return found.sqnr


def _as_it_is(trial, outliers):
    layer = trial.layer
    treatment = {"smoothing": 0.5} if layer.input_gain is not None else {}
    if layer.kept_channels:
        treatment |= {"kept_channels": layer.kept_channels, "kept_bits": layer.kept_bits}
    twin = trial.twin(trial.matrix, rotation=layer.rotation, **treatment)
    for name in ("input_gain", "kept_indices", "activation_scale"):
        if getattr(layer, name) is not None:
            getattr(twin, name).assign(ops.copy(getattr(layer, name)))
    return twin


def _smoothed(trial, outliers):
    twin = trial.twin(trial.plain, smoothing=0.5)
    twin.divide_inputs(smoothing_factors(twin, np.abs(trial.x).max(axis=0)))
    return twin


def _clipped(method):
    def measure(trial, outliers):
        quantizer = trial.layer.activation_quantizer
        if quantizer.formula != "absmax":
            return None
        static = StaticActivation(quantizer.bits, epsilon=quantizer.epsilon)
        magnitudes = np.abs(trial.x)
        absmax = magnitudes.max(axis=0)
        span = float(absmax.max())
        counts = np.histogram(magnitudes[magnitudes > 0], BINS, (0, span))[0].astype("float32")
        seen = Seen(absmax, span, 1, counts, span)
        twin = trial.twin(trial.plain, static)
        threshold = METHODS[method].threshold(seen, static.highest, PERCENTILE)
        twin.activation_scale.assign(max(threshold, static.epsilon) / static.highest)
        return twin

    return measure


def _rotated(trial, outliers):
    twin = trial.twin(trial.plain, rotation="hadamard")
    twin.kernel.assign(twin.adapt_matrix(trial.plain))
    return twin


def _kept(trial, outliers):
    if outliers.columns > trial.layer.in_features // 4:
        return None
    twin = trial.twin(trial.plain, kept_channels=outliers.columns)
    largest = np.argsort(-np.abs(trial.x).max(axis=0), kind="stable")[: outliers.columns]
    twin.kept_indices.assign(np.sort(largest).astype("int32"))
    return twin


# From what costs nothing when the packed layer runs to what costs most.
_TREATMENTS = {
    "none": _as_it_is,
    "smoothing": _smoothed,
    "mse": _clipped("mse"),
    "percentile": _clipped("percentile"),
    "rotation": _rotated,
    "kept_channels": _kept,
}
_HOW = {
    "smoothing": "quantize with smoothing=0.5, then calibrate",
    "mse": "calibrate with method='mse'",
    "percentile": f"calibrate with method='percentile', percentile={PERCENTILE}",
    "rotation": "quantize with rotation='hadamard'",
    "kept_channels": "quantize with kept_channels={columns}, then calibrate",
}
