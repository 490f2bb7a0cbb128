"""One compiled program per shape for functions of a model and a cache that is used up.

The program is traced once for the shapes of its arguments, all of which are tensors; weights
are read where they are, and the buffers of the cache are written in place.
"""

import functools
from typing import Any

import keras

BACKEND = keras.backend.backend()


def compile_function(function, model):
    """Returns `function` compiled for the present backend.

    Args:
        function: `function(cache, *tensors) -> (result, cache)`, in `keras.ops` and layers of
            `model`.
        model: The model whose weights it reads.

    Returns:
        A function of the same arguments. On PyTorch it is traced where the model computes on a
        CPU, where the overhead of Python would show, and eager on other devices.
    """
    return {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[BACKEND](function, model)


def is_asynchronous():
    """Whether a call returns before its result is there, so that the next can be queued."""
    return BACKEND == "jax"


def _jax(function, model):
    import jax

    @functools.partial(jax.jit, donate_argnums=1)
    def run(state, cache, arguments):
        with keras.StatelessScope(zip(model.variables, state, strict=True)):
            return function(cache, *arguments)

    state: Any = None

    def call(cache, *arguments):
        nonlocal state
        if state is None or any(a is not b.value for a, b in zip(*state, strict=True)):
            variables = model.variables
            state = ([v.value for v in variables], variables)
        return run(state[0], cache, arguments)

    return call


def _tensorflow(function, model):
    import tensorflow as tf

    run = tf.function(function, autograph=False)

    def call(cache, *arguments):
        return run(cache, *(tf.convert_to_tensor(a) for a in arguments))

    return call


def _torch(function, model):
    import torch

    traces: dict[Any, Any] = {}

    def call(cache, *arguments):
        tensors = [torch.as_tensor(a, device=cache[0]["key"].device) for a in arguments]
        with torch.inference_mode():
            if cache[0]["key"].device.type != "cpu":
                return function(cache, *tensors)
            flat = [buffer for layer in cache for buffer in layer.values()]
            key = tuple((tuple(t.shape), t.dtype) for t in (*tensors, flat[0]))
            key = (*key, len(model.variables))
            if key not in traces:
                traces[key] = _trace(function, model, cache, tensors)
            return traces[key](*tensors, *flat), cache

    return call


def _trace(function, model, cache, tensors):
    """A TorchScript program that writes the cache in place and gives the result alone."""
    import warnings

    import torch

    names, count = list(cache[0]), len(tensors)

    def flattened(*arguments):
        buffers = iter(arguments[count:])
        layers = [{name: next(buffers) for name in names} for _ in cache]
        return function(layers, *arguments[:count])[0]

    spare = [torch.zeros_like(buffer) for layer in cache for buffer in layer.values()]
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # a trace takes no others as its own
        parameter.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes are constants, and meant to be
            return torch.jit.trace(flattened, (*tensors, *spare), check_trace=False)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
