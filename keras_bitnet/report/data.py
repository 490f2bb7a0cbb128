"""Small samples of whatever data a Keras model can be fed, as checked batches of arrays."""

import re

import keras
import numpy as np
from keras import ops

from keras_bitnet.checks import check_count


def batches(data, samples=256, batch_size=32):
    """Reads the first examples of data.

    Args:
        data: Inputs (an array, or a list or dictionary of arrays); a tuple `(x, y)` or
            `(x, y, sample_weight)` of them, whose weights are not used; or an iterable of
            batches of these: a `tf.data.Dataset`, a torch `DataLoader`, a
            `keras.utils.PyDataset`, a generator.
        samples: How many examples at most.
        batch_size: Examples in a batch, where `data` holds arrays.

    Returns:
        List of `(x, y)` of NumPy arrays in the structure of the data; `y` may be `None`.

    Raises:
        ValueError: There are no examples, they hold a NaN or an infinity, or arrays are not
            equally long.
    """
    check_count("samples", samples)
    check_count("batch_size", batch_size)
    found = []
    for x, y in _items(data, samples, batch_size):
        x = keras.tree.map_structure(_array, x)
        y = None if y is None else keras.tree.map_structure(_array, y)
        _check_lengths(x, y)
        if _size(x) > samples:
            x, y = (_rows(part, slice(samples)) for part in (x, y))
        size = _size(x)
        if size:
            found.append((x, y))
            samples -= size
        if samples <= 0:
            break
    if not found:
        raise ValueError(f"`data` holds no examples. Received: {type(data).__name__}")
    return found


def _items(data, samples, batch_size):
    if isinstance(data, (tuple, list, dict)) and not data:
        return
    parts = isinstance(data, tuple)
    if not parts and not isinstance(data, (list, dict)) and not hasattr(data, "shape"):
        if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
            raise ValueError(
                "`data` must be arrays, a tuple (x, y), or an iterable of batches. "
                f"Received: {data!r} of type {type(data).__name__}"
            )
        yield from map(_pair, _iterate(data))
        return
    x, y = _pair(data)
    _check_lengths(x, y)
    size = min(_size(x), samples)
    for start in range(0, size, batch_size):
        rows = slice(start, min(start + batch_size, size))
        yield _rows(x, rows), _rows(y, rows)


def _iterate(data):
    if isinstance(data, keras.utils.PyDataset):
        return (data[i] for i in range(data.num_batches))
    return iter(data)


def _pair(item):
    if isinstance(item, list) and len(item) == 2:  # how a torch DataLoader gives (x, y)
        item = tuple(item)
    return keras.utils.unpack_x_y_sample_weight(item)[:2]


def _rows(structure, rows):
    if structure is None:
        return None
    return keras.tree.map_structure(lambda array: array[rows], structure)


def _size(x):
    leaves = keras.tree.flatten(x)
    return len(leaves[0]) if leaves and len(getattr(leaves[0], "shape", ())) else 0


def _check_lengths(x, y):
    leaves = keras.tree.flatten(x) + ([] if y is None else keras.tree.flatten(y))
    shapes = [tuple(getattr(leaf, "shape", ())) for leaf in leaves]
    if len({shape[:1] for shape in shapes}) > 1:
        raise ValueError(
            "The arrays of `data` must hold one row an example, as many in each. "
            f"Received: arrays of shapes {shapes}"
        )


def short_message(error):
    """The line of an error that matters: Keras writes it in bold between others."""
    text = str(error)
    found = re.search("\x1b\\[1m(.*?)\x1b\\[0m", text, re.DOTALL)
    line = found.group(1) if found else next(iter(text.splitlines()), "")
    return f"{type(error).__name__}: {line.strip().rstrip('.')}"


def check_fit(model, examples):
    """Raises a `ValueError` unless a model can be run on an example of `batches`."""
    x = _rows(examples[0][0], slice(1))
    try:
        model(x, training=False)
    except Exception as error:  # whatever a layer raises on an input that it was not made for
        shapes = keras.tree.map_structure(lambda array: (array.shape, str(array.dtype)), x)
        raise ValueError(
            f"`data` does not fit model '{model.name}': {short_message(error)}. "
            f"Received: one example of (shape, dtype) {shapes}"
        ) from error


def _array(value):
    array = ops.convert_to_numpy(value)
    if array.dtype.kind == "f":
        array = array.astype("float32") if array.dtype.itemsize > 4 else array
        if not np.isfinite(array).all():
            raise ValueError(
                "`data` holds a NaN or an infinity. Received: an array of shape "
                f"{array.shape} with {int((~np.isfinite(array)).sum())} of them"
            )
    return array
