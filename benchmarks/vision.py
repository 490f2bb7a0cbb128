"""Convolutions and attention on real images: float against low bits.

The data, split, schedule and search of the learning rate are those of `accuracy.py`: 5,000 MNIST
images at 14 x 14, 4,000 to train and 1,000 to test. Networks of stock Keras layers: a small CNN; a
small vision transformer (patches of 2 x 2); one block of it with the squared ReLU of BitNet and a
wider feed-forward network, which make large activations. `quantize_model` replaces all of their
convolutions, dense layers and attention projections, the first and the last too. A kind is a spec
for `quantize_model`, so another row is one line. After training each quantized network is packed,
and the packed one meets the test images. One with 8-bit activations meets them once more with
activations of 4 bits, without being trained for that.

    KERAS_BACKEND=jax python benchmarks/vision.py [--quick] [--networks CNN ViT] [--kinds ...]

With a choice of networks or kinds the other rows of the results stay as they are. `--jobs 8` trains
eight rows at a time; on one GPU set `XLA_PYTHON_CLIENT_PREALLOCATE=false` for that.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import time

import accuracy
import common
import keras
import numpy as np
from keras import layers

from keras_bitnet import pack_model, quantize_model
from keras_bitnet.layers import BitLayer, relu_squared
from keras_bitnet.quantizers import ActivationInt4

SIZE, PATCH = 14, 2
KINDS = {
    "float": None,
    "W1.58A8": {"weight_quantizer": "ternary", "activation_quantizer": "int8"},
    "W1.58A8, Hadamard": {
        "weight_quantizer": "ternary", "activation_quantizer": "int8", "rotation": "hadamard",
    },
    "W1.58A4": {"weight_quantizer": "ternary", "activation_quantizer": "int4"},
    "W1.58A4, Hadamard": {
        "weight_quantizer": "ternary", "activation_quantizer": "int4", "rotation": "hadamard",
    },
}  # fmt: skip


@keras.saving.register_keras_serializable("benchmarks")
class AddPositions(layers.Layer):
    """Adds a trained vector to every position."""

    def build(self, input_shape):
        """Creates the vectors `(length, features)`."""
        self.positions = self.add_weight(
            name="positions", shape=input_shape[1:], initializer="random_normal"
        )

    def call(self, inputs):
        """Maps `(batch, length, features)` to the same shape."""
        return inputs + self.positions


def make_cnn():
    """Three convolutions with batch normalization, then a dense layer."""
    x = inputs = keras.Input((SIZE, SIZE, 1))
    for filters, strides in ((16, 1), (32, 2), (32, 2)):
        x = layers.Conv2D(filters, 3, strides, "same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    return keras.Model(inputs, layers.Dense(accuracy.CLASSES)(layers.Flatten()(x)))


def make_vit(features=48, blocks=2, heads=4, widening=2, activation="gelu"):
    """Blocks of attention and feed-forward on 49 patches, norm before."""
    inputs = keras.Input((SIZE, SIZE, 1))
    x = layers.Conv2D(features, PATCH, PATCH)(inputs)
    x = AddPositions()(layers.Reshape((-1, features))(x))
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(heads, features // heads)(y, y)
        x = layers.Add()([x, y])
        y = layers.Dense(widening * features, activation)(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(features)(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(accuracy.CLASSES)(x))


NETWORKS = {
    "CNN": make_cnn,
    "ViT": make_vit,
    "ViT, squared ReLU": functools.partial(make_vit, blocks=1, widening=4, activation=relu_squared),
}


def make(network, spec):
    """A network drawn anew, quantized as a kind says."""
    model = NETWORKS[network]()
    return model if spec is None else quantize_model(model, spec, verbose=0)


def run_kind(network, kind, data, settings):
    """Finds the learning rate of one kind on validation images, then trains every seed."""
    spec = KINDS[kind]
    settings = {**settings, **{k: settings[k][network] for k in ("epochs", "learning_rates")}}
    trainer = accuracy.Trainer(functools.partial(make, network, spec), spec is not None, settings)
    train, test = data
    best, grid = settings["learning_rates"][0], {}
    if len(settings["learning_rates"]) > 1:
        best, grid = accuracy.find_learning_rate(trainer, train, settings)
    accuracies, packed, four_bits, packed_bytes = [], [], [], None
    for seed in settings["seeds"]:
        accuracies.append(trainer.accuracy(train, test, seed, best))
        if spec is not None:
            small = pack_model(trainer.model, verbose=0)
            packed.append(accuracy.evaluate(small, test))
            packed_bytes = _bytes(small)
            if spec["activation_quantizer"] == "int8":
                four_bits.append(accuracy.evaluate(with_four_bits(trainer.model), test))
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    print(f"{network:4} {kind:24} {mean:6.2f} +- {deviation:.2f}", flush=True)
    return {
        "network": network, "kind": kind, "device": common.gpu() or "cpu",
        "mean": mean, "stdev": deviation,
        "accuracies": accuracies, "packed_accuracies": packed,
        "four_bit_activations": four_bits, "learning_rate": best,
        "validation": {str(rate): values for rate, values in grid.items()},
        "bytes_float32": 4 * NETWORKS[network]().count_params(), "bytes_packed": packed_bytes,
    }  # fmt: skip


def with_four_bits(model):
    """A copy of a quantized model whose activations have 4 bits instead."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    for layer in copy._flatten_layers():
        if isinstance(layer, BitLayer):
            layer.activation_quantizer = ActivationInt4()
    return copy


def _bytes(model):
    return sum(keras.ops.convert_to_numpy(v).nbytes for v in model.variables)


def compare(rows):
    """Adds to every row how far it is below float, in points."""
    floats = {row["network"]: row["mean"] for row in rows if row["kind"] == "float"}
    for row in rows:
        row["below_float"] = floats[row["network"]] - row["mean"]


def earlier_rows(path, chosen):
    """The rows of an earlier run that this one does not make anew."""
    path = pathlib.Path(path)
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    return [row for row in rows if (row["network"], row["kind"]) not in chosen]


def table(rows):
    """The results as Markdown."""
    cells = [
        (r["network"], r["kind"], f"{r['mean']:.2f} ± {r['stdev']:.2f}",
         f"{0 - r['below_float']:+.2f}",
         f"{statistics.mean(r['four_bit_activations']):.2f}" if r["four_bit_activations"] else "",
         f"{r['learning_rate']:g}",
         r["bytes_packed"] or r["bytes_float32"])
        for r in rows
    ]  # fmt: skip
    headers = (
        "Network",
        "Kind",
        "Test accuracy, %",
        "to float",
        "then A4",
        "learning rate",
        "bytes",
    )
    return common.markdown(headers, cells)


def main():
    """Runs everything, writes `results/vision.json`, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few epochs, seeds and rates")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--output", default=common.RESULTS / "vision.json")
    arguments = parser.parse_args()
    settings = {
        "epochs": {"CNN": 20, "ViT": 40, "ViT, squared ReLU": 20},
        "batch_size": 64,
        "optimizer": "Adam, cosine decay, 3 epochs of warm-up",
        "warmup_share": 0.4,
        "learning_rates": {
            "CNN": [1e-3, 2e-3, 6e-3],
            "ViT": [1e-3, 2e-3, 6e-3],
            "ViT, squared ReLU": [4e-3],
        },
        "grid_seeds": [100],
        "seeds": [0, 1, 2, 3, 4],
    }
    if arguments.quick:
        settings |= {
            "epochs": dict.fromkeys(NETWORKS, 4),
            "learning_rates": {network: [4e-3] for network in NETWORKS},
            "seeds": [0, 1],
        }
    start = time.perf_counter()
    data = tuple(
        (x.reshape(-1, SIZE, SIZE, 1), y.astype(np.int32)) for x, y in accuracy.load_images()
    )
    chosen = list(itertools.product(arguments.networks, arguments.kinds))
    rows = earlier_rows(arguments.output, chosen)
    calls = [(network, kind, data, settings) for network, kind in chosen]
    rows += common.in_processes(run_kind, calls, arguments.jobs)
    places = {pair: i for i, pair in enumerate(itertools.product(NETWORKS, KINDS))}
    rows.sort(key=lambda row: places[row["network"], row["kind"]])
    compare(rows)
    common.publish(arguments.output, settings, start, rows, table)


if __name__ == "__main__":
    main()
