"""Which layers a model calls, and with what shapes: one symbolic run of one example.

Shapes that layers were built with are not enough: a layer can be called twice, on another
length than it was built with, or not at all.
"""

import contextlib
import dataclasses
import functools
import inspect
import threading
from typing import Any

import keras

_ONE_THREAD = threading.RLock()  # has its calls intercepted
_LENGTHS = (64, 96)  # stand for an unknown size; a shape that differs between them is unknown


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer on one example: the batch axis is 1, an unknown size is `None`.

    Attributes:
        layer: The layer.
        arguments: Arguments of `call` by name: a tensor as the tuple of its shape.
        output: Shape, or nested structure of shapes, of what it returned.
    """

    layer: keras.Layer
    arguments: dict[str, Any]
    output: Any

    @property
    def input(self):
        """Shape of the first argument."""
        return next(iter(self.arguments.values()))


class CannotRunError(Exception):
    """Why the calls of a model cannot be recorded."""


def record_calls(model, input_shape=None):
    """Runs a model symbolically and records the calls of all layers in it.

    Args:
        model: A built model or layer.
        input_shape: Shape of the inputs with the batch axis, or a list or dictionary of
            shapes; that of the model by default.

    Returns:
        A list of `Call`.

    Raises:
        CannotRunError: The inputs of the model are not known, or it cannot be run on them.
    """
    specs = _input_specs(model, input_shape)
    first, second = (_run(model, specs, length) for length in _LENGTHS)
    if [call.layer for call in first] != [call.layer for call in second]:
        raise CannotRunError("it calls other layers for another size of input")
    return [_merge_calls(*pair) for pair in zip(first, second, strict=True)]


def _input_specs(model, input_shape):
    """The inputs as `KerasTensor`s in the structure that the model takes."""
    known = getattr(model, "inputs", None)
    if known:
        structure = known[0] if isinstance(model, keras.Sequential) else model.input
        if input_shape is None:
            return structure
        shapes = _flatten_shapes(input_shape)
        if len(shapes) != len(known):
            raise ValueError(
                f"Model '{model.name}' has {len(known)} inputs. Received: input_shape={input_shape}"
            )
        specs = [keras.KerasTensor(s, dtype=x.dtype) for s, x in zip(shapes, known, strict=True)]
        return keras.tree.pack_sequence_as(structure, specs)
    if input_shape is None:
        shapes = list((model._build_shapes_dict or {}).values())
        input_shape = shapes[0] if len(shapes) == 1 else None
    if input_shape is None:
        raise CannotRunError("its inputs are not known; give `input_shape`")
    return keras.tree.map_shape_structure(
        lambda shape: keras.KerasTensor(shape, dtype=model.input_dtype), input_shape
    )


def _flatten_shapes(shape):
    shapes: list[tuple] = []
    keras.tree.map_shape_structure(shapes.append, shape)
    return shapes


def _run(model, specs, length):
    calls: list[Call] = []

    def run(inputs):
        calls.clear()  # a backend may try a second time
        return model(inputs)

    def fill(spec):
        sizes = [length if size is None else size for size in spec.shape[1:]]
        return keras.KerasTensor((1, *sizes), dtype=spec.dtype)

    try:
        with _recording(calls):
            _Run(run).compute_output_spec(keras.tree.map_structure(fill, specs))
    except Exception as error:  # whatever a layer raises on a size that it was not made for
        raise CannotRunError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    return calls


class _Run(keras.Operation):
    """Gives a function Keras's symbolic run, which has no public function of its own."""

    def __init__(self, function):
        super().__init__()
        self.call = function


@contextlib.contextmanager
def intercepted(handle):
    """Calls `handle(stock, layer, args, kwargs)` in place of every call of a layer in the block.

    `stock(layer, *args, **kwargs)` is the call that it stands for. Calls of other threads stay what
    they are, and a block of another thread waits.
    """
    thread = threading.get_ident()
    with _ONE_THREAD:
        stock = keras.Layer.__call__

        @functools.wraps(stock)
        def call(layer, *args, **kwargs):
            if threading.get_ident() != thread:
                return stock(layer, *args, **kwargs)
            return handle(stock, layer, args, kwargs)

        keras.Layer.__call__ = call
        try:
            yield
        finally:
            keras.Layer.__call__ = stock


def _recording(calls):
    def record(stock, layer, args, kwargs):
        outputs = stock(layer, *args, **kwargs)
        calls.append(Call(layer, _shapes(_bind(layer, args, kwargs)), _shapes(outputs)))
        return outputs

    return intercepted(record)


def _bind(layer, args, kwargs):
    try:
        return inspect.signature(layer.call).bind_partial(*args, **kwargs).arguments
    except TypeError:  # arguments that Keras takes out before `call`
        return {str(i): value for i, value in enumerate(args)} | kwargs


def _shapes(structure):
    return keras.tree.map_structure(
        lambda x: tuple(x.shape) if hasattr(x, "shape") else x, structure
    )


def _merge_calls(first, second):
    return Call(
        first.layer,
        _merge(first.arguments, second.arguments),
        _merge(first.output, second.output),
    )


def _merge(first, second):
    """The structure with `None` where sizes differ."""
    if isinstance(first, dict):
        return {key: _merge(value, second[key]) for key, value in first.items()}
    if isinstance(first, (list, tuple)):
        return type(first)(_merge(a, b) for a, b in zip(first, second, strict=True))
    return first if type(first) is type(second) and first == second else None
