"""Which kernel runs a packed matmul, and why.

A table is a literal tuple of rows, best first. A row says why it refuses a problem, or None.
`reference` is last and never refuses: with every other row gone, every result stays correct.
"""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import keras

from keras_bitnet.checks import check_built
from keras_bitnet.ops.reference import reference_matmul

# Read once: in a small call the look-up would take longer than the product.
DEFAULT = os.environ.get("KERAS_BITNET_KERNEL") or "auto"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts of one packed matmul, known under tracing too.

    How many rows the activations have is none of them, since every kernel takes any.

    Attributes:
        in_features: Inner size.
        out_features: Outputs.
        bits: Storage bits of a weight.
        group_size: Inputs that share a scale, or `None`.
        dtype: Dtype of the activations.
        activation_bits: Bits of the quantized activations, or `None` for float.
        activation_granularity: `"token"`, `"tensor"`, `"static"` or `None`.
        activation_formula: `"absmax"`, another name for a quantizer of the user's, or `None`.
        device: Where the activations are ("cpu", "cuda:0", ...), or `None` when not known.
        layout: Layout of the packed codes, `"tiles"` or `"trits"`.
        static_shape: Whether the shape of the activations is known while tracing.
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int | None
    dtype: str
    activation_bits: int | None
    activation_granularity: str | None
    activation_formula: str | None
    device: str | None
    layout: str = "tiles"
    static_shape: bool = True

    @classmethod
    def of(cls, x, packed, activation_quantizer):
        """Reads the problem off the operands of `ops.bit_matmul`, and checks them."""
        return _problem(*_facts(x, packed, activation_quantizer))

    @classmethod
    def of_kind(cls, x, packed, activation_quantizer):
        """The problem of activations of the kind of `x`, which may have other features."""
        return _problem(*_fields(x, packed, activation_quantizer))


def _facts(x, packed, activation_quantizer, window=None):
    """What `_fields` gives for operands that fit each other."""
    taps = 1 if window is None else window.count
    if x.shape[-1] * taps != packed.in_features:
        raise ValueError(
            f"The last axis of `x` must be in_features={packed.in_features}"
            f"{f', divided by the {taps} taps of the window' if window else ''}. "
            f"Received: x.shape={tuple(x.shape)}"
        )
    return _fields(x, packed, activation_quantizer)


def _fields(x, packed, activation_quantizer):
    """The fields of a `Problem` in their order, dtype and device as the backend has them."""
    return (
        packed.in_features,
        packed.out_features,
        packed.bits,
        packed.group_size,
        x.dtype,
        getattr(activation_quantizer, "bits", None),
        getattr(activation_quantizer, "granularity", None),
        getattr(activation_quantizer, "formula", None),
        getattr(x, "device", None),
        packed.layout,
        all(isinstance(size, int) for size in x.shape),
    )


def _problem(*facts):
    problem = Problem(*facts)
    dtype = keras.backend.standardize_dtype(problem.dtype)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(f"`x` must be a float tensor. Received: dtype={dtype}")
    device = None if problem.device is None else str(problem.device)
    return dataclasses.replace(problem, dtype=dtype, device=device)


def device_of(x):
    """Where a tensor is ("cpu", "cuda:0", ...), or `None` where that is not known."""
    device = getattr(x, "device", None)
    return None if device is None else str(device)


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """One row of a table.

    Attributes:
        name: What `KERAS_BITNET_KERNEL` and `use_kernel` call it.
        refuse: `refuse(problem)` gives the reason why it cannot run it, or `None`.
        run: `run(x, packed, activation_quantizer, bias, activation_scale)`, as `ops.bit_matmul`;
            `None` where there is `load`.
        normalizes: `normalizes(activation_quantizer)`: whether `run` takes a `norm` too.
        gathers: `gathers()`: whether `run` takes a `window` too.
        run_joint: `run_joint(x, packed, activation_quantizer, biases)`, as `ops.joint_bit_matmul`
            for weights that are alike; `None` where it has nothing faster than one after another.
        load: `load()`: the row itself, where this one only refuses for a row of a module.
    """

    name: str
    refuse: Callable[[Problem], str | None]
    run: Any = None
    normalizes: Callable[..., bool] = lambda activation_quantizer: False
    gathers: Callable[[], bool] = lambda: False
    run_joint: Callable[..., Any] = lambda *operands: None
    load: Callable[[], Any] | None = None


# The modules of the rows import their framework, so each is imported with its first question.
# Plain imports: `torch.compile` traces through these and not through `importlib`.


def _jax():
    from keras_bitnet.kernels import jax

    return jax.NATIVE


def _torch():
    from keras_bitnet.kernels import torch

    return torch.NATIVE


def _metal():
    from keras_bitnet.kernels import metal

    return metal.METAL


def _jax_cuda():
    from keras_bitnet.kernels.cuda import jax

    return jax.CUDA


def _torch_cuda():
    from keras_bitnet.kernels.cuda import torch

    return torch.CUDA


def _tensorflow():
    from keras_bitnet.kernels import tensorflow

    return tensorflow.NATIVE


def later(name, load):
    """Stands for the row that `load()` gives; it is imported with its first question."""
    return Kernel(name, lambda problem: load().refuse(problem), load=load)


def _loaded(row):
    return row.load() if row.load else row


REFERENCE = Kernel("reference", refuse=lambda problem: None, run=reference_matmul)

TABLES: dict[str, tuple[Kernel, ...]] = {
    "jax": (later("cuda", _jax_cuda), later("native", _jax), REFERENCE),
    "torch": (
        later("cuda", _torch_cuda),
        later("metal", _metal),
        later("native", _torch),
        REFERENCE,
    ),
    "tensorflow": (later("native", _tensorflow), REFERENCE),
}


class _Scope(threading.local):  # `torch.compile` traces through this, not through a ContextVar
    forced: Any = None  # here, as a default of `getattr` takes half a microsecond


_scope = _Scope()


@contextlib.contextmanager
def use_kernel(name):
    """Forces one kernel inside a `with` block; it is read while tracing.

    `"reference"` is plain `keras.ops`, so what is exported inside the block runs in a process
    without this package:

    >>> with keras_bitnet.kernels.use_kernel("reference"):
    ...     model.export("model", format="tf_saved_model")

    A function that was traced before keeps its kernel: clone the model, or reset
    `model.predict_function`, before it is traced again.

    Args:
        name: `"auto"` or the name of a row, see `explain`; or a `Kernel` that is in no table.

    Raises:
        ValueError: No row of this backend has that name.
    """
    _named(name)
    outer = _scope.forced
    _scope.forced = name
    try:
        yield
    finally:
        _scope.forced = outer


def forced_name():
    """The name that is forced here, or `"auto"`."""
    return _scope.forced or DEFAULT


def choose(x, packed, activation_quantizer, window=None):
    """The first row that does not refuse the operands of `ops.bit_matmul`, or the forced one.

    Raises:
        ValueError: The forced kernel is unknown or cannot run the problem, or the operands do
            not fit each other.
    """
    facts = _facts(x, packed, activation_quantizer, window)
    return _search(forced_name(), _table(), facts)


def _find(name, table, facts):
    problem = _problem(*facts)
    forced = _named(name)
    if forced is None:
        row = next(row for row in table if row.refuse(problem) is None)
    else:
        row = _willing(forced, problem)
    return _loaded(row)


# To ask anew would take most of the time of a small eager call. A row of TensorFlow looks at what
# traces it, and `torch.compile` warns where it meets a cache.
_found = functools.lru_cache(maxsize=1024)(_find)

if keras.backend.backend() == "torch":
    from torch.compiler import is_compiling

    def _search(*question):
        return _find(*question) if is_compiling() else _found(*question)

elif keras.backend.backend() == "tensorflow":
    from tensorflow import executing_eagerly

    def _search(*question):
        return _found(*question) if executing_eagerly() else _find(*question)

else:
    _search = _found


def first_or_forced(table, problem, strict=True):
    """A row of the table of another operation: the first that does not refuse, or the forced one.

    Where the table has no row of the forced name, that is a kernel of the packed matmul alone, and
    the last row runs, the reference.

    Args:
        table: Rows, best first.
        problem: What they are asked about.
        strict: Whether a forced row that refuses is an error; else the reference runs.

    Raises:
        ValueError: The forced kernel cannot run the problem, and `strict`.
    """
    name = forced_name()
    if name == "auto":
        row = next(row for row in table if row.refuse(problem) is None)
    else:
        row = next((row for row in table if row.name == name), table[-1])
        if not strict and row.refuse(problem) is not None:
            row = table[-1]
        row = _willing(row, problem)
    return _loaded(row)


def _willing(row, problem):
    reason = row.refuse(problem)
    if reason is not None:
        raise ValueError(f"Kernel '{row.name}' was forced and cannot run {problem}: {reason}")
    return row


def explain(problem):
    """Says for each kernel of the present backend whether it would run, and if not, why.

    Args:
        problem: A `Problem`, or a packed layer (then for one row in its compute dtype on Keras's
            default device).

    Returns:
        A list of `(name, reason)`, best first; `reason` is `None` where the kernel can run.
        The first of those is the one that runs, unless another is forced.

    Raises:
        ValueError: It is neither, or the layer is not built.
    """
    if not isinstance(problem, Problem):
        layer = problem
        if not hasattr(type(layer), "packed_kernel"):
            raise ValueError(
                "Expected a packed layer of `keras_bitnet.layers`, such as one of `model.layers`, "
                f"or a `Problem`. Received: {type(layer).__name__}"
            )
        check_built(layer)
        x = keras.ops.zeros((1, layer.in_features), dtype=layer.compute_dtype)
        problem = Problem.of(x, layer.packed_kernel, layer.activation_quantizer)
    return [(row.name, row.refuse(problem)) for row in _table()]


def _table():
    return TABLES.get(keras.backend.backend(), (REFERENCE,))


def _named(name):
    if name == "auto":
        return None
    if isinstance(name, Kernel):
        return name
    for row in _table():
        if row.name == name:
            return row
    raise ValueError(
        f"Unknown kernel. Accepted: {['auto', *(row.name for row in _table())]} on the "
        f"'{keras.backend.backend()}' backend. Received: {name!r}"
    )
