"""Peers of `gpu_matmul.py` on PyTorch: 2-bit weights by other libraries, of the same values.

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
    make = {8: helper.A8W158_INT_dynamic, 16: helper.A16W158_INT}[activations]
    values = case.codes().T.to(torch.bfloat16) - 1
    layer = make(device="cuda", dtype=torch.bfloat16).from_weights(values, case.scale).cuda()
    weight, *others = layer.get_tensor_args()
    facts = layer.get_meta_args()

    def product(x, weight):
        return library.forward_functional(x, None, [weight, *others], facts)

    return product, _copies(case, weight.detach(), 1)


def humming(case):
    """CUDA kernels compiled for a size; https://github.com/vllm-project/humming."""
    layers, library = peer("humming.layer"), peer("humming.ops")
    layer = layers.HummingLayer(
        shape_n=case.n,
        shape_k=case.k,
        weight_config={"dtype": "int2"},
        input_config={"dtype": "int8"},
        torch_dtype=torch.bfloat16,
    ).cuda()
    codes = (case.codes().T + 1).contiguous()  # the code 2 stands for 0 there
    scale = case.scale.to(torch.bfloat16).expand(case.n, 1).contiguous()
    packed = library.pack_weight(codes, 2)
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


# With the most rows that they are timed at: gemlite tunes itself for a minute at many rows.
PEERS = {
    "gemlite int8": (functools.partial(gemlite, activations=8), 16),
    "gemlite bf16": (functools.partial(gemlite, activations=16), 16),
    "humming int8": (humming, 2048),
}


def prepare(case, skipped):
    """`{name: (most rows, functions of x, one for each copy of the weights)}` of those here.

    Args:
        case: Of `gpu_matmul.py`.
        skipped: Reasons why others are not, by name; new ones are printed and added.
    """
    ready = {}
    for name, (make, most) in PEERS.items():
        if name in skipped or case.bits != 2:
            continue
        try:
            product, weights = make(case)
        except Skip as reason:
            skipped[name] = str(reason)
            print(f"{name} is left out: {reason}", flush=True)
            continue
        ready[name] = most, [functools.partial(product, weight=weight) for weight in weights]
    return ready
