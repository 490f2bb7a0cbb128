"""Reports about a model: what it holds, what it weighs, what it computes."""

from keras_bitnet.report.summary import ModelSummary, Row, Totals, summary

__all__ = ["ModelSummary", "Row", "Totals", "summary"]
