"""What quantization does to every layer of a model, on data: table, JSON and a page."""

import dataclasses

import keras
import numpy as np

from keras_bitnet.checks import check_built
from keras_bitnet.files import replacing
from keras_bitnet.report import html, pairs, probes
from keras_bitnet.report.content import Content
from keras_bitnet.report.data import batches, check_fit
from keras_bitnet.report.losses import loss_function
from keras_bitnet.report.quality import Errors, LayerQuality, Measured, layer_quality

_CHANNELS_SHOWN = 4


@dataclasses.dataclass
class QuantizationReport(Content):
    """The content of `quantization_report`.

    Attributes:
        name: Of the model.
        samples: Examples that were measured.
        output: `Errors` of the outputs of the whole model.
        loss, loss_float: Mean loss of the quantized and the float model, or `None`.
        layers: A `LayerQuality` for each quantized layer that the data reached, in order.
        unused: Paths of the others.
        search: The `PrecisionSearch` of the plan that was given, or `None`.
    """

    name: str
    samples: int
    output: Errors
    loss: float | None
    loss_float: float | None
    layers: list[LayerQuality]
    unused: list[str] = dataclasses.field(default_factory=list)
    search: object = None

    def to_html(self):
        """The content as one page, without any other file."""
        return html.page(self)

    def save(self, path, overwrite=True):
        """Writes the page to a file `*.html`, or the JSON to a file `*.json`.

        Args:
            path: Path of the file.
            overwrite: Whether a file that is there may be replaced.

        Raises:
            FileExistsError: There is one and it may not.
            ValueError: The name ends otherwise.
        """
        kinds = {".html": self.to_html, ".json": lambda: self.to_json(indent=1)}
        with replacing(path, overwrite) as temporary:
            if temporary.suffix not in kinds:
                raise ValueError(f"`path` must end in .html or .json. Received: '{path}'")
            temporary.write_text(kinds[temporary.suffix](), encoding="utf-8")

    def tables(self):
        """The layers, and those with outlier channels where there are any."""
        tables = [self._layer_table()]
        if any(row.outliers for row in self.layers):
            tables.append(self._outlier_table())
        return tables

    def _layer_table(self):
        headers = ("Layer (type)", "Precision", "Weight dB", "Input dB", "Output dB", "Cosine",
                   "MSE", "Max error", "Zeros", "Outliers", "Sensitivity")  # fmt: skip
        lines = [
            (
                f"{row.path} ({row.type})", row.precision, html.decibel(row.weight.sqnr),
                html.decibel(row.input_sqnr), html.decibel(row.output.sqnr),
                f"{row.output.cosine:.4f}", f"{row.output.mse:.3g}", f"{row.output.max_error:.3g}",
                f"{row.share_zero:.1%}", html.outlier_count(row), f"{row.sensitivity:.2e}",
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

    def _outlier_table(self):
        found = [(row.path, row.outliers) for row in self.layers if row.outliers]
        names = list(dict.fromkeys(name for _, seen in found for name in seen.product_sqnr))
        lines = [
            (
                path,
                html.channel_list(seen, _CHANNELS_SHOWN),
                seen.how or "-",
                *(html.decibel(seen.product_sqnr.get(name)) for name in names),
            )
            for path, seen in found
        ]
        return {
            "headers": ("Layer", "Channels, times the median", "Suggestion", *names),
            "lines": lines,
            "title": "Outlier channels; SQNR of the product in dB as it is and treated, untrained",
            "left": 3,
        }

    def _footer(self):
        lines = [
            f"Outputs: SQNR {html.decibel(self.output.sqnr)} dB, cosine {self.output.cosine:.5f}, "
            f"MSE {self.output.mse:.3g}, largest error {self.output.max_error:.3g}"
        ]
        if self.loss is not None:
            lines.append(f"Loss: {self.loss:.5g} quantized, {self.loss_float:.5g} float")
        if self.unused:
            lines.append(f"Not used on this data: {', '.join(self.unused)}")
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
        ValueError: The models do not belong together; `data` is empty, holds a NaN, does not fit
            the model, or makes a NaN in it.
    """
    check_built(model)
    examples = batches(data, samples, batch_size)
    reference = _float_reference(model, reference)
    check_fit(reference, examples)
    model = probes.quantized_twin(model)
    found = pairs.unit_pairs(reference, model)
    measured = Measured(reference, model, found, [x for x, _ in examples])
    used = {path: pair for path, pair in found.items() if measured.calls[path]}
    total = len(examples) * (2 + len(used))
    progress = keras.utils.Progbar(total, unit_name="run") if verbose else None
    base, (whole,), (alone,) = probes.effects(
        reference,
        model,
        examples,
        [used],
        loss_function(reference, loss, examples),
        (lambda: progress.add(1)) if progress else None,
    )
    if not np.isfinite(base.outputs.signal):
        raise ValueError(f"Model '{reference.name}' makes a NaN or an infinity of `data`.")
    layers = [layer_quality(path, pair, measured, alone[path], base) for path, pair in used.items()]
    report = QuantizationReport(
        name=model.name,
        samples=base.examples,
        output=Errors.of(whole.outputs),
        loss=whole.mean_loss,
        loss_float=base.mean_loss,
        layers=layers,
        unused=[path for path in found if path not in used],
        search=None if plan is None else plan.search,
    )
    if verbose:
        report.show()
    return report


def _float_reference(model, reference):
    if reference is None:
        if any(layer.packed for layer in probes.bit_layers(model).values()):
            raise ValueError(
                f"Model '{model.name}' is packed and holds no float weights to compare with: give "
                "the float model as `reference`."
            )
        return probes.float_twin(model)
    check_built(reference)
    packed = [path for path, layer in probes.bit_layers(reference).items() if layer.packed]
    if packed:
        raise ValueError(f"`reference` must be a float model. Received: packed layers {packed}")
    return reference
