"""What a model weighs and computes, layer by layer: float, quantized and packed."""

import collections
import dataclasses
import math

import keras
import numpy as np

from keras_bitnet.checks import check_built, check_count
from keras_bitnet.layers import BitLayer
from keras_bitnet.ops import layout
from keras_bitnet.report import table
from keras_bitnet.report.calls import CannotRunError, record_calls
from keras_bitnet.report.content import Content
from keras_bitnet.report.macs import count_macs, dtype_bits, is_low_bit, precision

# These loop over their inner layers: how often is not seen in a symbolic run.
LOOPS = (keras.layers.RNN, keras.layers.TimeDistributed)


@dataclasses.dataclass
class Row:
    """One layer, without the layers in it (unless those were rolled up into it).

    Attributes:
        path: Where it is in the model, such as `"encoder/attention/query"`.
        type: Its class.
        depth: 0 for the layers of the model, 1 for those inside them, and so on.
        output_shape: Shape of its (first) output, batch axis `None`, or `None`: not known.
        weight_bits: Bits of its weights when quantized, or `None`: it has none of its own.
        activation_bits: Bits of the inputs that it multiplies with, or `None` likewise.
        state: `"packed"`, `"QAT"`, `"mixed"` after rolling up layers that differ, or `""` for a
            layer that is not one of this package.
        strength: Value of `quantization_strength`, or `None`.
        calls: How often one run of the model calls it, or `None`: not known.
        parameters: Numbers in its weights, the scales of quantized kernels left out.
        parameters_by_precision: The same by precision: `{"W1.58": 100352, "float32": 128}`.
        bytes_stored: Bytes of its variables as they are now.
        bytes_packed: Bytes in memory once packed: codes with padding, scales, all the rest.
        bytes_on_disk: Bytes of the packed weights in a file.
        bytes_float32: Bytes with every parameter as `float32`.
        macs: Multiply-accumulates for one example, or `None`: not known.
        macs_by_precision: The same by precision: `{"W1.58A8": 100352}`.
    """

    path: str
    type: str
    depth: int = 0
    output_shape: tuple | None = None
    weight_bits: float | None = None
    activation_bits: int | None = None
    state: str = ""
    strength: float | None = None
    calls: int | None = None
    parameters: int = 0
    parameters_by_precision: dict[str, int] = dataclasses.field(default_factory=dict)
    bytes_stored: int = 0
    bytes_packed: int = 0
    bytes_on_disk: int = 0
    bytes_float32: int = 0
    macs: int | None = 0
    macs_by_precision: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Totals:
    """The sums over all rows, under the names of `Row`.

    Attributes:
        compression: `bytes_float32 / bytes_packed`.
        macs: Multiply-accumulates of the layers where they are known.
        low_bit_share: Share of those in quantized products, in [0, 1], or `None`.
        not_counted: Paths of the layers whose multiply-accumulates are not known.
        reason: Why none are known, or `None`.
    """

    parameters: int
    parameters_by_precision: dict[str, int]
    bytes_stored: int
    bytes_packed: int
    bytes_on_disk: int
    bytes_float32: int
    compression: float | None
    macs: int
    macs_by_precision: dict[str, int]
    low_bit_share: float | None
    not_counted: list[str]
    reason: str | None = None


@dataclasses.dataclass
class ModelSummary(Content):
    """The data of `summary`: a title, one `Row` a layer, and the `Totals`."""

    name: str
    rows: list[Row]
    totals: Totals

    def tables(self):
        """One: the layers and what they weigh and compute."""
        return [table.of_summary(self)]


def summary(model, print_fn=None, as_data=False, depth=None, input_shape=None):
    """Prints what every layer of a model weighs and computes, before and after packing.

    Parameters and bytes of a layer that is used several times count once, its
    multiply-accumulates for every use. Quantized layers count what `pack_model` will store.

    Args:
        model: A built Keras model or layer.
        print_fn: Called with the table as a text. By default it is printed, by `rich` where
            that is installed.
        as_data: Whether to return the content and print nothing.
        depth: Layers deeper than this are rolled up into the one that holds them: 0 lists
            only the layers of the model itself. All are listed by default.
        input_shape: Shape of the inputs, with the batch axis, for a model that takes any or
            that was never called: products over axes of unknown size are not counted.

    Returns:
        `None`, or a `ModelSummary` with `as_data=True`.

    Raises:
        ValueError: `model` is no Keras model or is not built, or `depth` no count.
    """
    if depth is not None:
        check_count("depth", depth, least=0)
    data = _summarize(model, depth, input_shape)
    if as_data:
        return data
    if print_fn is not None:
        print_fn(str(data))
    else:
        data.show()
    return None


def _summarize(model, depth, input_shape):
    check_built(model)
    try:
        calls, reason = record_calls(model, input_shape), None
    except CannotRunError as error:
        calls, reason = [], f"the model could not be run symbolically ({error})"
    by_layer = collections.defaultdict(list)
    for call in calls:
        by_layer[id(call.layer)].append(call)
    walk = _Walk(by_layer, known=reason is None)
    walk.visit(model, path="", depth=-1)
    not_counted = [row.path for row in walk.rows if row.macs is None]
    rows = walk.rows if depth is None else _roll_up(walk.rows, depth)
    return ModelSummary(model.name, rows, _totals(rows, not_counted, reason))


class _Walk:
    """Makes one row for each layer, outer before inner."""

    def __init__(self, calls, known):
        self.calls = calls
        self.known = known
        self.rows: list[Row] = []
        self._seen: set[int] = set()

    def visit(self, layer, path, depth, looped=False):
        self._seen.add(id(layer))
        row = self._row(layer, path, depth, looped)
        children = [] if isinstance(layer, BitLayer) else _children(layer)
        if depth >= 0 or row.parameters or not children:
            self.rows.append(dataclasses.replace(row, depth=max(depth, 0)))
        looped = looped or isinstance(layer, LOOPS)
        for child in children:
            shown = isinstance(layer, keras.Model) or child.weights
            if shown and id(child) not in self._seen:
                inner_path = f"{path}/{child.name}" if path else child.name
                self.visit(child, inner_path, depth + 1, looped)

    def _row(self, layer, path, depth, looped):
        calls = self.calls[id(layer)]
        row = Row(path or layer.name, type(layer).__name__, depth)
        if self.known and not looped:
            row.calls = len(calls)
            row.output_shape = _output_shape(calls)
        _count_weights(row, layer, self._seen)
        counts = [None] if looped or not self.known else [count_macs(call) for call in calls]
        if None in counts:
            silent = row.weight_bits is None and not calls
            row.macs = 0 if silent else None
        else:
            row.macs_by_precision = _add(*counts)
            row.macs = sum(row.macs_by_precision.values())
        return row


def _children(layer):
    children = layer.layers if isinstance(layer, keras.Model) else layer._layers
    return [child for child in children if not isinstance(child, keras.layers.InputLayer)]


def _output_shape(calls):
    shapes = {shape for call in calls for shape in _flatten(call.output)[:1]}
    if len(shapes) != 1:
        return None
    (shape,) = shapes
    return (None, *shape[1:])


def _flatten(shapes):
    if isinstance(shapes, tuple) and all(size is None or isinstance(size, int) for size in shapes):
        return [shapes]
    if isinstance(shapes, dict):
        shapes = shapes.values()
    return [leaf for shape in shapes or () for leaf in _flatten(shape)]


def _count_weights(row, layer, seen):
    """Fills in bits, parameters and bytes; a variable that was counted before adds nothing."""
    variables = [v for v in _own_variables(layer) if id(v) not in seen]
    seen.update(map(id, variables))
    row.bytes_stored = sum(_nbytes(v) for v in variables)
    if isinstance(layer, BitLayer):
        variables = _count_kernel(row, layer, variables)
    elif variables:
        mode = getattr(layer, "quantization_mode", None)
        row.weight_bits = dtype_bits(variables[0].dtype)
        row.activation_bits = None if mode else dtype_bits(layer.compute_dtype)
    for variable in variables:
        size, nbytes = math.prod(variable.shape), _nbytes(variable)
        row.parameters_by_precision = _add(row.parameters_by_precision, {variable.dtype: size})
        row.bytes_packed += nbytes
        row.bytes_on_disk += nbytes
        row.bytes_float32 += 4 * size
    row.parameters = sum(row.parameters_by_precision.values())


def _count_kernel(row, layer, variables):
    """Fills in the quantized kernel and returns the other variables."""
    quantizer, k, n = layer.weight_quantizer, layer.in_features, layer.out_features
    row.weight_bits = quantizer.bits_per_weight
    row.activation_bits = getattr(
        layer.activation_quantizer, "bits", dtype_bits(layer.compute_dtype)
    )
    row.state = "packed" if layer.packed else "QAT"
    if not layer.packed:
        row.strength = float(layer.quantization_strength)
    scale = 4 * math.prod(quantizer.scale_shape(k, n))
    codes = math.prod(layout.tiles_shape(k, n, quantizer.bits, layer.packed_layout))
    row.bytes_packed = codes + scale + layer.kept_bytes
    if quantizer.level_count == 3:
        codes = layout.pack_trits(np.zeros((k, 1), np.uint8)).size * n
    row.bytes_on_disk = codes + scale + layer.kept_bytes
    row.bytes_float32 = 4 * k * n
    row.parameters_by_precision = {precision(layer).partition("A")[0]: k * n}
    strength = layer.quantization_strength
    return [v for v in variables if not v.name.startswith("kernel") and v is not strength]


def _own_variables(layer):
    """The variables of a layer; for a quantized layer those of its norm too."""
    if isinstance(layer, BitLayer):
        return layer.weights
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def _nbytes(variable):
    return math.prod(variable.shape) * dtype_bits(variable.dtype) // 8


def _add(*counts):
    total: collections.Counter = collections.Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def _roll_up(rows, depth):
    """Merges rows deeper than `depth` into the row above."""
    shown: list[Row] = []
    for row in rows:
        if row.depth <= depth or not shown:
            shown.append(row)
        else:
            _merge_into(shown[-1], row)
    return shown


def _merge_into(outer, inner):
    for field in ("parameters", "bytes_stored", "bytes_packed", "bytes_on_disk", "bytes_float32"):
        setattr(outer, field, getattr(outer, field) + getattr(inner, field))
    for field in ("parameters_by_precision", "macs_by_precision"):
        setattr(outer, field, _add(getattr(outer, field), getattr(inner, field)))
    outer.macs = None if None in (outer.macs, inner.macs) else outer.macs + inner.macs
    _merge_kinds(outer, inner)


def _merge_kinds(outer, inner):
    kind = ("weight_bits", "activation_bits", "state", "strength")
    if inner.weight_bits is None or outer.state == "mixed":
        return
    if outer.weight_bits is None:
        for field in kind:
            setattr(outer, field, getattr(inner, field))
    elif any(getattr(outer, field) != getattr(inner, field) for field in kind):
        outer.weight_bits = outer.activation_bits = outer.strength = None
        outer.state = "mixed"


def _totals(rows, not_counted, reason):
    macs = _add(*(row.macs_by_precision for row in rows))
    low = sum(count for name, count in macs.items() if is_low_bit(name))
    total_macs = sum(macs.values())
    sums = {
        field: sum(getattr(row, field) for row in rows)
        for field in ("parameters", "bytes_stored", "bytes_packed", "bytes_on_disk",
                      "bytes_float32")
    }  # fmt: skip
    packed = sums["bytes_packed"]
    return Totals(
        **sums,
        parameters_by_precision=_add(*(row.parameters_by_precision for row in rows)),
        compression=sums["bytes_float32"] / packed if packed else None,
        macs=total_macs,
        macs_by_precision=macs,
        low_bit_share=low / total_macs if total_macs else None,
        not_counted=not_counted,
        reason=reason,
    )
