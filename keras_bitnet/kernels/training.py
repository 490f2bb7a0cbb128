"""Which kernel fake-quantizes in training, and why: tables as in `select`, of another operation.

The rows are asked by `fake_quantize` of the quantizers. `reference` is what the quantizers compute
in plain `keras.ops`; the others give the same bits.
"""

import dataclasses
from typing import Any

import keras

from keras_bitnet.kernels import select


@dataclasses.dataclass(frozen=True)
class FakeQuantization:
    """The static facts of one fake quantization.

    Attributes:
        weight: Whether it is of a weight, else of activations.
        formula: `"absmax"` of activations; `"nearest"` or `"sign"` of a weight; another name for a
            quantizer of the user's.
        scale: `"token"`, `"tensor"` or `"static"` of activations; how that of a weight is found.
        gradient: `"identity"` or `"clipped"`.
        dtype: Dtype of the activations, or of the result for a weight.
        device: Where they are, or `None` when not known.
    """

    weight: bool
    formula: str
    scale: str
    gradient: str
    dtype: str
    device: str | None


def of_activations(quantizer, x):
    """The facts of `quantizer.fake_quantize(x)`."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    facts = (quantizer.formula, quantizer.granularity, "identity", dtype)
    return FakeQuantization(False, *facts, select.device_of(x))


def of_weight(quantizer, weight, dtype):
    """The facts of `quantizer.fake_quantize(weight, dtype=dtype)`."""
    facts = (quantizer.formula, quantizer.scale, quantizer.gradient, dtype)
    return FakeQuantization(True, *facts, select.device_of(weight))


def _torch_cuda():
    from keras_bitnet.kernels.cuda import torch_training

    return torch_training.CUDA


def _reference(quantizer, *arguments) -> Any:
    return quantizer.reference_fake_quantize(*arguments)


REFERENCE = select.Kernel("reference", lambda problem: None, _reference)

# Elsewhere the compiler fuses the reference into what is around it.
TABLES: dict[str, tuple[select.Kernel, ...]] = {
    "torch": (select.later("cuda", _torch_cuda), REFERENCE),
}


def choose(problem):
    """The first row that does not refuse, or the forced one, where this table has its name.

    Raises:
        ValueError: The forced kernel cannot run the problem.
    """
    return select.first_or_forced(TABLES.get(keras.backend.backend(), (REFERENCE,)), problem)
