"""Statistics of quantized layers, as plain functions that return plain numbers."""

import contextlib

import numpy as np
from keras import ops

from keras_bitnet.ops.packed_tensor import expand_scale

WEIGHT_STATISTICS = (
    "share_zero",
    "share_lowest",
    "share_highest",
    "flip_rate",
    "weight_sqnr",
    "absmax",
    "saturation",
    "scale",
)
ACTIVATION_STATISTICS = ("activation_sqnr", "activation_absmax")


def signal_to_noise(signal, noise):
    """`10 log10(signal / noise)` of two powers, in dB; infinite without noise."""
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def layer_codes(layer):
    """The codes of the kernel as an array `uint8 (in, out)`."""
    return ops.convert_to_numpy(layer.quantized_matrix().codes)


_HALF_STEP = 0.5 + 1e-5  # a scale trained as a logarithm rounds


def layer_statistics(layer, previous_codes=None):
    """Describes what quantization does to the kernel of a layer.

    Args:
        layer: A built `BitLayer`, not packed.
        previous_codes: Earlier codes of it, as `layer_codes` returns them, or `None`.

    Returns:
        Dict of floats.
        `share_zero`, `share_lowest`, `share_highest`: share of the weights at level 0 and at
        the ends of the grid, for ternary weights those at 0, -1 and +1;
        `flip_rate`: share of the codes that differ from `previous_codes` (`None` without);
        `weight_sqnr`: `10 log10(sum w^2 / sum (w - quantized w)^2)`, in dB;
        `absmax`: largest `|w|`; `saturation`: share of the weights more than half a step outside
        the grid, which clipping moves further than rounding could; `scale`: mean scale.

    Raises:
        ValueError: The layer has no float kernel, or `previous_codes` another shape.
    """
    if layer.kernel is None:
        raise ValueError(
            f"Layer '{layer.name}' has no float kernel: statistics need a layer that is built "
            f"and not packed. Received: built={layer.built}, packed={layer.packed}"
        )
    quantizer = layer.weight_quantizer
    quantized = layer.quantized_matrix()
    weight = ops.convert_to_numpy(layer.kernel_matrix()).astype("float32")
    codes = ops.convert_to_numpy(quantized.codes)
    step = expand_scale(quantized.scale, weight.shape[0], quantizer.group_size)
    step = ops.convert_to_numpy(step)
    levels = codes.astype("float32") + np.float32(quantized.offset)
    ratio = weight / step
    outside = (ratio < quantizer.lowest - _HALF_STEP) | (ratio > quantizer.highest + _HALF_STEP)
    return {
        "share_zero": _share(levels == 0),
        "share_lowest": _share(levels == quantizer.lowest),
        "share_highest": _share(levels == quantizer.highest),
        "flip_rate": None if previous_codes is None else _flips(layer, codes, previous_codes),
        "weight_sqnr": signal_to_noise(_power(weight), _power(weight - levels * step)),
        "absmax": float(np.max(np.abs(weight))),
        "saturation": _share(outside),
        "scale": float(np.mean(ops.convert_to_numpy(quantized.scale))),
    }


def _share(condition):
    return float(np.mean(condition))


def _power(array):
    return float(np.sum(np.square(array, dtype="float64")))


def _flips(layer, codes, previous):
    if codes.shape != previous.shape:
        raise ValueError(
            f"`previous_codes` must have the shape of the codes of layer '{layer.name}', "
            f"{codes.shape}. Received: previous_codes.shape={previous.shape}"
        )
    return _share(codes != previous)


def activation_statistics(model, inputs, layers):
    """Describes what quantization does to the inputs of layers, on one batch.

    Runs the model once, eagerly and in inference mode, with `layer.product` of each layer
    replaced for that time by a function that looks at its input.

    Args:
        model: `keras.Model`.
        inputs: One batch of its inputs, as `model(inputs)` takes them.
        layers: `BitLayer`s of the model.

    Returns:
        List with a dict for each layer: `activation_absmax`, the largest magnitude that the
        activation quantizer sees (so, after a pre-norm), and `activation_sqnr`, in dB, at full
        strength. Empty where the model did not use the layer; without `activation_sqnr` where
        its inputs stay float.
    """
    probes = [Probe(layer) for layer in layers]
    with contextlib.ExitStack() as stack:
        for probe in probes:
            stack.enter_context(probe)
        model(inputs, training=False)
    return [probe.statistics() for probe in probes]


class Probe:
    """Context manager in which all uses of a layer are seen: adds up powers of signal and noise.

    Args:
        layer: A `BitLayer`. Its `product` is replaced meanwhile.
    """

    def __init__(self, layer):
        self.layer = layer
        self.signal = self.noise = self.absmax = 0.0
        self.used = False

    def __enter__(self):
        product = self.layer.product

        def probed(x, window=None):
            self.look(x if window is None else window.patches(x))
            return product(x, window)

        self.layer.product = probed

    def __exit__(self, *exception):
        del self.layer.product  # the instance's, which hid the method of the class

    def look(self, x):
        """Takes in the inputs `(..., in_features)` of one use."""
        layer = self.layer
        x = ops.cast(layer.quantizer_inputs(x), "float32")
        values = ops.convert_to_numpy(x)
        self.used = True
        self.absmax = max(self.absmax, float(np.max(np.abs(values), initial=0)))
        if layer.activation_quantizer is not None:
            rounded = ops.convert_to_numpy(layer.fake_quantize_inputs(x))
            self.signal += _power(values)
            self.noise += _power(values - rounded)

    def statistics(self):
        """See `activation_statistics`."""
        if not self.used:
            return {}
        found = {"activation_absmax": self.absmax}
        if self.layer.activation_quantizer is not None:
            found["activation_sqnr"] = signal_to_noise(self.signal, self.noise)
        return found
