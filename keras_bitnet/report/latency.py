"""How long each layer takes at each precision, measured on the present device and backend."""

import collections
import dataclasses
import json

import keras
import numpy as np

from keras_bitnet.checks import check_built
from keras_bitnet.filters import layer_filter
from keras_bitnet.kernels.select import explain
from keras_bitnet.layers.base import BitLayer
from keras_bitnet.report.calls import CannotRunError, record_calls
from keras_bitnet.report.macs import precision
from keras_bitnet.report.table import format_seconds, print_table, text_table
from keras_bitnet.report.timing import compiled_call, interleaved_times, spread
from keras_bitnet.transforms.precision_plan import layer_arguments
from keras_bitnet.transforms.quantize import twin_of
from keras_bitnet.transforms.rewrite import named_layers


@dataclasses.dataclass
class LayerLatency:
    """One layer.

    Attributes:
        path: Where it is in the model.
        type: Its class.
        input_shape: Shape of the inputs that it was timed on.
        calls: How often one run of the model calls it.
        seconds: One call: `{"W1.58A8": {"median", "min", "iqr"}}`; `"float32"` and the like for
            the float layer, where the model holds it.
        kernels: Name of the kernel that runs a packed layer, by precision.
    """

    path: str
    type: str
    input_shape: tuple
    calls: int
    seconds: dict[str, dict[str, float]]
    kernels: dict[str, str]


@dataclasses.dataclass
class LatencyReport:
    """The content of `benchmark_layers`: rows, backend, device and settings."""

    name: str
    backend: str
    device: str
    batch_size: int
    repeats: int
    rows: list[LayerLatency]

    def to_dict(self):
        """The content as dictionaries and lists."""
        return dataclasses.asdict(self)

    def to_json(self, **kwargs):
        """The content as JSON; arguments go to `json.dumps`."""
        return json.dumps(self.to_dict(), **kwargs)

    def show(self):
        """Prints the table."""
        print_table(**self._table())

    def __str__(self):
        return text_table(**self._table())

    def _table(self):
        labels = list(dict.fromkeys(label for row in self.rows for label in row.seconds))
        lines = []
        for row in self.rows:
            cells = [
                _cell(row.seconds[label]["median"], row.kernels.get(label))
                if label in row.seconds
                else "-"
                for label in labels
            ]
            calls = f" x{row.calls}" if row.calls > 1 else ""
            lines.append([f"{row.path} ({row.type}){calls}", str(row.input_shape), *cells])
        title = f"Latency of one call: {self.name}, {self.backend} on {self.device}"
        headers = ["Layer (type)", "Inputs", *labels]
        return {"headers": headers, "lines": lines, "title": title, "left": 2}


def _cell(seconds, kernel):
    return format_seconds(seconds) + ("" if kernel is None else f" {kernel}")


def benchmark_layers(
    model,
    precisions=("ternary", "int4", "int8"),
    *,
    batch_size=1,
    input_shape=None,
    repeats=15,
    filters=None,
    verbose=1,
):
    """Measures the latency of every layer, packed at several precisions, on this machine.

    A layer is timed alone, compiled as the backend does (`jax.jit`, `tf.function`, eager
    PyTorch), on inputs of the shape that the model calls it with; precisions take turns, and the
    clock stops when the device is done. Layers that are equal but for their name and
    weights are measured once.

    Args:
        model: A built model, float or quantized; it is left as it is.
        precisions: Specs as in `quantize_model`; for quantized layers they change the
            arguments that they have.
        batch_size: Examples in a batch.
        input_shape: Shape of the inputs with the batch axis, for a model that takes any.
        repeats: Samples of each time.
        filters: Which layers: regular expressions on the path or a function, see
            `quantize_model`.
        verbose: 1 prints the table, 0 nothing.

    Returns:
        A `LatencyReport`.

    Raises:
        ValueError: The model is not built, has no layer to measure, or the shapes of its
            inputs are not known.
    """
    check_built(model)
    specs = [layer_arguments(spec) for spec in precisions]
    if not specs or None in specs:
        raise ValueError(f"`precisions` must be a list of specs. Received: {precisions!r}")
    targets = _targets(model, filters)
    shapes = _input_shapes(model, input_shape, batch_size)
    measured: dict[str, tuple] = {}
    rows = []
    progress = keras.utils.Progbar(len(targets), unit_name="layer") if verbose else None
    for path, layer in targets:
        for shape, calls in shapes.get(id(layer), {}).items():
            key = _key(layer, shape)
            if key not in measured:
                measured[key] = _measure(layer, shape, specs, repeats)
            rows.append(LayerLatency(path, type(layer).__name__, shape, calls, *measured[key]))
        if progress:
            progress.add(1)
    report = LatencyReport(
        model.name, keras.backend.backend(), _device(model), batch_size, repeats, rows
    )
    if verbose:
        report.show()
    return report


def _targets(model, filters):
    matches = layer_filter(filters)
    found = [
        (path, layer)
        for path, layer in named_layers(model)
        if (isinstance(layer, BitLayer) or twin_of(layer) is not None) and matches(layer, path)
    ]
    if not found:
        raise ValueError(
            f"Model '{model.name}' has no layer to measure: none that `quantize_model` would "
            f"quantize, or that it has, matches `filters`. Received: filters={filters!r}"
        )
    return found


def _input_shapes(model, input_shape, batch_size):
    """How often layers are called with which shape: `{id(layer): {shape: count}}`."""
    try:
        calls = record_calls(model, input_shape)
    except CannotRunError as error:
        raise ValueError(f"The inputs of the layers are not known: {error}.") from error
    found: dict[int, dict] = {}
    for call in calls:
        shape = call.input
        if not isinstance(shape, tuple) or not isinstance(call.layer, keras.Layer):
            continue
        known = all(isinstance(size, int) for size in shape)
        if known:
            shape = (batch_size, *shape[1:])
            counts = found.setdefault(id(call.layer), {})
            counts[shape] = counts.get(shape, 0) + 1
        elif isinstance(call.layer, BitLayer) or twin_of(call.layer) is not None:
            raise ValueError(
                f"The size of the inputs of layer '{call.layer.name}' depends on those of the "
                f"model: give `input_shape`. Received: {shape}"
            )
    return found


def _key(layer, shape):
    config = {key: value for key, value in layer.get_config().items() if key != "name"}
    return f"{type(layer).__name__} {shape} {config}"


def _measure(layer, shape, specs, repeats):
    """`(seconds, kernels)` of one layer, by precision."""
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    x = keras.ops.cast(x, layer.compute_dtype)
    timed = [_packed(layer, spec, shape) for spec in specs]
    labels = unique_labels([precision(packed) for packed in timed])
    kernels = {
        label: next(name for name, reason in explain(packed) if reason is None)
        for label, packed in zip(labels, timed, strict=True)
    }
    functions = {}
    if not isinstance(layer, BitLayer):
        functions[precision(layer)] = compiled_call(layer, x)
    functions |= {
        label: compiled_call(packed, x) for label, packed in zip(labels, timed, strict=True)
    }
    times = interleaved_times(functions, repeats)
    return {label: spread(values) for label, values in times.items()}, kernels


def unique_labels(labels):
    """The labels, those that repeat numbered: `W4A8`, `W4A8 (2)`."""
    counts: collections.Counter = collections.Counter()
    found = []
    for label in labels:
        counts[label] += 1
        found.append(label if counts[label] == 1 else f"{label} ({counts[label]})")
    return found


def _packed(layer, spec, shape):
    arguments = {**spec, "packed": True}
    if isinstance(layer, BitLayer):
        packed = type(layer).from_config({**layer.get_config(), **arguments})
    else:
        packed = twin_of(layer, arguments)
    packed.build(shape)
    return packed


def _device(model):
    variable = next(iter(model.weights), None)
    return str(getattr(variable.value, "device", "")) if variable is not None else ""
