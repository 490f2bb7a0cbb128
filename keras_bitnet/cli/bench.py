"""`keras-bitnet bench`."""

from keras_bitnet.cli import common

NAME = "bench"
HELP = "Measure the latency of every layer, packed at several precisions, on this machine."
EXAMPLES = (
    "model.keras",
    "model.keras --precisions ternary,int4 --batch-size 16 --filters encoder/",
    "model.keras --input-shape 1,128 --backend torch --json > bench.json",
)


def add_arguments(parser):
    """Adds the arguments."""
    common.add_model(parser)
    common.add_precisions(parser, "names of weight quantizers")
    common.add_memory(parser)
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="examples a batch (%(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=15, metavar="N", help="samples of a time (%(default)s)"
    )
    common.add_input_shape(parser)
    common.add_filters(parser)


def run(arguments):
    """The content of `keras_bitnet.benchmark_layers`."""
    from keras_bitnet.report import benchmark_layers

    common.check_positive(arguments, "batch_size", "repeats")
    return benchmark_layers(
        common.load_model(arguments.file),
        arguments.precisions,
        batch_size=arguments.batch_size,
        input_shape=arguments.input_shape,
        memory=arguments.memory,
        repeats=arguments.repeats,
        filters=arguments.filters,
        verbose=common.verbosity(arguments),
    ).to_dict()


def show(result):
    """The table was printed when it was measured."""
