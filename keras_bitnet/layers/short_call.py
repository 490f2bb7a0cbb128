"""Calls that pass by what Keras would do around them for nothing."""

import inspect
from typing import Any

import keras

_EAGER = keras.backend.backend() == "torch"  # the others compile their calls
_STOCK = keras.Layer.__call__  # put in its place, another wants to see every call
if _EAGER:
    import torch

    with keras.device("cpu"):
        _PROBE = keras.Variable(0.0, dtype="float64")  # of another dtype where Keras autocasts


class ShortCall(keras.Layer):
    """Mixin of `BitLayer`: later eager calls of a packed layer in PyTorch are shorter.

    `keras.Layer.__call__` converts and checks inputs, finds `training` and masks, opens scopes and
    adds losses, which takes several times a small product. Where it had nothing of this to do for
    an input, it has nothing to do for others of that shape and dtype: they go straight to what it
    calls in the end, the PyTorch module with its hooks.
    """

    _let_through: Any = None  # the kind of inputs that are known to need no more

    def __call__(self, *args, **kwargs):
        """As `keras.Layer.__call__`."""
        kind = None
        if _EAGER and keras.Layer.__call__ is _STOCK and not torch.compiler.is_compiling():
            kind = self._kind_of(*args, **kwargs)
        if kind is not None and kind == self._let_through:
            return super(keras.Layer, self).__call__(args[0])
        result = super().__call__(*args, **kwargs)
        if kind is not None and self._left_alone(args[0], result):
            self._let_through = kind
        return result

    def _kind_of(self, *args, training=None, **others):
        """The kind of an input that Keras leaves alone as long as the layer does not change."""
        # Where a layer is left alone, nothing in it asks for `training`.
        if len(args) != 1 or others or type(args[0]) is not torch.Tensor:
            return None
        x = args[0]
        scopes = _PROBE.dtype != "float64" or keras.distribution.distribution() is not None
        adds = self.activity_regularizer is not None or hasattr(x, "_keras_mask")
        return None if scopes or adds or not self.packed else (x.shape, x.dtype, self.dtype_policy)

    def _left_alone(self, x, result):
        """Whether Keras, which let `x` through, did nothing else in that call."""
        dtype = keras.backend.standardize_dtype(x.dtype)
        asks_for_training = (
            len(inspect.signature(self.call).parameters) > 1
            or isinstance(self.activation, keras.Layer)
            or getattr(self.activation_quantizer, "momentum", None) is not None
        )
        converts = not dtype == self.compute_dtype == self.variable_dtype
        return not (converts or asks_for_training or hasattr(result, "_keras_mask"))
