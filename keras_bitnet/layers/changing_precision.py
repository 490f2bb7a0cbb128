"""Another weight quantizer for a layer that is built, and a trace of it in files of weights."""

import json

import keras
import numpy as np

from keras_bitnet import quantizers

_ENTRY = "kernel_quantizer"


class ChangingPrecision(keras.Layer):
    """Mixin of `BitLayer` and of blocks of them: `change_precision`.

    Where it was called, or `save_precisions`, files of weights say which quantizer the layer has,
    so that weights loaded into a layer of another one (`BackupAndRestore` does that) bring it.
    """

    _precision_saved = False

    def change_precision(self, weight_quantizer):
        """Gives the layer another weight quantizer; the float kernel stays.

        A learned scale starts again from the kernel. What was traced or compiled before keeps
        the old quantizer: `keras_bitnet.callbacks.AdaptivePrecision` sees to that within `fit`.

        Args:
            weight_quantizer: As in the constructor. It has a learned scale of the same shape
                where the present one has, and none where it has none: a scale that is trained
                is a variable.

        Raises:
            ValueError: The layer is packed, or the scales do not match.
        """
        quantizer = quantizers.get(weight_quantizer)
        layers = (self, *self.layers_of_one_precision())
        for layer in layers:
            layer.check_precision(quantizer)
        for layer in layers:
            layer.take_quantizer(quantizer)
        self.save_precisions()

    def save_precisions(self):
        """Makes files of weights say which quantizer this layer has, and those inside."""
        for layer in (self, *self.layers_of_one_precision()):
            layer._precision_saved = True

    def layers_of_one_precision(self):
        """What is inside and changes with this layer."""
        return []

    def check_precision(self, quantizer):
        """Raises a `ValueError` where the layer cannot have this quantizer; a block can."""

    def take_quantizer(self, quantizer):
        """Sets the quantizer."""
        self.weight_quantizer = quantizer

    def save_precision(self, store):
        """Adds the quantizer to the saved weights, where they are to say it."""
        if self._precision_saved:
            text = json.dumps(quantizers.serialize(self.weight_quantizer))
            store[_ENTRY] = np.frombuffer(text.encode(), np.uint8)

    def load_precision(self, found):
        """Takes the quantizer out of a dictionary of saved weights and follows it."""
        text = found.pop(_ENTRY, None)
        if text is not None:
            self.change_precision(quantizers.deserialize(json.loads(np.asarray(text).tobytes())))
