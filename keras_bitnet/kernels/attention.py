"""Which kernel attends to a cache, and why: tables as in `select`, of another operation.

The rows are asked by `attend_next` of `keras_bitnet.layers.key_value_cache`; `reference` is what it
means in plain `keras.ops`.
"""

import dataclasses

import keras

from keras_bitnet.kernels import select


@dataclasses.dataclass(frozen=True)
class Attention:
    """The static facts of the attention of new tokens to a cache.

    Attributes:
        tokens: New tokens of each sequence.
        heads: Query heads.
        key_heads: Heads of keys and values.
        head_dim: Size of a head.
        length: Tokens that the cache can hold.
        dtype: Dtype of the queries.
        cache_dtype: Dtype of the cache.
        gradient: Whether PyTorch records the operation for a gradient.
        device: Where the queries are, or `None` when not known.
    """

    tokens: int
    heads: int
    key_heads: int
    head_dim: int
    length: int
    dtype: str
    cache_dtype: str
    gradient: bool
    device: str | None

    @classmethod
    def of(cls, cache, query, heads=None):
        """Reads the facts off a cache and queries `(batch, tokens, heads, head_dim)`, or what will
        become queries of some `heads`, `(number, head_dim)`.
        """
        heads, head_dim = heads or query.shape[2:]
        tokens, (_, key_heads, length, _) = query.shape[1], cache["key"].shape
        dtype, cache_dtype = (
            keras.backend.standardize_dtype(x.dtype) for x in (query, cache["key"])
        )
        gradient = keras.backend.backend() == "torch" and query.requires_grad
        sizes = (tokens, heads, key_heads, head_dim, length)
        return cls(*sizes, dtype, cache_dtype, gradient, select.device_of(query))


def _jax_cuda():
    from keras_bitnet.kernels.cuda import jax_attention

    return jax_attention.CUDA


def _torch_cuda():
    from keras_bitnet.kernels.cuda import torch_attention

    return torch_attention.CUDA


def _jax():
    from keras_bitnet.kernels import jax_attention

    return jax_attention.NATIVE


def _torch():
    from keras_bitnet.kernels import torch_attention

    return torch_attention.NATIVE


def _tensorflow():
    from keras_bitnet.kernels import tensorflow_attention

    return tensorflow_attention.NATIVE


def _reference(*arguments):
    from keras_bitnet.layers import key_value_cache

    return key_value_cache.reference_attend_next(*arguments)


# Names of the tensors of a cache, those of an int8 one last.
CACHE = ("key", "value", "key_scale", "value_scale")

REFERENCE = select.Kernel("reference", lambda problem: None, _reference)

TABLES: dict[str, tuple[select.Kernel, ...]] = {
    "jax": (select.later("cuda", _jax_cuda), select.later("native", _jax), REFERENCE),
    "torch": (select.later("cuda", _torch_cuda), select.later("native", _torch), REFERENCE),
    "tensorflow": (select.later("native", _tensorflow), REFERENCE),
}


def choose(cache, query, heads=None):
    """The row for what `Attention.of` takes: see `select.first_or_forced`."""
    table = TABLES.get(keras.backend.backend(), (REFERENCE,))
    # What is forced is the kernel of the products: several tokens at once are no error.
    return select.first_or_forced(table, Attention.of(cache, query, heads), strict=False)
