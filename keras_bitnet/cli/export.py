"""`keras-bitnet export`."""

import pathlib

from keras_bitnet.cli import common

NAME = "export"
HELP = "Write a language model as a GGUF file or a Hugging Face checkpoint folder."
EXAMPLES = (
    "model.keras --to gguf --type tq2_0",
    "model.keras --to hf --variant offline -o folder",
    "model.keras --to gguf --tokenizer checkpoint-folder",
)


def add_arguments(parser):
    """Adds the arguments."""
    common.add_model(parser)
    common.add_output(parser, ".gguf or .hf")
    parser.add_argument("--to", choices=("gguf", "hf"), default="gguf", help="format (%(default)s)")
    parser.add_argument("--type", default="tq2_0", help="GGUF type (%(default)s)")
    parser.add_argument("--arch", default="auto", help="GGUF architecture (%(default)s)")
    parser.add_argument("--variant", default="offline", help="of a checkpoint (%(default)s)")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="checkpoint folder, tokenizer.json or .gguf file"
    )


def run(arguments):
    """Loads and writes."""
    from keras_bitnet import interop

    path = common.output_path(arguments, f".{arguments.to}")
    tokenizer = None
    if arguments.tokenizer:
        is_gguf = pathlib.Path(arguments.tokenizer).suffix == ".gguf"
        read = interop.Tokenizer.from_gguf if is_gguf else interop.Tokenizer.from_folder
        tokenizer = read(arguments.tokenizer)
    model = common.load_model(arguments.file)
    if arguments.to == "gguf":
        interop.to_gguf(model, path, type=arguments.type, arch=arguments.arch, tokenizer=tokenizer)
        files = [path]
    else:
        interop.to_hugging_face(model, path, variant=arguments.variant, tokenizer=tokenizer)
        files = sorted(path.iterdir())
    return {
        "output": str(path),
        "bytes": sum(file.stat().st_size for file in files),
        "files": [{"file": file.name, "bytes": file.stat().st_size} for file in files],
    }
