"""When no kernel runs a width on this machine, the next width that one runs, with the reasons."""

import dataclasses
import re

import keras

from keras_bitnet import quantizers
from keras_bitnet.kernels.select import Problem, explain
from keras_bitnet.ops.packed_tensor import PackedTensor
from keras_bitnet.transforms.precision_plan import PrecisionPlan
from keras_bitnet.transforms.quantize import twin_of
from keras_bitnet.transforms.rewrite import named_layers

HIERARCHY = ("binary", "ternary", "int2", "int4", "int8")


@dataclasses.dataclass(frozen=True)
class Fall:
    """A layer that gets another width than a plan wanted.

    Attributes:
        path: The layer.
        wanted: Name of the weight quantizer in the plan.
        taken: The next wider one that a kernel runs.
        reasons: `(width/kernel, why it refused)`, in the order in which they were asked.
    """

    path: str
    wanted: str
    taken: str
    reasons: tuple[tuple[str, str], ...]


def refusals(layer, rows=1):
    """Why the fast kernels refuse the product of a quantized layer.

    Args:
        layer: A built `BitLayer`, packed or not.
        rows: Rows of activations.

    Returns:
        List of `(kernel, reason)`, empty where one of them runs it, or where there is none
        but the reference.
    """
    quantizer = layer.weight_quantizer
    record = PackedTensor(
        tiles=None,
        scale=None,
        offset=quantizer.offset,
        bits=quantizer.bits,
        in_features=layer.in_features,
        out_features=layer.out_features,
        group_size=quantizer.group_size,
    )
    x = keras.KerasTensor((rows, layer.in_features), dtype=layer.compute_dtype)
    answers = explain(Problem.of(x, record, layer.activation_quantizer))
    fast = [answer for answer in answers if answer[0] != "reference"]
    return [] if any(reason is None for _, reason in fast) else fast


def runnable_plan(model, plan, hierarchy=HIERARCHY, rows=1):
    """Replaces the widths of a plan that no fast kernel of this machine and backend runs.

    Such a layer falls to the next wider quantizer of the hierarchy that one runs, all other
    arguments kept. Where none runs at any width, it keeps what the plan wanted: the
    reference runs everything.

    Args:
        model: The float model, built.
        plan: `PrecisionPlan` for it.
        hierarchy: Names of weight quantizers, narrow to wide.
        rows: Rows of activations that the kernels are asked about.

    Returns:
        `(plan, falls)`: a plan with a rule for each layer, and a list of `Fall`.
    """
    rules, falls = {}, []
    for path, layer in named_layers(model):
        if twin_of(layer) is None:
            continue
        spec = plan.spec_for(path)
        if spec is not None:
            spec, fall = _next_runnable(path, layer, spec, hierarchy, rows)
            falls += [fall] if fall else []
        rules[f"^{re.escape(path)}$"] = spec
    return PrecisionPlan(rules), falls


def _next_runnable(path, layer, spec, hierarchy, rows):
    wanted = quantizers.get(spec["weight_quantizer"]).name
    wider = hierarchy[hierarchy.index(wanted) + 1 :] if wanted in hierarchy else ()
    reasons: list[tuple[str, str]] = []
    for name in (None, *wider):
        tried = spec if name is None else {**spec, "weight_quantizer": name}
        found = refusals(built_twin(layer, tried), rows)
        if not found:
            return tried, Fall(path, wanted, name, tuple(reasons)) if name else None
        reasons += [(f"{name or wanted}/{kernel}", reason) for kernel, reason in found]
    return spec, None


def built_twin(layer, spec, **changes):
    """A built quantized twin of a float layer, with weights of its own."""
    twin = twin_of(layer, {**spec, **changes})
    twin.build_from_config(layer.get_build_config())
    return twin
