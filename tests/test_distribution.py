"""Data and model parallel training on eight simulated JAX devices."""

import pytest
from helpers import BACKEND, run_python

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
    model = keras.Sequential([
        keras.Input((32,)),
        BitLinear(64, "relu", norm="rms", name="wide"),
        BitLinear(16, name="head", weight_quantizer="int4"),
    ])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 32)).astype("float32"), rng.normal(size=(64, 16)).astype("float32")
    model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
    sharding = model.get_layer("wide").kernel.value.sharding
    shards, spec = len(sharding.device_set), str(sharding)
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
layout["wide/kernel"] = (None, "model")
layout["head/kernel"] = ("model", None)
layout["wide/kernel_tiles"] = ("model", None, None, None)
layout["table/embedding/kernel"] = ("model", None)
layout["table/embedding/kernel_tiles"] = ("model", None, None, None)
layout["conv/kernel"] = (None, None, "model")
layout["block/feed_forward/up/kernel"] = (None, "model")
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
    result = run_python(CODE, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert result["data"] < 1e-3 * result["scale"]
    assert result["model"] < 1e-3 * result["scale"]
    assert result["shards"] == [8, 8]
    assert "model" in result["spec"]
    assert max(result["packed"]) < 1e-5
    assert result["family"] < 2e-2  # behind a quantization one code may be the next one
    assert max(result["family_packed"]) < 2e-2
