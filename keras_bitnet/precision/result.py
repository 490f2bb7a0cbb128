"""What a search for a plan measured and found: table, JSON and Pareto plot."""

import dataclasses
import math

from keras_bitnet.files import replacing
from keras_bitnet.precision.budget import format_cost
from keras_bitnet.report import svg
from keras_bitnet.report.content import Content


@dataclasses.dataclass
class Choice:
    """One layer and the precisions it can have.

    Attributes:
        path: The layer.
        weights: Numbers in its kernel.
        labels: The precisions: `"W1.58A8"`, `"float32"`.
        errors: What each precision does to the outputs or the loss of the model.
        costs: What each costs, in the unit of the budget.
        sqnr: Of the outputs of the model, in dB, with only this layer quantized; infinite
            without noise.
        loss_changes: Growth of the loss then; `None` without targets.
        refused: Why the fast kernels refuse a precision, by label.
        chosen: The label of the one that was chosen.
    """

    path: str
    weights: int
    labels: list[str]
    errors: list[float] = dataclasses.field(default_factory=list)
    costs: list[float] = dataclasses.field(default_factory=list)
    sqnr: list[float] = dataclasses.field(default_factory=list)
    loss_changes: list[float | None] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    chosen: str = ""

    def add(self, error, sqnr, loss_change):
        """Appends what the next precision does."""
        self.errors.append(error)
        self.sqnr.append(sqnr)
        self.loss_changes.append(loss_change)


@dataclasses.dataclass
class Point:
    """One plan of the Pareto curve: its cost, its sum of errors, the label for every layer."""

    cost: float
    error: float
    labels: list[str]


@dataclasses.dataclass
class PrecisionSearch(Content):
    """What `suggest_precision` measured and found.

    Attributes:
        objective: `"output"` or `"loss"`, what the errors are.
        kind: `"bytes"`, `"bits"` or `"seconds"`, what the costs are.
        limit: The budget.
        cost: Of the plan.
        error: Sum of the errors of its layers.
        smallest, largest: Costs of the cheapest and the dearest plan.
        choices: A `Choice` for each layer.
        curve: The best plans at other budgets, a list of `Point` by rising cost.
        measured: Of the plan as a whole: `output_error`, `output_sqnr` in dB, and with targets
            `loss` and `loss_float`.
    """

    objective: str
    kind: str
    limit: float
    cost: float
    error: float
    smallest: float
    largest: float
    choices: list[Choice]
    curve: list[Point]
    measured: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_svg(self):
        """The Pareto curve as a self-contained SVG picture, a text."""
        return svg.standalone(self.chart())

    def plot(self, path, overwrite=True):
        """Writes the Pareto curve to an SVG file.

        Args:
            path: Path of the file.
            overwrite: Whether a file that is there may be replaced.

        Raises:
            FileExistsError: There is one and it may not.
        """
        with replacing(path, overwrite) as temporary:
            temporary.write_text(self.to_svg(), encoding="utf-8")

    def chart(self):
        """The Pareto curve as a chart of a page, see `report.svg`."""
        factor, unit = self._axis()
        curve = [(point.cost, point.error) for point in self.curve]
        own = (self.cost, self.error)
        if not any(math.isclose(cost, self.cost) for cost, _ in curve):
            curve = sorted([*curve, own])
        points = [(cost / factor, error) for cost, error in curve]
        titles = [f"{format_cost(cost, self.kind)}: error {error:.3g}" for cost, error in curve]
        errors = {"loss": "growth of the loss, summed", "output": "error of the outputs, summed"}
        return svg.line_chart(
            points,
            titles,
            xlabel=unit,
            ylabel=errors[self.objective],
            marked=next(i for i, (cost, _) in enumerate(curve) if math.isclose(cost, self.cost)),
            limit=self.limit / factor if self.limit <= 1.5 * self.largest else None,
            log_y=True,
        )

    def _axis(self):
        if self.kind == "bits":
            return 1.0, "average bits of a weight"
        if self.kind == "bytes":
            factor, unit = (1e6, "MB") if self.largest >= 1e6 else (1e3, "kB")
            return factor, f"{unit} in memory, packed"
        factor, unit = (1e-3, "ms") if self.largest >= 1e-3 else (1e-6, "µs")
        return factor, f"latency of the layers, {unit}"

    def tables(self):
        """One: the layers, their errors at each precision, and the choice."""
        labels = list(dict.fromkeys(label for choice in self.choices for label in choice.labels))
        lines = []
        for choice in self.choices:
            errors = dict(zip(choice.labels, choice.errors, strict=True))
            cells = [_error(choice, label, errors) for label in labels]
            cost = choice.costs[choice.labels.index(choice.chosen)]
            lines.append(
                [choice.path, choice.chosen, f"{choice.weights:,}", *cells,
                 format_cost(cost, self.kind)]
            )  # fmt: skip
        name = {"loss": "growth of the loss", "output": "relative error of the outputs"}
        title = f"Precision of each layer; {name[self.objective]} when only it is quantized"
        headers = ["Layer", "Chosen", "Weights", *labels, "Cost"]
        footer = self._footer()
        return [{"headers": headers, "lines": lines, "title": title, "left": 2, "footer": footer}]

    def _footer(self):
        lines = [
            f"Cost: {format_cost(self.cost, self.kind)} of "
            f"{format_cost(self.limit, self.kind)} allowed; these precisions reach "
            f"{format_cost(self.smallest, self.kind)} to {format_cost(self.largest, self.kind)}"
        ]
        if self.measured:
            lines.append(
                f"All layers together: SQNR of the outputs {self.measured['output_sqnr']:.1f} dB"
                + (
                    f", loss {self.measured['loss']:.4g} (float {self.measured['loss_float']:.4g})"
                    if "loss" in self.measured
                    else ""
                )
            )
        reasons = {
            f"{label} of {choice.path} was passed over: {reason}"
            for choice in self.choices
            for label, reason in choice.refused.items()
            if len(choice.refused) < len(choice.labels)
        }
        return lines + sorted(reasons)


def _error(choice, label, errors):
    if label not in errors:
        return "-"
    return f"{errors[label]:.3g}" + ("*" if label == choice.chosen else "")
