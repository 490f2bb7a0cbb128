"""`keras-bitnet quantize`."""

from keras_bitnet.cli import common

NAME = "quantize"
HELP = "Turn the layers of a float model into quantized ones, ready for training."
SUFFIX = ".quantized.keras"
EXAMPLES = (
    "model.keras",
    "model.keras --weights int4 --activations none --filters encoder/ -o small.keras",
    "model.keras --activations int4 --smoothing 0.5 --rotation hadamard",
    "model.keras --plan model.plan.json --json",
)
# Name of an argument of the layers: the option that sets it.
SPEC = {
    "weight_quantizer": "weights",
    "activation_quantizer": "activations",
    "norm": "norm",
    "smoothing": "smoothing",
    "rotation": "rotation",
    "kept_channels": "kept_channels",
}


def add_arguments(parser):
    """Adds the arguments."""
    common.add_model(parser)
    common.add_output(parser, SUFFIX)
    parser.add_argument(
        "--plan", metavar="PATH", help="a precision for every layer, as `plan` writes it"
    )
    parser.add_argument(
        "--weights", metavar="NAME", help="binary, ternary, int2, int4 or int8 (ternary)"
    )
    parser.add_argument("--activations", metavar="NAME", help="int8, int4 or none (int8)")
    parser.add_argument("--norm", choices=("rms", "layer"), help="a norm inside every layer")
    parser.add_argument(
        "--smoothing", type=float, metavar="ALPHA", help="in [0, 1]; set by `calibrate`"
    )
    parser.add_argument("--rotation", choices=("hadamard",), help="rotate the inputs")
    parser.add_argument(
        "--kept-channels", type=int, metavar="N", help="input channels kept in 16 bits"
    )
    common.add_filters(parser)


def run(arguments):
    """Quantizes and saves."""
    from keras_bitnet.transforms import quantize_model

    path = common.output_path(arguments, SUFFIX, accepted=(".keras",))
    spec = _spec(arguments)
    model, changes = quantize_model(
        common.load_model(arguments.file), spec, arguments.filters, verbose=0, return_changes=True
    )
    facts = common.write_model(model, path, arguments)
    return {"changes": common.changed_facts(changes), **facts}


def _spec(arguments):
    given = {name: getattr(arguments, option) for name, option in SPEC.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.plan is None:
        if given.get("activation_quantizer") == "none":
            given["activation_quantizer"] = None
        return {"weight_quantizer": "ternary", **given}
    if given:
        options = ", ".join("--" + SPEC[name].replace("_", "-") for name in given)
        raise ValueError(f"A plan says all that --plan stands for. Received also: {options}")
    from keras_bitnet.precision import PrecisionPlan

    return PrecisionPlan.load(arguments.plan)
