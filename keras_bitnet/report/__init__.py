"""Reports about a model: what it holds, weighs and computes, how fast, and how exactly."""

from keras_bitnet.report.latency import LatencyReport, benchmark_layers
from keras_bitnet.report.quantization import QuantizationReport, quantization_report
from keras_bitnet.report.summary import ModelSummary, Row, Totals, summary

__all__ = [
    "LatencyReport",
    "ModelSummary",
    "QuantizationReport",
    "Row",
    "Totals",
    "benchmark_layers",
    "quantization_report",
    "summary",
]
