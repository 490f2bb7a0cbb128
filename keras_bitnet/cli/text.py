"""What `generate` and `chat` share: the model and its tokenizer, sampling, streaming."""

import sys
import time

from keras_bitnet.cli import common


def add_arguments(parser):
    """Adds the model, its tokenizer and how tokens are chosen."""
    parser.add_argument(
        "file", metavar="SOURCE", help="a .keras file, a checkpoint folder or a .gguf file"
    )
    common.add_tokenizer(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="at most (%(default)s)"
    )
    sampling.add_argument(
        "--temperature", type=float, metavar="T", help="0, the default, takes the likeliest token"
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="choose from the K likeliest")
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="choose from the likeliest that reach P together"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed, the same text")


def load(arguments):
    """The language model of SOURCE, its `tokenizer` set.

    Raises:
        ValueError: It is no language model, or has no tokenizer.
    """
    from keras_bitnet.models.generation import Generation

    tokenizer = common.load_tokenizer(arguments.tokenizer)
    model = common.load_any(arguments.file)
    if not isinstance(model, Generation):
        raise ValueError(
            f"'{arguments.file}' holds no language model. Received: {type(model).__name__}"
        )
    model.tokenizer = tokenizer or model.tokenizer
    if model.tokenizer is None:
        raise ValueError(
            f"'{arguments.file}' comes without a tokenizer: give --tokenizer, the checkpoint "
            "folder or .gguf file that the model was imported from."
        )
    return model


def stream(model, prompt, arguments, before=""):
    """Continues a text, shown as it comes, after `before`, unless the result is to be JSON.

    Returns:
        `(text, facts)`: the continuation, and a dictionary of tokens and seconds.
    """
    pieces: list[str] = []
    start = first = time.perf_counter()
    for piece in model.stream(
        prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    ):
        if not pieces:
            first = time.perf_counter()
        pieces.append(piece)
        if not arguments.json:
            sys.stdout.write(piece if len(pieces) > 1 else before + piece)
            sys.stdout.flush()
    end = time.perf_counter()
    tokens = sum(not piece.endswith("\ufffd") for piece in pieces)  # but for an unfinished end
    later = tokens - 1  # the first token includes reading the prompt and compiling
    rate = later / (end - first) if later else None
    facts = {"new_tokens": tokens, "seconds": end - start, "tokens_per_second": rate}
    return "".join(pieces), facts
