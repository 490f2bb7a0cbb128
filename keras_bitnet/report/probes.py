"""Runs a float model and its quantized twin side by side and compares their layers.

Models run eagerly, batch by batch, so memory holds one batch. A layer of the quantized model
belongs to the layer of the float one at the same path.
"""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bitnet.callbacks.statistics import signal_to_noise
from keras_bitnet.layers.base import BitLayer
from keras_bitnet.report.calls import intercepted
from keras_bitnet.transforms.rewrite import Rule, named_layers, rewrite


@dataclasses.dataclass
class Comparison:
    """Sums over pairs of arrays, from which the measures of an error follow."""

    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    count: int = 0

    def add(self, expected, actual):
        """Takes in a pair of arrays of one shape."""
        expected = np.asarray(expected, "float64").ravel()
        actual = np.asarray(actual, "float64").ravel()
        with np.errstate(invalid="ignore"):  # an infinity shows in the sums
            error = actual - expected
        self.signal += float(expected @ expected)
        self.other += float(actual @ actual)
        self.product += float(expected @ actual)
        self.noise += float(error @ error)
        self.largest = max(self.largest, float(np.max(np.abs(error), initial=0.0)))
        self.count += expected.size

    @property
    def relative(self):
        """`sum (actual - expected)^2 / sum expected^2`."""
        return self.noise / self.signal if self.signal else (0.0 if not self.noise else math.inf)

    @property
    def sqnr(self):
        """`10 log10(sum expected^2 / sum (actual - expected)^2)` in dB; infinite without noise."""
        return signal_to_noise(self.signal, self.noise)

    @property
    def cosine(self):
        """Cosine of the angle between the two."""
        norms = math.sqrt(self.signal * self.other)
        return self.product / norms if norms else 1.0

    @property
    def mse(self):
        """Mean of the squared error."""
        return self.noise / self.count if self.count else 0.0


def float_twin(model):
    """A copy of a model with quantization-aware layers, in which their strength is 0."""
    return _copy_at_strength(model, 0.0)


def quantized_twin(model):
    """The model itself, or a copy at full strength if a layer of it has another."""
    layers = bit_layers(model).values()
    if all(layer.packed or float(layer.quantization_strength) == 1 for layer in layers):
        return model
    return _copy_at_strength(model, 1.0)


def _copy_at_strength(model, strength):
    copy, _ = rewrite(model, Rule("copied", lambda layer, path: "", lambda old, new: None), 0)
    for layer in bit_layers(copy).values():
        if not layer.packed:
            layer.quantization_strength.assign(strength)
    return copy


def bit_layers(model):
    """The quantized layers of a model by path."""
    return {path: layer for path, layer in named_layers(model) if isinstance(layer, BitLayer)}


def run(model, x):
    """The outputs of a model in inference mode, as a list of arrays."""
    return _arrays(model(x, training=False))


def run_and_record(model, x, layers):
    """As `run`, also `{id(layer): [output of each call]}` for these layers."""
    wanted: dict[int, list] = {id(layer): [] for layer in layers}

    def handle(stock, layer, args, kwargs):
        output = stock(layer, *args, **kwargs)
        if id(layer) in wanted:
            wanted[id(layer)].append(output)
        return output

    with intercepted(handle):
        outputs = run(model, x)
    return outputs, wanted


def run_substituted(model, x, old, new):
    """As `run`, with `new` called in place of the layer `old`."""

    def handle(stock, layer, args, kwargs):
        return stock(new if layer is old else layer, *args, **kwargs)

    with intercepted(handle):
        return run(model, x)


def _arrays(outputs):
    return [ops.convert_to_numpy(ops.cast(leaf, "float32")) for leaf in keras.tree.flatten(outputs)]


@dataclasses.dataclass
class Effect:
    """What a change does to the outputs of a model, over all batches seen.

    Attributes:
        outputs: `Comparison` of the outputs with those of the float model.
        loss: Sum of the loss over the examples, `None` without targets.
        examples: How many.
    """

    outputs: Comparison
    loss: float | None = None
    examples: int = 0

    @property
    def mean_loss(self):
        """The loss of an example, or `None`."""
        return None if self.loss is None or not self.examples else self.loss / self.examples

    def add(self, expected, actual, loss, size):
        """Takes in the outputs of a batch."""
        for pair in zip(expected, actual, strict=True):
            self.outputs.add(*pair)
        if loss is not None:
            self.loss = (self.loss or 0.0) + loss * size
        self.examples += size


def effects(reference, quantized, batches, pairs, loss=None, progress=None, alone=True):
    """Measures what quantizing each layer alone does to the outputs of the float model.

    Args:
        reference: The float model.
        quantized: Its quantized twin, or a list of them.
        batches: List or iterator of `(x, y)`, `y` may be `None`.
        pairs: List of `{path: (float layer, quantized layer)}`, one entry a twin.
        loss: `loss(y, outputs) -> float`, or `None`.
        progress: Called after each run of a model, or `None`.
        alone: Whether to quantize layers alone, too.

    Returns:
        `(base, whole, single)`: `Effect` of the float model; lists, one entry a twin, of the
        `Effect` of the whole twin and of `{path: Effect of that layer alone}`.
    """
    twins = quantized if isinstance(quantized, list) else [quantized]
    base = Effect(Comparison())
    whole = [Effect(Comparison()) for _ in twins]
    single = [{path: Effect(Comparison()) for path in found} for found in pairs]
    report: Any = progress or (lambda: None)
    for x, y in batches:
        expected = run(reference, x)
        size = len(keras.tree.flatten(x)[0])

        def measure(effect, outputs, expected=expected, y=y, size=size):
            value = None if loss is None or y is None else loss(y, outputs)
            effect.add(expected, outputs, value, size)
            report()

        measure(base, expected)
        for i, twin in enumerate(twins):
            measure(whole[i], run(twin, x))
            for path, (old, new) in pairs[i].items() if alone else ():
                measure(single[i][path], run_substituted(reference, x, old, new))
    return base, whole, single
