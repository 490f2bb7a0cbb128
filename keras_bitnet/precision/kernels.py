"""When no kernel runs a width on this machine, the next width that one runs, with the reasons."""

import dataclasses
import itertools
import re

import keras

from keras_bitnet import quantizers
from keras_bitnet.kernels.select import Problem, explain
from keras_bitnet.layers.kernel_weights import layout_for
from keras_bitnet.ops.packed_tensor import PackedTensor
from keras_bitnet.report.latency import multiplies
from keras_bitnet.report.pairs import inner_layers
from keras_bitnet.transforms.precision_plan import PRECISIONS, PrecisionPlan
from keras_bitnet.transforms.quantize import twin_of
from keras_bitnet.transforms.rewrite import named_layers


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


def refusals(layer, rows=1, memory="fastest"):
    """Why the fast kernels refuse the products of a quantized layer.

    Args:
        layer: A built `BitLayer`, packed or not, or a block of such layers.
        rows: Rows of activations.
        memory: As in `pack_model`.

    Returns:
        List of `(kernel, reason)`, empty where one of them runs every product, where there is
        none but the reference, and for layers that use none (lookups, depthwise convolutions).
    """
    found = [_refusals(inner, rows, memory) for inner in inner_layers(layer) if multiplies(inner)]
    return list(dict.fromkeys(itertools.chain(*found)))


def _refusals(layer, rows, memory):
    quantizer = layer.weight_quantizer
    record = PackedTensor(
        tiles=None,
        scale=None,
        offset=quantizer.offset,
        bits=quantizer.bits,
        in_features=layer.in_features,
        out_features=layer.out_features,
        group_size=quantizer.group_size,
        layout=layout_for(memory, quantizer),
    )
    x = keras.KerasTensor((rows, layer.in_features), dtype=layer.compute_dtype)
    answers = explain(Problem.of(x, record, layer.activation_quantizer))
    fast = [answer for answer in answers if answer[0] != "reference"]
    return [] if any(reason is None for _, reason in fast) else fast


def runnable_plan(model, plan, precisions=PRECISIONS, rows=1, memory="fastest"):
    """Replaces the widths of a plan that no fast kernel of this machine and backend runs.

    Such a layer falls to the next wider of `precisions` that one runs, all other
    arguments kept. Where none runs at any width, it keeps what the plan wanted: the
    reference runs everything.

    Args:
        model: The float model, built.
        plan: `PrecisionPlan` for it.
        precisions: Names of weight quantizers, narrow to wide.
        rows: Rows of activations that the kernels are asked about.
        memory: As in `pack_model`.

    Returns:
        `(plan, falls)`: a plan with a rule for each layer, and a list of `Fall`.
    """
    rules, falls = {}, []
    for path, layer in named_layers(model):
        if twin_of(layer) is None:
            continue
        spec = plan.spec_for(path)
        if spec is not None:
            spec, fall = _next_runnable(path, layer, spec, precisions, rows, memory)
            falls += [fall] if fall else []
        rules[f"^{re.escape(path)}$"] = spec
    return PrecisionPlan(rules), falls


def _next_runnable(path, layer, spec, precisions, rows, memory):
    wanted = quantizers.get(spec["weight_quantizer"]).name
    wider = precisions[precisions.index(wanted) + 1 :] if wanted in precisions else ()
    reasons: list[tuple[str, str]] = []
    for name in (None, *wider):
        tried = spec if name is None else {**spec, "weight_quantizer": name}
        found = refusals(_built_twin(layer, tried), rows, memory)
        if not found:
            return tried, Fall(path, wanted, name, tuple(reasons)) if name else None
        reasons += [(f"{name or wanted}/{kernel}", reason) for kernel, reason in found]
    return spec, None


def _built_twin(layer, spec):
    """A built quantized twin of a float layer, with weights of its own."""
    twin = twin_of(layer, spec)
    twin.build_from_config(layer.get_build_config())
    return twin
