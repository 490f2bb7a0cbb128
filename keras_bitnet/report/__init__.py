"""Reports about a model: what it holds, weighs and computes, how fast, and how exactly."""

from keras_bitnet.report.latency import LatencyReport, benchmark_layers
from keras_bitnet.report.outliers import OutlierChannel, Outliers
from keras_bitnet.report.quality import LayerQuality
from keras_bitnet.report.quantization import QuantizationReport, quantization_report
from keras_bitnet.report.summary import ModelSummary, Row, Totals, summary

__all__ = [
    "LatencyReport",
    "LayerQuality",
    "ModelSummary",
    "OutlierChannel",
    "Outliers",
    "QuantizationReport",
    "Row",
    "Totals",
    "benchmark_layers",
    "quantization_report",
    "summary",
]
