"""Composite layers and subclassed models with some inner layers replaced, that survive saving.

Swapping the inner layers of a `MultiHeadAttention` works until the model is reloaded: its
`from_config` brings the stock layers back. A converted layer therefore carries a recipe in its
config, the original layer plus the replaced ones by path, and follows it again in `from_config`.
It stays an instance of its class.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect

import keras

REGISTERED_NAME = "Converted"
_BOOKKEEPING = {
    "_layers", "_modules", "_tracker", "_functional",
    # Of TensorFlow: other backends would not find a layer by these paths.
    "_self_unconditional_dependency_names", "_self_unconditional_checkpoint_dependencies",
}  # fmt: skip


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
        layer = _deserialize(config["layer"])
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
        twins: Unbuilt replacements by path, see `get_child`.

    Raises:
        NotImplementedError, TypeError: The layer cannot be made from its config.
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


def own_classes(model):
    """The classes of a model's layers by the names in their configs, Keras's classes left out.

    A model that is only remade, not loaded, need not have registered them.

    Raises:
        ValueError: Two of them have one name.
    """
    classes: dict[str, type] = {}
    for layer in model._flatten_layers():
        cls = next(cls for cls in type(layer).__mro__ if not issubclass(cls, Converted))
        if cls.__module__.partition(".")[0] == "keras":
            continue
        name = keras.saving.get_registered_name(cls)
        if classes.setdefault(name, cls) is not cls:
            raise ValueError(
                f"Two classes of layers are named '{name}': tell them apart with "
                "`@keras.saving.register_keras_serializable(package)`. Received: "
                f"{classes[name]} and {cls}"
            )
    return classes


def child_layers(layer):
    """The direct children of a layer by path: `"attribute"`, or `"attribute.key"` in containers.

    Lists, tuples and dictionaries are searched, nested ones too. They come in the order in which
    they were made; a child that two attributes hold appears under both.

    Raises:
        ValueError: A child is only in a set, which has no order to find it by.
    """
    places = {id(child): place for place, child in enumerate(layer._layers)}
    attributes = {**vars(layer), **vars(layer).get("_modules", {})}  # torch keeps them apart
    names = sorted(attributes.keys() - _BOOKKEEPING)
    leaves = [pair for name in names for pair in _leaves(name, attributes[name])]
    found = [(path, leaf) for path, leaf in leaves if _is_layer(leaf) and id(leaf) in places]
    reached = {id(leaf) for _, leaf in found}
    for path, leaf in leaves:
        inside = leaf if isinstance(leaf, (set, frozenset)) else ()
        if any(_is_layer(item) and id(item) not in reached for item in inside):
            raise ValueError(
                f"'{layer.name}' ({type(layer).__name__}) holds layers in a set, `{path}`, which "
                "has no order to find them by. Hold them in a list, a tuple or a dictionary."
            )
    return dict(sorted(found, key=lambda item: places[id(item[1])]))


def _leaves(path, value):
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{path}.{_step(key)}", item)
    else:
        yield path, value


def _step(key):
    """A key of a container as a step of a path, which dots separate."""
    return str(key).replace("%", "%25").replace(".", "%2E")


def _is_layer(value):
    return isinstance(value, keras.Layer)


def get_child(layer, path):
    """The child at a path of `child_layers`, or `None`.

    A path may lead on into a child: `"attention.query_dense"`.
    """
    value = layer
    for key in path.split("."):
        value = _item(value, key)
    return value


def _item(value, key):
    """An attribute of a layer or an item of a container, or `None`."""
    if isinstance(value, keras.Layer):
        return getattr(value, key, None)
    if isinstance(value, dict):
        return next((item for own, item in value.items() if _step(own) == key), None)
    return value[int(key)] if value is not None and int(key) < len(value) else None


def _way(layer, path):
    """The layers on the way to a child, `layer` first, and the path from the last of them."""
    way, value, rest = [layer], layer, ""
    for key in path.split("."):
        if isinstance(value, keras.Layer) and value is not layer:
            way, rest = [*way, value], ""
        value = _item(value, key)
        rest = f"{rest}.{key}" if rest else key
    return way, rest


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
        return {
            own: _with_item(item, keys, child) if _step(own) == key else item
            for own, item in value.items()
        }
    items = [_with_item(v, keys, child) if str(i) == key else v for i, v in enumerate(value)]
    return tuple(items) if isinstance(value, tuple) else items


def _convert(layer, recipe):
    layer.__class__ = _converted_class(type(layer))  # type: ignore[arg-type]
    object.__setattr__(layer, "_recipe", recipe)
    _follow_recipe(layer)
    stock_build = layer.build

    @functools.wraps(stock_build)
    def build(*args, **kwargs):
        try:
            stock_build(*args, **kwargs)
        except AttributeError as error:
            raise ValueError(
                f"'{layer.name}' ({type(layer).__name__}) cannot be built around the layers that "
                f"take the place of those inside: {error}. If it reads a float kernel, as "
                "`SpectralNormalization` does, leave what is in it out with the `filters` of "
                "`quantize_model`."
            ) from error
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
        way, rest = _way(layer, path)
        if "same_as" in config:
            child = get_child(layer, config["same_as"])
        else:
            child = keras.saving.deserialize_keras_object(config)
            if stock.built and not child.built:
                with contextlib.ExitStack() as scopes:
                    for outer in way:
                        scopes.enter_context(keras.name_scope(outer.name, caller=outer))
                    child.build_from_config(stock.get_build_config())
        _set_child(way[-1], rest, child)
        del recipe.pending[path]
        recipe.done.append(path)
    inside = [outer for path in recipe.done for outer in _way(layer, path)[0][1:]]
    for outer in [*reversed(inside), layer] if recipe.done else []:
        if outer.built:
            outer._post_build()  # torch's list of parameters, where they have values already


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


def _deserialize(config):
    """The layer of a config, which may hold more than the constructor takes.

    Some layers of KerasHub write numbers into their config that they derive from the others, and
    refuse them; they are only ever made by the layer or model around them.
    """
    try:
        return keras.saving.deserialize_keras_object(config)
    except TypeError:
        if config["module"] is None:
            raise
        module = importlib.import_module(config["module"])
        cls = getattr(module, config["class_name"])
        inits = [base.__init__ for base in cls.__mro__]
        taken = {name for init in inits for name in inspect.signature(init).parameters}
        arguments = {key: value for key, value in config["config"].items() if key in taken}
        if arguments.keys() == config["config"].keys():
            raise
        return keras.saving.deserialize_keras_object({**config, "config": arguments})


def _serialize_unbuilt(layer):
    config = keras.saving.serialize_keras_object(layer)
    return {k: v for k, v in config.items() if k not in ("build_config", "compile_config")}
