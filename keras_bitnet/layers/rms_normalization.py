"""Keras's RMS normalization with a kernel of its own where there is one."""

import keras

from keras_bitnet.kernels.norm import rms_norm


@keras.saving.register_keras_serializable("keras_bitnet")
class RMSNormalization(keras.layers.RMSNormalization):
    """`keras.layers.RMSNormalization`, one operator where there is one: see `kernels.norm`.

    Arguments and weights are those of Keras's layer, so are the results but for rounding.
    """

    def call(self, inputs):
        """Normalizes `(..., features)`."""
        if self.axis != [-1]:
            return super().call(inputs)
        return rms_norm(inputs, self.scale, self.epsilon)
