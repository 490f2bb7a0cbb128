"""How XLA splits a packed matmul over devices: by rows of activations and by outputs, locally.

Without a rule it gathers every operand of a call that it does not know, the weights too.
"""

import functools
import inspect
import math

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

_TILE_OUTPUTS = 16


def partitioned(function, facts, *operands):
    """Calls a kernel so that each device computes its rows and outputs from what it holds.

    Outputs are split as the tiles are, where each device gets whole tiles; rows as those of `x`,
    unless one scale of all activations needs them all, or the tiles take the axis of the mesh.
    Inputs are never split: a token's scale is of all of them. Nor are images: windows overlap.

    Args:
        function: `function(facts, x, tiles, scale, bias, x_scale)`.
        facts: `keras_bitnet.kernels.cpu.Facts`.
        *operands: Its other arguments, tensors or `None`.

    Returns:
        What the function gives, `(..., out_features)`.
    """

    if jax.device_count() == 1:
        return function(facts, *operands)
    whole = jax.jit(functools.partial(function, facts))  # constants within it are no operands

    @custom_partitioning
    def call(*operands):
        return whole(*operands)

    def specs(mesh, shapes):
        x, tiles, scale, bias, x_scale = shapes
        outputs = _spec(tiles)[0]
        if facts.out_features % (_TILE_OUTPUTS * _size(mesh, outputs)):
            outputs = None
        taken = _names([outputs])  # rows move rather than weights
        rows = [None if facts.per_tensor or taken & _names([r]) else r for r in _spec(x)[:-1]]
        spatial = _spatial_axes(facts)
        rows[len(rows) - spatial :] = [None] * spatial
        wanted = (
            PartitionSpec(*rows, None),
            PartitionSpec(outputs, None, None, None),
            PartitionSpec(None, outputs if scale.shape[1] > 1 else None),
            None if bias is None else PartitionSpec(outputs),
            None if x_scale is None else PartitionSpec(*[None] * len(x_scale.shape)),
        )
        operands = [None if s is None else NamedSharding(mesh, s) for s in wanted]
        return tuple(operands), NamedSharding(mesh, PartitionSpec(*rows, outputs)), outputs

    def infer(mesh, shapes, result):
        return specs(mesh, shapes)[1]

    def partition(mesh, shapes, result):
        given, y, outputs = specs(mesh, shapes)
        own = facts._replace(out_features=facts.out_features // _size(mesh, outputs))
        return mesh, lambda *parts: function(own, *parts), y, given

    options = {"infer_sharding_from_operands": infer, "partition": partition}
    if "sharding_rule" in inspect.signature(call.def_partition).parameters:
        options |= _rule(facts, *operands)
    call.def_partition(**options)
    return call(*operands)


def _spatial_axes(facts):
    """Axes of x that are those of images."""
    return 0 if facts.window is None else len(facts.window.size)


def _spec(operand):
    """Of each axis the names of the mesh that split it, or `None`."""
    spec = tuple(operand.sharding.spec)
    return [*spec, *[None] * (len(operand.shape) - len(spec))]


def _names(entries):
    return {n for e in entries if e is not None for n in ((e,) if isinstance(e, str) else e)}


def _size(mesh, entry):
    return math.prod(mesh.shape[name] for name in _names([entry]))


def _rule(facts, x, tiles, scale, bias, x_scale):
    """The same for Shardy: which axes of operands and result are split together."""
    rows = [f"r{i}" for i in range(len(x.shape) - 1)]
    # Of one row of tiles there is nothing to split, and Shardy refuses products with factors of 1.
    tiled = facts.out_features % _TILE_OUTPUTS == 0 and facts.out_features > _TILE_OUTPUTS
    outputs = "(t s)" if tiled else "n"
    whole = len(rows) - _spatial_axes(facts)  # from this axis on x is not split as the result is
    given = [f"p{i}" if facts.per_tensor or i >= whole else r for i, r in enumerate(rows)]
    operands = [
        " ".join([*given, "k"]),
        "t u v w",
        f"g {outputs}" if scale.shape[1] > 1 else "g h",
    ]
    if bias is not None:
        operands.append(outputs)
    if x_scale is not None:
        operands.append(" ".join(f"x{i}" for i in range(len(x_scale.shape))))
    rule = f"{', '.join(operands)} -> {' '.join([*rows, outputs])}"
    return {"sharding_rule": rule, **({"s": _TILE_OUTPUTS} if tiled else {})}
