"""`keras-bitnet report`."""

from keras_bitnet.cli import common

NAME = "report"
HELP = "Measure on data what quantization does to every layer; writes a page with plots, or JSON."
SUFFIX = ".report.html"
EXAMPLES = (
    "model.quantized.keras --data test.npz",
    "model.packed.keras --reference model.keras --data test.npz -o report.html",
    "model.quantized.keras --data test.npz --loss sparse_categorical_crossentropy --json",
)


def add_arguments(parser):
    """Adds the arguments."""
    common.add_model(parser)
    common.add_data(parser)
    common.add_loss(parser)
    parser.add_argument(
        "--reference", metavar="FILE", help="the float model; a packed model needs it"
    )
    common.add_output(parser, f"{SUFFIX}; *.json holds the figures")


def run(arguments):
    """Measures and writes."""
    from keras_bitnet.report import quantization_report

    path = common.output_path(arguments, SUFFIX, accepted=(".html", ".json"))
    data = common.load_data(arguments.data, arguments.samples)
    model = common.load_model(arguments.file)
    reference = common.load_model(arguments.reference) if arguments.reference else None
    report = quantization_report(
        model,
        data,
        reference,
        loss=arguments.loss,
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        verbose=common.verbosity(arguments),
    )
    report.save(path, overwrite=arguments.force)
    return {**report.to_dict(), "file": str(path)}


def show(result):
    """The tables were printed when they were measured."""
    print(f"File: {result['file']}")
