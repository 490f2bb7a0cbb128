"""A precision for each layer against one for all: equal bytes, real images.

The images and split are those of `accuracy.py`. The network is one of unlike layers, stock Keras
layers with batch normalization: three narrow convolutions of a few hundred weights, then a
perceptron that holds nearly all of them. From every seed it is trained in float; then, for each
size, `suggest_precision` finds the precisions on training images alone, with the packed bytes of
the uniform network as its budget. Uniform and mixed networks start from the same float weights and
are compared twice: just rounded, and after the same training with quantization. What meets the
test images is packed, and its bytes are counted there.

    KERAS_BACKEND=jax python benchmarks/mixed_precision.py [--quick] [--jobs 2]
"""

import argparse
import statistics
import time

import accuracy
import common
import keras
import numpy as np
from keras import layers

from keras_bitnet import pack_model, quantize_model, suggest_precision
from keras_bitnet.quantizers import Binary, Int2, Int4, Int8, Ternary

SIZE = 14  # pixels a side
# All with a scale for each channel, so that the precisions differ in nothing else.
PRECISIONS = (
    Binary(granularity="channel"),
    Ternary(granularity="channel"),
    Int2(),
    Int4(),
    Int8(),
)
# `memory` of `pack_model` and the uniform networks of a size, by name; the plan gets their bytes.
SIZES = {
    "1.6 bits": ("smallest", {"W1.58A8": PRECISIONS[1]}),
    "2 bits": ("fastest", {"W2A8": PRECISIONS[2]}),
}
MIXED = "suggest_precision"


def make_model(filters, units):
    """Convolutions, each after the first halves the image, then a hidden layer and the classes."""
    x = inputs = keras.Input((SIZE, SIZE, 1))
    for i, count in enumerate(filters):
        strides = 1 if i == 0 else 2
        x = layers.Conv2D(count, 3, strides, "same", use_bias=False, name=f"conv_{i}")(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.Dense(units, use_bias=False, name="hidden")(layers.Flatten()(x))
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    model = keras.Model(inputs, layers.Dense(accuracy.CLASSES, name="classes")(x))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def train(model, data, epochs, learning_rate, settings):
    """Adam with the cosine schedule of `accuracy.py`."""
    schedule = accuracy.CosineDecay(learning_rate, epochs)
    batch_size = settings["batch_size"]
    model.fit(*data, epochs=epochs, batch_size=batch_size, callbacks=[schedule], verbose=0)


def measure(model, spec, memory, data, settings):
    """`(rounded, trained, bytes)` of a float model quantized as a spec or plan says."""
    training, test = data
    quantized = quantize_model(model, spec, verbose=0)
    rounded = accuracy.evaluate(quantized, test)
    train(quantized, training, settings["qat_epochs"], settings["qat_learning_rate"], settings)
    packed = pack_model(quantized, memory=memory, verbose=0)
    return rounded, accuracy.evaluate(packed, test), packed_bytes(packed)


def packed_bytes(model):
    """Bytes of all weights of a packed model."""
    return sum(keras.ops.convert_to_numpy(v).nbytes for v in model.weights)


def run_seed(seed, data, settings):
    """All networks from one seed: `[{"size", "kind", "rounded", "trained", "bytes", ...}]`."""
    training, test = data
    keras.utils.set_random_seed(seed)
    model = make_model(settings["filters"], settings["units"])
    train(model, training, settings["float_epochs"], settings["float_learning_rate"], settings)
    correct = accuracy.evaluate(model, test)
    rows = [
        {"size": "32 bits", "kind": "float", "rounded": correct, "trained": correct,
         "bytes": packed_bytes(model)}
    ]  # fmt: skip
    for size, (memory, uniform) in SIZES.items():
        found = []
        for kind, quantizer in uniform.items():
            keras.utils.set_random_seed(seed)
            rounded, trained, count = measure(model, quantizer, memory, data, settings)
            found.append(
                {"size": size, "kind": kind, "rounded": rounded, "trained": trained, "bytes": count}
            )
        allowed = min(row["bytes"] for row in found)
        examples = tuple(part[: settings["samples"]] for part in training)
        plan = suggest_precision(
            model, examples, f"{allowed} B", precisions=PRECISIONS, verbose=0,
            samples=settings["samples"], batch_size=512, objective=settings["objective"],
            memory=memory,
        )  # fmt: skip
        keras.utils.set_random_seed(seed)
        rounded, trained, count = measure(model, plan, memory, data, settings)
        if count > allowed or count != plan.search.cost:
            raise RuntimeError(
                f"The plan takes {count} bytes; allowed {allowed}, told {plan.search.cost}"
            )
        chosen = {choice.path: choice.chosen for choice in plan.search.choices}
        found.append(
            {"size": size, "kind": MIXED, "rounded": rounded, "trained": trained, "bytes": count,
             "plan": chosen}
        )  # fmt: skip
        rows += found
    for row in rows:
        cells = f"{row['size']:8} {row['kind']:18} {row['rounded']:6.2f} {row['trained']:6.2f}"
        print(f"seed {seed}  {cells} {row['bytes']:6} {row.get('plan', '')}", flush=True)
    return rows


def gather(seeds):
    """One row a network, over the seeds; `ahead` is the plan against each uniform one, paired."""
    rows = []
    for same in zip(*seeds, strict=True):
        row = {
            "size": same[0]["size"],
            "kind": same[0]["kind"],
            "bytes": [r["bytes"] for r in same],
        }
        for stage in ("rounded", "trained"):
            values = [r[stage] for r in same]
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            row[stage] = {"mean": mean, "stdev": deviation, "values": values}
        if "plan" in same[0]:
            row["plans"] = [r["plan"] for r in same]
        rows.append(row)
    plans = {row["size"]: row for row in rows if row["kind"] == MIXED}
    for row in rows:
        if row["size"] in plans and row["kind"] != MIXED:
            row["plan_ahead"] = {
                stage: [
                    mixed - own
                    for mixed, own in zip(
                        plans[row["size"]][stage]["values"], row[stage]["values"], strict=True
                    )
                ]
                for stage in ("rounded", "trained")
            }
    return rows


def table(rows):
    """The results as Markdown."""
    headers = ("Size", "Precision", "bytes, packed", "rounded, %", "trained, %")
    cells = [
        (row["size"], row["kind"], f"{np.mean(row['bytes']):.0f}",
         *(f"{row[s]['mean']:.2f} ± {row[s]['stdev']:.2f}" for s in ("rounded", "trained")))
        for row in rows
    ]  # fmt: skip
    return common.markdown(headers, cells)


def main():
    """Runs everything, writes `results/mixed_precision.json`, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few epochs and seeds")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--output", default=common.RESULTS / "mixed_precision.json")
    arguments = parser.parse_args()
    settings = {
        "filters": [4, 8, 8],
        "units": 128,
        "optimizer": "Adam, cosine decay, 3 epochs of warm-up",
        "batch_size": 64,
        "float_epochs": 15,
        "float_learning_rate": 6e-3,
        "qat_epochs": 8,
        "qat_learning_rate": 2e-3,
        "objective": "loss",
        "samples": 1024,
        "seeds": [0, 1, 2, 3, 4],
    }
    if arguments.quick:
        settings |= {"float_epochs": 6, "qat_epochs": 3, "seeds": [0, 1]}
    start = time.perf_counter()
    data = tuple(
        (x.reshape(-1, SIZE, SIZE, 1), y.astype(np.int32)) for x, y in accuracy.load_images()
    )
    calls = [(seed, data, settings) for seed in settings["seeds"]]
    rows = gather(common.in_processes(run_seed, calls, arguments.jobs))
    common.publish(arguments.output, settings, start, rows, table)


if __name__ == "__main__":
    main()
