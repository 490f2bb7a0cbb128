"""Packed layers of the same inputs, whose products are one operation."""

import keras
import numpy as np
import pytest
from helpers import to_numpy
from keras import ops

import keras_bitnet
from keras_bitnet.layers import (
    BitEinsumDense,
    BitFeedForward,
    BitGroupedQueryAttention,
    BitLinear,
    joint,
)


@pytest.fixture
def calls(monkeypatch):
    """How many weights the joint products since had."""
    found = []

    def count(x, packed, *operands):
        found.append(len(packed))
        return multiply(x, packed, *operands)

    multiply = joint.joint_bit_matmul
    monkeypatch.setattr(joint, "joint_bit_matmul", count)
    return found


def packed(layer, shape):
    model = keras.Sequential([keras.Input(shape[1:]), layer])
    return keras_bitnet.pack_model(model, verbose=0).layers[-1]


def apart(function, monkeypatch):
    """What a function gives where every layer multiplies by itself."""
    with monkeypatch.context() as patch:
        patch.setattr(joint, "_products", lambda layers, x: None)
        return function()


def attention(**kwargs):
    return BitGroupedQueryAttention(8, 4, 2, rope_max_wavelength=10000.0, **kwargs)


class Attend(keras.layers.Layer):
    """Attention of a sequence to itself, maybe from another tensor of the same numbers."""

    def __init__(self, block, same=True):
        super().__init__()
        self.block, self.same = block, same

    def call(self, x):
        return self.block(x, x if self.same else x + 0)


@pytest.mark.parametrize("use_bias", [False, True])
def test_blocks_multiply_once_for_layers_of_the_same_inputs(use_bias, calls, monkeypatch, rng):
    x = ops.convert_to_tensor(rng.normal(size=(2, 3, 32)).astype("float32"))
    block = BitFeedForward(48, use_bias=use_bias)
    block.build(x.shape)
    if use_bias:
        block.up_dense.bias.assign(rng.normal(size=48))
    block = packed(block, x.shape)
    y = block(x)
    assert calls == [2]
    np.testing.assert_array_equal(to_numpy(y), to_numpy(apart(lambda: block(x), monkeypatch)))
    calls.clear()
    block = attention(use_bias=use_bias, packed=True)
    block.build(x.shape, x.shape)
    for layer in block._flatten_layers(include_self=False):
        if isinstance(layer, BitEinsumDense):
            layer.kernel_tiles.assign(rng.integers(0, 256, layer.kernel_tiles.shape) & 0xAA)
            layer.kernel_scale.assign(np.full(layer.kernel_scale.shape, 0.1))
    y = Attend(block)(x)
    assert calls == [3]
    np.testing.assert_array_equal(to_numpy(y), to_numpy(apart(lambda: block(x, x), monkeypatch)))
    calls.clear()
    np.testing.assert_allclose(
        to_numpy(Attend(block, same=False)(x)), to_numpy(y), rtol=1e-5, atol=1e-6
    )
    assert calls == []


TREATED = {
    "float": {"packed": False},
    "norm": {"norm": "rms"},
    "rotation": {"rotation": "hadamard"},
    "static": {"activation_quantizer": "static_int8"},
    "width": {"weight_quantizer": "int4"},
    "activations": {"activation_quantizer": "int4"},
    "dtype": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("other", TREATED)
def test_layers_that_are_not_alike_multiply_by_themselves(other, calls, monkeypatch, rng):
    x = ops.convert_to_tensor(rng.normal(size=(3, 64)).astype("float32"))
    layers = []
    for arguments in ({}, {"packed": True, **TREATED[other]}):
        layer = BitLinear(16, **{"packed": True, **arguments})
        layer.build((None, 64))
        for v in layer.variables:
            if "kernel_scale" in v.path:
                v.assign(np.full(v.shape, 0.1))
        layers.append(layer)
    together = joint.call_jointly(layers, x)
    assert calls == ([2] if other == "width" else [])  # which `joint_bit_matmul` takes apart
    wanted = apart(lambda: joint.call_jointly(layers, x), monkeypatch)
    for y, alone in zip(together, wanted, strict=True):
        np.testing.assert_array_equal(*(to_numpy(ops.cast(v, "float32")) for v in (y, alone)))


def test_what_else_a_layer_does_it_still_does(calls, rng):
    """Activation, a norm after the product, LoRA; another call in between takes no product."""
    x = ops.convert_to_tensor(rng.normal(size=(3, 32)).astype("float32"))
    layers = [
        BitLinear(16, activation="relu", packed=True),
        BitLinear(24, norm="rms", norm_position="post", packed=True, use_bias=False),
        BitLinear(8, lora_rank=2, packed=True),
    ]
    for layer in layers:
        layer.build((None, 32))
        layer.kernel_tiles.assign(rng.integers(0, 256, layer.kernel_tiles.shape) & 0xAA)
        layer.kernel_scale.assign(np.full(layer.kernel_scale.shape, 0.1))
    layers[2].lora_kernel_b.assign(rng.normal(size=layers[2].lora_kernel_b.shape))
    wanted = [to_numpy(layer(x)) for layer in layers]
    assert calls == []
    for y, alone in zip(joint.call_jointly(layers, x), wanted, strict=True):
        np.testing.assert_array_equal(to_numpy(y), alone)
    assert calls == [3]
    assert joint.joint_product(layers[0], x) is None  # outside
