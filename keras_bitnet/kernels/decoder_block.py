"""New tokens of each sequence through a block of a decoder: one operator of a library of kernels.

Of the fifteen operators of a block those between the products compute one token for microseconds,
and to call one takes a framework longer, as the weights of the token before have left nothing of it
in the caches. Of a prompt frameworks need as long for what is between the products as these take.
The rows take the place of the layers, see `keras_bitnet.layers.decode_at_once`.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_bitnet.kernels import attention, cpu, cuda, native, select
from keras_bitnet.kernels.norm import rms_norm
from keras_bitnet.ops.bit_matmul import bit_matmul, joint_bit_matmul

WEIGHTS = ("query", "key", "value", "output", "up", "down", "gate")
GAINS = ("query", "output", "up", "down")  # of the norms before these


class Facts(NamedTuple):
    """The static side of a block, hashable: all but the tensors.

    Attributes:
        heads: Query heads.
        head_dim: Size of a head.
        activation: Function between the projections of the feed-forward block.
        activation_number: Its `kbn_activation` of `native/src/bitnet.h`.
        norm_epsilon: Added to the mean in every norm.
        weights: `cpu.Facts` of each of `WEIGHTS`, without the gate where there is none.
    """

    heads: int
    head_dim: int
    activation: Callable
    activation_number: int
    norm_epsilon: float
    weights: tuple[cpu.Facts, ...]

    @property
    def attributes(self):
        """The numbers of the operator, by their names and in their order."""
        first = self.weights[0]
        quantized = cpu.Activations.of(first.quantizer)
        return {
            "heads": self.heads,
            "intermediate": self.weights[WEIGHTS.index("up")].out_features,
            "activation": self.activation_number,
            "bits": first.bits,
            "trits": int(first.layout == "trits"),
            "group_size": first.group_size or 0,
            "activation_bits": quantized.bits,
            "offset": float(first.offset),
            "epsilon": float(quantized.epsilon),
            "norm_epsilon": float(self.norm_epsilon),
            "scale": self.head_dim**-0.5,
        }


class Weights(NamedTuple):
    """The tensors of a block.

    Attributes:
        products: `(tiles, scale, bias or None)` of each of the weights.
        gains: `float32 (features,)` of the norm before each of `GAINS`, or `None`.
    """

    products: tuple[tuple[Any, Any, Any], ...]
    gains: tuple[Any, ...]


def choose(facts, x, cache):
    """What runs a block, or `None`: then its layers do.

    It computes what the native rows of the products and of the attention would, or those of CUDA,
    where all of them would run: what they refuse it refuses, and where another kernel is forced the
    layers take it.

    Args:
        facts: `Facts`.
        x: Tensor `(batch, tokens, features)`.
        cache: A cache of `keras_bitnet.layers.key_value_cache`.

    Returns:
        A function of the arguments of `reference`, or `None`.
    """
    alike = {(w.bits, w.offset, w.group_size, w.layout, w.quantizer) for w in facts.weights}
    granularity = getattr(facts.weights[0].quantizer, "granularity", "token")
    if None in x.shape[:2] or len(alike) > 1 or granularity != "token":
        return None
    backend = keras.backend.backend()
    products = select.TABLES.get(backend)
    if products is None:
        return None
    problems = [select.Problem.of_kind(x, weight, weight.quantizer) for weight in facts.weights]
    rows = [select.first_or_forced(products, problem, strict=False) for problem in problems]
    rows.append(attention.choose(cache, x, (facts.heads, facts.head_dim)))
    names = {chosen.name for chosen in rows}
    row = _ROWS.get((backend, *names))
    return None if row is None else row().find()


def may_run_all(x):
    """Whether there may be what `choose_all` gives, for activations where these are."""
    row = _ROWS.get((keras.backend.backend(), cuda.NAME))
    on_cpu = str(select.device_of(x)).startswith("cpu")
    return row is not None and not on_cpu and hasattr(row(), "run_all")


def choose_all(facts, x, caches):
    """As `choose`, of what runs blocks of the same facts one after another, or `None`.

    Returns:
        A function `run_all(facts, x, weights, caches, index, mask, rotary)` of the `Weights` and
        the cache of each, which writes into the caches and returns `y` alone; or `None`.
    """
    run = choose(facts, x, caches[0])
    row = _ROWS.get((keras.backend.backend(), cuda.NAME))
    return row().run_all if row is not None and run is row().run else None


def operands(x, weights, index, mask, rotary, none):
    """The operands before the cache in the order of the native library.

    Args:
        x, weights, index, mask, rotary: As `reference` takes them.
        none: `none(dtype)`, an array without elements that stands for a missing operand.

    Returns:
        A list of tensors.
    """
    products = [
        none(dtype) if tensor is None else tensor
        for product in (*weights.products, (None,) * 3)[: len(WEIGHTS)]
        for tensor, dtype in zip(product, ("uint8", "float32", "float32"), strict=True)
    ]
    gains = [none("float32") if gain is None else gain for gain in weights.gains]
    rotary = (none("float32"),) * 2 if rotary is None else rotary
    return [x, *products, *gains, *rotary, none("bool") if mask is None else mask, index]


class Chain:
    """Blocks that the operator of a first one runs after it: those of a whole decoder are one call.

    Their operands have the shapes and dtypes of those of the first. The native library keeps the
    addresses, and this object the tensors: when it goes, the library forgets the chain.

    Attributes:
        number: `int32 (1,)`, the operand that names the chain.
    """

    def __init__(self, number, tensors):
        self.number, self._tensors = ops.convert_to_tensor([number], "int32"), tensors
        weakref.finalize(self, native.library().kbn_chain_drop, number)

    @staticmethod
    def possible():
        """Whether the operator of the backend takes a chain."""
        row = _ROWS.get((keras.backend.backend(), cpu.NAME))
        return native.library() is not None and row is not None and hasattr(row(), "in_memory")

    @classmethod
    def of(cls, weights, caches):
        """The chain of some blocks after the first, or `None` where there cannot be one.

        Args:
            weights: `Weights` of every block, the first too.
            caches: Their caches: the operator writes into the very memory of these.
        """
        in_memory = _ROWS[keras.backend.backend(), cpu.NAME]().in_memory
        rows = [_own_operands(*both) for both in zip(weights, caches, strict=True)]
        rows = [[None if t is None else in_memory(t) for t in row] for row in rows]
        kinds = [[t and (t[0].shape, t[0].dtype) for t in row] for row in rows]
        if any(kind != kinds[0] for kind in kinds):
            return None
        addresses = np.array(
            [[0 if t is None else t[1] for t in row] for row in rows[1:]], dtype=np.uintp
        )
        number = native.library().kbn_chain_keep(addresses.ctypes.data, len(addresses))
        return cls(number, rows) if number else None


def _own_operands(weights, cache):
    """The operands of one block in the order of the native library, `None` for what all share."""
    given = operands(None, weights, None, None, None, lambda dtype: None)
    return [*given, *map(cache.get, attention.CACHE)]


def reference(facts, x, weights, cache, index, mask, rotary):
    """What the operator means, by those that it takes the place of.

        a = x + output(attend(query(n), key(n), value(n))),   n = norm(x)
        y = a + down(activation(gate(m)) * up(m)),            m = norm(a)

    Args:
        facts: `Facts`.
        x: Tensor `(batch, tokens, features)`.
        weights: `Weights`.
        cache: A cache, not to be used again after.
        index: Where the first new token goes: an integer scalar tensor.
        mask, rotary: See `attend_next` of `keras_bitnet.layers.key_value_cache`.

    Returns:
        `(y, cache)`: a tensor of the shape and dtype of `x`, and the cache with the tokens.
    """
    from keras_bitnet.layers.key_value_cache import attend_next

    quantizer, sizes = facts.weights[0].quantizer, tuple(x.shape[:2])
    parts = zip(facts.weights, weights.products, strict=True)
    packed = [own.packed(tiles, scale) for own, (tiles, scale, _) in parts]
    biases = [bias for *_, bias in weights.products]
    gains = dict(zip(GAINS, weights.gains, strict=True))

    def joint(x, names):
        x = rms_norm(x, gains[names[0]], facts.norm_epsilon)
        places = [WEIGHTS.index(name) for name in names]
        chosen = [packed[i] for i in places], quantizer, [biases[i] for i in places]
        return joint_bit_matmul(x, *chosen)

    def product(x, name):
        place, gain = WEIGHTS.index(name), gains[name]
        norm = None if gain is None else (gain, facts.norm_epsilon)
        return bit_matmul(x, packed[place], quantizer, biases[place], norm=norm)

    query, key, value = (
        ops.reshape(y, (*sizes, -1, facts.head_dim)) for y in joint(x, ("query", "key", "value"))
    )
    scale = facts.head_dim**-0.5
    y, cache = attend_next(cache, query, key, value, index, scale, mask, rotary)
    x = x + product(ops.reshape(y, (*sizes, facts.heads * facts.head_dim)), "output")
    up, *gate = joint(x, ("up", "gate") if len(packed) == len(WEIGHTS) else ("up",))
    inner = facts.activation(gate[0]) * up if gate else facts.activation(up)
    return x + product(inner, "down"), cache


def _jax():
    from keras_bitnet.kernels import jax_decoder_block

    return jax_decoder_block


def _torch():
    from keras_bitnet.kernels import torch_decoder_block

    return torch_decoder_block


def _tensorflow():
    from keras_bitnet.kernels import tensorflow_decoder_block

    return tensorflow_decoder_block


def _jax_cuda():
    from keras_bitnet.kernels.cuda import jax_decoder

    return jax_decoder


def _torch_cuda():
    from keras_bitnet.kernels.cuda import torch_decoder

    return torch_decoder


# By backend and the name of the rows whose place they take.
_ROWS = {
    ("jax", cpu.NAME): _jax,
    ("torch", cpu.NAME): _torch,
    ("tensorflow", cpu.NAME): _tensorflow,
    ("jax", cuda.NAME): _jax_cuda,
    ("torch", cuda.NAME): _torch_cuda,
}
