"""`keras-bitnet summary`."""

from keras_bitnet.cli import common

NAME = "summary"
HELP = "Show bits, parameters, bytes and multiply-accumulates of every layer."
EXAMPLES = (
    "model.keras",
    "model.keras --depth 0 --input-shape 1,128,64",
    "model.keras --json > summary.json",
)


def add_arguments(parser):
    """Adds the arguments."""
    common.add_model(parser)
    parser.add_argument(
        "--depth", type=int, metavar="N", help="roll deeper layers up; 0 shows only the outer ones"
    )
    common.add_input_shape(parser)


def run(arguments):
    """The content of `keras_bitnet.summary`."""
    from keras_bitnet.report import summary

    model = common.load_model(arguments.file)
    shape = arguments.input_shape
    return summary(model, as_data=True, depth=arguments.depth, input_shape=shape).to_dict()


def show(result):
    """Prints the table of `keras_bitnet.summary`."""
    from keras_bitnet.report import ModelSummary, Row, Totals

    rows = [Row(**row) for row in result["rows"]]
    ModelSummary(result["name"], rows, Totals(**result["totals"])).show()
