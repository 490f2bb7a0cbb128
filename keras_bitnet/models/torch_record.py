"""Records of functions of PyTorch, replayed without their Python; on CUDA as one graph."""

import functools
import warnings
from typing import Any

import torch


def record(run, weights, leaves, inputs, repeated):
    """Records `run(weights, leaves, inputs)`, a list of tensors of lists of tensors.

    Args:
        run: The function. It may write into `leaves`.
        weights, leaves, inputs: Tensors like those of every call.
        repeated: Whether it is called so often that compiling the record pays.

    Returns:
        A function of the same arguments, without the Python of `run`.
    """
    # Recording runs the function, which writes into the state: into that of a copy.
    example = (weights, [tensor.clone() for tensor in leaves], inputs)
    with warnings.catch_warnings():
        # Of values that become constants: shapes, which are those of every call.
        warnings.simplefilter("ignore")
        step = torch.jit.trace(run, example, check_trace=False, strict=False)
    _drop_empty_conversions(step.graph)
    if not repeated:
        return functools.partial(_run_as_it_is, step)
    return _CudaGraph(step, leaves, inputs) if leaves[0].is_cuda else step


def _drop_empty_conversions(graph):
    """Takes those nodes out of a record that give back the tensor they take, or that nobody reads.

    Every operator of Keras converts what it is given: a hundred nodes for each block of a decoder,
    as against 15 others. A record has the types of all tensors, with their strides and devices.
    """
    for node in list(graph.nodes()):
        if node.kind() not in ("aten::to", "aten::contiguous"):
            continue
        given, *options = node.inputs()
        result = node.output()
        copies = any(option.toIValue() is True for option in options)
        if not copies and given.isCompleteTensor() and given.type().str() == result.type().str():
            result.replaceAllUsesWith(given)
            node.destroy()
    torch._C._jit_pass_dce(graph)


def _run_as_it_is(step, *arguments):
    """Runs a record that is not to be compiled, which would take longer than many calls."""
    with torch.jit.optimized_execution(False):
        return step(*arguments)


class _CudaGraph:
    """A recorded step as a CUDA graph: one launch, on buffers of its own."""

    def __init__(self, step, leaves, inputs):
        self.step = step
        self.leaves = [tensor.clone() for tensor in leaves]
        self.inputs = [tensor.clone() for tensor in inputs]
        self.given: Any = None  # the first tensor of the state that was given last
        self.weights: Any = None
        self.graph: Any = None
        self.results: Any = None
        self.stream = torch.cuda.Stream()

    def _run(self, weights):
        """Runs the step, which ends with its state in the buffers. Returns the results."""
        flat = self.step(weights, self.leaves, self.inputs)
        count = len(flat) - len(self.leaves)
        for own, written in zip(self.leaves, flat[count:], strict=True):
            if own.data_ptr() != written.data_ptr():
                own.copy_(written)
        return flat[:count]

    def _capture(self, weights):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(4):  # whatever is compiled or allocated at first use
                self._run(weights)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.results = self._run(weights)

    def __call__(self, weights, leaves, inputs):
        same = self.weights is not None and all(
            a.data_ptr() == b.data_ptr() for a, b in zip(weights, self.weights, strict=True)
        )
        if weights is not self.weights and not same:
            self._capture(weights)
        self.weights = weights
        if leaves[0] is self.given:
            leaves = self.leaves
        elif leaves[0].data_ptr() == self.leaves[0].data_ptr():
            raise RuntimeError(
                "Another generation of the same shapes has begun on this model since, and its "
                "cache took the place of this one's. End one first, or give both prompts at once."
            )
        pairs = zip((*self.leaves, *self.inputs), (*leaves, *inputs), strict=True)
        copies = [(own, given) for own, given in pairs if own is not given]
        for dtype in {own.dtype for own, _ in copies}:  # of one dtype they are one kernel
            own, given = zip(*(pair for pair in copies if pair[0].dtype == dtype), strict=True)
            torch._foreach_copy_(own, given)
        self.graph.replay()
        self.given = self.leaves[0].detach()
        # Of the results copies: the next replay writes over them.
        return [*(result.clone() for result in self.results), self.given, *self.leaves[1:]]
