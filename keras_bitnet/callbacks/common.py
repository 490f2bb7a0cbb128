"""What the callbacks share: finding the layers, counting steps, compiling the step again."""

import functools
import math

import keras
from keras import ops

from keras_bitnet.filters import layer_filter
from keras_bitnet.layers.base import BitLayer
from keras_bitnet.transforms.rewrite import named_layers


def student_of(model):
    """The model whose layers count: of a distiller (`student` and `teacher`) the student."""
    return model.student if hasattr(model, "student") and hasattr(model, "teacher") else model


def find_bit_layers(model, filters=None):
    """The trainable `BitLayer`s of a model, nested ones too, each once, in order.

    Args:
        model: Built `keras.Model`, see `student_of`.
        filters: Which ones, see `keras_bitnet.filters.layer_filter`.

    Returns:
        Dictionary of their paths by layer, not empty. Packed layers are left out.

    Raises:
        ValueError: There is none, or the model is not built.
    """
    layers = {
        layer: path
        for path, layer in named_layers(student_of(model))
        if isinstance(layer, BitLayer) and not layer.packed
    }
    unbuilt = [layer.name for layer in layers if layer.quantization_strength is None]
    if unbuilt:
        raise ValueError(
            "The model must be built before `fit()`: give it a `keras.Input`, or call it on a "
            f"batch. Received: unbuilt layers {unbuilt}"
        )
    matches = layer_filter(filters)
    chosen = {layer: path for layer, path in layers.items() if matches(layer, path)}
    if not chosen:
        raise ValueError(
            "The model needs at least one layer of `keras_bitnet.layers`, not packed and matched "
            f"by `filters`. Received: filters={filters!r}, "
            f"layers={list(layers.values())}"
        )
    return chosen


def inner_optimizer(optimizer):
    """The optimizer itself, or the one that a `LossScaleOptimizer` wraps."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def rebuild_functions(model):
    """Makes training, evaluation and prediction trace their steps again, where they were made."""
    for kind in ("train", "test", "predict"):
        if getattr(model, f"{kind}_function") is not None:
            _rebuild(model, kind)


def rebuild_train_function(model):
    """Makes `fit` trace and compile the training step again, also in the middle of an epoch.

    The loops of all three backends read `model.train_function` at every step, so replacing it
    is enough, with one exception. `jax.jit` keys its cache on the function, and bound methods
    of one object are equal: `jit(model.train_step)` finds the old program as long as anything
    still refers to the old function. So the new one is made from a distinct callable.
    """
    _rebuild(model, "train")


def _rebuild(model, kind):
    name = f"{kind}_step"
    own = vars(model).get(name)  # a user may have set one on the instance
    setattr(model, name, functools.partial(getattr(model, name)))
    try:
        getattr(model, f"make_{kind}_function")(force=True)
    finally:
        delattr(model, name)
        if own is not None:
            setattr(model, name, own)


def freeze_variables(model, variables):
    """Stops the training of variables in the middle of `fit`, at the begin of an epoch.

    No gradient, momentum or weight decay moves them any more. The optimizer keeps all of its
    variables, those of the frozen ones too: the layout of saved files stays what `compile`
    makes, so that `BackupAndRestore` and `load_model` find every slot. TensorFlow and torch hand
    the optimizer the variables to update; on JAX `stateless_apply` demands that those it was
    built with equal the trainable ones of the model, so there it has to forget the frozen ones.
    """
    optimizer = model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    for variable in variables:
        variable.trainable = False
    if keras.backend.backend() == "jax":
        for owner in {id(o): o for o in (optimizer, inner_optimizer(optimizer))}.values():
            _forget(owner, variables)
    rebuild_train_function(model)


def _forget(optimizer, variables):
    frozen = {id(variable) for variable in variables}
    for variable in variables:
        optimizer._trainable_variables_indices.pop(optimizer._var_key(variable), None)
    optimizer._trainable_variables[:] = [
        variable for variable in optimizer._trainable_variables if id(variable) not in frozen
    ]


class StepCallback(keras.callbacks.Callback):
    """Calls `update(step)` before training steps, `step` being `optimizer.iterations`.

    Before the first batch of every epoch, then every `update_freq` batches, and exactly before
    each step named in `milestones`; from `final_step` on no more. Reading `iterations` waits
    for the device and, on JAX, writes the whole state back, which is why it is not done at
    each batch: the iterations at the begin of the epoch plus the batch number bound it from
    above (skipped or accumulated steps make it smaller), and that is enough to know when to look.
    """

    update_freq: float = 1
    milestones: tuple[float, ...] = ()
    final_step: float = math.inf
    _next_batch: float = 0

    def on_epoch_begin(self, epoch, logs=None):
        """Reads the iterations."""
        self._first_step = self.read_step()
        self._last_step = self._first_step
        self._next_batch = 0

    def on_train_batch_begin(self, batch, logs=None):
        """Calls `update` where it is due."""
        bound = self._first_step + batch
        if batch < self._next_batch and not any(
            self._last_step < milestone <= bound for milestone in self.milestones
        ):
            return
        step = self._last_step = self.read_step()
        self._next_batch = math.inf if step >= self.final_step else batch + self.update_freq
        self.update(step)

    def read_step(self):
        """The steps that the optimizer has made."""
        # `self.model` is more than an attribute: on JAX it brings the state of the running
        # epoch back into the variables, and lets the trainer read them again.
        return int(ops.convert_to_numpy(self.model.optimizer.iterations))

    def update(self, step):
        """Acts on the state before step number `step`."""
        raise NotImplementedError
