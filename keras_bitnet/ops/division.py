"""Division to the last bit, on every device."""

import keras


def divide(x, y):
    """`x / y` in `float32`, rounded as IEEE says: the codes of a ratio are the same on all devices.

    On a GPU XLA divides approximately, so what the quotient leaves there is divided once more.

    Args:
        x, y: Float32 tensors that broadcast; no gradient is asked for.

    Returns:
        Tensor of their shape.
    """
    quotient = x / y
    if keras.backend.backend() != "jax":
        return quotient
    import jax

    return refined(x, quotient, y) if jax.default_backend() == "gpu" else quotient


def refined(x, quotient, y):
    """The nearest quotient of `x / y`, of one in JAX that is off by units in the last place."""
    from jax import lax
    from jax import numpy as jnp

    inverse = 1 / y
    if y.size < x.size:  # computed once, not for every number that is divided
        inverse = lax.optimization_barrier(inverse)
    (q, q_low), (d, d_low) = _halves(quotient), _halves(y)
    # Exact, whether products are fused with the differences or not: they have 24 bits at most.
    rest = ((x - q * d) - q * d_low - q_low * d) - q_low * d_low
    nearest = quotient + rest * inverse
    return jnp.where(jnp.isfinite(nearest), nearest, quotient)


def _halves(x):
    """A number as the sum of two with 12 bits each."""
    from jax import lax
    from jax import numpy as jnp

    high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & -4096, jnp.float32)
    return high, x - high
