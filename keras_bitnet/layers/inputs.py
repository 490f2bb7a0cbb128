"""What a quantized layer does to its inputs, in one order.

    norm -> smoothing -> rotation -> split of kept channels -> quantize

Each step has its opposite in the kernel, so that none of them changes the float layer.
"""

import contextlib
from typing import Any

import keras
from keras import ops

from keras_bitnet.checks import check_choice, check_number, check_own_names
from keras_bitnet.layers.kept_channels import KeptChannels
from keras_bitnet.ops.hadamard import hadamard
from keras_bitnet.ops.magnitude import largest_magnitude

_SPARSE: Any = ()  # what a backend gives for `keras.Input(..., sparse=True)`
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    _SPARSE = tf.SparseTensor
elif keras.backend.backend() == "jax":
    from jax.experimental import sparse

    _SPARSE = sparse.JAXSparse

# For `own_names` of a layer that does nothing to its inputs but quantize them.
UNTREATED: dict[str, str | None] = dict.fromkeys(
    ("smoothing", "rotation", "kept_channels", "kept_bits")
)
# The weight that scales the output of a norm, and the one that shifts it.
_NORM_GAINS = {"rms": ("scale",), "layer": ("gamma", "beta")}


class InputTreatment(KeptChannels):
    """Mixin of `BitLayer`: smoothing, rotation, static scales.

    Args:
        smoothing: `None`, or alpha in [0, 1]: `calibrate` divides every input channel by
            `max |x|^alpha / max |w|^(1 - alpha)` and multiplies the rows of the kernel by it.
            The division is a weight `input_gain`, or part of the gain of a norm before it.
        rotation: `None` or `"hadamard"`: the inputs are rotated by a block-diagonal Hadamard
            matrix before they are quantized, the kernel is kept rotated. See `ops.hadamard`.
        kept_channels, kept_bits: See `KeptChannels`.

    Source:
        Xiao et al. 2022, SmoothQuant (https://arxiv.org/abs/2211.10438); Wang et al. 2025,
        BitNet v2 (https://arxiv.org/abs/2504.18415).
    """

    takes_static = True  # whether the activation scale can be a weight of the layer
    _look: Any = None

    def __init__(self, *, smoothing=None, rotation=None, **kwargs):
        super().__init__(**kwargs)
        check_own_names(self, smoothing=smoothing, rotation=rotation)
        check_choice("rotation", rotation, (None, "hadamard"))
        if smoothing is not None:
            check_number("smoothing", smoothing, "[0, 1]")
        self.smoothing = smoothing
        self.rotation = rotation
        self.input_gain: Any = None
        self.activation_scale: Any = None
        self.input_absmax: Any = None
        self.follow_in_inference: Any = None

    @property
    def static(self):
        """Whether the activation scale is a weight of the layer."""
        return getattr(self.activation_quantizer, "granularity", None) == "static"

    @property
    def calibrated(self):
        """Whether a static activation scale has been found, by calibration or by training."""
        return self.static and float(ops.convert_to_numpy(self.activation_scale)) > 0

    def build_inputs(self):
        """Creates the weights of the inputs; `build_kernel` calls it."""
        if self.smoothing is not None and not self._norm_first:
            self.input_gain = self._fixed_weight("input_gain", (self.in_features,), "ones")
        if self.static:
            # 0 is not calibrated. A packed layer always has a scale: to build a subclassed model
            # on PyTorch Keras may run it before its weights are there, and kernels refuse 0.
            initial = "ones" if self.packed else "zeros"
            self.activation_scale = self._fixed_weight("activation_scale", (), initial)
            self.input_absmax = self._fixed_weight("input_absmax", (self.in_features,))
            if self.activation_quantizer.momentum is not None:
                self.follow_in_inference = self._fixed_weight("follow_in_inference", (), dtype=bool)

    def _fixed_weight(self, name, shape, initializer="zeros", dtype="float32"):
        return self.add_weight(
            name=name, shape=shape, initializer=initializer, dtype=dtype, trainable=False,
            autocast=False,
        )  # fmt: skip

    # -- inputs and their opposite in the kernel -------------------------------------------

    def floating(self, x):
        """Dense inputs, integers in the compute dtype: Keras casts floats only."""
        if isinstance(x, _SPARSE):
            x = ops.convert_to_tensor(x, sparse=False)
        return x if keras.backend.is_float_dtype(x.dtype) else ops.cast(x, self.compute_dtype)

    def normalize_inputs(self, x):
        """The norm before the product, if the layer has one."""
        # `call` alone: what Keras does around it took as long again in eager PyTorch.
        return self.normalization.call(x) if self._norm_first else x

    @property
    def norm_alone(self):
        """Whether an RMS norm of the inputs is all that is done before they are quantized."""
        return self.norm == "rms" and self._norm_first and self._untreated

    @property
    def quantized_alone(self):
        """Whether nothing else is done before they are quantized."""
        return self._untreated and (not self._norm_first or self.norm == "rms")

    @property
    def _untreated(self):
        follows = getattr(self.activation_quantizer, "momentum", None) is not None
        treated = self.input_gain is not None or self.rotation or self.kept_channels or follows
        return not treated

    def smooth(self, x):
        """Inputs divided by the smoothing factors, `(..., in_features)`."""
        return x if self.input_gain is None else x * ops.cast(self.input_gain, x.dtype)

    def rotate(self, x):
        """Smoothed inputs in the basis of the kernel, `(..., in_features)`."""
        return x if self.rotation is None else hadamard(x)

    def rotate_rows(self, matrix):
        """The kernel `(in_features, out_features)` to rotated inputs; twice gives it back."""
        return ops.transpose(self.rotate(ops.transpose(matrix)))

    def adapt_matrix(self, matrix):
        """The kernel of a float layer `(in_features, out_features)` for the treated inputs.

        Both are `float32`, whatever the dtype of the variable: so are the factors.
        """
        if self.input_gain is not None:
            matrix = matrix / ops.convert_to_tensor(self.input_gain)[:, None]
        return self.rotate_rows(matrix)

    def divide_inputs(self, factor):
        """Divides every smoothed input by a factor and multiplies the kernel by it.

        Args:
            factor: Positive array `(in_features,)`.
        """
        factor = ops.cast(factor, "float32")
        gains = [self.input_gain]
        if self._norm_first:
            gains = [getattr(self.normalization, name) for name in _NORM_GAINS[self.norm]]
        for gain in gains:
            gain.assign(gain / ops.cast(factor, gain.dtype))
        if self._norm_first and self.lora_enabled:  # LoRA reads what the norm gives
            rows = ops.cast(self.lora_kernel_a, "float32")
            self.lora_kernel_a.assign(rows * factor[:, None])
        matrix = self.rotate_rows(self.kernel_matrix()) * factor[:, None]
        self.kernel.assign(self.matrix_to_kernel(self.rotate_rows(matrix)))
        self.reset_scale()

    @property
    def _norm_first(self):
        return self.normalization is not None and self.norm_position == "pre"

    # -- quantization ----------------------------------------------------------------------

    def quantizer_inputs(self, x):
        """What the activation quantizer sees of inputs `(..., in_features)`."""
        return self.split_channels(self.rotate(self.smooth(self.normalize_inputs(x))))[0]

    def fake_quantize_inputs(self, x, strength=None):
        """The activations of QAT of what `quantizer_inputs` gives."""
        return self.activation_quantizer.fake_quantize(x, self.scale_for(x), strength)

    def scale_for(self, x):
        """The static scale for quantizer inputs, or `None` where it is computed from them.

        With a momentum it follows the inputs first, in training, or where
        `follow_in_inference` says so. Never calibrated, it is that of the inputs at hand.
        """
        if not self.static:
            return None
        scale = ops.convert_to_tensor(self.activation_scale)
        momentum = self.activation_quantizer.momentum
        if self.packed and momentum is None:
            return scale  # packing saw to it that there is one
        axes, least = tuple(range(len(x.shape))), self.activation_quantizer.epsilon
        seen = ops.reshape(largest_magnitude(ops.cast(x, "float32"), axes, least), ())
        seen = seen / self.activation_quantizer.highest
        if momentum is not None:
            moved = ops.where(scale > 0, momentum * scale + (1 - momentum) * seen, seen)
            follow = self._in_training() or ops.convert_to_tensor(self.follow_in_inference)
            # A NaN would stay for good; a compiled maximum may pass over it.
            follow = ops.logical_and(follow, ops.all(ops.isfinite(x)))
            scale = ops.where(follow, moved, scale)
            self.activation_scale.assign(scale)
        return ops.where(scale > 0, scale, seen)

    def _in_training(self):
        # The context of Keras's calls: `call` of the layers takes no `training`.
        context = self._get_call_context()
        if context.entry_layer is self and not hasattr(context, "training"):
            self._maybe_reset_call_context()  # outside of any call: it was made just now
        return bool(getattr(context, "training", False))

    def get_config(self):
        """The arguments of the constructor, where they are not the default."""
        config = {"smoothing": self.smoothing, "rotation": self.rotation}
        return {**super().get_config(), **{k: v for k, v in config.items() if v is not None}}


@contextlib.contextmanager
def watch_inputs(layers, look):
    """While it is open, `look(layer, x)` sees the smoothed inputs, which are not quantized.

    It acts where the layers are called, or traced, inside the block.

    Args:
        layers: `BitLayer`s.
        look: Function of a layer and its inputs `(..., in_features)` after norm and smoothing.
    """
    for layer in layers:
        layer._look = look
    try:
        yield
    finally:
        for layer in layers:
            layer._look = None
