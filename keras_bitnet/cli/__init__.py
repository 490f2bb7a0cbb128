"""The command line: `keras-bitnet COMMAND FILE`, one module for each command.

A command is a module with `NAME`, `HELP`, `EXAMPLES` (lines of arguments), and the functions
`add_arguments(parser)` and `run(arguments) -> result`, a dictionary that JSON can hold. It may
have `show(result)`; otherwise `output.show` prints the result. Modules import Keras inside of
`run` only, so that help comes at once.
"""

import argparse
import importlib
import os
import sys

from keras_bitnet.cli import (
    bench,
    calibrate,
    chat,
    devices,
    export,
    generate,
    import_model,
    output,
    pack,
    plan,
    quantize,
    report,
    summary,
    unpack,
)

COMMANDS = (
    summary, plan, quantize, calibrate, pack, unpack, report, bench, import_model, export,
    generate, chat, devices,
)  # fmt: skip
BACKENDS = ("jax", "torch", "tensorflow")
INTERRUPTED = 130  # the exit code of a shell: 128 and the number of the signal


def main(argv=None):
    """Runs one command.

    Args:
        argv: List of arguments, those of the process by default.

    Returns:
        The exit code: 0, or 1 after an error, which is printed to the standard error stream, or
        130 after Ctrl-C. Wrong usage leaves with code 2, as `argparse` does.
    """
    arguments = make_parser().parse_args(argv)
    try:
        _prepare(arguments)
        result = arguments.command.run(arguments)
        if arguments.json:
            print(output.to_json(result))
        else:
            getattr(arguments.command, "show", output.show)(result)
    except (ValueError, OSError, ImportError) as error:
        print(f"keras-bitnet {arguments.command.NAME}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)  # ends the line of a text that was cut short
        return INTERRUPTED
    return 0


def make_parser():
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="keras-bitnet",
        description="Low-bit neural networks in Keras: quantize, pack and inspect model files.",
        epilog="`keras-bitnet COMMAND --help` shows the arguments of a command, with examples.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        examples = "\n".join(f"  keras-bitnet {command.NAME} {line}" for line in command.EXAMPLES)
        sub = commands.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.HELP,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        _add_common_arguments(sub)
        sub.set_defaults(command=command)
    return parser


def _add_common_arguments(parser):
    group = parser.add_argument_group("common arguments")
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    group.add_argument("--backend", choices=BACKENDS, help="what Keras runs on")
    group.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module first that registers layers of your own; may be repeated",
    )


def _prepare(arguments):
    """Chooses the backend, and imports what a plain `import keras_bitnet` does."""
    if arguments.backend:
        if "keras" in sys.modules and sys.modules["keras"].backend.backend() != arguments.backend:
            raise ValueError(
                "The backend cannot change after Keras was imported. "
                f"Received: --backend {arguments.backend}"
            )
        os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's greeting
    package = sys.modules["keras_bitnet"]
    if not hasattr(package, "layers"):
        importlib.reload(package)
    if arguments.modules:
        sys.path.insert(0, os.getcwd())
    for module in arguments.modules:
        importlib.import_module(module)
