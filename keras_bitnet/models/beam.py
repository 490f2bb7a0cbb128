"""Beam search: the continuation of highest probability that a few kept at each step can find."""

import numpy as np
from keras import ops


def search(model, request, beams):
    """Returns the best continuation of each prompt, a list of token ids.

    Continuations are compared by the mean logarithm of the probability of their tokens.

    Args:
        model: A language model that generates, see `Generation`.
        request: What is asked.
        beams: Continuations kept at each step, at least 2.

    Source:
        Wu et al. 2016, section 7 (https://arxiv.org/abs/1609.08144), length penalty 1.
    """
    _check(request, beams, model.backbone.vocabulary_size)
    batch, start = request.tokens.shape
    # Every beam starts from the prompt; the first step chooses among the first one's tokens.
    tokens = np.repeat(request.tokens, beams, axis=0)
    padding = np.repeat(request.padding, beams)
    scores = np.full((batch, beams), -np.inf, "float32")
    scores[:, 0] = 0
    ended = np.zeros((batch, beams), bool)
    rows: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(batch)]
    cache = model.backbone.make_cache(batch * beams, request.cache_length, request.cache_dtype)
    prefill, step = model.programs(_first, _next, beams)
    (scores, chosen, parents), cache = prefill(cache, tokens, padding, scores, ended)
    for i in range(request.new_tokens):
        scores, chosen, parents = (ops.convert_to_numpy(x) for x in (scores, chosen, parents))
        ended = np.take_along_axis(ended, parents, axis=1)
        rows = [
            [_extended(rows[b][p], chosen[b, w], ended[b, w]) for w, p in enumerate(parents[b])]
            for b in range(batch)
        ]
        ended = ended | np.isin(chosen, list(request.stop_tokens))
        if ended.all() or i + 1 == request.new_tokens:
            break
        index = np.int32(start + i)
        (scores, chosen, parents), cache = step(
            cache, chosen, index, padding, scores, ended, parents
        )
    lengths = np.array([[len(row) for row in beams_of] for beams_of in rows])
    best = np.argmax(scores / lengths, axis=1)
    return [rows[b][w] for b, w in enumerate(best)]


def _extended(row, token, ended):
    return row if ended else [*row, int(token)]


def _first(model, beams, cache, tokens, padding, scores, ended):
    x, cache = model.backbone.call_with_cache(tokens, cache, 0, padding)
    return _best(model.backbone.logits(x[:, -1]), scores, ended), cache


def _next(model, beams, cache, tokens, index, padding, scores, ended, parents):
    offsets = ops.arange(parents.shape[0], dtype="int32")[:, None] * beams
    order = ops.reshape(ops.cast(parents, "int32") + offsets, (-1,))
    cache = [{n: _reordered(buffer, order) for n, buffer in layer.items()} for layer in cache]
    tokens = ops.reshape(tokens, (-1, 1))
    x, cache = model.backbone.call_with_cache(tokens, cache, index, padding)
    return _best(model.backbone.logits(x[:, 0]), scores, ended), cache


def _best(logits, scores, ended):
    """The highest sums of scores and log-probabilities, `(batch, beams)`, and whose they are."""
    batch, beams = scores.shape
    vocabulary = logits.shape[-1]
    gains = ops.log_softmax(ops.cast(logits, "float32"))
    gains = ops.reshape(gains, (batch, beams, vocabulary))
    # A beam that has ended goes on as itself, through one token that costs nothing.
    stay = ops.where(ops.arange(vocabulary) == 0, 0.0, -np.inf)
    gains = ops.where(ended[..., None], stay, gains)
    sums = ops.reshape(scores[..., None] + gains, (batch, beams * vocabulary))
    best, at = ops.top_k(sums, beams)
    at = ops.cast(at, "int32")
    return best, at % vocabulary, at // vocabulary


def _reordered(buffer, order):
    """The rows in another order, in the same memory where the cache is written in place."""
    rows = ops.take(buffer, order, axis=0)
    return buffer.copy_(rows) if hasattr(buffer, "copy_") else rows


def _check(request, beams, vocabulary_size):
    if not isinstance(beams, int) or not 1 < beams <= vocabulary_size:
        raise ValueError(
            f"`beams` must be an integer in [1, {vocabulary_size}]. Received: beams={beams!r}"
        )
    if request.sampler.temperature:
        raise ValueError(
            "A beam search takes no `temperature`, `top_k` or `top_p`. "
            f"Received: beams={beams}, {request.sampler}"
        )
