"""Attention of new tokens to a cache by the native CPU library, for PyTorch: one operator."""

import torch

from keras_bitnet.kernels import cpu
from keras_bitnet.kernels.attention import CACHE
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.kernels.torch import REGISTERED, not_registered
from keras_bitnet.kernels.torch_operators import fake_like, missing


def refuse(problem):
    """Why the kernel cannot run an `Attention`, or `None`."""
    if not REGISTERED:
        return not_registered()
    return cpu.refuse_attention(problem)


def run(cache, query, key, value, index, scale, mask=None, rotary=None):
    """As `attend_next`, for a problem that was not refused; the cache is written in place."""
    none = missing(query)
    cosines, sines = rotary or (none, none)
    operands = (query, key, value, cosines, sines, none if mask is None else mask)
    y = torch.ops.keras_bitnet.attend_next.default(
        *(operand.contiguous() for operand in operands),
        torch.as_tensor(index, dtype=torch.int32),
        *(cache.get(name, none) for name in CACHE),
        scale,
    )
    return y, cache


if REGISTERED:
    torch.library.register_fake("keras_bitnet::attend_next", fake_like)

NATIVE = Kernel(cpu.NAME, refuse, run)
