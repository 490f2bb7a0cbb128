"""Low-bit neural networks in Keras 3: train, save, pack and run.

    qat = keras_bitnet.quantize_model(model, "ternary")  # or build with keras_bitnet.layers
    qat.fit(x, y)
    packed = keras_bitnet.pack_model(qat)
    packed.save("packed.keras")  # `import keras_bitnet` before it is loaded

`calibrate`, `suggest_precision` and `quantization_report` look at data, `summary` and `explain` at
models; `callbacks` schedule the training, `models` and `interop` are for language models.
"""

import pathlib
import sys
from importlib.metadata import PackageNotFoundError, version


def _command_line_starts():
    """Whether this is the process of `keras-bitnet`, which imports the rest when it needs it.

    Its help then comes at once. Everybody else gets every name, and every layer registered.
    """
    if "keras_bitnet.cli" in sys.modules:
        return False
    module_run = sys.argv[:1] == ["-m"] and "keras_bitnet" in sys.orig_argv
    return module_run or pathlib.Path(*sys.argv[:1]).stem == "keras-bitnet"


if not _command_line_starts():
    from keras_bitnet import callbacks, interop, kernels, layers, models, ops, quantizers
    from keras_bitnet.kernels.select import explain
    from keras_bitnet.loading import load_model
    from keras_bitnet.precision import PrecisionPlan, suggest_precision
    from keras_bitnet.report import benchmark_layers, quantization_report, summary
    from keras_bitnet.transforms import calibrate, pack_model, quantize_model, unpack_model

__all__ = [
    "PrecisionPlan",
    "benchmark_layers",
    "calibrate",
    "callbacks",
    "explain",
    "interop",
    "kernels",
    "layers",
    "load_model",
    "models",
    "ops",
    "pack_model",
    "quantization_report",
    "quantize_model",
    "quantizers",
    "suggest_precision",
    "summary",
    "unpack_model",
]

try:
    __version__ = version("keras-bitnet")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"
