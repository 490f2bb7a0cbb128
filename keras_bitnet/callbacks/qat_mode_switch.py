"""Float training, then quantization-aware training, then frozen codes."""

import math
import warnings

from keras import ops

from keras_bitnet.callbacks.common import (
    StepCallback,
    find_bit_layers,
    freeze_variables,
    inner_optimizer,
)
from keras_bitnet.checks import check_choice, check_count

MODES = ("auto", "min", "max")


class QATModeSwitch(StepCallback):
    """Trains in float up to a moment, then quantized, and later with the codes frozen.

    Effects: sets the variable `quantization_strength` of all layers to 0 before the trigger and
    to 1 from it on, and writes it to `logs["quantization_strength"]`. From `freeze_epoch` on the
    codes of the weights stay what they are, bit for bit: `kernel` and a learned scale
    become untrainable (the codes are their ratio rounded, so one cannot move without the
    other; a computed scale follows the kernel anyway) and the training step is compiled again,
    once. Biases, norms and all other weights train on, and the optimizer keeps its state. What is
    frozen stays so after `fit`; to thaw it set `layer.kernel.trainable = True` and compile.

    Epochs and steps decide alone, so resumed training goes on where it was. With `monitor` the
    saved strength tells whether the trigger was reached, unless training starts at epoch 0.

    Args:
        epoch: First quantized epoch (the first of all is 0).
        step: First quantized step of the optimizer, in place of `epoch`.
        monitor: Name of a value in the logs, in place of `epoch`: the next epoch is quantized
            once it has reached `threshold` at the end of one.
        threshold: The value that `monitor` has to reach.
        mode: `"min"`: reached from above. `"max"`: from below. `"auto"`: `"max"` where the
            name holds "acc" or "auc", else `"min"`.
        freeze_epoch: First epoch with frozen codes, `None` for never. Freezing waits until
            training is quantized.

    Raises:
        ValueError: Not exactly one of `epoch`, `step` and `monitor` is given, an argument is
            out of range, or, when training begins, the model has no quantized layer or
            freezing meets an optimizer with `use_ema=True`.

    Source:
        Nielsen et al. 2024, "Continual Quantization-Aware Pre-Training"
        (https://arxiv.org/abs/2502.11895): 16 bits first, then 1.58. Freezing is ours.
    """

    update_freq = math.inf

    def __init__(
        self,
        epoch=None,
        step=None,
        monitor=None,
        threshold=None,
        mode="auto",
        freeze_epoch=None,
    ):
        super().__init__()
        if sum(trigger is not None for trigger in (epoch, step, monitor)) != 1:
            raise ValueError(
                "Exactly one of `epoch`, `step` and `monitor` must be given. "
                f"Received: epoch={epoch}, step={step}, monitor={monitor!r}"
            )
        for name, value in (("epoch", epoch), ("step", step), ("freeze_epoch", freeze_epoch)):
            if value is not None:
                check_count(name, value, least=0)
        if (monitor is None) != (threshold is None):
            raise ValueError(
                "`monitor` and `threshold` go together. "
                f"Received: monitor={monitor!r}, threshold={threshold}"
            )
        check_choice("mode", mode, MODES)
        if epoch is not None and freeze_epoch is not None and freeze_epoch < epoch:
            raise ValueError(
                "`freeze_epoch` must not be less than `epoch`. "
                f"Received: epoch={epoch}, freeze_epoch={freeze_epoch}"
            )
        if mode == "auto" and monitor is not None:
            mode = "max" if "acc" in monitor or "auc" in monitor else "min"
        self.epoch = epoch
        self.step = step
        self.monitor = monitor
        self.threshold = threshold
        self.mode = mode
        self.freeze_epoch = freeze_epoch
        self.milestones = () if step is None else (step,)
        self.layers = []
        self.quantized = self.frozen = False

    def on_train_begin(self, logs=None):
        """Finds the layers."""
        self.layers = list(find_bit_layers(self.model))
        self.frozen = False
        optimizer = inner_optimizer(self.model.optimizer)
        if self.freeze_epoch is not None and getattr(optimizer, "use_ema", False):
            raise ValueError(
                "`freeze_epoch` cannot be combined with an optimizer that replaces the weights by "
                f"their moving average. Received: {type(optimizer).__name__}(use_ema=True)"
            )

    def on_epoch_begin(self, epoch, logs=None):
        """Sets the mode of the epoch."""
        super().on_epoch_begin(epoch, logs)
        if self.epoch is not None:
            self._set(epoch >= self.epoch)
        elif self.step is not None:
            self._set(self._first_step >= self.step)
        else:
            self._set(epoch > 0 and self._is_quantized())
        if self._freezes_at(epoch):
            # A computed scale is no variable; a layer with LoRA has frozen both before.
            variables = [
                v for layer in self.layers for v in (layer.kernel, layer.kernel_log2_scale)
            ]
            freeze_variables(self.model, [v for v in variables if v is not None])
            self.frozen = True

    def _freezes_at(self, epoch):
        if self.freeze_epoch is None or self.frozen:
            return False
        return self.quantized and epoch >= self.freeze_epoch

    def update(self, step):
        """Sets the mode of the step."""
        if self.step is not None and not self.quantized and step >= self.step:
            self._set(True)

    def on_epoch_end(self, epoch, logs=None):
        """Writes the strength to the logs and looks at the monitored value."""
        logs = {} if logs is None else logs
        logs["quantization_strength"] = float(self.quantized)
        if self.monitor is None or self.quantized:
            return
        value = logs.get(self.monitor)
        if value is None:
            warnings.warn(
                f"`QATModeSwitch` waits for '{self.monitor}', which is not in the logs of epoch "
                f"{epoch}. Available: {sorted(logs)}",
                stacklevel=2,
            )
        elif value >= self.threshold if self.mode == "max" else value <= self.threshold:
            self._set(True)

    def _is_quantized(self):
        strengths = [layer.quantization_strength for layer in self.layers]
        return all(float(ops.convert_to_numpy(strength)) >= 1 for strength in strengths)

    def _set(self, quantized):
        for layer in self.layers:
            layer.quantization_strength.assign(float(quantized))
        self.quantized = bool(quantized)
