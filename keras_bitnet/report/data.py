"""Small samples of whatever data a Keras model can be fed, as checked batches of arrays."""

import keras
import numpy as np
from keras import ops


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
        ValueError: There are no examples, or they hold a NaN or an infinity.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    found = []
    for x, y in _items(data, samples, batch_size):
        x = keras.tree.map_structure(_array, x)
        y = None if y is None else keras.tree.map_structure(_array, y)
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
    return len(leaves[0]) if leaves and len(leaves[0].shape) else 0


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
