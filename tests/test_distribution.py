"""Data and model parallel training on eight simulated JAX devices."""

import pytest
from helpers import BACKEND, run_python, simulated_devices

pytestmark = pytest.mark.skipif(
    BACKEND != "jax", reason="keras.distribution on simulated devices is of the JAX backend"
)

CODE = """
import json
import keras, numpy as np
import keras_bitnet
from keras_bitnet import layers
from keras_bitnet.layers import BitLinear

def family(distribution):
    # One step of the other layers in one model: the outputs, and how far the packed ones are.
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    tokens = keras.Input((8,), dtype="int32")
    table = layers.ReversibleBitEmbedding(64, 16, name="table")
    x = layers.BitTransformerEncoder(32, 4, normalize_first=True, name="block")(table(tokens))
    x = layers.BitResidual("int16")([x, layers.BitConv1D(16, 3, padding="same", name="conv")(x)])
    x = layers.BitSeparableConv1D(16, 3, padding="same")(x)
    model = keras.Model(tokens, table(x, reverse=True))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    rng = np.random.default_rng(0)
    data = rng.integers(0, 64, (32, 8))
    model.fit(data, rng.normal(size=(32, 8, 64)), batch_size=32, verbose=0)
    out = model.predict(data, batch_size=32, verbose=0)
    packed = keras_bitnet.pack_model(model, verbose=0).predict(data, batch_size=32, verbose=0)
    return out, float(np.abs(packed - out).max() / np.abs(out).max())

def train(distribution):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    # No activations are quantized but data, whose codes arithmetic does not change.
    head = {"norm": "rms", "weight_quantizer": "int4", "activation_quantizer": None}
    model = keras.Sequential([
        keras.Input((32,)), BitLinear(64, "relu", name="wide"), BitLinear(16, name="head", **head)
    ])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 32)).astype("float32"), rng.normal(size=(64, 16)).astype("float32")
    model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
    sharding = model.get_layer("wide").kernel.value.sharding
    shards, spec = len(sharding.device_set), str(getattr(sharding, "spec", ""))
    out = model.predict(x, verbose=0)
    packed = keras_bitnet.pack_model(model, verbose=0)
    close = float(np.abs(packed.predict(x, verbose=0) - out).max() / np.abs(out).max())
    return out, shards, spec, close

devices = keras.distribution.list_devices("cpu")
assert len(devices) == 8, devices
plain = train(None)
data = train(keras.distribution.DataParallel(devices=devices))
mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)
layout = keras.distribution.LayoutMap(mesh)
layout[".*wide/kernel$"] = (None, "model")
layout[".*head/kernel$"] = ("model", None)
layout[".*wide/kernel_tiles$"] = ("model", None, None, None)
layout[".*table/embedding/kernel$"] = ("model", None)
layout[".*table/embedding/kernel_tiles$"] = ("model", None, None, None)
layout[".*conv/kernel$"] = (None, None, "model")
layout[".*block/feed_forward/up/kernel$"] = (None, "model")
parallel = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
model = train(parallel)
one, several = family(None), family(parallel)
print(json.dumps({
    "data": float(np.abs(data[0] - plain[0]).max()),
    "model": float(np.abs(model[0] - plain[0]).max()),
    "scale": float(np.abs(plain[0]).max()), "shards": [data[1], model[1]], "spec": model[2],
    "packed": [plain[3], data[3], model[3]],
    "family": float(np.abs(several[0] - one[0]).max() / np.abs(one[0]).max()),
    "family_packed": [one[1], several[1]],
}))
"""


def test_data_and_model_parallel():
    result = run_python(CODE, **simulated_devices(8))
    assert result["data"] < 1e-5 * result["scale"]
    assert result["model"] < 1e-5 * result["scale"]
    assert result["shards"] == [8, 8]
    assert "model" in result["spec"]
    assert max(result["packed"]) < 1e-5
    assert result["family"] < 2e-2  # behind a quantization one code may be the next one
    assert max(result["family_packed"]) < 2e-2


DECODER = """
import json
import keras, numpy as np
import keras_bitnet
from keras_bitnet.models import BitNetBackbone, BitNetCausalLM

SPLIT = ("kernel", "embeddings", "kernel_tiles")

def split(model):
    # The paths of the matrices, and on how many parts of the axis "model" each one is.
    found = {}
    for v in model.variables:
        if v.path.endswith(SPLIT):
            spec = getattr(v.value.sharding, "spec", ())
            found[v.path.split("/", 1)[1]] = 4 if "model" in spec else 1
    return found

def make(distribution, **arguments):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    return BitNetCausalLM(BitNetBackbone(
        vocabulary_size=64, num_layers=1, num_query_heads=8, num_key_value_heads=4,
        hidden_dim=64, intermediate_dim=128, head_dim=16, **arguments))

def train(distribution):
    # Float, so that no rounding makes more of small differences.
    model = make(distribution, tie_word_embeddings=False, quantization_strength=0.0)
    model.compile(
        keras.optimizers.Adam(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    tokens = (np.arange(17) + np.arange(16)[:, None]).astype("int32") % 64
    x, y = tokens[:, :-1], tokens[:, 1:]
    loss = model.fit(x, y, batch_size=8, epochs=8, shuffle=False, verbose=0).history["loss"]
    logits = model.predict(x, batch_size=8, verbose=0)
    for layer in model._flatten_layers():
        if getattr(layer, "quantization_strength", None) is not None:
            layer.quantization_strength.assign(1.0)
    packed = keras_bitnet.pack_model(model, verbose=0)
    return {
        "loss": loss, "logits": logits, "split": split(model), "packed_split": split(packed),
        "qat": model.predict(x, batch_size=8, verbose=0),
        "packed": packed.predict(x, batch_size=8, verbose=0),
        "text": packed.generate(tokens[:8, :6], max_new_tokens=4),
    }

devices = keras.distribution.list_devices("cpu")
mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)
parallel = keras.distribution.ModelParallel(
    layout_map=BitNetBackbone.get_layout_map(mesh), batch_dim_name="batch")

one, several = train(None), train(parallel)
llama = make(parallel, embedding_quantizer="int8", sub_norm=None, activation="silu")
splits = [several["split"], several["packed_split"], split(llama),
          split(keras_bitnet.pack_model(llama, verbose=0))]
far = lambda a, b: float(np.abs(a - b).mean() / np.abs(b).mean())
print(json.dumps({
    "matrices": [len(s) for s in splits],
    "whole": [path for s in splits for path, parts in s.items() if parts < 4],
    "whole_alone": len(one["split"]) - sum(parts == 1 for parts in one["split"].values()),
    "loss": [one["loss"], several["loss"]],
    "logits": far(several["logits"], one["logits"]),
    "qat": far(several["qat"], one["qat"]),
    "packed": far(several["packed"], several["qat"]),
    "text": [one["text"], several["text"]],
}))
"""


def test_layout_map_of_the_decoder():
    """Every matrix is split, float and packed, and nothing else changes."""
    result = run_python(DECODER, **simulated_devices(8))
    assert result["matrices"] == [9, 9, 8, 8]
    assert result["whole"] == []
    assert result["whole_alone"] == 0
    one, several = result["loss"]
    assert one[-1] < 0.7 * one[0]
    assert max(abs(a - b) for a, b in zip(one, several, strict=True)) < 1e-3 * one[0]
    assert result["logits"] < 1e-3
    assert result["qat"] < 2e-2  # behind a quantization one code may be the next one
    assert result["packed"] < 2e-2
    assert result["text"][0] == result["text"][1]
