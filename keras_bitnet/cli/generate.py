"""`keras-bitnet generate`."""

import sys

from keras_bitnet.cli import text

NAME = "generate"
HELP = "Continue a text with a language model, shown as it comes."
EXAMPLES = (
    'model.gguf "The capital of France is"',
    'model.keras "Once" --tokenizer checkpoint-folder --temperature 0.8 --top-p 0.95 --seed 1',
    "checkpoint-folder --json < prompt.txt",
)


def add_arguments(parser):
    """Adds the arguments."""
    text.add_arguments(parser)
    parser.add_argument(
        "prompt", metavar="TEXT", nargs="?", help="what to continue; the standard input by default"
    )


def run(arguments):
    """Loads and continues."""
    prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    if not prompt:
        raise ValueError("There is no text to continue. Received: an empty one")
    model = text.load(arguments)
    continuation, facts = text.stream(model, prompt, arguments, before=prompt)
    return {"prompt": prompt, "text": continuation, **facts}


def show(result):
    """Ends the line; the text is there already."""
    print()
