"""How the next token is chosen from the logits."""

import dataclasses
import math

import keras
from keras import ops

from keras_bitnet.checks import check_count, check_number
from keras_bitnet.ops.constants import constant_like

LOWEST = 1e-30  # a temperature below would make infinities of logits


def argmax(x):
    """The first place of the largest number of each row.

    The row is cut in parts, of which only the one with the largest number is looked through for its
    place: maxima alone are vectorized, and on a GPU each part has a block of threads. TensorFlow is
    faster at the one largest of all.

    Args:
        x: Tensor `(batch, size)`.

    Returns:
        Integer tensor `(batch,)`.
    """
    if keras.backend.backend() == "tensorflow":
        return ops.top_k(x, 1)[1][:, 0]
    parts = math.gcd(x.shape[-1], 256)
    if parts == 1:
        return ops.argmax(x, axis=-1)
    batch, size = x.shape[0], x.shape[-1] // parts
    x = ops.reshape(x, (batch * parts, size))
    part = ops.argmax(ops.reshape(ops.max(x, axis=-1), (batch, parts)), axis=-1)
    row = ops.take(x, part + ops.arange(batch, dtype=part.dtype) * parts, axis=0)
    return part * size + ops.argmax(row, axis=-1)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Greedy or random choice, from one uniform number a sequence.

    With a temperature of 0 the most likely token is taken. Else the probabilities
    `softmax(logits / temperature)`, of the `top_k` most likely tokens, of those the fewest that
    reach `top_p` together, are added up in the order of the vocabulary until they pass the
    uniform number. The numbers come from outside, so a seed gives the same tokens on every
    backend as far as the logits agree.

    Args:
        temperature: 0 is greedy; lower than 1 sharpens the distribution, higher flattens it.
        top_k: Tokens to choose from, or `None` for all.
        top_p: Probability in (0, 1] that the tokens to choose from reach, or `None` for all.

    Raises:
        ValueError: An argument is out of range.

    Source:
        Holtzman et al. 2019, nucleus sampling (https://arxiv.org/abs/1904.09751).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        check_number("temperature", self.temperature, "[0, inf]")
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None:
            check_number("top_p", self.top_p, "(0, 1]")

    def __call__(self, logits, uniform):
        """Chooses tokens.

        Args:
            logits: Float tensor `(batch, vocabulary)`.
            uniform: Float tensor `(batch,)` in [0, 1).

        Returns:
            `int32` tensor `(batch,)`.
        """
        logits = ops.cast(logits, "float32")
        if self.temperature == 0:
            return ops.cast(argmax(logits), "int32")
        probabilities = ops.softmax(logits / max(self.temperature, LOWEST))
        lowest = self._lowest(probabilities)
        if lowest is not None:
            kept = probabilities >= lowest
            probabilities = ops.where(kept, probabilities, ops.zeros_like(probabilities))
        below = ops.cumsum(probabilities, axis=-1)
        total, uniform = below[:, -1:], ops.convert_to_tensor(uniform)
        chosen = ops.sum(below <= uniform[:, None] * total, axis=-1)
        chosen = ops.cast(chosen, "int32")
        return ops.minimum(chosen, constant_like(chosen, logits.shape[-1] - 1))

    def _lowest(self, probabilities):
        """The least probability `(batch, 1)` that may be chosen, or `None`."""
        if self.top_k is None and self.top_p in (None, 1.0):
            return None
        size = min(self.top_k or probabilities.shape[-1], probabilities.shape[-1])
        best, _ = ops.top_k(probabilities, size)  # sorted, highest first
        if self.top_p is None:
            return best[:, -1:]
        before = ops.cumsum(best, axis=-1) - best
        kept = before < self.top_p * ops.sum(best, axis=-1, keepdims=True)
        return ops.min(ops.where(kept, best, ops.ones_like(best)), axis=-1, keepdims=True)
