"""The keys and values of earlier tokens, kept for decoding: float, or int8 per token and head.

A cache is a dictionary of tensors of fixed shapes, so a compiled step takes and gives it back
with no retrace. `write` puts new rows in place where the backend can: PyTorch and TensorFlow
write into the buffer that was passed, JAX where the caller donates it.
"""

import keras
import numpy as np
from keras import ops

from keras_bitnet import quantizers
from keras_bitnet.kernels import attention
from keras_bitnet.layers.rotary import in_float32, rotate

BACKEND = keras.backend.backend()


class TakesCache(keras.layers.Layer):
    """Mixin of layers that are called with a `cache`, whose tensors keep their dtypes.

    Keras casts float tensors in the arguments of a layer to its dtype: the scales of an int8 cache
    too, and a copy of the rest, into which the layer would then write.
    """

    def __call__(self, *args, cache=None, **kwargs):
        """As any Keras layer."""
        if cache is None:
            return super().__call__(*args, **kwargs)
        symbolic = any(isinstance(x, keras.KerasTensor) for x in cache.values())
        return super().__call__(*args, cache=cache if symbolic else _Untouched(cache), **kwargs)


class _Untouched:
    """A cache on its way into a layer."""

    def __init__(self, cache):
        self.cache = cache


def untouched(cache):
    """The cache that `call` was given."""
    return cache.cache if isinstance(cache, _Untouched) else cache


def make_cache(batch, length, heads, head_dim, dtype="float32"):
    """An empty cache.

    Args:
        batch: Sequences.
        length: Tokens that it can hold.
        heads: Heads of keys and values.
        head_dim: Size of a head.
        dtype: A float dtype, or `"int8"`: a quarter of the memory of float32, each token of each
            head with a scale of its own.

    Returns:
        `{"key", "value"}`, tensors `(batch, heads, length, head_dim)`; with `"int8"` also
        `{"key_scale", "value_scale"}`, `float32 (batch, heads, length, 1)`.

    Raises:
        ValueError: `dtype` is of another kind.
    """
    if dtype != "int8" and not keras.backend.is_float_dtype(dtype):
        raise ValueError(f"`dtype` must be a float dtype or 'int8'. Received: dtype={dtype!r}")
    shape = (batch, heads, length, head_dim)
    cache = {name: ops.zeros(shape, dtype) for name in ("key", "value")}
    if dtype == "int8":
        for name in ("key_scale", "value_scale"):
            cache[name] = ops.zeros((*shape[:-1], 1), "float32")
    return cache


def make_caches(count, *arguments):
    """`count` empty caches that do not share memory; other arguments as of `make_cache`."""
    first = make_cache(*arguments)
    # TensorFlow makes a tensor like another in a quarter of the time.
    others = ({name: ops.zeros_like(x) for name, x in first.items()} for _ in range(count - 1))
    return [first, *others]


if BACKEND == "jax":  # one program: each array by itself would take a quarter of a millisecond
    import jax

    make_caches = jax.jit(make_caches, static_argnums=range(6))


def write(cache, key, value, start):
    """Writes new keys and values.

    Args:
        cache: A cache, not to be used again after.
        key, value: Tensors `(batch, length, heads, head_dim)`.
        start: Where the first one goes: a Python integer or an integer scalar tensor.

    Returns:
        The cache that holds them.
    """
    written = {}
    for name, rows in (("key", key), ("value", value)):
        rows = _heads_first(rows)
        if f"{name}_scale" in cache:
            rows, scale = quantizers.ActivationInt8().quantize(rows)
            written[f"{name}_scale"] = _put(cache[f"{name}_scale"], scale, start)
        written[name] = _put(cache[name], ops.cast(rows, cache[name].dtype), start)
    return written


def attend(cache, query, mask, scale):
    """Attention of a few queries to the whole cache, heads grouped, nothing repeated.

    Args:
        cache: A cache.
        query: Tensor `(batch, length, query_heads, head_dim)`.
        mask: Boolean tensor `(batch or 1, length, cache length)`: what each query may see.
        scale: Factor of the scores.

    Returns:
        Tensor of the shape and dtype of `query`. Scores and softmax are `float32`.
    """
    batch, length, heads, head_dim = query.shape
    key_heads, groups = cache["key"].shape[1], heads // cache["key"].shape[1]
    rows = ops.reshape(_heads_first(query), (batch, key_heads, groups * length, head_dim))
    rows = ops.cast(rows, "float32") * scale
    scores = _inner_products(rows, ops.cast(cache["key"], "float32"))
    if "key_scale" in cache:
        scores = scores * ops.transpose(cache["key_scale"], (0, 1, 3, 2))
    total = scores.shape[-1]
    scores = ops.reshape(scores, (batch, key_heads, groups, length, total))
    scores = ops.where(mask[:, None, None], scores, -1e30)
    weights = ops.reshape(ops.softmax(scores), (batch, key_heads, groups * length, total))
    if "value_scale" in cache:
        weights = weights * ops.transpose(cache["value_scale"], (0, 1, 3, 2))
    y = ops.matmul(weights, ops.cast(cache["value"], "float32"))
    if length == 1:
        return ops.cast(ops.reshape(y, query.shape), query.dtype)
    y = ops.reshape(y, (batch, heads, length, head_dim))
    return ops.cast(ops.transpose(y, (0, 2, 1, 3)), query.dtype)


def attend_next(cache, query, key, value, index, scale, mask=None, rotary=None):
    """Writes new tokens and attends to them and those before them.

    Args:
        cache: A cache, not to be used again after.
        query: Tensor `(batch, length, query_heads, head_dim)`.
        key, value: Tensors `(batch, length, heads, head_dim)`.
        index: Where the first new token goes: an integer or an integer scalar tensor.
        scale: Factor of the scores.
        mask: Boolean tensor `(batch or 1, length, cache length)`: what each query may see, nothing
            behind the last new token; by default every token up to its own.
        rotary: What `rotary_tables` gave for the new tokens, by which queries and keys are turned
            first, or `None`.

    Returns:
        `(y, cache)`: a tensor of the shape and dtype of `query`, and the cache with the tokens.
    """
    rotary = None if rotary is None else in_float32(rotary)
    kernel = attention.choose(cache, query)
    return kernel.run(cache, query, key, value, index, scale, mask, rotary)


def reference_attend_next(cache, query, key, value, index, scale, mask=None, rotary=None):
    """What `attend_next` means, in plain `keras.ops`."""
    if rotary is not None:
        query, key = rotate(query, rotary), rotate(key, rotary)
    cache = write(cache, key, value, index)
    if mask is None:
        ends = ops.arange(query.shape[1], dtype="int32")[None, :, None] + index
        mask = ops.arange(cache["key"].shape[2], dtype="int32")[None, None] <= ends
    return attend(cache, query, mask, scale), cache


def _heads_first(x):
    """`(batch, length, heads, size)` to `(batch, heads, length, size)`; of one token no work."""
    if x.shape[1] == 1 and x.shape[0] is not None:
        return ops.reshape(x, (x.shape[0], x.shape[2], 1, x.shape[3]))
    return ops.transpose(x, (0, 2, 1, 3))


def _inner_products(rows, keys):
    """`rows keys^T`; TensorFlow would first write down the transpose of the whole cache."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.matmul(rows, keys, transpose_b=True)
    return ops.matmul(rows, ops.transpose(keys, (0, 1, 3, 2)))


def _put(buffer, rows, start):
    """Writes rows `(batch, heads, n, size)` into `(batch, heads, length, size)` at `start`."""
    if BACKEND == "torch":
        import torch

        at = torch.arange(rows.shape[2], device=buffer.device) + start
        return buffer.index_copy_(2, at, rows)
    if BACKEND == "tensorflow":
        return _put_tensorflow(buffer, rows, start)
    return ops.slice_update(buffer, (0, 0, start, 0), rows)


def _put_tensorflow(buffer, rows, start):
    """In place through an alias: as a matrix of tokens, which shares the memory of the buffer."""
    import tensorflow as tf

    batch, heads, length, size = buffer.shape
    new = rows.shape[2]
    first = np.arange(batch * heads, dtype="int32")[:, None] * length + np.arange(new)
    at = tf.constant(first.reshape(-1), "int32") + tf.cast(start, "int32")
    matrix = tf.reshape(buffer, (-1, size))
    matrix = tf.raw_ops.InplaceUpdate(x=matrix, i=at, v=tf.reshape(rows, (-1, size)))
    return tf.reshape(matrix, (batch, heads, length, size))
