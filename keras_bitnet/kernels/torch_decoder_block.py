"""A block of a decoder for one new token by the native CPU library, for PyTorch: one operator."""

import torch

from keras_bitnet.kernels.attention import CACHE
from keras_bitnet.kernels.decoder_block import operands
from keras_bitnet.kernels.torch import REGISTERED
from keras_bitnet.kernels.torch_operators import fake_like


def find():
    """`run`, or `None` where it cannot: it has no gradient, and `torch.compile` its own ways."""
    possible = REGISTERED and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return run if possible else None


def run(facts, x, weights, cache, index, mask, rotary):
    """As `keras_bitnet.kernels.decoder_block.reference`; the cache is written in place."""
    index = torch.as_tensor(index, dtype=torch.int32)
    given = operands(x, weights, index, mask, rotary, _none)
    y = torch.ops.keras_bitnet.decode_block.default(
        *(tensor.contiguous() for tensor in given),
        *(cache.get(name, _none("float32")) for name in CACHE),
        *facts.attributes.values(),
    )
    return y, cache


def _none(dtype):
    return _NONE[dtype]


_NONE = {name: torch.empty(0, dtype=getattr(torch, name)) for name in ("float32", "uint8", "bool")}

if REGISTERED:
    torch.library.register_fake("keras_bitnet::decode_block", fake_like)
