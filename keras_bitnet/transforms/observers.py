"""What calibration sees of a layer, in a few variables of fixed size, and what it concludes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

BINS = 2048
_MOMENTUM = 0.99  # of the moving average over batches


class Observer(keras.layers.Layer):
    """Statistics of the inputs of one layer, updated batch by batch, compiled or not.

    The histogram is one of magnitudes, zeros left out. Its range is a power of two; when a
    larger value comes it doubles and neighbouring bins are added together, so nothing has to
    be known beforehand and nothing is forgotten.

    Args:
        layer: The `BitLayer` that is observed.
        see: Function of its smoothed inputs: what to observe of them.
        histogram: Whether to keep one.
        moments: Whether to keep the second moments of the channels.
    """

    def __init__(self, layer, see, histogram=False, moments=False):
        super().__init__(autocast=False, dtype="float32")
        self.see = see
        self.absmax = self._zeros("absmax", (layer.in_features,))
        self.average = self._zeros("average", ())
        self.batches = self._zeros("batches", ())
        self.counts: Any = None
        self.span: Any = None
        self.moments: Any = None
        if moments:
            self.moments = self._zeros("moments", (layer.in_features, layer.in_features))
        if histogram:
            self.counts = self._zeros("counts", (BINS,))
            self.span = self._zeros("span", ())
        self.built = True

    def _zeros(self, name, shape):
        # Never cast: it is read where a layer of lower precision is called.
        return self.add_weight(
            name=name, shape=shape, initializer="zeros", trainable=False, autocast=False
        )

    def update(self, x):
        """Takes in one batch of inputs `(..., in_features)`."""
        x = ops.cast(self.see(x), "float32")
        if self.moments is not None:
            rows = ops.reshape(x, (-1, x.shape[-1]))
            moments = ops.matmul(ops.transpose(rows), rows)
            self.moments.assign(ops.convert_to_tensor(self.moments) + moments)
        # An infinity stays and is found later; a maximum of TensorFlow may pass over a NaN.
        x = ops.where(ops.isfinite(x), ops.abs(x), np.inf)
        absmax, average, batches = map(
            ops.convert_to_tensor, (self.absmax, self.average, self.batches)
        )
        channels = ops.max(ops.reshape(x, (-1, x.shape[-1])), axis=0)
        largest = ops.max(channels)
        self.absmax.assign(ops.maximum(absmax, channels))
        moved = _MOMENTUM * average + (1 - _MOMENTUM) * largest
        self.average.assign(ops.where(batches > 0, moved, largest))
        self.batches.assign(batches + 1)
        if self.counts is not None:
            self._count(ops.reshape(x, (-1,)))

    def _count(self, x):
        x = ops.where(ops.isfinite(x), x, 0.0)
        exponent = ops.ceil(ops.log2(ops.maximum(ops.max(x), 1e-30)))
        before = ops.convert_to_tensor(self.span)
        span = ops.maximum(before, ops.power(2.0, exponent))
        fold = span / ops.where(before > 0, before, span)
        folded = ops.cast(ops.floor(ops.arange(BINS, dtype="float32") / fold), "int32")
        counts = ops.segment_sum(ops.convert_to_tensor(self.counts), folded, BINS)
        bins = ops.cast(ops.clip(ops.floor(x * (BINS / span)), 0, BINS - 1), "int32")
        counts = counts + ops.segment_sum(ops.cast(x > 0, "float32"), bins, BINS)
        self.counts.assign(counts)
        self.span.assign(span)

    def seen(self):
        """The statistics as `Seen`."""
        names = ("absmax", "average", "batches", "counts", "span", "moments")
        values = {name: getattr(self, name) for name in names}
        return Seen(
            **{k: None if v is None else ops.convert_to_numpy(v) for k, v in values.items()}
        )


class Seen(NamedTuple):
    """What an observer saw, as NumPy arrays.

    Attributes:
        absmax: Largest magnitude of each channel, `(in_features,)`.
        average: Moving average of the largest magnitude of a batch.
        batches: Uses of the layer.
        counts: Histogram of the magnitudes above zero, `(BINS,)`, or `None`.
        span: The magnitude at which it ends, or `None`.
        moments: Sum of `x^T x`, `(in_features, in_features)`, or `None`.
    """

    absmax: Any
    average: Any
    batches: Any
    counts: Any
    span: Any
    moments: Any = None

    @property
    def magnitudes(self):
        """The middle of each bin."""
        return (np.arange(BINS) + 0.5) * (float(self.span) / BINS)


# -- methods: from statistics to the magnitude that gets the highest code ------------------


def minmax(seen, highest, percentile):
    """The largest magnitude seen."""
    return seen.absmax.max()


def ema(seen, highest, percentile):
    """The moving average of the largest magnitude of each batch."""
    return seen.average


def of_percentile(seen, highest, percentile):
    """The magnitude that this share of the inputs, zeros left out, stays under."""
    reached = np.cumsum(seen.counts, dtype="float64")
    i = int(np.searchsorted(reached, reached[-1] * percentile / 100))
    return min((i + 1) * float(seen.span) / BINS, seen.absmax.max())


def mse(seen, highest, percentile):
    """The threshold with the least squared error of rounding and clipping."""

    def error(threshold):
        step = threshold / highest
        rounded = np.minimum(np.round(seen.magnitudes / step), highest) * step
        return seen.counts @ np.square(seen.magnitudes - rounded)

    return _least(error, seen)


def histogram(seen, highest, percentile):
    """The threshold with the least error if rounding were uniform noise: step^2 / 12."""

    def error(threshold):
        clipped = np.maximum(seen.magnitudes - threshold, 0)
        inside = seen.counts[seen.magnitudes <= threshold].sum()
        return seen.counts @ np.square(clipped) + inside * (threshold / highest) ** 2 / 12

    return _least(error, seen)


def entropy(seen, highest, percentile):
    """The threshold that keeps the distribution: least Kullback-Leibler divergence.

    Source:
        Migacz 2017, 8-bit inference with TensorRT (GPU Technology Conference).
    """
    levels, last = highest + 1, int(np.flatnonzero(seen.counts)[-1]) + 1

    def divergence(kept):
        clipped = seen.counts[:kept].astype("float64")
        clipped[-1] += seen.counts[kept:].sum()
        level = np.arange(kept) * levels // kept
        filled = seen.counts[:kept] > 0
        mass = np.bincount(level, seen.counts[:kept], levels)
        share = mass / np.maximum(np.bincount(level, filled, levels), 1)
        coarse = np.where(filled, share[level], 0)
        p, q = clipped / clipped.sum(), coarse / max(coarse.sum(), 1)
        both = (p > 0) & (q > 0)
        lost = p[(p > 0) & (q == 0)].sum()  # what only clipping puts there
        return (p[both] * np.log(p[both] / q[both])).sum() + lost * np.log(1e6)

    if last <= levels:
        return seen.absmax.max()
    candidates = np.unique(np.linspace(levels, last, 128).astype(int))
    best = min(candidates, key=divergence)
    return min(best * float(seen.span) / BINS, seen.absmax.max())


def _least(error, seen):
    """The threshold of least error among 128 from the largest magnitude down to 1/256 of it."""
    return min(seen.absmax.max() * 2.0 ** -(np.arange(128) / 16), key=error)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to find the range of activations.

    Attributes:
        threshold: `threshold(seen, highest, percentile)`, the magnitude of the highest code.
        histogram: Whether it needs one.
    """

    threshold: Callable
    histogram: bool = True


METHODS = {
    "minmax": Method(minmax, histogram=False),
    "ema": Method(ema, histogram=False),
    "percentile": Method(of_percentile),
    "mse": Method(mse),
    "histogram": Method(histogram),
    "entropy": Method(entropy),
}
