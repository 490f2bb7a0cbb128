"""Composite layers and subclassed models with some inner layers replaced, that survive saving.

Swapping the inner layers of a `MultiHeadAttention` works until the model is reloaded: its
`from_config` brings the stock layers back. A converted layer therefore carries a recipe in its
config, the original layer plus the replaced ones by path, and follows it again in `from_config`.
It stays an instance of its class.
"""

import dataclasses
import functools

import keras

REGISTERED_NAME = "Converted"
_BOOKKEEPING = {"_layers", "_modules", "_tracker", "_functional"}


@dataclasses.dataclass
class _Recipe:
    original: dict  # how Keras serializes the original layer, without its config
    pending: dict  # path -> config of a replacement whose place does not exist yet
    done: list  # paths replaced


class Converted:
    """Mixin of a layer with replaced inner layers; see the module."""

    _recipe: _Recipe

    @classmethod
    def from_config(cls, config):
        """Makes the original layer and replaces inner layers as the recipe says."""
        layer = keras.saving.deserialize_keras_object(config["layer"])
        original = {key: value for key, value in config["layer"].items() if key != "config"}
        return _convert(layer, _Recipe(original, dict(config["replaced"]), []))

    def get_config(self):
        """The original layer, and the replaced ones by path."""
        recipe = self._recipe
        replaced = dict(recipe.pending)
        first_path: dict[int, str] = {}
        for path in recipe.done:
            child = get_child(self, path)
            if id(child) in first_path:
                replaced[path] = {"same_as": first_path[id(child)]}
            else:
                first_path[id(child)] = path
                replaced[path] = _serialize_unbuilt(child)
        original = {**recipe.original, "config": super().get_config()}  # type: ignore[misc]
        return {"layer": original, "replaced": replaced}


keras.saving.register_keras_serializable("keras_bitnet", REGISTERED_NAME)(Converted)


def make_converted(layer, twins):
    """Returns an unbuilt copy of `layer` with inner layers replaced.

    Args:
        layer: A composite layer or subclassed model.
        twins: Unbuilt replacements by path, see `child_layers`.

    """
    if isinstance(layer, Converted):
        config = layer.get_config()
    else:
        config = {"layer": _serialize_unbuilt(layer), "replaced": {}}
    first_path: dict[int, str] = {}
    for path, twin in twins.items():
        shared = first_path.setdefault(id(twin), path)
        config["replaced"][path] = (
            _serialize_unbuilt(twin) if shared == path else {"same_as": shared}
        )
    return Converted.from_config(config)


def child_layers(layer):
    """The direct children of a layer by path: `"attribute"`, or `"attribute.key"` in containers.

    Lists, tuples and dictionaries with string keys are searched, nested ones too. A child
    that two attributes hold appears under both.
    """
    tracked = {id(child) for child in layer._layers}
    attributes = {**vars(layer), **vars(layer).get("_modules", {})}  # torch keeps them apart
    found = {}
    for name in sorted(attributes.keys() - _BOOKKEEPING):
        for path, leaf in _leaves(name, attributes[name]):
            if isinstance(leaf, keras.Layer) and id(leaf) in tracked:
                found[path] = leaf
    return found


def _leaves(path, value):
    if isinstance(value, (list, tuple)):
        value = {str(i): item for i, item in enumerate(value)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}", item)
    else:
        yield path, value


def get_child(layer, path):
    """The child at a path of `child_layers`, or `None`."""
    name, *keys = path.split(".")
    value = getattr(layer, name, None)
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key)
        else:
            value = value[int(key)] if value is not None and int(key) < len(value) else None
    return value


def _set_child(layer, path, child):
    name, *keys = path.split(".")
    layer._tracker.unlock()
    layer._tracker.untrack(get_child(layer, path))
    setattr(layer, name, _with_item(getattr(layer, name), keys, child))
    if layer.built:
        layer._lock_state()


def _with_item(value, keys, child):
    """A copy of nested containers with the item at `keys` replaced."""
    if not keys:
        return child
    key, *keys = keys
    if isinstance(value, dict):
        return {k: _with_item(v, keys, child) if k == key else v for k, v in value.items()}
    items = [_with_item(v, keys, child) if str(i) == key else v for i, v in enumerate(value)]
    return tuple(items) if isinstance(value, tuple) else items


def _convert(layer, recipe):
    layer.__class__ = _converted_class(type(layer))  # type: ignore[arg-type]
    object.__setattr__(layer, "_recipe", recipe)
    _follow_recipe(layer)
    stock_build = layer.build

    @functools.wraps(stock_build)
    def build(*args, **kwargs):
        stock_build(*args, **kwargs)
        with keras.name_scope(layer.name, caller=layer):
            _follow_recipe(layer)

    layer.build = build
    return layer


def _follow_recipe(layer):
    """Replaces every inner layer whose place exists by now; some are made only in `build`."""
    recipe = layer._recipe
    for path, config in list(recipe.pending.items()):
        stock = get_child(layer, path)
        if stock is None:
            continue
        if "same_as" in config:
            child = get_child(layer, config["same_as"])
        else:
            child = keras.saving.deserialize_keras_object(config)
            if stock.built and not child.built:
                child.build_from_config(stock.get_build_config())
        _set_child(layer, path, child)
        del recipe.pending[path]
        recipe.done.append(path)
    if recipe.done and layer.built and hasattr(layer, "_track_variables"):
        layer._track_variables()  # torch's list of parameters


@functools.cache
def _converted_class(cls):
    """A subclass of `cls` with `Converted` mixed in, serialized under one registered name."""

    def get_config(self):
        return Converted.get_config(self)

    # Keras generates the config of a class that does not define its own only if it sees so.
    get_config._is_default = getattr(cls.get_config, "_is_default", False)  # type: ignore
    body = {"get_config": get_config, "__module__": cls.__module__, "__doc__": cls.__doc__}
    converted = type(cls.__name__, (Converted, cls), body)
    register = keras.saving.register_keras_serializable("keras_bitnet", REGISTERED_NAME)
    register(converted)
    register(Converted)  # the name keeps standing for the mixin
    return converted


def _serialize_unbuilt(layer):
    config = keras.saving.serialize_keras_object(layer)
    return {k: v for k, v in config.items() if k not in ("build_config", "compile_config")}
