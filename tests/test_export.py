"""Exports of packed models: other programs give the same outputs, from small files."""

import importlib

import keras
import numpy as np
import pytest
from helpers import BACKEND, mean_error, relative_error, to_numpy

import keras_bitnet
from keras_bitnet import layers, quantizers
from keras_bitnet.interop import to_onnx
from keras_bitnet.interop.codecs import matmul_nbits
from keras_bitnet.kernels import use_kernel
from keras_bitnet.models import BitNetBackbone, BitNetCausalLM

only_torch = pytest.mark.skipif(BACKEND != "torch", reason="ONNX files are traced by PyTorch")


def run_onnx(path, inputs):
    """Outputs of ONNX Runtime, and the bits of every product."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    if not isinstance(inputs, dict):
        inputs = {session.get_inputs()[0].name: inputs}
    outputs = session.run(None, inputs)
    nodes = onnx.load(path).graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    bits = [attribute.i for n in products for attribute in n.attribute if attribute.name == "bits"]
    return outputs, bits


@pytest.mark.parametrize("bits", matmul_nbits.BITS)
def test_blocks_hold_their_levels(bits, rng):
    levels = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 2, 32))
    levels[0, 0, :2] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert matmul_nbits.width(levels) == bits
    packed = matmul_nbits.pack_blocks(levels, bits)
    assert packed.shape == (3, 2, 32 * bits // 8)
    for place in (0, 1, 5, 31):  # from the lowest bits of a byte up
        byte = packed[..., place * bits // 8].astype(int)
        code = (byte >> (place * bits % 8)) & (2**bits - 1)
        np.testing.assert_array_equal(code - 2 ** (bits - 1), levels[..., place])
    with pytest.raises(ValueError, match="8 bits"):
        matmul_nbits.width(np.array([200]))


WIDTHS = {
    2: ["binary", "ternary", "int2", quantizers.Ternary(granularity="channel"),
        quantizers.Int2(group_size=96)],
    4: ["int4", quantizers.Int4(group_size=64)],
    8: ["int8"],
}  # fmt: skip
STATIC = quantizers.StaticActivation(momentum=None)


@only_torch
def test_onnx_runtime_gives_the_outputs_of_the_model(rng, tmp_path):
    """Every width and granularity, odd sizes, int4, per-tensor and static activations, a bias."""
    pytest.importorskip("onnxscript")
    x = keras.Input((None, 133))
    kinds = [(bits, {"weight_quantizer": w}) for bits, ws in WIDTHS.items() for w in ws]
    kinds += [
        (2, {"activation_quantizer": a}) for a in ("int4", quantizers.ActivationInt8("tensor"))
    ]
    kinds += [(2, {"activation_quantizer": STATIC})]
    products = [layers.BitLinear(7, bias_initializer="uniform", **kind) for _, kind in kinds]
    model = keras.Model(x, [product(x) for product in products])
    for product in products:
        product.bias.assign(rng.normal(size=7))
    products[-1].activation_scale.assign(0.02)
    packed = keras_bitnet.pack_model(model, verbose=0)
    to_onnx(packed, tmp_path / "m.onnx")
    data = rng.normal(size=(3, 5, 133)).astype("float32")
    found, bits = run_onnx(tmp_path / "m.onnx", data)
    assert sorted(bits) == sorted(width for width, _ in kinds)
    for kind, a, b in zip(kinds, found, packed(data), strict=True):
        assert relative_error(a, to_numpy(b)) < 2e-6, kind


@only_torch
def test_the_norm_of_a_gpu_is_translated(rng, tmp_path):
    pytest.importorskip("onnxscript")
    import torch

    from keras_bitnet.interop import onnx_product

    class Norm(torch.nn.Module):
        def forward(self, x, gain):
            return torch.ops.aten._fused_rms_norm.default(x, [6], gain, 1e-5)[0]

    x, gain = (rng.normal(size=size).astype("float32") for size in ((3, 5, 6), 6))
    torch.onnx.export(
        Norm(), (torch.tensor(x), torch.tensor(gain)), tmp_path / "m.onnx", dynamo=True,
        input_names=["x", "gain"], custom_translation_table=onnx_product.TRANSLATIONS,
    )  # fmt: skip
    (found,), _ = run_onnx(tmp_path / "m.onnx", {"x": x, "gain": gain})
    wanted = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * gain
    assert relative_error(found, wanted) < 1e-6


@only_torch
def test_float_activations_stay_float_or_are_rounded(rng, tmp_path, monkeypatch):
    """In one file, and with the weights apart, as those of large models are."""
    pytest.importorskip("onnxscript")
    layer = layers.BitLinear(
        5, activation_quantizer=None, weight_quantizer=quantizers.Int4(group_size=64)
    )
    model = keras_bitnet.pack_model(keras.Sequential([keras.Input((200,)), layer]), verbose=0)
    x = rng.normal(size=(4, 200)).astype("float32")
    expected, errors = to_numpy(model(x)), []
    for level in (0, 4):
        to_onnx(model, tmp_path / "m.onnx", accuracy_level=level)
        (found,), _ = run_onnx(tmp_path / "m.onnx", x)
        errors.append(relative_error(found, expected))
        module = importlib.import_module("keras_bitnet.interop.to_onnx")
        monkeypatch.setattr(module, "INLINE_BYTES", 100)
    assert errors[0] < 2e-6 < errors[1] < 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


@only_torch
def test_a_language_model_becomes_a_small_file(rng, tmp_path):
    pytest.importorskip("onnxscript")
    model = BitNetCausalLM(
        BitNetBackbone(
            vocabulary_size=50, num_layers=1, num_query_heads=4, num_key_value_heads=2,
            hidden_dim=256, intermediate_dim=256, sub_norm="rms", embedding_quantizer="int8",
            packed=False,
        )
    )  # fmt: skip
    packed = keras_bitnet.pack_model(model, verbose=0)
    to_onnx(packed, tmp_path / "m.onnx")
    tokens = rng.integers(0, 50, (3, 9)).astype("int32")
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    (found,), bits = run_onnx(tmp_path / "m.onnx", inputs)
    assert mean_error(found, to_numpy(packed(inputs))) < 2e-3
    assert bits.count(2) == 7
    floats = 4 * sum(np.prod(v.shape) for v in model.variables if len(v.shape) > 1)
    assert (tmp_path / "m.onnx").stat().st_size < floats / 7


def test_what_cannot_be_exported_says_what_to_do(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.BitLinear(2, dtype="mixed_bfloat16")])
    if BACKEND != "torch":
        with pytest.raises(ValueError, match="KERAS_BACKEND=torch"):
            to_onnx(model, tmp_path / "m.onnx")
        return
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="compute in float32"):
        to_onnx(model, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="accuracy_level"):
        to_onnx(model, tmp_path / "m.onnx", accuracy_level=1)
    inner = keras.Sequential([layers.BitLinear(2)])
    with pytest.raises(ValueError, match="input_signature"):
        to_onnx(inner, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def packed_model(rng):
    model = keras.Sequential(
        [keras.Input((64,)), layers.BitLinear(48, activation="relu"), layers.BitLinear(5)]
    )
    return keras_bitnet.pack_model(model, verbose=0), rng.normal(size=(2, 64)).astype("float32")


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.skipif(BACKEND != "tensorflow", reason="LiteRT files are made by TensorFlow")
def test_litert(rng, tmp_path):
    import tensorflow as tf

    model, x = packed_model(rng)
    with use_kernel("reference"):
        model.export(str(tmp_path / "m.tflite"), format="litert", verbose=False)
    interpreter = tf.lite.Interpreter(str(tmp_path / "m.tflite"))
    run = interpreter.get_signature_runner()
    (name,) = run.get_input_details()
    (found,) = run(**{name: x}).values()
    assert relative_error(found, to_numpy(model(x))) < 1e-5
