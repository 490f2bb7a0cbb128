"""Training and packed models on two GPUs; skipped where there are fewer."""

import pytest
from helpers import BACKEND, run_python
from test_distribution_torch import check_two_processes

from keras_bitnet.kernels.cuda import library

if library.device_count() < 2:
    pytest.skip("there are fewer than two GPUs", allow_module_level=True)

JAX = """
import json
import keras, numpy as np
import keras_bitnet
from keras_bitnet.layers import BitLinear

rng = np.random.default_rng(0)
x, y = rng.normal(size=(64, 256)).astype("float32"), rng.normal(size=(64, 128)).astype("float32")

def train(distribution):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((256,)),
        BitLinear(512, "relu", norm="rms", name="wide"),
        BitLinear(128, name="head", weight_quantizer="int4"),
    ])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses = model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0).history["loss"]
    out = model.predict(x, verbose=0)
    packed_model = keras_bitnet.pack_model(model, verbose=0)
    kernels = dict(keras_bitnet.kernels.explain(packed_model.layers[0]))
    devices = len(model.layers[0].kernel.value.sharding.device_set)
    packed = packed_model.predict(x, verbose=0)
    return losses, out, packed, devices, kernels["cuda"]

gpus = keras.distribution.list_devices("gpu")[:2]
alone = train(None)
data = train(keras.distribution.DataParallel(devices=gpus))
mesh = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], gpus)
layout = keras.distribution.LayoutMap(mesh)
layout[".*wide/kernel$"] = (None, "model")
layout[".*wide/kernel_tiles$"] = ("model", None, None, None)
split = train(keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))
scale = float(np.abs(alone[1]).max())
print(json.dumps([dict(
    losses=[alone[0], together[0]],
    outputs=float(np.abs(alone[1] - together[1]).max()) / scale,
    packed=float(np.abs(together[2] - together[1]).max()) / scale,
    devices=together[3],
    cuda=together[4],
) for together in (data, split)]))
"""


@pytest.mark.skipif(BACKEND != "torch", reason="processes are PyTorch's way")
def test_processes_of_torch():
    check_two_processes("cuda")


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is of the JAX backend")
def test_distribution_of_jax():
    for result in run_python(JAX):
        assert result["devices"] == 2
        assert result["cuda"] is None
        # An activation at the edge of rounding may take the other side.
        assert result["outputs"] < 2e-2
        assert result["packed"] < 2e-2
        assert result["losses"][1][-1] < result["losses"][1][0]
