"""Peers of `gpu_matmul.py` on PyTorch: packed weights by other libraries, of the same values.

Each takes a case and gives `(product, weights)`: `product(x, weight)` with bfloat16 `x (m, k)` for
each of the weights, copies of one packed in the library's own way; the first is the weight of the
case. The libraries tune or compile themselves at the first call of a size.
"""

import functools
import importlib

import torch
from common import Skip, peer


def _copies(case, weight, axis):
    """The weight and others, rolled: as many as the case has."""
    return [weight.roll(i, axis).contiguous() for i in range(len(case.tiles))]


def gemlite(case, activations):
    """Triton kernels; https://github.com/dropbox/gemlite, tuned with its default candidates."""
    library, helper = peer("gemlite"), peer("gemlite.helper")
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    codes = case.codes().T
    if case.bits == 2:
        make = {8: helper.A8W158_INT_dynamic, 16: helper.A16W158_INT}[activations]
        layer = make(**kind).from_weights(codes.to(torch.bfloat16) - 1, case.scale)
    else:
        scale = case.scale.expand(case.n, 1).contiguous()
        zeros = torch.full_like(scale, 2 ** (case.bits - 1))
        make = helper.A16Wn(**kind)
        layer = make.from_weights(codes.to(torch.uint8), scale, zeros, case.bits, case.k)
    layer = layer.cuda()
    weight, *others = layer.get_tensor_args()
    facts = layer.get_meta_args()

    def product(x, weight):
        return library.forward_functional(x, None, [weight, *others], facts)

    return product, _copies(case, weight.detach(), 1)


def humming(case, activations):
    """CUDA kernels compiled for a size; https://github.com/vllm-project/humming."""
    layers, library = peer("humming.layer"), peer("humming.ops")
    layer = layers.HummingLayer(
        shape_n=case.n,
        shape_k=case.k,
        weight_config={"dtype": f"int{case.bits}"},
        input_config={"dtype": {8: "int8", 16: "bfloat16"}[activations]},
        torch_dtype=torch.bfloat16,
    ).cuda()
    # The middle code stands for 0 there, ours of 2 bits are ternary.
    codes = (case.codes().T + (case.bits == 2)).contiguous()
    scale = case.scale.to(torch.bfloat16).expand(case.n, 1).contiguous()
    packed = library.pack_weight(codes, case.bits)
    layer.load_from_tensors({"weight": packed, "weight_scale": scale})
    layer.transform()
    forward = importlib.import_module("humming.forward").humming_forward

    def product(x, weight):
        return forward(
            layer.humming_config,
            x,
            weight,
            weight_scale=layer.weight_scale,
            locks=layer.locks,
        )

    return product, _copies(case, layer.weight.detach(), 0)


# What makes it, the most rows that it is timed at (gemlite tunes itself for a minute at many), and
# the bits of weights that it is timed with: where activations are quantized, where they are float.
PEERS = {
    "gemlite int8": (functools.partial(gemlite, activations=8), 16, (2,), ()),
    "gemlite bf16": (functools.partial(gemlite, activations=16), 16, (2,), (2, 4)),
    "humming int8": (functools.partial(humming, activations=8), 2048, (2,), ()),
    "humming bf16": (functools.partial(humming, activations=16), 2048, (), (2, 4)),
}


def prepare(case, skipped):
    """`{name: (most rows, functions of x, one for each copy of the weights)}` of those here.

    Args:
        case: Of `gpu_matmul.py`.
        skipped: Reasons why others are not, by name; new ones are printed and added.
    """
    ready = {}
    for name, (make, most, quantized, floats) in PEERS.items():
        if name in skipped or case.bits not in (floats if case.quantizer is None else quantized):
            continue
        try:
            product, weights = make(case)
        except Skip as reason:
            skipped[name] = str(reason)
            print(f"{name} is left out: {reason}", flush=True)
            continue
        ready[name] = most, [functools.partial(product, weight=weight) for weight in weights]
    return ready
