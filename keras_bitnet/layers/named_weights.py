"""How the quantized layers save: every weight under its name, ternary codes five to a byte."""

import numpy as np
from keras import ops

from keras_bitnet.kernels import native
from keras_bitnet.layers.changing_precision import ChangingPrecision
from keras_bitnet.layers.large_weights import fill, parts_of
from keras_bitnet.ops import layout


class NamedWeights(ChangingPrecision):
    """Mixin of `BitLayer`: `save_own_variables` and `load_own_variables` by name."""

    def own_weights(self):
        """The layer's own variables by name, those of its normalization left out."""
        return {v.name: v for v in (*self._trainable_variables, *self._non_trainable_variables)}

    def save_own_variables(self, store):
        """Writes the variables under their names; ternary codes five to a byte."""
        for name, variable in self.own_weights().items():
            if name == "kernel_tiles" and self._saves_trits:
                codes = ops.convert_to_numpy(self.packed_kernel.codes())
                store["kernel_trits"] = layout.pack_trits(codes)
            else:
                store[name] = ops.convert_to_numpy(variable)
        self.save_precision(store)

    def load_own_variables(self, store):
        """Reads what `save_own_variables` wrote, or the weights of the Keras layer it replaces.

        Raises:
            ValueError: A weight is missing, has another shape, or holds impossible values.
        """
        found = {name: parts_of(store, name) for name in store.keys()}  # noqa: SIM118 (no mapping)
        self.load_precision(found)
        if not self.packed and found.keys() and found.keys() <= {"0", "1"}:
            self._load_stock(found)
            return
        expected = {
            "kernel_trits" if name == "kernel_tiles" and self._saves_trits else name
            for name in self.own_weights()
        }
        if found.keys() != expected:
            raise ValueError(
                f"Layer '{self.name}' ({'packed' if self.packed else 'not packed'}) expects the "
                f"weights {sorted(expected)}. Received: {sorted(found)}. Load the file with "
                "`keras.models.load_model`, or into a model of the same kind."
            )
        for name, value in found.items():
            if name == "kernel_trits":
                name, value = "kernel_tiles", self._tiles_from_trits(np.asarray(value))
            self._assign(name, value)
        if self.packed and not np.isfinite(ops.convert_to_numpy(self.kernel_scale)).all():
            raise ValueError(f"The saved scale of layer '{self.name}' holds a NaN or an infinity.")

    def _load_stock(self, found):
        """Reads the weights "0" (kernel) and "1" (bias) that a stock Keras layer saves."""
        self._assign("kernel", found["0"])
        self.take_kernel(self.kernel)
        if "1" in found:
            self._assign("bias", found["1"])

    def _assign(self, name, value):
        variable = self.own_weights().get(name)
        if variable is None or tuple(variable.shape) != tuple(value.shape):
            wanted = "no such weight" if variable is None else f"shape {tuple(variable.shape)}"
            raise ValueError(
                f"Weight '{name}' of layer '{self.name}': the layer has {wanted}. "
                f"Received: shape {tuple(value.shape)}"
            )
        fill(variable, value)

    def _tiles_from_trits(self, trits):
        if trits.shape[1:] != (self.out_features,):
            found = trits.shape[1] if trits.ndim == 2 else f"shape {trits.shape}"
            raise ValueError(
                f"The packed kernel of layer '{self.name}' has {self.out_features} outputs. "
                f"Received: data of {found}"
            )
        if self.packed_layout == "tiles" and native.library() is not None:
            return native.tiles_from_trits(trits, self.in_features)
        return layout.tiles_from_trits(trits, self.in_features, self.packed_layout)

    @property
    def _saves_trits(self):
        return self.packed and self.weight_quantizer.level_count == 3
