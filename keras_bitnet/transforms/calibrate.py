"""Calibration: a stream of data decides what quantized layers do with their inputs."""

import contextlib
import warnings

import keras
import numpy as np
from keras import ops

from keras_bitnet.checks import check_built, check_choice, check_count, check_number
from keras_bitnet.filters import layer_filter
from keras_bitnet.layers.base import BitLayer
from keras_bitnet.layers.inputs import watch_inputs
from keras_bitnet.quantizers import StaticActivation
from keras_bitnet.transforms import gptq
from keras_bitnet.transforms.observers import METHODS, Observer
from keras_bitnet.transforms.pack import copy_the_rest
from keras_bitnet.transforms.rewrite import Rule, rewrite


def calibrate(
    model,
    data,
    method="minmax",
    *,
    percentile=99.99,
    momentum=None,
    static=True,
    rounding="nearest",
    damping=0.01,
    filters=None,
    batch_size=None,
    steps=None,
    verbose=1,
):
    """Returns a copy of a model whose quantized layers have looked at data.

    Layers with `smoothing` get their factors, those with `kept_channels` the channels of the
    largest magnitude, and all get one static activation scale, `threshold / highest code`,
    where `method` finds the threshold:

    | method | threshold |
    |---|---|
    | `"minmax"` | the largest magnitude seen |
    | `"ema"` | moving average of the largest magnitude of each batch |
    | `"percentile"` | the magnitude that `percentile` % of the inputs stay under |
    | `"mse"` | least squared error of rounding and clipping |
    | `"histogram"` | the same with rounding as uniform noise, `step^2 / 12` |
    | `"entropy"` | least Kullback-Leibler divergence of the distribution |

    With `rounding="gptq"` float kernels are rounded so that the errors of a layer's weights make
    up for each other, as the second moments of its inputs tell, in place of each weight to the
    nearest level: for models of 4 bits and less that are not trained after they were quantized.
    The layers then have a learned scale (`scale="learned"` of their weight quantizer) and a
    kernel on its grid, and both can be trained further.

    While it looks, weights are quantized and activations are float. The memory that it takes
    does not grow with the data: each layer has a few variables of fixed size (the largest
    magnitude of each channel and, where the method needs it, a histogram). They are updated
    inside a compiled `predict`. The magnitudes stay in the layers as `input_absmax`.

    Args:
        model: A built Keras model with layers of `keras_bitnet.layers`, packed or not; it is
            left as it is.
        data: What `model.predict` takes: arrays, `tf.data.Dataset`, PyTorch `DataLoader`,
            `keras.utils.PyDataset`, a generator of tuples. Targets are ignored.
        method: See the table.
        percentile: In (0, 100], for `method="percentile"`.
        momentum: Of scales that follow the inputs in later training, see `StaticActivation`.
        static: Whether activations get static scales; otherwise only smoothing, kept channels
            and the rounding are set.
        rounding: `"nearest"` leaves the weights as they are, or `"gptq"`. That takes seconds for
            a layer of some thousand inputs, and `in_features^2` numbers of each layer: of as many
            as 1 GB holds in one pass over the data, of the others in further ones.
        damping: Positive number, part of the mean second moment that is added to all for
            `rounding="gptq"`: more where there is little data.
        filters: Which layers, see `keras_bitnet.quantize_model`.
        batch_size: Of arrays, 32 by default.
        steps: Batches to take, all by default; needed where the data never ends.
        verbose: 1 shows a progress bar for each pass, 0 nothing. Smoothing and kept channels
            are a pass each before the last one, GPTQ one or more.

    Returns:
        The new model.

    Raises:
        ValueError: An argument is out of range; no layer to calibrate; the data is empty, does
            not fit the model or makes a NaN or an infinity; a generator where several passes
            are needed; smoothing, kept channels or GPTQ of a packed layer; GPTQ with a weight
            quantizer that does not round to the nearest level; on JAX, a layer in the cell
            of an RNN that is not unrolled.
    """
    check_built(model)
    check_choice("method", method, tuple(METHODS))
    check_number("percentile", percentile, "(0, 100]")
    check_choice("rounding", rounding, ("nearest", "gptq"))
    check_number("damping", damping, "(0, inf)")
    for name, count in (("batch_size", batch_size), ("steps", steps)):
        if count is not None:
            check_count(name, count)
    _check_data(data, getattr(model, "inputs", None))
    model, chosen = _prepare(model, filters, momentum, static, rounding)
    stream = _Stream(model, data, batch_size, steps, verbose)
    smoothed = [layer for layer in chosen if layer.smoothing is not None and not layer.packed]
    kept = [layer for layer in chosen if layer.kept_channels and not layer.packed]
    fixed = [layer for layer in chosen if layer.static]
    adjusted = [layer for layer in chosen if _adjusts(layer, rounding)]
    portions = gptq.portions(adjusted)
    stream.check_passes(sum(map(bool, (smoothed, kept, fixed, *portions))))
    for layer, seen in stream.watch(smoothed, lambda layer: lambda x: x):
        layer.divide_inputs(smoothing_factors(layer, seen.absmax))
    for layer, seen in stream.watch(kept, lambda layer: layer.rotate):
        largest = np.argsort(-seen.absmax, kind="stable")[: layer.kept_channels]
        layer.kept_indices.assign(np.sort(largest).astype("int32"))
        layer.reset_scale()
    with _unrounded(adjusted):
        for portion in portions:
            for layer, seen in stream.watch(portion, _quantized_part, moments=True):
                gptq.round_kernel(layer, seen.moments, damping)
    way = METHODS[method]
    for layer, seen in stream.watch(fixed, _quantized_part, histogram=way.histogram):
        quantizer = layer.activation_quantizer
        threshold = 0.0
        if seen.absmax.max() > 0:
            threshold = way.threshold(seen, quantizer.highest, percentile)
        layer.activation_scale.assign(max(threshold, quantizer.epsilon) / quantizer.highest)
        layer.input_absmax.assign(seen.absmax)
    return model


def _quantized_part(layer):
    return lambda x: layer.split_channels(layer.rotate(x))[0]


def smoothing_factors(layer, absmax):
    """`max |x|^alpha / max |w|^(1 - alpha)` per channel, 1 where either is zero."""
    matrix = ops.convert_to_numpy(layer.rotate_rows(layer.kernel_matrix()))
    weight = np.abs(matrix).max(axis=1)
    alive = (absmax > 0) & (weight > 0)
    x, w = np.where(alive, absmax, 1), np.where(alive, weight, 1)
    return np.clip(x**layer.smoothing / w ** (1 - layer.smoothing), 1e-5, 1e5)


@contextlib.contextmanager
def _unrounded(layers):
    """While it is open, the layers multiply with their float kernels."""
    strengths = [ops.copy(layer.quantization_strength) for layer in layers]
    for layer in layers:
        layer.quantization_strength.assign(0.0)
    try:
        yield
    finally:
        for layer, strength in zip(layers, strengths, strict=True):
            layer.quantization_strength.assign(strength)


def _prepare(model, filters, momentum, static, rounding):
    """A copy of the model with static quantizers, and its layers that are calibrated."""
    chosen, matches = [], layer_filter(filters)

    def replace(layer, path):
        if not isinstance(layer, BitLayer):
            return f"{type(layer).__name__} is not quantized"
        if not matches(layer, path):
            return "left out by `filters`"
        config = layer.get_config()
        if static and layer.takes_static and layer.activation_quantizer is not None:
            config["activation_quantizer"] = _static(layer.activation_quantizer, momentum)
        if _adjusts(layer, rounding):
            config["weight_quantizer"] = _learned(layer)
        return type(layer).from_config(config)

    def transfer(old, new):
        news = new.own_weights()
        for name in news.keys() & old.own_weights().keys():
            if name.startswith("kernel"):
                news[name].assign(ops.copy(old.own_weights()[name]))
        copy_the_rest(old, new)
        new._untrained_checksum = old._untrained_checksum
        treated = new.static or new.smoothing is not None or new.kept_channels
        if treated or _adjusts(new, rounding):
            chosen.append(new)

    new_model, _ = rewrite(model, Rule("calibrated", replace, transfer), verbose=0)
    if not chosen:
        raise ValueError(
            "`calibrate` found no layer to calibrate: it needs layers of `keras_bitnet.layers` "
            "that `filters` lets through, with an activation quantizer (with `static=False`, with "
            '`smoothing` or `kept_channels`) or with `rounding="gptq"`. Call '
            "`keras_bitnet.quantize_model` first. "
            f"Received: filters={filters!r}, static={static!r}"
        )
    return new_model, chosen


def _adjusts(layer, rounding):
    """Whether the weights of a layer are rounded anew: where calibration sees its inputs."""
    return rounding == "gptq" and layer.takes_static


def _learned(layer):
    """The weight quantizer of a layer with a scale that is a variable."""
    quantizer = layer.weight_quantizer
    if layer.packed or quantizer.formula not in ("nearest", "sign"):
        raise ValueError(
            f"GPTQ takes float kernels and rounds them to the nearest level. Layer '{layer.name}' "
            f"{'is packed' if layer.packed else f'has {quantizer!r}'}: leave it out with `filters`"
            f"{', or call it before `pack_model`' if layer.packed else ''}."
        )
    return type(quantizer).from_config({**quantizer.get_config(), "scale": "learned"})


def _static(quantizer, momentum):
    if quantizer.formula != "absmax":
        raise ValueError(
            f"`calibrate` knows no static scale for the activation quantizer {quantizer!r}. Leave "
            "its layers out with `filters`."
        )
    return StaticActivation(quantizer.bits, momentum, quantizer.epsilon)


def _check_data(data, inputs):
    """Refuses what has no batch, as far as that is known before it is read."""
    if data is None:
        raise ValueError("`data` must be what `model.predict` takes. Received: None")
    sized = [leaf for leaf in keras.tree.flatten(data) if hasattr(leaf, "shape")] or [data]
    sizes = set()
    for leaf in sized:
        try:
            sizes.add(leaf.shape[0] if hasattr(leaf, "shape") else len(leaf))
        except (TypeError, IndexError):  # a generator; a dataset without an end
            continue
    nested = isinstance(data, list) and any(isinstance(each, (list, tuple)) for each in data)
    if nested and inputs and len(sized) != len(inputs):  # Keras would take the first for all
        raise ValueError(
            "A list is taken as the inputs of the model, not as batches. Pass arrays, a dataset, "
            "a `keras.utils.PyDataset` or, for a single pass, a generator of tuples. Received: "
            f"a list of {len(data)}, {len(sized)} arrays in all, for {len(inputs)} inputs"
        )
    if 0 in sizes:
        raise ValueError(f"`data` is empty. Received: {_describe(data)}")
    if len(sizes) > 1:
        raise ValueError(
            "All arrays of `data` must have the same number of examples. Received: "
            f"{sorted(sizes)} of them"
        )


def _describe(data):
    shape = getattr(data, "shape", None)
    return type(data).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")


class _Stream:
    """Runs a model over data, as often as there is something to watch."""

    def __init__(self, model, data, batch_size, steps, verbose):
        self.model = model
        self.data = data
        self.options = {"batch_size": batch_size, "steps": steps, "verbose": verbose}

    def check_passes(self, count):
        if count > 1 and hasattr(self.data, "__next__"):
            raise ValueError(
                f"The data is read {count} times (smoothing, kept channels and scales are a pass "
                "each), and a generator can be read once. Pass arrays, a dataset or a "
                f"`keras.utils.PyDataset`. Received: {_describe(self.data)}"
            )

    def watch(self, layers, see, **kept):
        """Gives `(layer, seen)` for each layer after one pass over the data.

        Args:
            layers: `BitLayer`s.
            see: Gives of a layer what to observe of its inputs.
            **kept: What the `Observer`s keep.
        """
        if not layers:
            return []
        observers = [Observer(layer, see(layer), **kept) for layer in layers]
        watcher = _Watcher(self.model, layers, observers)
        try:
            self._predict(watcher)
        except UnboundLocalError as error:  # Keras's answer to data without a batch
            raise ValueError(f"`data` is empty. Received: {_describe(self.data)}") from error
        except Exception as error:
            if type(error).__name__ != "UnexpectedTracerError":  # JAX's
                raise
            raise ValueError(
                "On JAX `calibrate` cannot look into a compiled loop, such as the cell of an RNN. "
                "Leave the layers in it out with `filters`, or make the RNN with `unroll=True`."
            ) from error
        if not bool(ops.convert_to_numpy(watcher.finite)):
            raise ValueError("`data` holds a NaN or an infinity. Leave those examples out.")
        found = [
            (layer, observer.seen()) for layer, observer in zip(layers, observers, strict=True)
        ]
        self._check(found)
        return found

    def _predict(self, watcher):
        with warnings.catch_warnings():
            if self.options["steps"] is None:  # the end of a generator interrupts nothing
                warnings.filterwarnings("ignore", "Your input ran out of data")
            watcher.predict(self.data, **self.options)

    def _check(self, found):
        unused = [layer.name for layer, seen in found if seen.batches == 0]
        if unused:
            raise ValueError(
                f"The model did not use the layers {unused} on `data`. Leave them out with "
                "`filters`."
            )
        for layer, seen in found:
            if not np.isfinite(seen.absmax).all():
                raise ValueError(
                    f"The inputs of layer '{layer.name}' hold a NaN or an infinity, which the "
                    "model makes of finite `data`. Leave the layer out with `filters`."
                )


class _Watcher(keras.Model):
    """A model in whose `predict` the observers see the inputs of layers; it returns nothing.

    So `predict` gathers nothing, however long the data is; state in `call`, so that it works
    compiled on every backend. Being a model of its own it is traced anew, and
    the model inside keeps its compiled functions.
    """

    def __init__(self, model, layers, observers):
        super().__init__(autocast=False, name="watcher")  # "_" begins no scope in TensorFlow
        self.watched = model
        self.observers = observers
        self._layers_watched = layers
        self.finite = self.add_weight(
            name="finite", shape=(), initializer="ones", dtype="bool", trainable=False
        )
        self.built = True

    def call(self, inputs):
        by_layer = dict(zip(map(id, self._layers_watched), self.observers, strict=True))
        with watch_inputs(self._layers_watched, lambda layer, x: by_layer[id(layer)].update(x)):
            self.watched(inputs, training=False)
        # Of the data itself too: a layer such as a ReLU or a pooling may lose a NaN.
        for x in keras.tree.flatten(inputs):
            if keras.backend.is_float_dtype(x.dtype):
                self.finite.assign(ops.logical_and(self.finite, ops.all(ops.isfinite(x))))
        return ()
