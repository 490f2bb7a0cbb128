"""One compiled program per shape for functions of a model and a cache that is used up.

On JAX and TensorFlow the program is traced once for the shapes of its arguments, all of which
are tensors. Weights are read where they are, and the buffers of the cache are written in place.
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
        A function of the same arguments. On PyTorch it is eager, in inference mode.
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

    def call(cache, *arguments):
        device = cache[0]["key"].device
        with torch.inference_mode():
            return function(cache, *(torch.as_tensor(a, device=device) for a in arguments))

    return call
