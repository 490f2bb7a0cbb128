"""Finding a precision for every layer: measured sensitivities, a budget, a plan."""

from keras_bitnet.precision.budget import Budget
from keras_bitnet.precision.kernels import Fall, runnable_plan
from keras_bitnet.precision.result import Choice, Point, PrecisionSearch
from keras_bitnet.precision.search import suggest_precision
from keras_bitnet.transforms.precision_plan import PrecisionPlan

__all__ = [
    "Budget",
    "Choice",
    "Fall",
    "Point",
    "PrecisionPlan",
    "PrecisionSearch",
    "runnable_plan",
    "suggest_precision",
]
