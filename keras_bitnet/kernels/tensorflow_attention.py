"""Attention of new tokens to a cache by the native CPU library, for TensorFlow: one op."""

import tensorflow as tf

from keras_bitnet.kernels import cpu
from keras_bitnet.kernels.attention import CACHE
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.kernels.tensorflow import MODULE, reason


def refuse(problem):
    """Why the kernel cannot run an `Attention` here, or `None`; asked while tracing."""
    return cpu.refuse_attention(problem) or reason(problem)


def run(cache, query, key, value, index, scale, mask=None, rotary=None):
    """As `attend_next`, for a problem that was not refused; the cache is written in place."""
    none = tf.zeros((0,))
    cosines, sines = rotary or (none, none)
    y, *written = MODULE.keras_bitnet_attend_next(
        query=query,
        key=key,
        value=value,
        cosines=cosines,
        sines=sines,
        mask=tf.zeros((0,), "bool") if mask is None else mask,
        index=tf.cast(index, "int32"),
        key_cache=cache["key"],
        value_cache=cache["value"],
        key_scale=cache.get("key_scale", none),
        value_scale=cache.get("value_scale", none),
        scale=scale,
    )
    found = dict(zip(CACHE, written, strict=True))
    return y, {name: found[name] for name in cache}


NATIVE = Kernel(cpu.NAME, refuse, run)
