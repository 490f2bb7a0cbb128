"""Callbacks for quantization-aware training."""

from keras_bitnet.callbacks.adaptive_precision import AdaptivePrecision
from keras_bitnet.callbacks.qat_mode_switch import QATModeSwitch
from keras_bitnet.callbacks.quantization_scheduler import QuantizationScheduler
from keras_bitnet.callbacks.quantization_stats import QuantizationStats
from keras_bitnet.callbacks.statistics import activation_statistics, layer_statistics
from keras_bitnet.callbacks.two_stage_schedule import TwoStageSchedule

__all__ = [
    "AdaptivePrecision",
    "QATModeSwitch",
    "QuantizationScheduler",
    "QuantizationStats",
    "TwoStageSchedule",
    "activation_statistics",
    "layer_statistics",
]
