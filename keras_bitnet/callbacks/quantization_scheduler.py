"""Warm-up of the quantization strength."""

import math

from keras_bitnet.callbacks.common import StepCallback, find_bit_layers
from keras_bitnet.checks import check_choice, check_count, check_number
from keras_bitnet.filters import layer_filter

SHARPNESS = 10.0  # the logistic curve is cut at -5 and 5


def _sigmoid(progress):
    def logistic(x):
        return 1 / (1 + math.exp(-SHARPNESS * (x - 0.5)))

    return (logistic(progress) - logistic(0)) / (logistic(1) - logistic(0))


SCHEDULES = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "sigmoid": _sigmoid,
}


class QuantizationScheduler(StepCallback):
    """Raises the quantization strength of the layers from 0 (float) to 1 (quantized).

        strength(t) = schedule(clip((t - start) / (end - start), 0, 1))

    Effects: assigns the variable `quantization_strength` of the layers, without compiling
    anything again, and writes `logs["quantization_strength"]` at the end of an epoch. The value
    depends on the epoch or on `optimizer.iterations` alone, so training resumed with
    `initial_epoch` or `keras.callbacks.BackupAndRestore` goes on where it was.

    Args:
        start: Last moment of strength 0. Epochs (the first is 0) with `update_freq="epoch"`,
            else steps of the optimizer.
        end: First moment of strength 1, in the same unit. Train on after it: only then does
            the model learn what the packed one computes.
        schedule: `"linear"`; `"cosine"`: half a cosine; `"sigmoid"`: a logistic curve over ten
            of its units, stretched to hit 0 and 1.
        update_freq: `"epoch"`, or a number of steps. Each update reads and writes variables,
            20 to 40 ms for 100 layers, so prefer tens of steps to one. `end` is met exactly.
        filters: Which layers, see `keras_bitnet.quantize_model`; all by default. Other
            layers keep their strength.

    Raises:
        ValueError: An argument is out of range, or, when training begins, the model has no
            layer to schedule.

    Source:
        The ramp `min(step / 1000, 1)` with which Hugging Face fine-tuned Llama 3 8B to 1.58
        bits (https://huggingface.co/blog/1_58_llm_extreme_quantization), there per step and
        linear, or a sigmoid.
    """

    def __init__(self, start=0, *, end, schedule="linear", update_freq="epoch", filters=None):
        super().__init__()
        check_number("start", start, "[0, inf)")
        check_number("end", end, "(0, inf)")
        if end <= start:
            raise ValueError(
                f"`end` must be larger than `start`. Received: start={start}, end={end}"
            )
        check_choice("schedule", schedule, tuple(SCHEDULES))
        if update_freq != "epoch":
            check_count("update_freq", update_freq)
        layer_filter(filters)  # says now what is wrong with it
        self.start = start
        self.end = end
        self.schedule = schedule
        self.update_freq = update_freq
        self.filters = filters
        self.milestones = (end,)
        self.final_step = end
        self.layers = []
        self.strength = None

    def strength_at(self, moment):
        """The strength at an epoch or step."""
        progress = (moment - self.start) / (self.end - self.start)
        return SCHEDULES[self.schedule](min(max(progress, 0.0), 1.0))

    def on_train_begin(self, logs=None):
        """Finds the layers."""
        self.layers = list(find_bit_layers(self.model, self.filters))

    def on_epoch_begin(self, epoch, logs=None):
        """Sets the strength of the epoch."""
        if self.update_freq == "epoch":
            self._assign(self.strength_at(epoch))
        else:
            super().on_epoch_begin(epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        """Sets the strength of the step."""
        if self.update_freq != "epoch":
            super().on_train_batch_begin(batch, logs)

    def update(self, step):
        """Sets the strength of the step."""
        self._assign(self.strength_at(step))

    def _assign(self, strength):
        for layer in self.layers:
            layer.quantization_strength.assign(strength)
        self.strength = strength

    def on_epoch_end(self, epoch, logs=None):
        """Writes the strength to the logs."""
        if logs is not None and self.strength is not None:
            logs["quantization_strength"] = self.strength
