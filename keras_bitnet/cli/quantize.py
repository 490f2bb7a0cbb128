"""`keras-bitnet quantize`."""

from keras_bitnet.cli import common

NAME = "quantize"
HELP = "Turn the dense layers of a float model into quantized ones, ready for training."
SUFFIX = ".quantized.keras"
EXAMPLES = (
    "model.keras",
    "model.keras --weights int4 --activations none --filters encoder/ -o small.keras",
    "model.keras --norm rms --json",
)


def add_arguments(parser):
    """Adds the arguments."""
    common.add_model(parser)
    common.add_output(parser, SUFFIX)
    parser.add_argument(
        "--weights", default="ternary", metavar="NAME",
        help="binary, ternary, int2, int4 or int8 (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--activations", default="int8", metavar="NAME", help="int8, int4 or none (%(default)s)"
    )
    parser.add_argument("--norm", choices=("rms", "layer"), help="a norm inside every layer")
    parser.add_argument(
        "--filters",
        action="append",
        metavar="REGEX",
        help="only layers whose path matches; may be repeated",
    )


def run(arguments):
    """Quantizes and saves."""
    from keras_bitnet.transforms import quantize_model

    path = common.output_path(arguments, SUFFIX)
    spec = {
        "weight_quantizer": arguments.weights,
        "activation_quantizer": None if arguments.activations == "none" else arguments.activations,
        "norm": arguments.norm,
    }
    model, changes = quantize_model(
        common.load_model(arguments.file),
        spec,
        arguments.filters,
        verbose=0,
        return_changes=True,
    )
    common.save_model(model, path, arguments.force)
    facts = common.model_facts(arguments.file, path, model)
    return {"changes": common.changed_facts(changes), **facts}
