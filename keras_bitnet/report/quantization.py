"""What quantization does to every layer of a model, on data: table, JSON and a page."""

import contextlib
import dataclasses
import json

import keras
import numpy as np
from keras import ops

from keras_bitnet.callbacks.statistics import _Probe
from keras_bitnet.checks import check_built
from keras_bitnet.files import replacing
from keras_bitnet.report import html, probes
from keras_bitnet.report.data import batches
from keras_bitnet.report.losses import loss_function
from keras_bitnet.report.macs import precision
from keras_bitnet.report.table import print_table, text_table

BINS = 48
_OUTLIER_WEIGHT = 6.0  # standard deviations
_OUTLIER_CHANNEL = 6.0  # times the median of the largest magnitudes of the channels


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
    """Counts of equal bins from `low` to `high`; values outside are in the outermost."""

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
        weights: Numbers in the kernel.
        weight: `Errors` of the kernel.
        share_zero: Share of the weights that are quantized to 0.
        weight_outliers: Share of the weights more than 6 standard deviations from 0.
        input_absmax: Largest magnitude that the activation quantizer sees.
        input_sqnr: SQNR of the quantized inputs in dB, `None` where they stay float.
        outlier_channels: How many input channels have a largest magnitude more than 6 times the
            median of the channels.
        output: `Errors` of the outputs in the quantized model, all layers before included.
        sensitivity: Squared error of the outputs of the model over their square, when only this
            layer is quantized.
        loss_change: Growth of the loss then, `None` without targets.
        weight_histogram: Of the float kernel, with the quantization levels of one scale.
        input_histogram: Of the inputs that are quantized.
    """

    path: str
    type: str
    precision: str
    weights: int
    weight: Errors
    share_zero: float
    weight_outliers: float
    input_absmax: float
    input_sqnr: float | None
    outlier_channels: int
    output: Errors
    sensitivity: float
    loss_change: float | None
    weight_histogram: Histogram
    input_histogram: Histogram


@dataclasses.dataclass
class QuantizationReport:
    """The content of `quantization_report`.

    Attributes:
        name: Of the model.
        samples: Examples that were measured.
        output: `Errors` of the outputs of the whole model.
        loss, loss_float: Mean loss of the quantized and the float model, or `None`.
        layers: A `LayerQuality` for each quantized layer, in order.
        search: The `PrecisionSearch` of the plan that was given, or `None`.
    """

    name: str
    samples: int
    output: Errors
    loss: float | None
    loss_float: float | None
    layers: list[LayerQuality]
    search: object = None

    def to_dict(self):
        """The content as dictionaries and lists."""
        return dataclasses.asdict(self)

    def to_json(self, **kwargs):
        """The content as JSON; arguments go to `json.dumps`."""
        return json.dumps(self.to_dict(), **kwargs)

    def to_html(self):
        """The content as one page, without any other file."""
        return html.page(self)

    def save(self, path, overwrite=True):
        """Writes the page to a file `*.html`, or the JSON to a file `*.json`.

        Raises:
            ValueError: The name ends otherwise.
        """
        kinds = {".html": self.to_html, ".json": lambda: self.to_json(indent=1)}
        with replacing(path, overwrite) as temporary:
            if temporary.suffix not in kinds:
                raise ValueError(f"`path` must end in .html or .json. Received: '{path}'")
            temporary.write_text(kinds[temporary.suffix](), encoding="utf-8")

    def show(self):
        """Prints the table, by `rich` where that is installed."""
        print_table(**self._table())

    def __str__(self):
        return text_table(**self._table())

    def _table(self):
        headers = ("Layer (type)", "Precision", "Weight dB", "Input dB", "Output dB", "Cosine",
                   "MSE", "Max error", "Zeros", "Outliers", "Sensitivity")  # fmt: skip
        lines = [
            (
                f"{row.path} ({row.type})", row.precision, html.decibel(row.weight.sqnr),
                html.decibel(row.input_sqnr), html.decibel(row.output.sqnr),
                f"{row.output.cosine:.4f}", f"{row.output.mse:.3g}", f"{row.output.max_error:.3g}",
                f"{row.share_zero:.1%}", str(row.outlier_channels), f"{row.sensitivity:.2e}",
            )
            for row in self.layers
        ]  # fmt: skip
        return {
            "headers": headers,
            "lines": lines,
            "title": f"Quantization of {self.name}, {self.samples} examples",
            "left": 2,
            "footer": self._footer(),
        }

    def _footer(self):
        lines = [
            f"Outputs: SQNR {html.decibel(self.output.sqnr)} dB, cosine {self.output.cosine:.5f}, "
            f"MSE {self.output.mse:.3g}, largest error {self.output.max_error:.3g}"
        ]
        if self.loss is not None:
            lines.append(f"Loss: {self.loss:.5g} quantized, {self.loss_float:.5g} float")
        return lines


def quantization_report(
    model, data, reference=None, *, plan=None, loss=None, samples=256, batch_size=32, verbose=1
):
    """Measures what quantization does to every layer of a model, against the float model.

    Args:
        model: A model with quantized layers, in training or packed, taken at full strength;
            it is left as it is.
        data: Examples: inputs, a tuple `(x, y)`, or an iterable of batches of these.
        reference: The float model that it was made from, with the same names of layers. By
            default the model itself with its strength at 0; a packed one has no float weights
            any more and needs it.
        plan: The `PrecisionPlan` of the model: the curve of its search goes on the page.
        loss: A Keras loss or its name; that of the compiled reference by default.
        samples: Examples to measure on.
        batch_size: Examples in a batch, where `data` holds arrays.
        verbose: 1 shows progress and the table, 0 nothing.

    Returns:
        A `QuantizationReport`, with `show()`, `to_json()`, `to_html()` and `save(path)`.

    Raises:
        ValueError: The models do not belong together, or `data` is not what is accepted.
    """
    check_built(model)
    examples = batches(data, samples, batch_size)
    if reference is None:
        reference = _own_reference(model)
    model = probes.quantized_twin(model)
    pairs = probes.layer_pairs(reference, model)
    outputs = _compare_outputs(reference, model, pairs, [x for x, _ in examples])
    inputs = _probe_inputs(model, pairs, [x for x, _ in examples])
    total = len(examples) * (2 + len(pairs))
    progress = keras.utils.Progbar(total, unit_name="run") if verbose else None
    base, (whole,), (alone,) = probes.effects(
        reference,
        model,
        examples,
        loss_function(reference, loss, examples),
        (lambda: progress.add(1)) if progress else None,
    )
    layers = [
        _quality(path, pair, inputs[path], outputs[path], alone[path], base)
        for path, pair in pairs.items()
    ]
    report = QuantizationReport(
        name=model.name,
        samples=base.examples,
        output=Errors.of(whole.outputs),
        loss=whole.mean_loss,
        loss_float=base.mean_loss,
        layers=layers,
        search=None if plan is None else plan.search,
    )
    if verbose:
        report.show()
    return report


def _own_reference(model):
    if any(layer.packed for layer in probes.bit_layers(model).values()):
        raise ValueError(
            f"Model '{model.name}' is packed and holds no float weights to compare with: give the "
            "float model as `reference`."
        )
    return probes.float_twin(model)


def _compare_outputs(reference, model, pairs, inputs):
    """A `Comparison` of the outputs of each layer in the two models, by path."""
    found = {path: probes.Comparison() for path in pairs}
    for x in inputs:
        _, expected = probes.run_and_record(reference, x, [old for old, _ in pairs.values()])
        _, actual = probes.run_and_record(model, x, [new for _, new in pairs.values()])
        for path, (old, new) in pairs.items():
            for first, second in zip(expected[id(old)], actual[id(new)], strict=True):
                found[path].add(*(_array(output) for output in (first, second)))
    return found


def _probe_inputs(model, pairs, inputs):
    found = {path: _InputProbe(layer) for path, (_, layer) in pairs.items()}
    with contextlib.ExitStack() as stack:
        for probe in found.values():
            stack.enter_context(probe)
        for x in inputs:
            model(x, training=False)
    return found


class _InputProbe(_Probe):
    """Adds the histogram and the largest magnitude of every channel."""

    counts = np.zeros(BINS, int)
    high = 0.0
    channels = np.zeros(1)

    def look(self, x):
        super().look(x)
        values = _array(probes.quantizer_inputs(self.layer, x))
        if not self.high:  # the first batch decides the range; what lies outside is at its ends
            self.high = float(np.max(np.abs(values), initial=0.0)) or 1.0
        inside = np.clip(values, -self.high, self.high)
        self.counts = self.counts + np.histogram(inside, BINS, (-self.high, self.high))[0]
        largest = np.max(np.abs(values).reshape(-1, values.shape[-1]), axis=0, initial=0.0)
        self.channels = np.maximum(self.channels, largest)

    def histogram(self):
        return Histogram(-self.high, self.high, self.counts.tolist())

    def outlier_channels(self):
        median = float(np.median(self.channels))
        return int(np.sum(self.channels > _OUTLIER_CHANNEL * median)) if median else 0


def _quality(path, pair, inputs, output, effect, base):
    old, layer = pair
    expected, actual = _matrices(old, layer)
    weight = probes.Comparison()
    weight.add(expected, actual)
    deviation = float(np.std(expected))
    statistics = inputs.statistics()
    grown = None if effect.mean_loss is None else effect.mean_loss - base.mean_loss
    return LayerQuality(
        path=path,
        type=type(layer).__name__,
        precision=precision(layer),
        weights=expected.size,
        weight=Errors.of(weight),
        share_zero=float(np.mean(actual == 0)),
        weight_outliers=float(np.mean(np.abs(expected) > _OUTLIER_WEIGHT * deviation)),
        input_absmax=statistics.get("activation_absmax", 0.0),
        input_sqnr=statistics.get("activation_sqnr"),
        outlier_channels=inputs.outlier_channels(),
        output=Errors.of(output),
        sensitivity=effect.outputs.relative,
        loss_change=grown,
        weight_histogram=_weight_histogram(expected, actual),
        input_histogram=inputs.histogram(),
    )


def _matrices(old, layer):
    """The float and the quantized kernel of a layer as matrices."""
    if layer.packed:
        kernel = ops.convert_to_tensor(old.kernel)
        return _array(layer.kernel_to_matrix(kernel)), _array(layer.packed_kernel.dequantize())
    return _array(layer.kernel_matrix()), _array(layer.fake_quantized_matrix())


def _weight_histogram(expected, actual):
    high = float(np.max(np.abs(expected), initial=0.0)) or 1.0
    levels = np.unique(actual)
    shown = levels.tolist() if len(levels) <= 16 else []
    counts = np.histogram(expected, BINS, (-high, high))[0]
    return Histogram(-high, high, counts.tolist(), shown)


def _array(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))
