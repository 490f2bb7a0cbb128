"""How long each layer takes at each precision, measured on the present device and backend."""

import dataclasses

import keras
import numpy as np

from keras_bitnet import quantizers
from keras_bitnet.checks import check_built, check_choice, check_count
from keras_bitnet.filters import layer_filter
from keras_bitnet.kernels.select import explain
from keras_bitnet.layers import BitEmbedding
from keras_bitnet.layers.base import BitLayer
from keras_bitnet.layers.bit_depthwise_conv import BitDepthwiseConv
from keras_bitnet.layers.kernel_weights import MEMORY, layout_for
from keras_bitnet.report.calls import CannotRunError, record_calls
from keras_bitnet.report.content import Content
from keras_bitnet.report.macs import precision
from keras_bitnet.report.pairs import BLOCKS, inner_layers, quantized_units
from keras_bitnet.report.table import format_seconds
from keras_bitnet.report.timing import compiled_call, interleaved_times, spread
from keras_bitnet.transforms.precision_plan import layer_arguments
from keras_bitnet.transforms.quantize import requantized, twin_of
from keras_bitnet.transforms.rewrite import named_layers, unique_names


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
        kernels: Name of the kernel that runs a packed layer, by precision; several names where
            it consists of several layers, none where it multiplies without (a lookup).
    """

    path: str
    type: str
    input_shape: tuple
    calls: int
    seconds: dict[str, dict[str, float]]
    kernels: dict[str, str]


@dataclasses.dataclass
class LatencyReport(Content):
    """The content of `benchmark_layers`: rows, backend, device and settings."""

    name: str
    backend: str
    device: str
    batch_size: int
    memory: str
    repeats: int
    rows: list[LayerLatency]

    def tables(self):
        """One: the layers and their latency at each precision."""
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
        return [{"headers": headers, "lines": lines, "title": title, "left": 2}]


def _cell(seconds, kernel):
    return format_seconds(seconds) + ("" if kernel is None else f" {kernel}")


def benchmark_layers(
    model,
    precisions=("ternary", "int4", "int8"),
    *,
    batch_size=1,
    input_shape=None,
    memory="fastest",
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
        memory: Which layout the packed layers have, see `pack_model`.
        repeats: Samples of each time, at least 2.
        filters: Which layers, see `quantize_model`; all by default.
        verbose: 1 prints the table, 0 nothing.

    Returns:
        A `LatencyReport`.

    Raises:
        ValueError: The model is not built, has no layer to measure, or the shapes of its
            inputs are not known; or an argument is out of range.
    """
    check_built(model)
    check_choice("memory", memory, MEMORY)
    check_count("batch_size", batch_size)
    check_count("repeats", repeats, least=2)
    specs = [layer_arguments(spec) for spec in precisions]
    if not specs or None in specs:
        raise ValueError(f"`precisions` must be a list of specs. Received: {precisions!r}")
    targets = _targets(model, filters)
    shapes = _input_shapes(model, input_shape, batch_size)
    measured: dict[str, tuple] = {}
    rows = []
    progress = keras.utils.Progbar(len(targets), unit_name="layer") if verbose else None
    for path, layer in targets:
        for (shape, reverse), calls in shapes.get(id(layer), {}).items():
            key = f"{_key(layer, shape)} {reverse}"
            if key not in measured:
                measured[key] = _measure(layer, shape, reverse, specs, repeats, memory)
            rows.append(LayerLatency(path, type(layer).__name__, shape, calls, *measured[key]))
        if progress:
            progress.add(1)
    report = LatencyReport(
        model.name, keras.backend.backend(), _device(model), batch_size, memory, repeats, rows
    )
    if verbose:
        report.show()
    return report


def _targets(model, filters):
    matches = layer_filter(filters)
    units = quantized_units(model)
    found = [
        (path, layer)
        for path, layer in named_layers(model)
        if (path in units or twin_of(layer) is not None) and matches(layer, path)
    ]
    if not found:
        raise ValueError(
            f"Model '{model.name}' has no layer to measure: none that `quantize_model` would "
            f"quantize, or that it has, matches `filters`. Received: filters={filters!r}"
        )
    return found


def _input_shapes(model, input_shape, batch_size):
    """How often layers are called with what: `{id(layer): {(shape, reverse): count}}`."""
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
            key = (batch_size, *shape[1:]), bool(call.arguments.get("reverse"))
            counts = found.setdefault(id(call.layer), {})
            counts[key] = counts.get(key, 0) + 1
        elif isinstance(call.layer, (BitLayer, *BLOCKS)) or twin_of(call.layer) is not None:
            raise ValueError(
                f"The size of the inputs of layer '{call.layer.name}' depends on those of the "
                f"model: give `input_shape`. Received: {shape}"
            )
    return found


def _key(layer, shape):
    config = {key: value for key, value in layer.get_config().items() if key != "name"}
    return f"{type(layer).__name__} {shape} {config}"


def _measure(layer, shape, reverse, specs, repeats, memory):
    """`(seconds, kernels)` of one layer, by precision."""
    x = _inputs(layer, shape, reverse)
    timed = [_packed(layer, spec, shape, memory) for spec in specs]
    labels = unique_names(precision(packed) for packed in timed)
    named = dict(zip(labels, timed, strict=True))
    kernels = {label: _kernel(packed) for label, packed in named.items()}
    kernels = {label: kernel for label, kernel in kernels.items() if kernel}
    if not inner_layers(layer):
        named = {precision(layer): layer, **named}
    arguments = {"reverse": True} if reverse else {}
    functions = {label: compiled_call(one, x, **arguments) for label, one in named.items()}
    times = interleaved_times(functions, repeats)
    return {label: spread(values) for label, values in times.items()}, kernels


def _inputs(layer, shape, reverse):
    """Random inputs: tokens for a lookup, else floats."""
    rng = np.random.default_rng(0)
    tokens = getattr(layer, "input_dim", None) or getattr(
        getattr(layer, "embedding", None), "input_dim", None
    )
    if tokens and not reverse:
        return rng.integers(0, tokens, shape).astype("int32")
    return keras.ops.cast(rng.normal(size=shape).astype("float32"), layer.compute_dtype)


def multiplies(layer):
    """Whether a packed `BitLayer` multiplies by a kernel: lookups and depthwise layers do not."""
    lookup = isinstance(layer, BitEmbedding) and layer.activation_quantizer is None
    return not lookup and not isinstance(layer, BitDepthwiseConv)


def _kernel(layer):
    """The kernels that run a packed layer, or `""`."""
    runs = [
        next(name for name, reason in explain(inner) if reason is None)
        for inner in inner_layers(layer)
        if multiplies(inner)
    ]
    return ", ".join(dict.fromkeys(runs))


def _packed(layer, spec, shape, memory):
    quantizer = quantizers.get(spec["weight_quantizer"])
    arguments = {**spec, "packed": True, "packed_layout": layout_for(memory, quantizer)}
    packed = requantized(layer, arguments) if inner_layers(layer) else twin_of(layer, arguments)
    packed.build(shape)
    for inner in inner_layers(packed):
        if inner.static:  # as if it were calibrated
            inner.activation_scale.assign(1 / inner.activation_quantizer.highest)
    return packed


def _device(model):
    variable = next(iter(model.weights), None)
    return str(getattr(variable.value, "device", "")) if variable is not None else ""
