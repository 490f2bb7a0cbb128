"""One compiled program per shape for functions of a model and a cache that is used up.

The program is traced once for the shapes of its arguments, all of which are tensors. Weights are
read where they are, and the buffers of the cache are written in place. PyTorch traces what is
called over and over only, and replays it as one CUDA graph on such a device.
"""

import functools
import warnings
from typing import Any

import keras

BACKEND = keras.backend.backend()


def compile_function(function, model, repeated=False):
    """Returns `function` compiled for the present backend.

    Args:
        function: `function(cache, *tensors) -> (result, cache)`, in `keras.ops` and layers of
            `model`.
        model: The model whose weights it reads.
        repeated: Whether it is called often with the same shapes, so that on PyTorch recording
            it is worth its time; else it is eager there.

    Returns:
        A function of the same arguments. Call `begin` with it before a row of calls.
    """
    if BACKEND == "torch":
        return _torch(function, model, repeated)
    return {"jax": _jax, "tensorflow": _tensorflow}[BACKEND](function, model)


def begin(program):
    """Prepares a compiled function for a row of calls."""
    if isinstance(program, _TorchStep):
        program.begin()


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


def _torch(function, model, repeated):
    return _TorchStep(function, model) if repeated else _torch_eager(function)


def _torch_eager(function):
    import torch

    def call(cache, *arguments):
        device = cache[0]["key"].device
        with torch.inference_mode():
            return function(cache, *(torch.as_tensor(a, device=device) for a in arguments))

    return call


class _TorchStep:
    """A function recorded once for each shape of its arguments, then run without Python.

    The record takes the weights as arguments: tensors that share their memory, so it follows
    every assignment. A weight whose tensor was replaced is seen from the next `begin` on.
    """

    def __init__(self, function, model):
        self.function, self.model = function, model
        self.state: Any = None
        self.recorded: dict = {}

    def begin(self):
        self.state = [v.value.detach() for v in self.model.variables]

    def __call__(self, cache, *arguments):
        import torch

        device = cache[0]["key"].device
        leaves = [tensor for layer in cache for tensor in layer.values()]
        inputs = [torch.as_tensor(a, device=device) for a in arguments]
        key = tuple((tuple(t.shape), t.dtype, t.device) for t in (*leaves, *inputs))
        with torch.inference_mode():
            if key not in self.recorded:
                step = self._record([tuple(layer) for layer in cache], leaves, inputs)
                on_gpu = device.type == "cuda"
                self.recorded[key] = _CudaGraph(step, leaves, inputs) if on_gpu else step
            result, leaves = self.recorded[key](self.state, leaves, inputs)
        following = iter(leaves)
        return result, [{name: next(following) for name in layer} for layer in cache]

    def _record(self, names, leaves, inputs):
        import torch

        variables = self.model.variables

        def run(state, leaves, inputs):
            leaves = iter(leaves)
            cache = [{name: next(leaves) for name in layer} for layer in names]
            with keras.StatelessScope(zip(variables, state, strict=True)):
                result, cache = self.function(cache, *inputs)
            return result, [tensor for layer in cache for tensor in layer.values()]

        # Recording runs the function, which writes into the cache: into that of a copy.
        example = (self.state, [tensor.clone() for tensor in leaves], inputs)
        with warnings.catch_warnings():
            # Of values that become constants: shapes, which are those of every call.
            warnings.simplefilter("ignore")
            return torch.jit.trace(run, example, check_trace=False, strict=False)


class _CudaGraph:
    """A recorded step as a CUDA graph: one launch, on buffers of its own."""

    def __init__(self, step, leaves, inputs):
        import torch

        self.step = step
        self.leaves = [tensor.clone() for tensor in leaves]
        self.inputs = [tensor.clone() for tensor in inputs]
        self.state: Any = None
        self.graph: Any = None
        self.result: Any = None
        self.stream = torch.cuda.Stream()

    def _capture(self, state):
        import torch

        self.state = state
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(4):  # whatever is compiled or allocated at first use
                self.step(state, self.leaves, self.inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.result, self.written = self.step(state, self.leaves, self.inputs)

    def __call__(self, state, leaves, inputs):
        same = self.state is not None and all(
            a.data_ptr() == b.data_ptr() for a, b in zip(state, self.state, strict=True)
        )
        if state is not self.state and not same:
            self._capture(state)
        self.state = state
        for own, given in zip((*self.leaves, *self.inputs), (*leaves, *inputs), strict=True):
            if own is not given:
                own.copy_(given)
        self.graph.replay()
        return _cloned(self.result), self.leaves


def _cloned(result):
    """Copies: the next replay writes over the tensors of a graph."""
    return tuple(x.clone() for x in result) if isinstance(result, tuple) else result.clone()
