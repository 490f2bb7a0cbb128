"""`keras-bitnet unpack`."""

from keras_bitnet.cli import common

NAME = "unpack"
HELP = "Make the packed layers of a model float again, to train it further."
SUFFIX = ".unpacked.keras"
EXAMPLES = ("model.keras", "model.keras -o other.keras --force", "model.keras --json")


def add_arguments(parser):
    """Adds the arguments."""
    common.add_model(parser)
    common.add_output(parser, SUFFIX)


def run(arguments):
    """Unpacks and saves."""
    from keras_bitnet.transforms import unpack_model

    path = common.output_path(arguments, SUFFIX, accepted=(".keras",))
    model, changes = unpack_model(common.load_model(arguments.file), verbose=0, return_changes=True)
    facts = common.write_model(model, path, arguments)
    return {"changes": common.changed_facts(changes), **facts}
