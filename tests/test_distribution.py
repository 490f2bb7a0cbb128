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
from keras_bitnet.layers import BitLinear

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
model = train(keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))
print(json.dumps({
    "data": float(np.abs(data[0] - plain[0]).max()),
    "model": float(np.abs(model[0] - plain[0]).max()),
    "scale": float(np.abs(plain[0]).max()), "shards": [data[1], model[1]], "spec": model[2],
    "packed": [plain[3], data[3], model[3]],
}))
"""


def test_data_and_model_parallel():
    result = run_python(CODE, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert result["data"] < 1e-3 * result["scale"]
    assert result["model"] < 1e-3 * result["scale"]
    assert result["shards"] == [8, 8]
    assert "model" in result["spec"]
    assert max(result["packed"]) < 1e-5
