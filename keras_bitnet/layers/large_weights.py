"""Filling large weights without a second copy of them in memory.

A weight that is read from a file exists twice for a moment, as an array and as a variable, and
a new variable holds zeros that nobody needs. For an embedding of 330 MB that is what decides the
memory that loading takes.
"""

import ctypes
from typing import Any

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()
PART_BYTES = 4 << 20  # of a weight in memory at a time
_ALIGNMENT = 64  # JAX takes memory of NumPy as it is where it lies so


@keras.saving.register_keras_serializable("keras_bitnet")
class UntouchedZeros(keras.initializers.Initializer):
    """Zeros that take no memory until they are replaced, where the backend can hold such."""

    def __call__(self, shape, dtype=None):
        """A tensor of zeros."""
        if BACKEND != "jax":
            return ops.zeros(shape, dtype)
        import jax

        return jax.device_put(_untouched(shape, dtype))


def parts_of(store, name):
    """The weight `store[name]` of a file of Keras as an array, or readable in parts.

    Args:
        store: What Keras passes to `load_own_variables`.
        name: Name of a weight.

    Returns:
        NumPy array or, for large plain bytes in an HDF5 file, an object with `shape`, `dtype`
        and slices, which are arrays.
    """
    group = getattr(store, "_h5_entry_group", None)
    if not hasattr(group, "get"):
        return store[name]
    import h5py

    if not isinstance(group, h5py.Group):
        return store[name]
    # Whatever Keras would refuse, links and data outside of the file, is left to it.
    own = isinstance(group.get(name, getlink=True), h5py.HardLink)
    dataset: Any = group.get(name) if own else None
    plain = (
        isinstance(dataset, h5py.Dataset)
        and dataset.dtype == np.uint8
        and dataset.chunks is None
        and not (dataset.external or dataset.is_virtual)
    )
    return dataset if plain and dataset.nbytes > PART_BYTES else store[name]


def fill(variable, source):
    """Assigns what `parts_of` gave, a part at a time where it is no array.

    Args:
        variable: Keras variable.
        source: Array; or of the shape of the variable an `h5py.Dataset` or anything else with
            `shape` and `nbytes` whose slices are arrays.
    """
    if isinstance(source, np.ndarray) or (BACKEND == "tensorflow" and _mirrored()):
        variable.assign(np.asarray(source))
        return
    step = max(1, PART_BYTES // (source.nbytes // source.shape[0]))
    parts = (slice(i, i + step) for i in range(0, source.shape[0], step))
    {"jax": _fill_jax, "torch": _fill_torch, "tensorflow": _fill_tensorflow}[BACKEND](
        variable, source, parts
    )


def _fill_jax(variable, source, parts):
    import jax

    array = _untouched(source.shape, variable.dtype)
    for part in parts:
        array[part] = source[part]
    variable.assign(jax.device_put(array))


def _fill_torch(variable, source, parts):
    import torch

    with torch.no_grad():
        for part in parts:
            variable.value[part].copy_(torch.from_numpy(source[part]))


def _fill_tensorflow(variable, source, parts):
    import tensorflow as tf

    def assign(tensor):
        tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=tensor)

    # A variable that was once written in parts is copied whenever it is read. So a new tensor is
    # written before anybody else has it, and takes the memory that the variable gives back first.
    assign(tf.zeros((0,), variable.dtype))
    size = np.dtype(variable.dtype).itemsize
    with tf.device("CPU:0"):
        bits = tf.zeros(source.shape, f"uint{8 * size}")  # no memory is shown of bfloat16
    shown = np.asarray(memoryview(bits))
    own = (ctypes.c_uint8 * shown.nbytes).from_address(shown.ctypes.data)
    array = np.frombuffer(memoryview(own), variable.dtype).reshape(source.shape)
    try:
        for part in parts:
            array[part] = source[part]
    finally:
        assign(tf.bitcast(bits, variable.dtype))


def _mirrored():
    import tensorflow as tf

    return tf.distribute.has_strategy()


def _untouched(shape, dtype):
    """NumPy zeros that the system makes real when they are first written, aligned."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)
