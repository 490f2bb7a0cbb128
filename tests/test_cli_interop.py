"""`keras-bitnet import` and `export`."""

import numpy as np
import pytest
from helpers import once, run_json, to_numpy
from test_gguf import TOKENS, make_model

from keras_bitnet import cli
from keras_bitnet.cli import common


@pytest.mark.parametrize("to", ["gguf", "hf"])
def test_a_model_goes_out_and_comes_in(to, tmp_path, capsys):
    model = make_model(weight_quantizer="ternary")
    path = tmp_path / "model.keras"
    model.save(path)
    facts = run_json(capsys, "export", path, "--to", to)
    assert facts["output"] == str(tmp_path / f"model.{to}")
    assert facts["bytes"] == sum(file["bytes"] for file in facts["files"])
    facts = run_json(capsys, "import", facts["output"], "-o", tmp_path / "again.keras")
    assert (facts["packed"], facts["vocabulary_size"], facts["tokenizer"]) == (True, 40, False)
    again = common.load_model(tmp_path / "again.keras")
    tokens = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    np.testing.assert_allclose(to_numpy(again(tokens)), to_numpy(model(tokens)), atol=0.02)


@once
def test_dots_in_the_name_of_a_folder_are_no_suffix(tmp_path, monkeypatch):
    folder = tmp_path / "bitnet-b1.58-2B-4T"
    folder.mkdir()
    wanted = tmp_path / "bitnet-b1.58-2B-4T.keras"
    monkeypatch.chdir(folder)
    for given in (folder, "."):
        arguments = cli.make_parser().parse_args(["import", str(given)])
        assert common.output_path(arguments, ".keras") == wanted


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "m.gguf").write_bytes(b"GGUX" + bytes(100))
    assert cli.main(["import", str(tmp_path / "m.gguf")]) == 1
    assert "is no GGUF file" in capsys.readouterr().err
