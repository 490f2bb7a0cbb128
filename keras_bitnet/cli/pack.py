"""`keras-bitnet pack`."""

from keras_bitnet.cli import common

NAME = "pack"
HELP = "Pack the quantized layers of a model: small in memory and on disk, and fast."
SUFFIX = ".packed.keras"
EXAMPLES = (
    "model.keras",
    "model.keras --memory smallest -o other.keras --force",
    "model.keras --json",
)


def add_arguments(parser):
    """Adds the arguments."""
    common.add_model(parser)
    common.add_memory(parser)
    common.add_output(parser, SUFFIX)


def run(arguments):
    """Packs and saves."""
    from keras_bitnet.transforms import pack_model

    path = common.output_path(arguments, SUFFIX, accepted=(".keras",))
    model, changes = pack_model(
        common.load_model(arguments.file), memory=arguments.memory, verbose=0, return_changes=True
    )
    facts = common.write_model(model, path, arguments)
    return {"changes": common.changed_facts(changes), **facts}
