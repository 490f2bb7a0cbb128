"""The learning rate and weight decay of BitNet b1.58."""

from typing import Any

import keras

from keras_bitnet.callbacks.common import (
    StepCallback,
    inner_optimizer,
    rebuild_train_function,
)
from keras_bitnet.checks import check_count, check_number


class TwoStageSchedule(StepCallback):
    """Two stages of learning rate and weight decay, as BitNet b1.58 was trained.

        t < warmup:  learning_rate * (t + 1) / (warmup + 1)
        t < switch:  learning_rate * (total - t) / (total - warmup)
        after it:    second_learning_rate * (total - t) / (total - switch)

    Low-bit weights want a learning rate two to four times the float one at first, and a much
    lower one without weight decay afterwards, when their codes should settle.

    Effects: sets the learning rate and `weight_decay` of the optimizer. Compiled training
    steps hold `weight_decay` as a constant, so where it changes, at the switch, the training
    step is compiled again, once. Writes `logs["learning_rate"]` and `logs["weight_decay"]`.
    All depends on `optimizer.iterations` alone, so training resumed from a backup goes on
    where it was.

    Args:
        learning_rate: The peak, reached after the warm-up.
        second_learning_rate: The rate right after the switch, from where it falls to 0. By
            default two thirds of the rate right before it (a peak of 1.5e-3: 0.75e-3 at
            half-way, then 0.5e-3).
        weight_decay: Weight decay of the first stage, or `None`: the callback does not touch
            that of the optimizer. On an optimizer made without weight decay it turns it on.
        second_weight_decay: Weight decay of the second stage.
        total_steps: Steps of the optimizer over the whole training; by default the epochs
            times the steps of an epoch, as `fit` knows them.
        warmup_steps: Steps of the linear warm-up.
        switch: Part of `total_steps` after which the second stage begins, in (0, 1).
        update_freq: Steps between two settings of the learning rate. Each waits for the
            device. The switch is exact whatever it is.

    Raises:
        ValueError: An argument is out of range; or, when training begins, `total_steps` is
            unknown or over already, or the optimizer's learning rate is a schedule, or it has
            no `weight_decay`.

    Source:
        Ma et al. 2024, "The Era of 1-bit LLMs: Training Tips, Code and FAQ"; Ma et al. 2025,
        BitNet b1.58 2B4T (https://arxiv.org/abs/2504.12285), where the stages fall along
        cosines.
    """

    def __init__(
        self,
        learning_rate,
        second_learning_rate=None,
        weight_decay=0.1,
        second_weight_decay=0.0,
        total_steps=None,
        warmup_steps=0,
        switch=0.5,
        update_freq=10,
    ):
        super().__init__()
        check_number("learning_rate", learning_rate, "(0, inf)")
        if second_learning_rate is not None:
            check_number("second_learning_rate", second_learning_rate, "(0, inf)")
        if weight_decay is not None:
            check_number("weight_decay", weight_decay, "[0, inf)")
            check_number("second_weight_decay", second_weight_decay, "[0, inf)")
        check_number("switch", switch, "(0, 1)")
        if total_steps is not None:
            check_count("total_steps", total_steps)
        check_count("warmup_steps", warmup_steps, least=0)
        check_count("update_freq", update_freq)
        self.peak = learning_rate
        self.second_learning_rate = second_learning_rate
        self.weight_decay = weight_decay
        self.second_weight_decay = second_weight_decay
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.switch = switch
        self.update_freq = update_freq
        self._total: Any = None
        self._switch_step: Any = None

    def learning_rate_at(self, step):
        """The learning rate of a step, once `total_steps` is known."""
        if step >= self._switch_step:
            remaining = max(self._total - step, 0) / (self._total - self._switch_step)
            return self._second_rate() * remaining
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        return self._first_rate(step)

    def weight_decay_at(self, step):
        """The weight decay of a step, `None` if it is left alone."""
        if self.weight_decay is None or step < self._switch_step:
            return self.weight_decay
        return self.second_weight_decay

    def _first_rate(self, step):
        return self.peak * (self._total - step) / (self._total - self.warmup_steps)

    def _second_rate(self):
        if self.second_learning_rate is not None:
            return self.second_learning_rate
        return self._first_rate(self._switch_step) * 2 / 3

    def on_train_begin(self, logs=None):
        """Finds the number of steps and checks the optimizer."""
        optimizer = inner_optimizer(self.model.optimizer)
        if not isinstance(optimizer.learning_rate, keras.Variable):
            raise ValueError(
                "`TwoStageSchedule` sets the learning rate: compile the optimizer with a float. "
                f"Received: {type(optimizer).__name__} with a schedule as its `learning_rate`."
            )
        if self.weight_decay is not None and not hasattr(optimizer, "weight_decay"):
            raise ValueError(
                "The optimizer has no `weight_decay`. Take another, such as "
                "`keras.optimizers.AdamW`, or `TwoStageSchedule(..., weight_decay=None)`. "
                f"Received: optimizer={type(optimizer).__name__}"
            )
        self._total = self.total_steps or self._steps_of_fit(optimizer)
        self._switch_step = round(self.switch * self._total)
        if not self.warmup_steps < self._switch_step < self._total:
            raise ValueError(
                "The warm-up must end before the switch, and the switch lie within the training. "
                f"Received: warmup_steps={self.warmup_steps}, switch at step "
                f"{self._switch_step} of {self._total}"
            )
        self.milestones = (self._switch_step,)
        self._checked = False

    def _steps_of_fit(self, optimizer):
        epochs, steps = self.params.get("epochs"), self.params.get("steps")
        if not epochs or not steps:
            raise ValueError(
                "The number of steps of an epoch is unknown. Give `total_steps` to "
                "`TwoStageSchedule`, or `steps_per_epoch` to `fit()`. "
                f"Received: epochs={epochs}, steps={steps}"
            )
        return epochs * steps // (getattr(optimizer, "gradient_accumulation_steps", None) or 1)

    def update(self, step):
        """Sets learning rate and weight decay for a step."""
        if not self._checked and step >= self._total:
            raise ValueError(
                f"The optimizer has made {step} steps already, and the schedule ends at "
                f"total_steps={self._total}. Compile the model again, or give a larger "
                "`total_steps`."
            )
        self._checked = True
        model = self.model
        model.optimizer.learning_rate = self.learning_rate_at(step)
        optimizer = inner_optimizer(model.optimizer)
        decay = self.weight_decay_at(step)
        if decay is not None and optimizer.weight_decay != decay:
            optimizer.weight_decay = decay
            rebuild_train_function(model)

    def on_epoch_end(self, epoch, logs=None):
        """Writes learning rate and weight decay to the logs."""
        if logs is None:
            return
        optimizer = inner_optimizer(self.model.optimizer)
        logs["learning_rate"] = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
        if self.weight_decay is not None:
            logs["weight_decay"] = float(optimizer.weight_decay)
