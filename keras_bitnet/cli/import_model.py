"""`keras-bitnet import`."""

import pathlib

from keras_bitnet.cli import common

NAME = "import"
HELP = "Read a Hugging Face checkpoint folder or a GGUF file as a model."
EXAMPLES = (
    "checkpoint-folder -o model.keras",
    "model.gguf --pack int8",
    "checkpoint-folder --embedding int8 --json",
)
SUFFIX = ".keras"


def add_arguments(parser):
    """Adds the arguments."""
    parser.add_argument("file", metavar="SOURCE", help="a checkpoint folder, or a .gguf file")
    common.add_output(parser, SUFFIX)
    parser.add_argument(
        "--pack", metavar="QUANTIZER", help="pack float weights: ternary, int4, int8, ..."
    )
    parser.add_argument(
        "--embedding", metavar="QUANTIZER", help="quantize the embedding: int8, int4, ..."
    )


def run(arguments):
    """Reads and saves."""
    from keras_bitnet import interop

    path = common.output_path(arguments, SUFFIX, accepted=(".keras",))
    given: dict = {}
    if arguments.pack:
        given.update(packed=True, weight_quantizer=arguments.pack)
    if arguments.embedding:
        given["embedding_quantizer"] = arguments.embedding
    is_folder = pathlib.Path(arguments.file).is_dir()
    read = interop.from_hugging_face if is_folder else interop.from_gguf
    model = read(arguments.file, **given)
    common.save_model(model, path, arguments.force)
    return {
        "output": str(path),
        "bytes": path.stat().st_size,
        "packed": model.packed,
        "layers": model.backbone.num_layers,
        "vocabulary_size": model.backbone.vocabulary_size,
        "tokenizer": getattr(model, "tokenizer", None) is not None,
    }
