"""Train on one backend, run the packed file on every other that is installed.

python examples/switch_backends.py
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

TRAIN = """
import keras, keras_bitnet
from keras_bitnet.layers import BitLinear
from sklearn.datasets import load_digits

x, y = load_digits(return_X_y=True)
model = keras.Sequential([keras.Input((64,)), BitLinear(128, "relu", norm="rms"),
                          BitLinear(10, norm="rms")])
model.compile(keras.optimizers.Adam(5e-3),
              keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(x[:1400], y[:1400], epochs=15, verbose=0)
keras_bitnet.pack_model(model, verbose=0).save(PATH)
print(f"trained on {keras.backend.backend()}")
"""

RUN = """
import keras, keras_bitnet, zlib
import numpy as np
from sklearn.datasets import load_digits

x, y = load_digits(return_X_y=True)
model = keras.models.load_model(PATH)
correct = (model.predict(x[1400:], verbose=0).argmax(-1) == y[1400:]).mean()
layer = model.layers[0]
codes = np.random.default_rng(0).integers(-127, 128, (100, 64))
sums = keras_bitnet.ops.accumulate(codes, layer.packed_kernel)
checksum = zlib.crc32(keras.ops.convert_to_numpy(sums).tobytes())
print(f"{keras.backend.backend():>10}: accuracy {correct:.4f}, integer sums {checksum:08x}")
"""


def run(code, backend, path):
    subprocess.run(
        [sys.executable, "-c", f"PATH = {str(path)!r}\n{code}"],
        env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=True,
    )


backends = [b for b in ("jax", "torch", "tensorflow") if importlib.util.find_spec(b)]
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "packed.keras"
    run(TRAIN, backends[0], path)
    for backend in backends:
        run(RUN, backend, path)
