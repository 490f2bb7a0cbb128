"""Fair timing: compiled calls, synchronised on each backend, in turns."""

import statistics
import time

import keras

_SHORTEST = 1e-3  # seconds a sample lasts at least: the clock and the call weigh little then


def interleaved_times(functions, repeats=15, warmup=2):
    """Seconds of a call of each function, measured in turns, so that a busy machine hits all alike.

    Args:
        functions: Dictionary of functions without arguments that return when the work is done.
        repeats: Samples of each; a sample is the mean of as many calls as take a millisecond.
        warmup: Calls before that are not timed, the first of which compiles.

    Returns:
        A dictionary of lists of seconds.
    """
    for _ in range(max(warmup, 1)):
        for function in functions.values():
            function()
    calls = {name: max(1, round(_SHORTEST / _seconds(f, 1))) for name, f in functions.items()}
    times: dict = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(_seconds(function, calls[name]))
    return times


def _seconds(function, calls):
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def spread(values):
    """Median, fastest and interquartile range of seconds."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "min": min(values), "iqr": high - low}


def compiled_call(layer, x, **arguments):
    """A function that runs a layer on `x`, compiled where the backend does, and waits for it."""
    return _COMPILED[keras.backend.backend()](layer, keras.ops.convert_to_tensor(x), arguments)


def _jax(layer, x, arguments):
    import jax

    trainable = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]

    @jax.jit
    def call(trainable, others, x):
        return layer.stateless_call(trainable, others, x, **arguments)[0]

    return lambda: jax.block_until_ready(call(trainable, others, x))


def _torch(layer, x, arguments):
    import torch

    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(x.device.type)

    def call():
        with torch.no_grad():
            layer(x, **arguments)
        if wait is not None:
            wait()

    return call


def _tensorflow(layer, x, arguments):
    import tensorflow as tf

    function = tf.function(lambda x: layer(x, **arguments))

    def call():
        # A copy of one number waits for the kernel, also on a GPU.
        tf.reshape(function(x), [-1])[0].numpy()

    return call


_COMPILED = {"jax": _jax, "torch": _torch, "tensorflow": _tensorflow}
