"""A block of a decoder for new tokens by the native CPU library, for TensorFlow: one op."""

import functools

import numpy as np
import tensorflow as tf

from keras_bitnet.kernels.attention import CACHE
from keras_bitnet.kernels.decoder_block import operands
from keras_bitnet.kernels.tensorflow import MODULE


def find():
    """`run`: where products run natively, so does this."""
    return run


def in_memory(tensor):
    """`(array, address)` of a tensor that is no part of a graph: the array shares its memory."""
    array = np.asarray(tensor)
    return array, array.ctypes.data


def run(facts, x, weights, cache, index, mask, rotary, chain=None):
    """As `keras_bitnet.kernels.decoder_block.reference`; the cache is written in place.

    `chain`: the number of a `Chain` of the blocks after this one, whose `y` is returned.
    """
    none = functools.cache(lambda dtype: tf.zeros((0,), dtype))  # a node of the graph each
    given = operands(x, weights, tf.cast(index, "int32"), mask, rotary, none)
    y, *written = MODULE.keras_bitnet_decode_block(
        *given,
        *(cache.get(name, none("float32")) for name in CACHE),
        none("int32") if chain is None else chain,
        **facts.attributes,
    )
    found = dict(zip(CACHE, written, strict=True))
    return y, {name: found[name] for name in cache}
