"""Builds a new model from an old one with some layers replaced, and brings the weights over.

One mechanism for quantizing, packing and unpacking. The old model is left as it was.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bitnet.checks import check_built
from keras_bitnet.layers.kernel_weights import assign_copy
from keras_bitnet.transforms.converted import (
    child_layers,
    get_child,
    make_converted,
    own_classes,
)


@dataclasses.dataclass(frozen=True)
class Change:
    """What a transform did with one layer.

    Attributes:
        path: Where the layer is in the model, such as `"encoder/attention/query"`.
        layer: Its class.
        replaced_by: The class of the new layer, or `None`: it was kept.
        reason: Why it was kept, or `None`.
    """

    path: str
    layer: str
    replaced_by: str | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a transform does.

    Attributes:
        verb: Past participle for messages: "quantized", "packed", "unpacked".
        replace: `replace(layer, path)` gives an unbuilt layer, or a string: why not.
        transfer: `transfer(old, new)` fills the weights of a replaced layer.
    """

    verb: str
    replace: Callable[[keras.Layer, str], keras.Layer | str]
    transfer: Callable[[keras.Layer, keras.Layer], None]


def rewrite(model, rule, verbose):
    """Returns `(new_model, changes)`.

    Raises:
        ValueError: `model` is no built Keras model or layer, or cannot be made from its config.
    """
    check_built(model)
    with keras.saving.CustomObjectScope(own_classes(model)):
        return _rewrite(model, rule, verbose)


def _rewrite(model, rule, verbose):
    twins = _Twins(rule)
    new_model = twins.copy_of(model, path="")
    if not new_model.built:
        shapes = json.dumps(model.get_build_config())  # Keras's dictionaries are no plain ones
        new_model.build_from_config(json.loads(shapes))
        new_model.built = True  # Keras leaves it to the first call of a subclassed model
    pairs = _pairs(model, new_model, twins.replaced)
    progress = keras.utils.Progbar(len(pairs), unit_name="layer") if verbose else None
    for i, (old, new) in enumerate(pairs):
        if old.built and old.weights and not new.weights:
            raise ValueError(
                f"'{model.name}' made again from its config cannot be built: Keras runs `call` on "
                f"placeholders of float32, which made no weights of '{old.name}'. Give the model a "
                "`build(input_shape)` that builds its layers; loading a file needs that too."
            )
        transfer = rule.transfer if id(old) in twins.replaced else copy_own_weights
        transfer(old, new)
        if progress:
            progress.update(i + 1)
    if getattr(model, "compiled", False) and not new_model.compiled:
        _compile_like(new_model, model)
    if verbose:
        _print_changes(rule.verb, twins.changes)
    return new_model, twins.changes


class _Twins:
    """Makes unbuilt twins of layers; a layer that occurs twice gets one twin."""

    def __init__(self, rule):
        self.rule = rule
        self.changes: list[Change] = []
        self.replaced: set[int] = set()
        self._made: dict[int, keras.Layer | CannotRemakeError] = {}

    def copy_of(self, layer, path):
        """The twin, or a copy of a layer in which nothing is replaced."""
        if self.of(layer, path) is layer:
            self._made[id(layer)] = _remake(layer, {})
        return self.of(layer, path)

    def of(self, layer, path):
        """The twin, or the layer itself where nothing in it is replaced."""
        if id(layer) not in self._made:
            try:
                self._made[id(layer)] = self._make(layer, path)
            except CannotRemakeError as error:
                self._made[id(layer)] = error
        made = self._made[id(layer)]
        if isinstance(made, CannotRemakeError):
            raise made
        return made

    def _make(self, layer, path):
        if not isinstance(layer, keras.Layer):  # an operation such as a slice or a mask
            return type(layer).from_config(layer.get_config())
        outcome = self.rule.replace(layer, path)
        if isinstance(outcome, keras.Layer):
            self.replaced.add(id(layer))
            self.changes.append(Change(path, type(layer).__name__, type(outcome).__name__))
            return outcome
        if is_graph(layer):
            return _clone_graph(layer, lambda child: self.copy_of(child, _join(path, child.name)))
        if not child_layers(layer):
            if layer.weights:
                self.changes.append(Change(path, type(layer).__name__, reason=outcome))
            return layer
        # Where nothing changes no copy is made: some layers of others cannot be.
        before = len(self.replaced)
        twins = self._twins_in(layer, path)
        return _remake(layer, twins) if len(self.replaced) > before else layer

    def _twins_in(self, layer, path):
        """What is replaced in a composite layer, by path of `get_child`."""
        twins = {}
        children = child_layers(layer)
        names = _names(children.values())
        for attribute, child in children.items():
            try:
                twin = self.of(child, _join(path, names[id(child)]))
            except CannotRemakeError as error:  # this layer makes it; what is in it is replaced
                twins.update({f"{attribute}.{inner}": twin for inner, twin in error.twins.items()})
                continue
            if twin is not child:
                twins[attribute] = twin
        return twins


class CannotRemakeError(ValueError):
    """A layer cannot be made again from its config; `twins` are the replaced layers in it."""

    def __init__(self, layer, twins):
        super().__init__(
            f"'{layer.name}' ({type(layer).__name__}) cannot be made again from its config. As "
            "for saving, `get_config` must give the arguments of `__init__`, which must accept "
            "`name`, `trainable` and `dtype` (as `**kwargs`)."
        )
        self.twins = twins


def is_graph(layer):
    """Whether the layer is a Sequential or Functional model, whose layers are a graph's nodes."""
    return isinstance(layer, (keras.Sequential, keras.Function))


def unique_names(names):
    """The names in their order, all but the first of those that repeat numbered: `"dense_1"`."""
    names, found = list(names), []
    for name in names:
        numbered = (f"{name}_{i}" for i in itertools.count(1))
        free = (other for other in numbered if other not in names and other not in found)
        found.append(next(free) if name in found else name)
    return found


def _names(children):
    """`{id(child): name}`, one name for each."""
    once = {id(child): child for child in children}
    names = unique_names(child.name for child in once.values())
    return dict(zip(once, names, strict=True))


def named_layers(layer, path="", seen=None):
    """Yields `(path, layer)` of every layer in a model, once, under the paths of `Change`."""
    seen = set() if seen is None else seen
    children = layer.layers if is_graph(layer) else child_layers(layer).values()
    names = _names(children)
    for child in children:
        if id(child) not in seen:
            seen.add(id(child))
            inner = _join(path, names[id(child)])
            yield inner, child
            yield from named_layers(child, inner, seen)


def _remake(layer, twins):
    """An unbuilt copy of a layer, with these inner layers replaced."""
    try:
        if not twins:
            with contextlib.suppress(TypeError):
                return type(layer).from_config(layer.get_config())
        return make_converted(layer, twins)
    except (NotImplementedError, TypeError, AttributeError) as error:  # of its `get_config` too
        raise CannotRemakeError(layer, twins) from error


def _clone_graph(model, clone_function):
    """`clone_model` for Sequential and Functional, with the names of the inputs kept."""
    inputs = None
    if isinstance(model, keras.Function):
        inputs = keras.tree.map_structure(_clone_input, model.input)
    compiled, model.compiled = model.compiled, False
    try:
        new_model = keras.models.clone_model(model, inputs, clone_function)
    finally:
        model.compiled = compiled
    if compiled:
        _compile_like(new_model, model)
    return new_model


def _compile_like(new_model, model):
    """Compiles a model as another one is, with an optimizer and metrics of its own.

    Functions and schedules, which have no state, are shared; through a config, Keras's way, only
    registered ones would come back, and lambdas never.
    """
    if type(model).compile is not keras.Model.compile:  # of other arguments, which we do not know
        new_model.compile_from_config(model.get_compile_config())
        return
    new_model.compile(**keras.tree.map_structure(_fresh, model._compile_config.config))
    if new_model.built:
        new_model.optimizer.build(new_model.trainable_variables)


def _fresh(argument):
    if not isinstance(argument, (keras.optimizers.Optimizer, keras.metrics.Metric)):
        return argument
    config = argument.get_config()
    rate = getattr(argument, "_learning_rate", None)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        config["learning_rate"] = rate
    return type(argument).from_config(config)


def _clone_input(tensor):
    layer = tensor._keras_history.operation
    return keras.layers.InputLayer.from_config(layer.get_config()).output


def copy_own_weights(old, new):
    """Copies what belongs to `old` itself, that of its children left out.

    Raises:
        ValueError: `new` has other variables.
    """
    olds, news = (
        [*layer._trainable_variables, *layer._non_trainable_variables] for layer in (old, new)
    )
    by_name = {v.name: v for v in news}
    if len(by_name) == len(news) and by_name.keys() == {v.name for v in olds}:
        news = [by_name[v.name] for v in olds]  # quantized in place by Keras it has another order
    if [tuple(v.shape) for v in olds] != [tuple(v.shape) for v in news]:
        raise ValueError(
            f"'{old.name}' ({type(old).__name__}) made again from its config has other weights. "
            f"Expected the shapes {[tuple(v.shape) for v in olds]}. "
            f"Received: {[tuple(v.shape) for v in news]}{_lost_mode(old, new)}"
        )
    for source, target in zip(olds, news, strict=True):
        assign_copy(target, source)
    _copy_what_is_no_variable(old, new)


def _copy_what_is_no_variable(old, new):
    """What `adapt` of a preprocessing layer found, and files such as a vocabulary, as if saved."""
    if hasattr(old, "adapt"):
        store: dict[str, Any] = {}
        old.save_own_variables(store)
        # Copies: on JAX, `fit` would delete a shared array.
        copies = {name: np.array(ops.convert_to_numpy(value)) for name, value in store.items()}
        new.load_own_variables(copies)
    if hasattr(old, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)


def _lost_mode(old, new):
    """What to say where Keras quantized a layer in place and the one around it does not know."""
    mode = old.quantization_mode
    if mode == new.quantization_mode:
        return ""
    return (
        f". Keras quantized it in place ({mode}), which the config of the layer around it does not "
        "say, so a saved file would not load either: leave it out of `Model.quantize` with its "
        "`filters`, or take `keras_bitnet.quantize_model` in its place."
    )


def copy_weights(old, new):
    """Copies the weights of a layer and of all layers in it."""
    for pair in _pairs(old, new, replaced=set()):
        copy_own_weights(*pair)


def _pairs(old, new, replaced):
    """Every layer with its twin, once, without looking into the replaced ones."""
    pairs = {id(old): (old, new)}
    queue = [] if id(old) in replaced else [(old, new)]
    while queue:
        old, new = queue.pop()
        if is_graph(old):
            below = list(zip(old.layers, new.layers, strict=True))  # names may have changed
        else:
            below = [(child, get_child(new, path)) for path, child in child_layers(old).items()]
        for pair in below:
            if id(pair[0]) not in pairs:
                pairs[id(pair[0])] = pair
                if id(pair[0]) not in replaced:
                    queue.append(pair)
    return list(pairs.values())


def _print_changes(verb, changes):
    done = [change for change in changes if change.replaced_by]
    print(f"{len(done)} of {len(changes)} layers {verb}.")
    kept = collections.defaultdict(list)
    for change in changes:
        if change.reason:
            kept[change.reason].append(change.path)
    for reason, paths in kept.items():
        print(f"  kept {some_of(paths)}: {reason}")


def some_of(names):
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _join(path, name):
    return f"{path}/{name}" if path else name
