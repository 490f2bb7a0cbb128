"""Generation of text: prompts in, tokens out, one compiled program a token, or a few of them."""

import collections
import functools
import itertools
import operator

import keras
import numpy as np
from keras import ops

from keras_bitnet.checks import check_count
from keras_bitnet.models import beam, compiled
from keras_bitnet.models.sampling import Sampler

STEPS = 4  # of a call of `several_tokens`


class Generation(keras.Model):
    """Mixin of a language model on a backbone with `call_with_cache` and `logits`."""

    tokenizer = None

    def generate(self, prompts, max_length=None, *, beams=1, strip_prompt=False, **options):
        """Continues prompts.

        Args:
            prompts: A string or a list of strings, which takes a tokenizer; or token ids: one
                list, a list of lists of any lengths, or an integer array `(batch, length)`.
            max_length: Tokens of the longest prompt and its continuation together.
            beams: 1 samples; more is a beam search for the most likely continuation.
            strip_prompt: Whether to return the continuation alone.
            **options: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `seed`, `stop_tokens`,
                `cache_dtype`: see `stream`. A beam search takes no sampling options.

        Returns:
            As the prompts: strings, or lists of token ids; one or a list. A continuation ends
            with its stop token.

        Raises:
            ValueError: A prompt is empty, holds what is no token of the vocabulary, or is too long.
        """
        request = Request(self, prompts, max_length, **options)
        rows = self._sample(request) if beams == 1 else beam.search(self, request, beams)
        if not strip_prompt:
            rows = [[*prompt, *row] for prompt, row in zip(request.prompts, rows, strict=True)]
        return request.restore(rows)

    def stream(self, prompts, max_length=None, **options):
        """As `generate`, but yields while it goes.

        Args:
            prompts: See `generate`.
            max_length: See `generate`.
            max_new_tokens: Tokens to add, in place of `max_length`.
            temperature, top_k, top_p: See `keras_bitnet.models.Sampler`; greedy by default.
            seed: Integer; the same seed gives the same tokens. `None` takes a new one.
            stop_tokens: Token id or a list of them that end a sequence; by default those of
                the tokenizer, if there is one that names them.
            cache_dtype: Dtype of the cache: a float dtype or `"int8"`, the compute dtype by
                default.

        Yields:
            For one prompt the next token id; with text the new piece of text. For several a
            list of them, `None` for sequences that have ended. Where a text ends within a
            character of several tokens, one more piece ends it with U+FFFD.
        """
        request = Request(self, prompts, max_length, **options)
        pieces = [_Text(request.tokenizer) for _ in request.prompts]
        for tokens in self._tokens(request):
            row = [
                t if t is None or not request.is_text else piece.add(t)
                for t, piece in zip(tokens, pieces, strict=True)
            ]
            yield row[0] if request.is_single else row
        rest = [piece.rest() for piece in pieces] if request.is_text else []
        if any(rest):
            yield rest[0] if request.is_single else rest

    def _sample(self, request):
        rows: list[list[int]] = [[] for _ in request.prompts]
        for tokens in self._tokens(request):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return rows

    def _tokens(self, request):
        """Yields a list of one token for each sequence, `None` for those that have ended."""
        active = [True] * len(request.prompts)
        for row in itertools.islice(self._rows(request), request.new_tokens):
            yield [t if on else None for t, on in zip(row, active, strict=True)]
            active = [
                on and t not in request.stop_tokens for t, on in zip(row, active, strict=True)
            ]
            if not any(active):
                return

    def _rows(self, request):
        """Yields a list of the tokens of each place; where that saves time, a call ahead.

        The first are not kept back: to start a call can take the host as long as a short prompt.
        """
        padding, uniform = compiled.to_tensors(request.padding, request.uniform())
        following = next_tokens if request.steps == 1 else several_tokens
        prefill, step = self.programs(first_tokens, following, request.sampler)
        cache = self.backbone.make_cache(
            len(request.prompts), request.cache_length, request.cache_dtype
        )
        ahead = compiled.is_asynchronous(padding)
        chain = None if ahead else step.evaluate(self.backbone.chain_of_blocks, cache)
        given = (padding, uniform) if chain is None else (padding, uniform, chain.number)
        _, state = prefill({"cache": cache}, request.tokens, *given)

        def rows(copy):
            return np.reshape(copy(), (-1, len(request.prompts))).tolist()

        yield from rows(compiled.start_copy(state["tokens"]))
        copies: collections.deque = collections.deque()
        for _ in range(request.calls):
            chosen, state = step(state, *given)
            copies.append(compiled.start_copy(state["tokens"] if request.steps == 1 else chosen))
            if len(copies) > ahead:
                yield from rows(copies.popleft())
        for copy in copies:
            yield from rows(copy)

    def programs(self, first, following, *arguments):
        """Functions `(model, *arguments, state, *tensors)` of prompts and of each token after them.

        They are compiled, once for each, and read the weights of now.
        """
        programs = self.__dict__.setdefault("_programs", _Programs()).made
        weights = compiled.read_weights(self)
        for function in (first, following):
            key = (function, *arguments)
            if key not in programs:
                programs[key] = compiled.compile_function(
                    functools.partial(function, self, *arguments), self, function is following
                )
            programs[key].begin(weights)
        return [programs[function, *arguments] for function in (first, following)]


class _Programs:
    """What Keras does not track."""

    def __init__(self):
        self.made = {}


def first_tokens(model, sampler, state, tokens, padding, uniform, chain=None):
    """Reads the prompts, padded on the left, and chooses the first tokens.

    Args:
        model: The language model.
        sampler: A `Sampler`.
        state: `{"cache"}`, empty.
        tokens: Integers `(batch, length)`.
        padding: Integers `(batch,)`, how many tokens of a row are padding.
        uniform: Numbers in [0, 1), `(cache length, batch)`: each row chooses the tokens of its
            place in the sequence.
        chain: The number of what `chain_of_blocks` of the backbone gave, or `None`.

    Returns:
        `((), state)` with `{"cache", "tokens", "index"}`: the tokens `(batch,)` that were chosen,
        not yet in the cache, and their place, a scalar. It all stays on the device.
    """
    x, cache = model.backbone.call_with_cache(tokens, state["cache"], 0, padding, chain)
    index = ops.convert_to_tensor(tokens.shape[1], "int32")
    return _chosen(model, sampler, x[:, -1], cache, index, uniform)


def next_tokens(model, sampler, state, padding, uniform, chain=None):
    """Reads one token for each sequence and chooses the next; see `first_tokens`."""
    tokens, index = state["tokens"][:, None], state["index"]
    x, cache = model.backbone.call_with_cache(tokens, state["cache"], index, padding, chain)
    return _chosen(model, sampler, x[:, 0], cache, index + 1, uniform)


def several_tokens(model, sampler, state, padding, uniform):
    """As `next_tokens`, `STEPS` times. Returns `(tokens, state)`, tokens `(STEPS, batch)`."""

    def turn(state, _):
        _, state = next_tokens(model, sampler, state, padding, uniform)
        return state, state["tokens"]

    state, tokens = ops.scan(turn, state, length=STEPS)
    return tokens, state


def _chosen(model, sampler, x, cache, index, uniform):
    tokens = sampler(model.backbone.logits(x), ops.take(uniform, index, axis=0))
    return (), {"cache": cache, "tokens": tokens, "index": index}


class Request:
    """What is asked of `generate`, checked: padded tokens, lengths, stop tokens, sampler.

    Args:
        model: The language model.
        prompts, max_length: See `Generation.generate`.
        max_new_tokens, temperature, top_k, top_p, seed, stop_tokens, cache_dtype: See
            `Generation.stream`.
    """

    def __init__(
        self,
        model,
        prompts,
        max_length=None,
        *,
        max_new_tokens=None,
        temperature=None,
        top_k=None,
        top_p=None,
        seed=None,
        stop_tokens=None,
        cache_dtype=None,
    ):
        self.tokenizer = model.tokenizer
        self.prompts = self._read(prompts, model.backbone.vocabulary_size)
        if temperature is None:
            temperature = 0.0 if top_k is None and top_p is None else 1.0
        self.sampler = Sampler(temperature, top_k, top_p)
        if isinstance(seed, int):
            check_count("seed", seed, least=0)
        self.seed = seed
        self.cache_dtype = cache_dtype
        self.stop_tokens = self._stop_tokens(stop_tokens)
        longest = max(len(prompt) for prompt in self.prompts)
        limit = model.backbone.max_sequence_length
        self.new_tokens = _new_tokens(longest, max_length, max_new_tokens, limit)
        start = longest if _takes_any_length() else _padded_length(longest)
        self.steps = _steps()
        self.calls = -(-(self.new_tokens - 1) // self.steps)  # the prompt gives the first token
        length = start + 1 + self.calls * self.steps
        self.cache_length = -(-length // 64) * 64  # so programs are reused
        self.tokens = np.zeros((len(self.prompts), start), "int32")
        self.padding = np.array([start - len(prompt) for prompt in self.prompts], "int32")
        for row, prompt in zip(self.tokens, self.prompts, strict=True):
            row[start - len(prompt) :] = prompt

    def _read(self, prompts, vocabulary_size):
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.is_text = bool(texts) and all(isinstance(text, str) for text in texts)
        if self.is_text:
            self.is_single = isinstance(prompts, str)
            if self.tokenizer is None:
                raise ValueError(
                    "Prompts of text take a tokenizer: set `model.tokenizer` to an object with "
                    "`encode` and `decode`, or pass token ids. Received: a string"
                )
            rows = [_ids(self.tokenizer.encode(text)) for text in texts]
        else:
            self.is_single = bool(texts) and all(np.ndim(text) == 0 for text in texts)
            rows = [_integers(row) for row in ([texts] if self.is_single else texts)]
        if not rows:
            raise ValueError(f"There must be at least one prompt. Received: {prompts!r}")
        if not all(rows):
            raise ValueError("Every prompt must hold at least one token. Received: an empty one")
        for row in rows:
            if not 0 <= min(row) <= max(row) < vocabulary_size:
                raise ValueError(
                    f"Tokens must lie in [0, {vocabulary_size}). "
                    f"Received: tokens from {min(row)} to {max(row)}"
                )
        return rows

    def _stop_tokens(self, stop_tokens):
        if stop_tokens is None:
            stop_tokens = getattr(self.tokenizer, "stop_tokens", None)
        if stop_tokens is None:
            return frozenset()
        ids = [stop_tokens] if np.ndim(stop_tokens) == 0 else list(stop_tokens)
        if not all(isinstance(i, (int, np.integer)) for i in ids):
            raise ValueError(
                f"`stop_tokens` must be a token id or a list of them. Received: {stop_tokens!r}"
            )
        return frozenset(ids)

    def uniform(self):
        """The numbers that choose the token of each place, `(cache_length, batch)`."""
        random, start = np.random.default_rng(self.seed), self.tokens.shape[1]
        numbers = np.zeros((self.cache_length, len(self.prompts)), "float32")
        numbers[start : start + self.new_tokens] = random.random(
            (self.new_tokens, len(self.prompts)), "float32"
        )
        return numbers

    def restore(self, rows):
        """Token ids in the form of the prompts."""
        if self.is_text:
            rows = [self.tokenizer.decode(row) for row in rows]
        return rows[0] if self.is_single else rows


class _Text:
    """Text of tokens one by one; a character of several tokens comes with its last."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def add(self, token):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd"):
            return ""
        piece, self.shown = text[self.shown :], len(text)
        return piece

    def rest(self):
        """What `add` kept back, `None` if nothing."""
        return self.tokenizer.decode(self.ids)[self.shown :] or None


def _ids(encoded):
    return [int(t) for t in getattr(encoded, "ids", encoded)]


def _integers(row):
    try:
        return [operator.index(t) for t in row]
    except TypeError as error:
        raise ValueError(
            f"Prompts must be strings, or lists of integer token ids. Received: {row!r}"
        ) from error


def _new_tokens(longest, max_length, max_new_tokens, limit):
    if (max_length is None) == (max_new_tokens is None):
        raise ValueError(
            "Give one of `max_length` and `max_new_tokens`. "
            f"Received: max_length={max_length}, max_new_tokens={max_new_tokens}"
        )
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if value is not None and not isinstance(value, np.integer):
            check_count(name, value)
    new = max_length - longest if max_new_tokens is None else max_new_tokens
    if new < 1 or longest + new > limit:
        raise ValueError(
            f"The longest prompt has {longest} tokens, and the model takes {limit}. Received: "
            f"max_length={max_length}, max_new_tokens={max_new_tokens}"
        )
    return new


def _steps():
    """Tokens of a call. JAX takes longer to start a program of so many arrays than a GPU to run it
    (decision 8), so it starts one for several tokens there.
    """
    return STEPS if compiled.BACKEND == "jax" and compiled.is_on_gpu(ops.zeros(1)) else 1


def _takes_any_length():
    """Whether padding costs more than a program for each length: in PyTorch on a processor."""
    return compiled.BACKEND == "torch" and not compiled.is_asynchronous(ops.zeros(1))


def _padded_length(length):
    """A power of two up to 64, then a multiple of 64: few programs for all lengths of prompts."""
    return 1 << (length - 1).bit_length() if length <= 64 else -(-length // 64) * 64
