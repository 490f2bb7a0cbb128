"""Fake quantization by the CUDA kernels: the bits of the reference, its gradient, compiled too."""

import importlib

import numpy as np
import pytest
from helpers import BACKEND

if BACKEND != "torch":
    pytest.skip("the torch backend is not the active one", allow_module_level=True)

import keras
import torch

from keras_bitnet import kernels, quantizers
from keras_bitnet.kernels import training
from keras_bitnet.kernels.cuda import library
from keras_bitnet.layers import BitConv2D, BitLinear
from keras_bitnet.quantizers.activations import ActivationInt4, ActivationInt8, StaticActivation

if library.reason(0) is not None:
    pytest.skip(library.reason(0), allow_module_level=True)

DTYPES = ("float32", "bfloat16", "float16")
# Rows that fit in the registers of a block and rows that do not, odd sizes, none at all.
SHAPES = ((3, 5, 64), (1, 1), (7, 257), (2, 9000), (33, 1030), (0, 16), (5,))
STRENGTHS = (None, 1.0, 0.0, 0.3)


def both(function):
    """What a function gives under the kernel and under the reference."""
    results = []
    for name in ("cuda", "reference"):
        with kernels.use_kernel(name):
            results.append(function())
    return results


def same_bits(actual, wanted):
    assert actual.dtype == wanted.dtype
    assert torch.equal(torch.isnan(actual), torch.isnan(wanted))
    assert torch.equal(torch.nan_to_num(actual), torch.nan_to_num(wanted))


def tensor(value):
    return None if value is None else torch.tensor(value, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "quantizer",
    [ActivationInt8(), ActivationInt4(), ActivationInt8("tensor"), StaticActivation(8)],
    ids=repr,
)
def test_activations_are_the_same_bits(quantizer, dtype, rng):
    static = quantizer.granularity == "static"
    for shape in SHAPES:
        if 0 in shape and quantizer.granularity == "tensor":
            continue  # there is no maximum of nothing
        x = torch.tensor(rng.normal(size=shape) * 3, dtype=getattr(torch, dtype), device="cuda")
        for strength in STRENGTHS:
            scale = tensor(0.021) if static else None
            arguments = (x, scale, tensor(strength))
            same_bits(*both(lambda a=arguments: quantizer.fake_quantize(*a)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_values_that_are_not_finite(value, strength, rng):
    x = torch.tensor(rng.normal(size=(4, 100)), dtype=torch.float32, device="cuda")
    x[1, 30] = value
    static = StaticActivation(8)
    same_bits(*both(lambda: ActivationInt8().fake_quantize(x, strength=tensor(strength))))
    same_bits(*both(lambda: static.fake_quantize(x, tensor(0.02), tensor(strength))))
    weight = quantizers.get("ternary")
    same_bits(*both(lambda: weight.fake_quantize(x, strength=tensor(strength))))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("name", ["binary", "ternary", "int2", "int4", "int8"])
def test_weights_are_the_same_bits(name, granularity, rng):
    kind = type(quantizers.get(name))
    quantizer = kind(scale=next(s for s in kind.scales if s != "learned"), granularity=granularity)
    for k, n in ((100, 33), (257, 1028), (64, 1), (1, 5), (300, 2048)):
        weight = torch.tensor(rng.normal(size=(k, n)), dtype=torch.float32, device="cuda")
        weight.view(-1)[:3] = 0
        for dtype in DTYPES:
            for strength in STRENGTHS:
                arguments = (weight, None, tensor(strength), dtype)
                same_bits(*both(lambda a=arguments: quantizer.fake_quantize(*a)))


def test_values_in_another_order_of_memory(rng):
    x = torch.tensor(rng.normal(size=(64, 40)), dtype=torch.float32, device="cuda").T
    same_bits(*both(lambda: ActivationInt8().fake_quantize(x)))
    same_bits(*both(lambda: quantizers.get("ternary").fake_quantize(x)))


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_passes_unchanged(dtype, strength, rng):
    for quantizer in (ActivationInt8(), quantizers.get("ternary")):
        weight = quantizer.name == "ternary"
        kind = torch.float32 if weight else getattr(torch, dtype)
        x = torch.tensor(rng.normal(size=(50, 60)), dtype=kind, device="cuda", requires_grad=True)
        arguments = (None, tensor(strength), dtype) if weight else (None, tensor(strength))
        with kernels.use_kernel("cuda"):
            y = quantizer.fake_quantize(x, *arguments)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx, dy.to(kind))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_layer_trains_as_with_the_reference(compiled, policy, rng):
    layer = BitLinear(48, dtype=policy, norm="rms")
    x = torch.tensor(rng.normal(size=(32, 64)), dtype=torch.float32, device="cuda")
    layer(x)

    def step(call):
        layer.kernel.value.grad = None
        y = call(x)
        y.float().square().sum().backward()
        return y.detach(), layer.kernel.value.grad

    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True) if compiled else layer  # then the reference runs
    found = step(call)
    with kernels.use_kernel("reference"):
        wanted = step(layer)
    # Compiled, the norm before the quantization may be rounded otherwise.
    tolerance = 0.02 if compiled else 0.0
    for actual, expected in zip(found, wanted, strict=True):
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_strength_changes_without_a_new_trace(rng):
    layer = BitLinear(48, use_bias=False)
    x = torch.tensor(rng.normal(size=(32, 64)), dtype=torch.float32, device="cuda")
    layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for strength in (1.0, 0.5, 0.0):
            layer.quantization_strength.assign(strength)
            with torch._dynamo.config.patch(error_on_recompile=strength < 1):
                torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_float_convolution_takes_the_fused_weight(rng):
    layer = BitConv2D(8, 3, activation_quantizer=None, dtype="mixed_bfloat16")
    x = torch.tensor(rng.normal(size=(2, 9, 9, 4)), dtype=torch.float32, device="cuda")
    layer(x)
    same_bits(*both(lambda: layer(x).detach()))


def test_cuda_graph_of_a_step(rng):
    layer = BitLinear(64, use_bias=False, dtype="mixed_bfloat16")
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    layer(x)
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.normal_()
        graph.replay()
        assert torch.equal(y, layer(x))


def test_refusals(rng):
    x = torch.zeros(4, 4, device="cuda")

    def reason(quantizer, dtype="float32", values=x):
        problem = training.of_weight(quantizer, values, dtype)
        return next(r.refuse(problem) for r in training.TABLES["torch"] if r.name == "cuda")

    ternary = quantizers.get("ternary")
    assert reason(ternary) is None
    assert "float64" in reason(ternary, "float64")
    assert "on 'cpu'" in reason(ternary, values=x.cpu())
    assert "learned" in reason(type(ternary)(scale="learned"))
    assert "clipped" in reason(type(ternary)(gradient="clipped"))

    class Own(type(ternary)):
        def round_levels(self, ratio):
            return ratio

    assert "Own" in reason(Own())
    with kernels.use_kernel("cuda"), pytest.raises(ValueError, match="learned"):
        quantizers.get("int2").fake_quantize(x, torch.ones(1, 4, device="cuda"))


def test_opcheck():
    importlib.import_module("keras_bitnet.kernels.cuda.torch_training")  # registers them
    x = torch.randn(6, 20, device="cuda", requires_grad=True)
    strength, scale = torch.tensor(0.5, device="cuda"), torch.ones(1, 1, device="cuda")
    operators = torch.ops.keras_bitnet
    torch.library.opcheck(
        operators.fake_quantize_cuda.default, (x, strength, None, 127.0, False, 1e-5)
    )
    torch.library.opcheck(
        operators.fake_quantize_weight_cuda.default,
        (x, scale, None, 0, -1.0, 1.0, 0.0, False, torch.bfloat16),
    )


def test_fit(rng):
    model = keras.Sequential([keras.Input((100,)), BitLinear(33, norm="rms")])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    x, y = (rng.normal(size=(64, size)).astype("float32") for size in (100, 33))
    losses = model.fit(x, y, epochs=3, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
