"""`keras-bitnet calibrate`."""

from keras_bitnet.cli import common

NAME = "calibrate"
HELP = "Find scales, smoothing factors, kept channels and the rounding of weights from data."
SUFFIX = ".calibrated.keras"
METHODS = ("minmax", "ema", "percentile", "mse", "histogram", "entropy")
EXAMPLES = (
    "model.quantized.keras --data train.npz",
    "model.quantized.keras --data train.npz --method percentile --percentile 99.9",
    "model.quantized.keras --data train.npy --dynamic -o smoothed.keras",
    "model.quantized.keras --data train.npy --dynamic --rounding gptq",
)


def add_arguments(parser):
    """Adds the arguments."""
    common.add_model(parser)
    common.add_data(parser)
    parser.add_argument(
        "--method", choices=METHODS, default="minmax", help="how a scale is found (%(default)s)"
    )
    parser.add_argument(
        "--percentile", type=float, default=99.99, metavar="P", help="of that method (%(default)s)"
    )
    parser.add_argument(
        "--momentum", type=float, metavar="M", help="let scales follow the inputs in training"
    )
    parser.add_argument(
        "--dynamic",
        action="store_true",
        help="leave the scales of activations dynamic",
    )
    parser.add_argument(
        "--rounding",
        choices=("nearest", "gptq"),
        default="nearest",
        help="of weights: as they are, or so that errors make up for each other (%(default)s)",
    )
    common.add_filters(parser)
    common.add_output(parser, SUFFIX)


def run(arguments):
    """Calibrates and saves."""
    from keras_bitnet.transforms import calibrate

    path = common.output_path(arguments, SUFFIX, accepted=(".keras",))
    x, _ = common.load_data(arguments.data, arguments.samples)
    model = common.load_model(arguments.file)
    common.check_data(model, x)
    model = calibrate(
        model,
        x,
        arguments.method,
        percentile=arguments.percentile,
        momentum=arguments.momentum,
        static=not arguments.dynamic,
        rounding=arguments.rounding,
        filters=arguments.filters,
        batch_size=arguments.batch_size,
        verbose=common.verbosity(arguments),
    )
    return {"layers": list(_facts(model)), **common.write_model(model, path, arguments)}


def _facts(model):
    from keras_bitnet.report.probes import bit_layers

    for path, layer in bit_layers(model).items():
        yield {
            "layer": path,
            "activation_scale": float(layer.activation_scale) if layer.static else None,
            "kept_channels": layer.kept_channels,
            "smoothing": layer.smoothing,
            "rotation": layer.rotation,
        }
