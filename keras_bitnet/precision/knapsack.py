"""One precision for each layer, least error within a limit: a multiple-choice knapsack."""

import importlib.util

import numpy as np

# HiGHS takes two plans as equal within 1e-6: errors are scaled so that this is 1e-10 of the
# largest, and among plans that differ by no more than that the cheaper one is taken.
_LARGEST = 1e4
_CHEAPER = 1e-6


def check_scipy():
    """Raises an `ImportError` if scipy is missing."""
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("This needs scipy: `pip install 'keras-bitnet[precision]'`.")


def solve(errors, costs, limit, allowed=None):
    """The multiple-choice knapsack: one precision a layer, least error within a limit.

    Args:
        errors: Array `(layers, precisions)`.
        costs: Array likewise.
        limit: The sum of the costs must not exceed it; it can be met.
        allowed: Array of booleans likewise, all by default.

    Returns:
        Array of integers `(layers,)`: the precisions.

    Raises:
        ValueError: The limit cannot be met.
    """
    import scipy.optimize

    layers, precisions = errors.shape
    allowed = np.ones(errors.shape, bool) if allowed is None else allowed
    scale = _LARGEST / max(errors.max(), 1e-30)
    weights = errors * scale + _CHEAPER * costs / max(costs.max(), 1e-30)
    unit = max(limit, 1e-30)
    one_each = np.kron(np.eye(layers), np.ones(precisions))
    result = scipy.optimize.milp(
        weights.ravel(),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(costs.ravel()[None] / unit, -np.inf, 1 + 1e-9),
        ],
        integrality=np.ones(errors.size),
        bounds=scipy.optimize.Bounds(0, allowed.ravel().astype(float)),
        options={"mip_rel_gap": 0},
    )
    if result.x is None:
        raise ValueError(f"The precisions could not be chosen: {result.message}")
    return result.x.reshape(layers, precisions).argmax(1)
