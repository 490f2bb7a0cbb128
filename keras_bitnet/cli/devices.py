"""`keras-bitnet devices`."""

import importlib

NAME = "devices"
HELP = "Show the devices, the native library, and which kernel would run at each width."
EXAMPLES = ("", "--backend torch", "--json")
WIDTHS = {"binary": 1, "ternary": 2, "int4": 4, "int8": 8}


def add_arguments(parser):
    """Adds no arguments of its own."""


def run(arguments):
    """Asks the backend, the native library and the kernel table."""
    import keras

    backend = keras.backend.backend()
    return {
        "kernels": [row for name, bits in WIDTHS.items() for row in _kernels(name, bits)],
        "backend": backend,
        "version": importlib.import_module(backend).__version__,
        "keras": keras.__version__,
        "devices": _devices(backend),
        "native_library": _native_library(),
    }


def _devices(backend):
    if backend == "torch":
        import torch

        cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ["cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else [])]
    import keras

    return keras.distribution.list_devices()


def _native_library():
    from keras_bitnet.kernels import native

    reason = native.reason()
    return reason or f"{native.isa()} of {', '.join(native.isas())}; {native.threads()} threads"


def _kernels(name, bits):
    from keras import ops

    from keras_bitnet.kernels import Problem, explain

    problem = Problem(
        in_features=1024,
        out_features=1024,
        bits=bits,
        group_size=None,
        dtype="float32",
        activation_bits=8,
        activation_granularity="token",
        activation_formula="absmax",
        device=str(ops.zeros(1).device),
    )
    return [
        {"weights": name, "kernel": kernel, "runs": "yes" if reason is None else f"no: {reason}"}
        for kernel, reason in explain(problem)
    ]
