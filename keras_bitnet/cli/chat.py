"""`keras-bitnet chat`."""

import sys

from keras_bitnet.cli import text

NAME = "chat"
HELP = "Talk with a chat model: a line of the standard input is a message."
EXAMPLES = (
    "model.gguf",
    'checkpoint-folder --system "Answer in one sentence." --temperature 0.7 --seed 1',
    'model.keras --tokenizer checkpoint-folder --json < "questions.txt"',
)


def add_arguments(parser):
    """Adds the arguments."""
    text.add_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")


def run(arguments):
    """Answers every line until the input ends."""
    model = text.load(arguments)
    tokenizer, model.tokenizer = model.tokenizer, _Rendered(model.tokenizer)
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    tokens = 0
    for line in _lines():
        messages.append({"role": "user", "content": line})
        prompt = tokenizer.apply_chat_template(messages)
        answer, facts = text.stream(model, prompt, arguments)
        messages.append({"role": "assistant", "content": answer})
        tokens += facts["new_tokens"]
        if not arguments.json:
            print()
    return {"messages": messages, "new_tokens": tokens}


def show(result):
    """Nothing: the answers are there already."""


def _lines():
    """Messages of the standard input; a person is asked for them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


class _Rendered:
    """A tokenizer for texts of a chat template, which has written the special tokens already."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.decode, self.stop_tokens = tokenizer.decode, tokenizer.stop_tokens

    def encode(self, rendered):
        return self._tokenizer.encode(rendered, add_special_tokens=False)
