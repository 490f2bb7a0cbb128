"""Which layer gets which precision, as an object that can be saved, edited and used again."""

import inspect
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import keras

from keras_bitnet import quantizers
from keras_bitnet.files import replacing
from keras_bitnet.layers.base import BitLayer

PRECISIONS = ("binary", "ternary", "int2", "int4", "int8")  # narrow to wide
_FORMAT = "keras_bitnet.PrecisionPlan"
_VERSION = 1
_OF_EVERY_LAYER = {"dtype", "trainable"}


def layer_arguments(spec):
    """The arguments of `BitLayer` that a spec stands for, or `None`: the layer stays as it is.

    Args:
        spec: Name of a weight quantizer, a `WeightQuantizer`, a dictionary of arguments
            of `keras_bitnet.layers.BitLayer`, or `None`.

    Returns:
        A dictionary with `"weight_quantizer"` as its config, or `None`.

    Raises:
        ValueError: The weight quantizer or an argument is unknown.
    """
    if spec is None:
        return None
    arguments = dict(spec) if isinstance(spec, Mapping) else {"weight_quantizer": spec}
    unknown = arguments.keys() - _known_arguments()
    if unknown:
        raise ValueError(
            f"A spec holds arguments of `BitLayer`, {sorted(_known_arguments())}. "
            f"Received: {sorted(unknown)}"
        )
    arguments["weight_quantizer"] = quantizers.serialize(
        quantizers.get(arguments.get("weight_quantizer", "ternary"))
    )
    return arguments


@keras.saving.register_keras_serializable("keras_bitnet")
class PrecisionPlan:
    """A precision for every layer, by regular expressions on the paths of the layers.

    >>> plan = PrecisionPlan({"attention/": "int4", "^head$": None}, default="ternary")
    >>> model = keras_bitnet.quantize_model(model, plan)

    Args:
        rules: Dictionary from regular expressions to specs, or a list of such pairs. An
            expression is searched in the path of a layer (such as
            `"encoder/attention/query"`), and the first that matches decides.
        default: The spec of layers that no rule matches.

    A spec is the name of a weight quantizer, a `WeightQuantizer`, a dictionary of arguments of
    `keras_bitnet.layers.BitLayer`, or `None`: the layer stays float.

    Attributes:
        rules: List of pairs `(expression, spec)`, specs as `layer_arguments` gives them.
        default: The spec of the others.
        search: How `suggest_precision` found the plan, a `PrecisionSearch`, else `None`. It is
            not saved.

    Raises:
        ValueError: A rule is no valid regular expression or no valid spec.
    """

    def __init__(self, rules=(), default=None):
        pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise ValueError(
                "`rules` must be a dictionary {regular expression: spec} or a list of such "
                f"pairs. Received: rules={rules!r}"
            )
        self._patterns = [_compiled(pattern) for pattern, _ in pairs]
        self.rules = [(pattern, _checked(spec, repr(pattern))) for pattern, spec in pairs]
        self.default = _checked(default, "the default")
        self.search: Any = None

    def spec_for(self, path):
        """The arguments of `BitLayer` for the layer at a path, or `None`: it stays float."""
        for pattern, (_, spec) in zip(self._patterns, self.rules, strict=True):
            if pattern.search(path):
                return spec
        return self.default

    def unused_rules(self, paths):
        """The expressions that match none of these paths: misspelt ones, most likely."""
        return [p.pattern for p in self._patterns if not any(p.search(path) for path in paths)]

    def get_config(self):
        """The arguments of the constructor, in a form that JSON can hold."""
        return {
            "rules": [[pattern, _readable(spec)] for pattern, spec in self.rules],
            "default": _readable(self.default),
        }

    @classmethod
    def from_config(cls, config):
        """The plan that `get_config` described."""
        return cls(**config)

    def to_json(self, **kwargs):
        """The plan as JSON, made to be read and edited; arguments go to `json.dumps`."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **self.get_config()}, **kwargs)

    @classmethod
    def from_json(cls, text):
        """The plan that `to_json` wrote.

        Raises:
            ValueError: It is no JSON, or no plan.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f'Expected JSON with "format": "{_FORMAT}". Received: {text[:80]!r}')
        if content.get("version") != _VERSION:
            raise ValueError(
                f"This version of keras_bitnet reads plans of version {_VERSION}. "
                f"Received: version={content.get('version')!r}"
            )
        known = {"format", "version", "rules", "default"}
        if content.keys() - known:
            raise ValueError(
                f"A plan holds {sorted(known)}. Received also: {sorted(content.keys() - known)}"
            )
        return cls(content.get("rules", ()), content.get("default"))

    def save(self, path, overwrite=True):
        """Writes the plan to a JSON file.

        Args:
            path: Path of the file.
            overwrite: Whether a file that is there may be replaced.

        Raises:
            FileExistsError: There is one and it may not.
        """
        with replacing(path, overwrite) as temporary:
            temporary.write_text(self.to_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Reads a plan from a JSON file.

        Args:
            path: Path of the file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file holds no plan.
        """
        try:
            return cls.from_json(pathlib.Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"'{path}' holds no precision plan: {error}") from error

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash(self.to_json())

    def __repr__(self):
        rules = "".join(f"    {pattern!r}: {_readable(spec)!r},\n" for pattern, spec in self.rules)
        inner = f"{{\n{rules}}}" if rules else "{}"
        return f"PrecisionPlan({inner}, default={_readable(self.default)!r})"


def _compiled(pattern):
    if not isinstance(pattern, str):
        raise ValueError(f"A rule begins with a regular expression. Received: {pattern!r}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"A rule holds no valid regular expression: {error}. Received: {pattern!r}"
        ) from error


def _checked(spec, rule):
    """The arguments of a spec, with every quantizer as its config."""
    try:
        arguments = layer_arguments(spec)
        if arguments is None:
            return None
        if "activation_quantizer" in arguments:
            arguments["activation_quantizer"] = quantizers.serialize(
                quantizers.get_activation(arguments["activation_quantizer"])
            )
        return arguments
    except (ValueError, TypeError) as error:
        raise ValueError(f"The spec of {rule} is not valid: {error}") from error


def _known_arguments():
    ours = [cls for cls in BitLayer.__mro__ if cls.__module__.startswith("keras_bitnet.")]
    parameters = [p for cls in ours for p in inspect.signature(cls.__init__).parameters.values()]
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} | _OF_EVERY_LAYER


def _readable(spec):
    """The shortest spec that means the same: names for what is as its name makes it."""
    if spec is None:
        return None
    short = dict(spec)
    short["weight_quantizer"] = _name_of(spec["weight_quantizer"], quantizers.get)
    if "activation_quantizer" in spec:
        short["activation_quantizer"] = _name_of(
            spec["activation_quantizer"], quantizers.get_activation
        )
    named = list(short) == ["weight_quantizer"] and isinstance(short["weight_quantizer"], str)
    return short["weight_quantizer"] if named else short


def _name_of(config, get):
    """The name of a quantizer that is as its name makes it, else its config."""
    if config is None:
        return None
    quantizer = get(config)
    try:
        default = get(quantizer.name)
    except ValueError:  # the name of a quantizer of the user's
        return config
    return quantizer.name if quantizer == default else config
