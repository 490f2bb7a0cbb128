"""`keras-bitnet export`."""

from keras_bitnet.cli import common

NAME = "export"
HELP = "Write a model as ONNX, or a language model as a GGUF file or Hugging Face checkpoint."
EXAMPLES = (
    "model.keras --to gguf --type tq2_0",
    "model.keras --to hf --variant offline -o folder",
    "model.keras --to gguf --tokenizer checkpoint-folder",
    "model.keras --to onnx --backend torch",
)


def add_arguments(parser):
    """Adds the arguments."""
    common.add_model(parser)
    common.add_output(parser, ".gguf, .hf or .onnx")
    parser.add_argument(
        "--to", choices=("gguf", "hf", "onnx"), default="gguf", help="format (%(default)s)"
    )
    parser.add_argument("--type", default="tq2_0", help="GGUF type (%(default)s)")
    parser.add_argument("--arch", default="auto", help="GGUF architecture (%(default)s)")
    parser.add_argument("--variant", default="offline", help="of a checkpoint (%(default)s)")
    common.add_tokenizer(parser)


def run(arguments):
    """Loads and writes."""
    from keras_bitnet import interop

    path = common.output_path(arguments, f".{arguments.to}")
    tokenizer = common.load_tokenizer(arguments.tokenizer)
    model = common.load_model(arguments.file)
    if arguments.to == "onnx":
        interop.to_onnx(model, path)
        files = [path]
    elif arguments.to == "gguf":
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
