"""Chat templates: Jinja from a stranger's file, rendered in a sandbox."""

import datetime
import json
from typing import Any

from keras_bitnet.interop.files import require

MAX_LENGTH = 2**22  # of a text that is multiplied, and of numbers
MAX_POWER = 64


def render_chat(template, **variables):
    """Renders a chat template as Hugging Face's libraries do.

    The sandbox gives the template no attribute that leads to Python's internals, no long ranges
    and no products beyond `MAX_LENGTH`; variables are copied as plain data first.

    Args:
        template: Jinja text.
        **variables: `messages`, `add_generation_prompt`, `bos_token`, `eos_token`, ...

    Returns:
        The text.

    Raises:
        ValueError: The template is invalid, refuses the messages or leaves the sandbox.
    """
    jinja2 = require("jinja2", "hf")
    sandbox = require("jinja2.sandbox", "hf")
    environment = _bounded(sandbox.ImmutableSandboxedEnvironment)(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    if not isinstance(template, str):
        raise ValueError(f"A chat template is a text. Received: {type(template).__name__}")
    try:
        plain = json.loads(json.dumps(variables))
    except TypeError as error:
        raise ValueError(f"Messages hold text, numbers, lists and dictionaries: {error}") from error
    try:
        return environment.from_string(template).render(**plain)
    except (jinja2.exceptions.TemplateError, ArithmeticError, AttributeError, LookupError,
            RecursionError, TypeError, ValueError) as error:  # fmt: skip
        raise ValueError(f"The chat template cannot take these messages: {error}") from error


def _bounded(environment: Any):
    """An environment whose products and powers are of bounded size."""

    class Bounded(environment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context, operator, left, right):
            sizes = [abs(x) if isinstance(x, (int, float)) else len(x) for x in (left, right)]
            numbers = all(isinstance(x, (int, float)) for x in (left, right))
            size = max(sizes) if numbers else sizes[0] * sizes[1]
            if size > MAX_LENGTH or (operator == "**" and sizes[1] > MAX_POWER):
                raise OverflowError(f"the operands of '{operator}' are too large")
            return super().call_binop(context, operator, left, right)

    return Bounded


def _to_json(value, indent=None, separators=None, sort_keys=False, ensure_ascii=False):
    """Jinja's own filter escapes HTML, which templates do not expect."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
