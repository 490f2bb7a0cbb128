"""Calls that pass by what Keras would do around them for nothing."""

import contextlib
import functools
import inspect
from typing import Any

import keras

_STOCK = keras.Layer.__call__  # put in its place, another wants to see every call
_KINDS = 8  # of inputs that a layer remembers
_UNUSUAL = "float8_e4m3fn"  # no layer computes in it
_aside: Any = contextlib.nullcontext  # a scope in which a variable can be made that no one sees

if keras.backend.backend() == "torch":
    import torch

    _aside = functools.partial(keras.device, "cpu")  # others have not every dtype

    def _is_eager(x):
        return not torch.compiler.is_compiling() and type(x) is torch.Tensor

elif keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    _aside = tf.init_scope  # out of the replicas of a strategy

    def _is_eager(x):
        return tf.executing_eagerly() and isinstance(x, tf.Tensor)

elif keras.backend.backend() == "jax":
    import jax

    _aside = jax.ensure_compile_time_eval

    def _is_eager(x):
        return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)

else:

    def _is_eager(x):
        return False


class ShortCall(keras.Layer):
    """Mixin of `BitLayer`: later eager calls of a packed layer are shorter.

    `keras.Layer.__call__` converts and checks inputs, finds `training` and masks, opens scopes and
    adds losses, which takes several times a small product. Where it had nothing of this to do for
    an input, it has nothing to do for others of that shape and dtype: they go straight to what it
    calls in the end, in PyTorch the module with its hooks.
    """

    _let_through: tuple[Any, ...] = ()  # the kinds of inputs that are known to need no more

    def __call__(self, *args, **kwargs):
        """As `keras.Layer.__call__`."""
        kind = None
        if self.packed and keras.Layer.__call__ is _STOCK:
            kind = self._kind_of(*args, **kwargs)
        if kind in self._let_through:
            return super(keras.Layer, self).__call__(args[0])
        result = super().__call__(*args, **kwargs)
        if kind is not None and self._left_alone(args[0], result):
            self._let_through = (kind, *self._let_through[: _KINDS - 1])
        return result

    def _kind_of(self, *args, training=None, **others):
        """The kind of an input that Keras leaves alone as long as the layer does not change."""
        # Where a layer is left alone, nothing in it asks for `training`.
        if len(args) != 1 or others or not _is_eager(args[0]):
            return None
        x = args[0]
        scopes = _probe().dtype != _UNUSUAL or keras.distribution.distribution() is not None
        adds = self.activity_regularizer is not None or hasattr(x, "_keras_mask")
        adds = adds or bool(self._losses)  # of the last call, which Keras clears
        return None if scopes or adds else (x.shape, x.dtype, self.dtype_policy)

    def _left_alone(self, x, result):
        """Whether Keras, which let `x` through, did nothing else in that call."""
        dtype = keras.backend.standardize_dtype(x.dtype)
        inside = self._flatten_layers(include_self=False, recursive=False)
        asks_for_training = (
            len(inspect.signature(self.call).parameters) > 1
            or any(layer is not self.normalization for layer in inside)
            or getattr(self.activation_quantizer, "momentum", None) is not None
        )
        converts = not dtype == self.compute_dtype == self.variable_dtype
        return not (converts or asks_for_training or hasattr(result, "_keras_mask"))


@functools.cache
def _probe():
    """A variable that is of another dtype where Keras autocasts; not made before, it starts JAX."""
    with _aside():
        # By an initializer: in a stateless scope Keras puts off what that gives.
        return keras.Variable(_zero, shape=(), dtype=_UNUSUAL, trainable=False)


def _zero(shape, dtype):
    return keras.ops.convert_to_tensor(0.0, dtype=dtype)
