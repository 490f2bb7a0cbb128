"""A packed file written on one backend loads on every other, integer sums bit for bit."""

import itertools

import numpy as np
import pytest
from helpers import once, run_python

BACKENDS = ("jax", "torch", "tensorflow")
PAIRS = list(itertools.product(BACKENDS, BACKENDS))

pytestmark = once

COMMON = """
import json, sys, zlib
import keras, numpy as np
import keras_bitnet
from helpers import to_numpy
from keras_bitnet import ops, quantizers
from keras_bitnet.interop.tensor_map import projections
from keras_bitnet.layers import BitLinear
from keras_bitnet.models import BitNetBackbone, BitNetCausalLM
from rounding import clear_tokens

GRANULARITIES = [("tensor", None), ("channel", None), ("group", 32)]
x = np.random.default_rng(1).normal(size=(5, 70)).astype("float32")

def facts(model):
    sums = []
    for layer in model.layers:
        if isinstance(layer, BitLinear):
            codes, _ = layer.activation_quantizer.quantize(x)
            s = to_numpy(ops.accumulate(codes, layer.packed_kernel))
            sums.append(zlib.crc32(s.astype("<i4").tobytes()))
    return {"sums": sums, "y": to_numpy(model(x)).tolist()}

def family_outputs(model):
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 37, (2, 6))
    images = rng.normal(size=(2, 6, 6, 4)).astype("float32")
    return {k: to_numpy(v).tolist() for k, v in model([tokens, images]).items()}

def text_facts(model, tokens):
    data = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    tiles = [to_numpy(p.layer.kernel_tiles).tobytes() for p in projections(model.backbone)
             if model.packed]
    return {
        "class": type(model).__name__, "packed": model.packed, "tiles": zlib.crc32(b"".join(tiles)),
        "logits": to_numpy(model(data)).tolist(),
        "text": model.generate(tokens, max_new_tokens=4, strip_prompt=True),
    }
"""

FAMILY = """
from keras_bitnet import layers
keras.utils.set_random_seed(4)
tokens, images = keras.Input((6,), dtype="int32"), keras.Input((6, 6, 4))
rows, volume = images[:, :, 0], keras.ops.expand_dims(images, -1)
embedding = layers.ReversibleBitEmbedding(37, 8, weight_quantizer="int4")
vectors = embedding(tokens)
model = keras.Model([tokens, images], {
    "BitEmbedding": layers.BitEmbedding(37, 40)(tokens),
    "ReversibleBitEmbedding": embedding(vectors, reverse=True),
    "BitConv1D": layers.BitConv1D(5, 3, padding="causal", norm="rms")(rows),
    "BitConv2D": layers.BitConv2D(6, 3, padding="same", groups=2, weight_quantizer="int2")(images),
    "BitConv3D": layers.BitConv3D(5, (2, 3, 1), strides=2, weight_quantizer="binary")(volume),
    "BitDepthwiseConv1D": layers.BitDepthwiseConv1D(3)(rows),
    "BitDepthwiseConv2D": layers.BitDepthwiseConv2D(3, weight_quantizer="int8")(images),
    "BitResidual": layers.BitResidual("int16", scale="channel")([rows, rows]),
    "deep BitSeparableConv1D": layers.BitSeparableConv1D(5, 3)(rows),
    "deep BitSeparableConv2D": layers.BitSeparableConv2D(5, 3)(images),
    "deep BitMultiHeadAttention": layers.BitMultiHeadAttention(2, 4, value_dim=3)(rows, rows),
    "deep BitTransformerEncoder": layers.BitTransformerEncoder(16, 2, sub_norm="rms")(vectors),
    "deep converted attention": keras.layers.MultiHeadAttention(2, 4)(rows, rows),
})
model = keras_bitnet.quantize_model(model, verbose=0)
qat = family_outputs(model)
packed = keras_bitnet.pack_model(model, verbose=0)
packed.save(f"{FOLDER}/family.keras")
family = {"qat": qat, "packed": family_outputs(packed)}
"""

LANGUAGE_MODELS = """
model = BitNetCausalLM(BitNetBackbone(
    vocabulary_size=50, num_layers=2, num_query_heads=4, num_key_value_heads=2, hidden_dim=32,
    intermediate_dim=48, tie_word_embeddings=False))
rng = np.random.default_rng(0)
for variable in sorted(model.trainable_variables, key=lambda v: v.path):
    scale = variable.name == "scale"
    variable.assign(rng.uniform(0.5, 1.5, variable.shape) if scale
                    else rng.normal(0, 0.5, variable.shape))
packed = keras_bitnet.pack_model(model, verbose=0)
tokens = clear_tokens(model)
language_models = {}
for name, m in {"qat": model, "packed": packed}.items():
    m.save(f"{FOLDER}/{name}.keras")
    language_models[name] = text_facts(m, tokens)
np.save(f"{FOLDER}/tokens.npy", tokens)
"""

SAVE = """
keras.utils.set_random_seed(3)
inputs = keras.Input((70,))
outputs = []
for name in ("binary", "ternary", "int2", "int4", "int8"):
    for granularity, group_size in GRANULARITIES:
        q = type(quantizers.get(name))(granularity=granularity, group_size=group_size)
        outputs.append(BitLinear(19, weight_quantizer=q, bias_initializer="ones")(inputs))
model = keras.Model(inputs, keras.layers.Concatenate()(outputs))
packed = keras_bitnet.pack_model(model, verbose=0)
packed.save(f"{FOLDER}/linear.keras")
qat = to_numpy(model(x))
print(json.dumps({
    **facts(packed), "qat": qat.tolist(), "family": family, "language_models": language_models,
}))
"""

LOAD = """
load = keras.models.load_model
print(json.dumps([{
    **facts(load(f"{folder}/linear.keras")),
    "family": family_outputs(load(f"{folder}/family.keras")),
    "language_models": {
        name: text_facts(load(f"{folder}/{name}.keras"), np.load(f"{folder}/tokens.npy"))
        for name in ("qat", "packed")
    },
} for folder in FOLDERS]))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each backend saw of what it saved, and of what each other backend saved."""
    folders = [str(tmp_path_factory.mktemp(b)) for b in BACKENDS]
    write = COMMON + FAMILY + LANGUAGE_MODELS + SAVE
    saved = {
        b: run_python(f"FOLDER = {folder!r}\n{write}", b)
        for b, folder in zip(BACKENDS, folders, strict=True)
    }
    read = f"FOLDERS = {folders!r}\n{COMMON}{LOAD}"
    loaded = {b: dict(zip(BACKENDS, run_python(read, b), strict=True)) for b in BACKENDS}
    return saved, loaded


def assert_alike(actual, wanted):
    """Outputs by layer; behind a second quantization one code may be the next one."""
    assert actual.keys() == wanted.keys()
    for name, y in actual.items():
        tolerance = 2e-2 if name.startswith("deep") else 1e-5
        largest = np.abs(wanted[name]).max()
        assert np.abs(np.subtract(y, wanted[name])).max() <= tolerance * largest, name


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_pair(writer, reader, results):
    saved, loaded = results
    wanted, actual = saved[writer], loaded[reader][writer]
    assert len(wanted["sums"]) == 15
    assert actual["sums"] == wanted["sums"]
    largest = np.abs(wanted["y"]).max()
    assert np.abs(np.subtract(actual["y"], wanted["y"])).max() <= 1e-5 * largest


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_keeps_the_outputs(backend, results):
    saved, _ = results
    y, qat = np.array(saved[backend]["y"]), np.array(saved[backend]["qat"])
    assert np.abs(y - qat).max() <= 1e-5 * np.abs(qat).max()


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_pair_of_every_layer(writer, reader, results):
    saved, loaded = results
    assert_alike(loaded[reader][writer]["family"], saved[writer]["family"]["packed"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_keeps_the_outputs_of_every_layer(backend, results):
    family = results[0][backend]["family"]
    assert_alike(family["packed"], family["qat"])


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_pair_of_language_models(writer, reader, results):
    """The same tokens everywhere, trained and packed, and the same logits to 1e-4."""
    saved, loaded = results
    wanted = saved[writer]["language_models"]
    actual = loaded[reader][writer]["language_models"]
    for kind in ("qat", "packed"):
        assert (actual[kind]["class"], actual[kind]["packed"]) == (
            "BitNetCausalLM",
            kind == "packed",
        )
        assert actual[kind]["tiles"] == wanted[kind]["tiles"]
        assert actual[kind]["text"] == wanted[kind]["text"]
        for logits in (wanted[kind]["logits"], wanted["qat"]["logits"]):
            np.testing.assert_allclose(actual[kind]["logits"], logits, rtol=0, atol=1e-4)
