"""Inputs of a language model whose activations all keep clear of the edges of rounding.

Two correct programs add floats in different orders. Where an activation, scaled to int8, lies
within that difference of a half, they round it to different codes, and the logits differ by more
than arithmetic does. On tokens that keep clear of every edge they must agree to float accuracy.
"""

from unittest import mock

import numpy as np
from helpers import bit_layers
from keras import ops

import keras_bitnet
from keras_bitnet.kernels import use_kernel
from keras_bitnet.quantizers import ActivationInt8

CLEAR = 5e-4  # of a code; the arithmetic of the activations differs by much less


def margins(model, tokens):
    """How far from an edge the nearest activation of each row of tokens is, in codes.

    Args:
        model: `BitNetCausalLM` with int8 activations, packed or not.
        tokens: Integer array `(rows, length)`.

    Returns:
        Array `(rows,)`.
    """
    model = keras_bitnet.unpack_model(model, verbose=0) if model.packed else model
    found, ratio_of = [], ActivationInt8._ratio

    def look(self, x, scale):
        ratio, scale = ratio_of(self, x, scale)
        codes = ops.convert_to_numpy(ratio).reshape(len(tokens), -1)
        found.append(np.abs(codes - np.floor(codes) - 0.5).min(axis=1))
        return ratio, scale

    # A fused kernel would not pass there.
    with mock.patch.object(ActivationInt8, "_ratio", look), use_kernel("reference"):
        model(tokens)
    quantizers = [layer.activation_quantizer for layer in bit_layers(model)]
    assert len(found) == sum(quantizer is not None for quantizer in quantizers) > 0
    return np.min(found, axis=0)


def clear_tokens(model, rows=2, length=8, candidates=400):
    """The rows of random tokens that keep clearest of the edges, `int32 (rows, length)`."""
    vocabulary_size = model.backbone.vocabulary_size
    tokens = np.random.default_rng(0).integers(0, vocabulary_size, (candidates, length))
    tokens = tokens.astype("int32")
    apart = margins(model, tokens)
    best = np.argsort(-apart, kind="stable")[:rows]
    assert apart[best].min() > CLEAR, f"no tokens keep clear of rounding: {apart[best]}"
    return tokens[best]
