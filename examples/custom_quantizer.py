"""A quantizer of your own: ternary weights whose scale is a power of two.

On fixed-point hardware such a scale is a shift. The quantizer is one class; it trains, packs
and saves like those of the package.

    KERAS_BACKEND=jax python examples/custom_quantizer.py
"""

import keras
import numpy as np
from keras import ops
from sklearn.datasets import load_digits

import keras_bitnet
from keras_bitnet.layers import BitLinear
from keras_bitnet.quantizers import Ternary


@keras.saving.register_keras_serializable("examples")
class ShiftTernary(Ternary):
    """Ternary with `scale = 2 ** round(log2(mean |w|))`."""

    def compute_scale(self, weight):
        return 2.0 ** ops.round(ops.log2(super().compute_scale(weight)))


x, y = load_digits(return_X_y=True)  # 1,797 images of 8 x 8
quantizer = ShiftTernary(granularity="channel")
model = keras.Sequential(
    [
        keras.Input((64,)),
        BitLinear(128, "relu", norm="rms", weight_quantizer=quantizer),
        BitLinear(10, norm="rms", weight_quantizer=quantizer),
    ]
)
model.compile(
    keras.optimizers.Adam(5e-3),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(x[:1400], y[:1400], epochs=15, verbose=0)
packed = keras_bitnet.pack_model(model, verbose=0)
scales = np.log2(ops.convert_to_numpy(packed.layers[0].kernel_scale))
print("exponents of the scales:", sorted({int(v) for v in scales.ravel()}))
print("accuracy:", (packed.predict(x[1400:], verbose=0).argmax(-1) == y[1400:]).mean())
