"""One compiled program per shape for functions of a model and a state that is used up.

The program is traced once for the shapes of its arguments, all of which are tensors. Weights are
read where they are, and the tensors of the state, the cache among them, are written in place: what
a step takes and gives stays on the device, at the same addresses. PyTorch traces what is called
over and over, and replays it as one CUDA graph on such a device; anything else it traces once it
has come often.
"""

import collections
import functools
from typing import Any

import keras
from keras import ops

BACKEND = keras.backend.backend()
# Calls of the same shapes before PyTorch records what is not `repeated`: their record then saves
# them as much time as it takes to make (decision 13).
CALLS_UNTIL_RECORD = 20


def compile_function(function, model, repeated=False):
    """Returns `function` compiled for the present backend.

    Args:
        function: `function(state, *tensors) -> (result, state)`, in `keras.ops` and layers of
            `model`. A state is a structure of tensors, a result a tensor or a structure of them.
        model: The model whose weights it reads.
        repeated: Whether it is called often with the same shapes. Else PyTorch, where recording
            takes long, records it once the same shapes have come often.

    Returns:
        A function of the same arguments. Call its `begin(read_weights(model))` before a row of
        calls: weights are those of then.
    """
    if BACKEND == "torch":
        return _Torch(function, model, repeated)
    return {"jax": _Jax, "tensorflow": _TensorFlow}[BACKEND](function, model)


def read_weights(model):
    """The tensors of a model's variables, as its programs take them."""
    values = [v.value for v in variables_of(model)]
    if BACKEND == "torch":
        return [value.detach().contiguous() for value in values]
    if BACKEND == "tensorflow":  # Keras takes its variables for tensors
        from keras_bitnet.kernels.tensorflow import read_variable

        return list(map(read_variable, values))  # converted, a decoder's hundreds take 20 ms
    return values


def variables_of(model):
    """The variables of a model in one order, each once.

    `model.variables` collects those of each layer again for every layer that holds it, which takes
    longer than a GPU needs for a short prompt.
    """
    layers = model._flatten_layers()
    found = [v for x in layers for v in x._trainable_variables + x._non_trainable_variables]
    found += [generator.state for layer in layers for generator in layer._seed_generators]
    return list({id(v): v for v in found}.values())


def is_asynchronous(tensor):
    """Whether a program that gives this tensor returns before it is there: more can be queued."""
    return BACKEND == "jax" or (BACKEND == "torch" and is_on_gpu(tensor))


def to_tensors(*arrays):
    """NumPy arrays as tensors."""
    if BACKEND == "jax":  # converted one by one each takes half a millisecond
        import jax

        return jax.device_put(arrays)
    return tuple(map(ops.convert_to_tensor, arrays))


def start_copy(tensor):
    """Starts to copy a tensor to the host.

    Args:
        tensor: A tensor; a program may use it up or write over it at once.

    Returns:
        A function that waits for the copy and gives it, a NumPy array.
    """
    if BACKEND == "jax":
        copy = ops.copy(tensor)
        copy.copy_to_host_async()
        return functools.partial(ops.convert_to_numpy, copy)
    if BACKEND == "torch" and is_on_gpu(tensor):
        return _torch_copy(tensor)
    copy = tensor.numpy().copy()
    return lambda: copy


def _torch_copy(tensor):
    import torch

    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait():
        done.synchronize()
        return copy.numpy()

    return wait


def is_on_gpu(tensor):
    """Whether a tensor of JAX or PyTorch lies on a CUDA device."""
    if BACKEND == "jax":
        return all(device.platform == "gpu" for device in tensor.devices())
    return tensor.device.type == "cuda"


class _Program:
    """A function and the weights that it reads."""

    def __init__(self, function, model):
        self.function, self.model = function, model
        self.weights: Any = None

    def begin(self, weights):
        self.weights = weights

    def call_with(self, weights, function, *arguments):
        """`function(*arguments)` where the model has these weights."""
        with keras.StatelessScope(zip(variables_of(self.model), weights, strict=True)):
            return function(*arguments)

    def evaluate(self, function, *arguments):
        """`function(*arguments)` as it is, of the weights that the program reads."""
        return self.call_with(self.weights, function, *arguments)


class _Jax(_Program):
    """A jitted function to which the state is donated."""

    def __init__(self, function, model):
        import jax

        super().__init__(function, model)
        self.jitted = jax.jit(self.run, donate_argnums=1)

    def run(self, weights, state, arguments):
        return self.call_with(weights, self.function, state, *arguments)

    def __call__(self, state, *arguments):
        return self.jitted(self.weights, state, arguments)


class _State:
    """The state that a record gives: flat, since a step in between takes it as it is.

    A decoder's memory passes through the caches of a processor between two steps, and what Python
    does then takes several times as long as in a loop of its own.
    """

    def __init__(self, leaves, places):
        self.leaves, self.places = leaves, places

    def __getitem__(self, name):
        """The tensors of one entry of a state that is a dictionary, or of a list."""
        place = self.places[name]
        if isinstance(place, int):
            return self.leaves[place]
        return keras.tree.map_structure(self.leaves.__getitem__, place)


class _Recorded(_Program):
    """A function recorded once for each shape of its arguments, then run without its Python.

    The record takes the weights as arguments. A state that the last call gave is one of the same
    shapes again, and so are the other arguments with it.
    """

    def __init__(self, function, model):
        super().__init__(function, model)
        self.recorded: dict = {}
        # The first tensor of the state given last, its record, and the weights that this reads.
        self.last: Any = (None, None, None)

    def call(self, leaves, structure, inputs):
        given, record, weights = self.last
        if leaves[0] is not given:
            key = self.key(leaves, inputs)
            if key not in self.recorded:
                self.recorded[key] = self.record(structure, leaves, inputs)
            record = self.recorded[key]
            weights = [self.weights[i] for i in record[1]]
        step, _, result, count, places = record
        flat = step(weights, leaves, inputs)
        following = _State(flat[count:], places)
        self.last = following.leaves[0], record, weights
        return keras.tree.pack_sequence_as(result, flat[:count]) if count else result, following

    @staticmethod
    def key(leaves, inputs):
        """What a record is made for."""
        return tuple((tuple(t.shape), t.dtype, t.device) for t in (*leaves, *inputs))

    def trace(self, run, weights, leaves, inputs) -> Any:
        """`run(weights, leaves, inputs)`, a list of tensors of lists of tensors, recorded."""
        raise NotImplementedError

    def record(self, structure, leaves, inputs):
        """What is recorded: a function of flat arguments, which gives a flat result and state.

        Returns:
            That function, the places of the weights that it takes, the structure of the result,
            how many tensors it has, and the structure of the state, with the place of each in it.
        """
        structures: Any = None
        all_variables = variables_of(self.model)

        def trace(places):
            """The function of the weights at some places, and the places of those that it reads."""
            variables = [all_variables[i] for i in places]
            read: set = set()

            def run(weights, leaves, inputs):
                nonlocal structures
                with _Scope(zip(variables, weights, strict=True), read):
                    both = self.function(keras.tree.pack_sequence_as(structure, leaves), *inputs)
                structures = keras.tree.map_structure(lambda _: 0, both)
                return keras.tree.flatten(both)

            step = self.trace(run, [self.weights[i] for i in places], leaves, inputs)
            return step, [i for i, v in zip(places, variables, strict=True) if id(v) in read]

        places = list(range(len(self.weights)))
        step, read = trace(places)
        if 2 * len(read) < len(places):  # a chain of blocks finds its weights by itself
            places = read
            step, _ = trace(places)
        result, state = structures
        leaf_places = list(range(len(keras.tree.flatten(state))))
        count = len(keras.tree.flatten(result))
        return step, places, result, count, keras.tree.pack_sequence_as(state, leaf_places)


class _Scope(keras.StatelessScope):
    """Puts values in the place of variables and notes which were read."""

    def __init__(self, values, read):
        super().__init__(values)
        self.read = read

    def get_current_value(self, variable):
        self.read.add(id(variable))
        return super().get_current_value(variable)


def _flat(state):
    """The tensors of a state and its structure."""
    if isinstance(state, _State):
        return state.leaves, state.places
    return keras.tree.flatten(state), state


class _TensorFlow(_Recorded):
    """A graph, called as an operator of flat tensors.

    `tf.function` takes a millisecond of Python to bind the hundreds of tensors of a decoder, and
    its graph reads each variable anew.
    """

    def __call__(self, state, *arguments):
        inputs = [ops.convert_to_tensor(a) for a in arguments]
        leaves, structure = _flat(state)
        return self.call(leaves, structure, inputs)

    def trace(self, run, weights, leaves, inputs):
        import tensorflow as tf

        graph = tf.function(run, autograph=False).get_concrete_function(weights, leaves, inputs)
        dtypes, constants = [t.dtype for t in graph.outputs], graph.captured_inputs
        config = tf.compat.v1.ConfigProto()  # of the graph rewriter, which finds little and warns
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        options = {"Tout": dtypes, "f": graph, "config_proto": config.SerializeToString()}

        def step(weights, leaves, inputs):
            tensors = [*weights, *leaves, *inputs, *constants]
            return tf.raw_ops.StatefulPartitionedCall(args=tensors, **options)

        return step


class _Torch(_Recorded):
    """A recorded function of tensors that share the memory of the weights.

    So it follows every assignment; a weight whose tensor was replaced is seen at `begin`.
    """

    def __init__(self, function, model, repeated):
        super().__init__(function, model)
        self.repeated = repeated
        self.seen: collections.Counter = collections.Counter()

    def __call__(self, state, *arguments):
        import torch

        leaves, structure = _flat(state)
        inputs = [torch.as_tensor(a, device=leaves[0].device) for a in arguments]
        with torch.inference_mode():
            if self.repeated or self.is_frequent(leaves, inputs):
                return self.call(leaves, structure, inputs)
            return self.function(state, *inputs)

    def evaluate(self, function, *arguments):
        import torch

        with torch.inference_mode():  # the weights are the memory of the variables
            return function(*arguments)

    @staticmethod
    def key(leaves, inputs):
        strides = tuple(t.stride() for t in (*leaves, *inputs))
        return (*_Recorded.key(leaves, inputs), strides)

    def is_frequent(self, leaves, inputs):
        """Whether shapes came often."""
        key = self.key(leaves, inputs)
        self.seen[key] += 1
        return self.seen[key] > CALLS_UNTIL_RECORD

    def trace(self, run, weights, leaves, inputs):
        from keras_bitnet.models.torch_record import record

        return record(run, weights, leaves, inputs, self.repeated)
