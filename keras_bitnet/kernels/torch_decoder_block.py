"""A block of a decoder for new tokens by the native CPU library, for PyTorch: one operator."""

import torch

from keras_bitnet.kernels.attention import CACHE
from keras_bitnet.kernels.decoder_block import operands
from keras_bitnet.kernels.torch import REGISTERED
from keras_bitnet.kernels.torch_operators import fake_like


def find():
    """`run`, or `None` where it cannot: it has no gradient, and `torch.compile` its own ways."""
    possible = REGISTERED and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return run if possible else None


def in_memory(tensor):
    """`(tensor, address)` of a tensor, `None` where the operator would not take it."""
    return (tensor, tensor.data_ptr()) if tensor.is_contiguous() else None


def run(facts, x, weights, cache, index, mask, rotary, chain=None):
    """As `keras_bitnet.kernels.decoder_block.reference`; the cache is written in place.

    `chain`: the number of a `Chain` of the blocks after this one, whose `y` is returned.
    """
    index = torch.as_tensor(index, dtype=torch.int32)
    given = operands(x, weights, index, mask, rotary, _none)
    y = torch.ops.keras_bitnet.decode_block.default(
        *(tensor.contiguous() for tensor in given),
        *(cache.get(name, _none("float32")) for name in CACHE),
        _none("int32") if chain is None else chain,
        *facts.attributes.values(),
    )
    return y, cache


def _none(dtype):
    return _NONE[dtype]


_NONE = {
    name: torch.empty(0, dtype=getattr(torch, name))
    for name in ("float32", "uint8", "int32", "bool")
}

if REGISTERED:
    torch.library.register_fake("keras_bitnet::decode_block", fake_like)
