"""The command line: what it writes, prints and refuses."""

import json
import re
import shlex
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import BACKEND, ROOT, run_json, to_numpy

from keras_bitnet import cli
from keras_bitnet.cli import common
from keras_bitnet.layers import BitLinear


@pytest.fixture
def saved(tmp_path):
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, name="a"), keras.layers.Dense(3, name="b")]
    )
    path = tmp_path / "model.keras"
    model.save(path)
    return path


def run_python(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd,
        env={"KERAS_BACKEND": BACKEND, "PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(cwd)},
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [[], ["pack"]], ids=str)
def test_help_imports_no_keras(arguments, tmp_path):
    code = (
        "import sys; sys.argv = ['keras-bitnet']\n"
        "from keras_bitnet.cli import main\n"
        f"try: main({[*arguments, '--help']})\n"
        "except SystemExit as leave: print('code', leave.code, 'keras' in sys.modules)"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert result.stdout.strip().endswith("code 0 False"), result.stderr
    assert "keras-bitnet" in result.stdout


def test_module_run_registers_the_layers(saved, capsys, tmp_path):
    quantized = run_json(capsys, "quantize", saved)["output"]
    result = run_python("-m", "keras_bitnet", "summary", quantized, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [row["state"] for row in json.loads(result.stdout)["rows"]] == ["QAT", "QAT"]


def test_quantize_pack_unpack(saved, capsys):
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    quantized = run_json(capsys, "quantize", saved, "--weights", "int4", "--filters", "a$")
    assert [(c["layer"], c["is"]) for c in quantized["changes"]] == [
        ("a", "BitLinear"), ("b", "Dense"),
    ]  # fmt: skip
    model = keras.models.load_model(quantized["output"])
    assert isinstance(model.layers[0], BitLinear)
    packed = run_json(capsys, "pack", quantized["output"])
    assert packed["output"] == str(saved.parent / "model.quantized.packed.keras")
    assert packed["bytes_in_memory"] < quantized["bytes_in_memory"]
    loaded = keras.models.load_model(packed["output"])
    np.testing.assert_allclose(to_numpy(loaded(x)), to_numpy(model(x)), rtol=1e-4, atol=1e-5)
    unpacked = run_json(capsys, "unpack", packed["output"], "-o", saved.parent / "u.keras")
    model = keras.models.load_model(unpacked["output"])
    np.testing.assert_allclose(to_numpy(loaded(x)), to_numpy(model(x)), rtol=1e-4, atol=1e-5)


def test_summary_table_and_json(saved, capsys):
    data = run_json(capsys, "summary", saved)
    assert [row["macs"] for row in data["rows"]] == [30, 15]
    assert cli.main(["summary", str(saved)]) == 0
    out = capsys.readouterr().out
    assert "a (Dense)" in out
    assert "MACs of one example: 45" in out


@pytest.fixture
def data(saved, rng):
    path = saved.parent / "data.npz"
    x = rng.normal(size=(24, 6)).astype("float32")
    np.savez(path, x=x, y=rng.normal(size=(24, 3)).astype("float32"))
    return path


def test_plan_quantize_calibrate_pack_report(saved, data, capsys):
    """The way of a model through the shell: each command takes the file of the one before."""
    pytest.importorskip("scipy")
    folder = saved.parent
    plan = run_json(capsys, "plan", saved, "--data", data, "--budget", "6 bits",
                    "--precisions", "int4,int8", "--loss", "mse",
                    "--report", folder / "plan.html")  # fmt: skip
    assert plan["file"] == str(folder / "model.plan.json")
    assert plan["objective"] == "loss"
    assert plan["cost"] <= 6
    assert "Cost and error" in (folder / "plan.html").read_text()

    quantized = run_json(capsys, "quantize", saved, "--plan", plan["file"])["output"]
    layers = keras.models.load_model(quantized).layers
    chosen = [choice["chosen"] for choice in plan["choices"]]
    assert [f"W{layer.weight_quantizer.bits}A8" for layer in layers] == chosen

    facts = run_json(capsys, "calibrate", quantized, "--data", data, "--method", "mse")
    assert facts["output"] == str(folder / "model.quantized.calibrated.keras")
    assert all(row["activation_scale"] > 0 for row in facts["layers"])
    packed = run_json(capsys, "pack", facts["output"], "-o", folder / "packed.keras")["output"]

    found = run_json(capsys, "report", packed, "--reference", saved, "--data", data,
                     "--samples", "20", "--loss", "mse")  # fmt: skip
    assert found["samples"] == 20
    assert [row["path"] for row in found["layers"]] == ["a", "b"]
    assert found["loss"] == pytest.approx(found["loss_float"], rel=0.2)
    assert (folder / "packed.report.html").read_text().startswith("<!doctype html>")
    report = ["report", packed, "--reference", saved, "--data", data, "-o", folder / "r.json"]
    assert cli.main([*map(str, report)]) == 0
    assert "a (BitLinear)" in capsys.readouterr().out
    assert json.loads((folder / "r.json").read_text())["samples"] == 24


def test_quantize_sets_treatments_and_calibrate_fills_them(saved, data, capsys):
    out = run_json(capsys, "quantize", saved, "--weights", "int8", "--activations", "int4",
                   "--smoothing", "0.5", "--rotation", "hadamard", "--kept-channels", "1",
                   "--filters", "a$")["output"]  # fmt: skip
    facts = run_json(capsys, "calibrate", out, "--data", data, "--dynamic")
    assert facts["layers"] == [
        {"layer": "a", "activation_scale": None, "kept_channels": 1, "smoothing": 0.5,
         "rotation": "hadamard"}
    ]  # fmt: skip
    layer = keras.models.load_model(facts["output"]).layers[0]
    assert not np.allclose(to_numpy(layer.input_gain), 1)
    rounding = ("--dynamic", "--rounding", "gptq", "-o", saved.parent / "gptq.keras")
    facts = run_json(capsys, "calibrate", out, "--data", data, *rounding)
    assert keras.models.load_model(facts["output"]).layers[0].weight_quantizer.learned


def test_bench(saved, capsys):
    data = run_json(capsys, "bench", saved, "--precisions", "ternary", "--repeats", "2",
                    "--batch-size", "3", "--filters", "a$", "--memory", "smallest")  # fmt: skip
    (row,) = data["rows"]
    assert data["memory"] == "smallest"
    assert (row["path"], row["input_shape"]) == ("a", [3, 6])
    assert row["seconds"].keys() == {"float32", "W1.58A8"}
    assert cli.main(["bench", str(saved), "--repeats", "2", "--filters", "b$"]) == 0
    assert "b (Dense)" in capsys.readouterr().out


def test_pack_as_small_as_can_be(saved, capsys):
    quantized = run_json(capsys, "quantize", saved)["output"]
    packed = run_json(capsys, "pack", quantized, "--memory", "smallest")["output"]
    assert keras.models.load_model(packed).layers[0].packed_layout == "trits"


def test_devices(capsys):
    data = run_json(capsys, "devices")
    assert data["backend"] == BACKEND
    assert any(
        kind in device.lower() for device in data["devices"] for kind in ("cpu", "gpu", "cuda")
    )
    assert [row["runs"] for row in data["kernels"] if row["kernel"] == "reference"] == ["yes"] * 4
    assert cli.main(["devices"]) == 0
    assert "reference" in capsys.readouterr().out


def test_nothing_is_overwritten_without_force(saved, capsys):
    before = saved.read_bytes()
    assert cli.main(["quantize", str(saved), "-o", str(saved)]) == 1
    assert "--force" in capsys.readouterr().err
    assert saved.read_bytes() == before
    assert cli.main(["quantize", str(saved), "-o", str(saved), "--force"]) == 0
    assert saved.read_bytes() != before
    assert [path.name for path in saved.parent.iterdir()] == ["model.keras"]


def test_a_failure_leaves_no_file(saved, capsys, monkeypatch):
    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(keras.Model, "save", fail)
    assert cli.main(["quantize", str(saved)]) == 1
    assert "disk full" in capsys.readouterr().err
    assert [path.name for path in saved.parent.iterdir()] == ["model.keras"]


def test_an_interrupted_command_leaves_no_file_and_no_traceback(saved, capsys, monkeypatch):
    def interrupted(self, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Sequential, "save", interrupted)
    assert cli.main(["quantize", str(saved)]) == 130
    assert capsys.readouterr().err == "\n"
    assert [path.name for path in saved.parent.iterdir()] == ["model.keras"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summary", "{dir}/none.keras"], "There is no file"),
        (["quantize", "{file}", "--weights", "int3"], "Received: 'int3'"),
        (
            ["quantize", "{file}", "--smoothing", "2"],
            "Layer 'a': `smoothing` must be a number in [0, 1]",
        ),
        (["quantize", "{file}", "-o", "{dir}/x.zip"], r"\*.keras"),
        (["quantize", "{file}", "-o", "{dir}/no/x.keras"], "no folder"),
        (["summary", "{dir}/text.keras"], "text.keras"),
        (["summary", "{dir}"], "`keras-bitnet import` makes one"),
        (["pack", "{dir}/text.gguf"], "`keras-bitnet import` makes one"),
        (["summary", "{file}", "--depth", "-1"], "depth=-1"),
        (["summary", "{file}", "--import", "no_such_module"], "no_such_module"),
        (["quantize", "{file}", "--plan", "{dir}/none.json"], "none.json"),
        (["quantize", "{file}", "--plan", "{dir}/text.json", "--weights", "int4"], "--weights"),
        (["quantize", "{file}", "--plan", "{dir}/text.json"], "holds no precision plan"),
        (["calibrate", "{file}", "--data", "{dir}/x.npy"], "no layer to calibrate"),
        (["calibrate", "{file}", "--data", "{dir}/none.npy"], "none.npy"),
        (["report", "{file}", "--data", "{dir}/x.npy"], "share no quantized layer"),
        (["report", "{file}", "--data", "{dir}/x.npy", "-o", "{dir}/page.pdf"], "*.html"),
        (["report", "{file}", "--data", "{dir}/text.npy"], "no arrays"),
        (["report", "{file}", "--data", "{dir}/x.npy", "--samples", "0"], "--samples"),
        (["plan", "{file}", "--data", "{dir}/x.npy", "--budget", "much"], "budget='much'"),
        (
            ["plan", "{file}", "--data", "{dir}/x.npy", "--budget", "0.5 bits", "--json"],
            "cannot be met",
        ),
        (["plan", "{file}", "--data", "{dir}/wide.npy", "--budget", "9 bits"], "(1, 9)"),
        (["bench", "{file}", "--precisions", "int3"], "'int3'"),
        (["bench", "{file}", "--repeats", "0"], "--repeats"),
        (["bench", "{file}", "--repeats", "1"], "at least 2. Received: repeats=1"),
        (["calibrate", "{file}", "--data", "{dir}/x.npy", "--batch-size", "0"], "batch_size=0"),
    ],
    ids=str,
)
def test_errors_have_exit_code_1_and_say_why(arguments, message, saved, capsys):
    for suffix in ("keras", "gguf", "json", "npy"):
        (saved.parent / f"text.{suffix}").write_text("no model, no plan, no data")
    np.save(saved.parent / "x.npy", np.ones((4, 6), "float32"))
    np.save(saved.parent / "wide.npy", np.ones((4, 9), "float32"))
    filled = [a.format(dir=saved.parent, file=saved) for a in arguments]
    assert cli.main(filled) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"keras-bitnet {arguments[0]}: ")
    assert message.replace("\\", "") in captured.err


def test_a_class_that_nobody_registered_is_named(tmp_path, capsys):
    own = type("Own", (keras.layers.Layer,), {"call": lambda self, x: x})
    path = tmp_path / "model.keras"
    keras.Sequential([keras.Input((4,)), own()]).save(path)
    assert cli.main(["summary", str(path)]) == 1
    error = capsys.readouterr().err
    assert "Could not locate class 'Own'. `--import MODULE`" in error
    assert "config" not in error


def test_wrong_usage_has_exit_code_2(saved, capsys):
    for arguments in (
        [],
        ["fly"],
        ["pack"],
        ["summary", str(saved), "--depth", "deep"],
        ["report", str(saved)],
        ["bench", str(saved), "--precisions", ","],
        ["calibrate", str(saved), "--data", "x.npy", "--method", "median"],
    ):
        with pytest.raises(SystemExit) as leave:
            cli.main(arguments)
        assert leave.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_the_backend_cannot_change_late(saved, capsys):
    other = "torch" if BACKEND == "jax" else "jax"
    assert cli.main(["summary", str(saved), "--backend", other]) == 1
    assert "cannot change" in capsys.readouterr().err


def test_json_is_valid_where_numbers_are_not_finite():
    text = cli.output.to_json({"a": [float("inf"), 1.5], "b": {"c": float("nan")}})
    assert json.loads(text) == {"a": [None, 1.5], "b": {"c": None}}


def test_data_files(tmp_path):
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "xy.npz", x=x, y=y)
    np.savez(tmp_path / "named.npz", left=x, right=x)
    np.savez(tmp_path / "uneven.npz", x=x, y=y[:3])
    inputs, targets = common.load_data(tmp_path / "xy.npz", samples=4)
    np.testing.assert_array_equal(inputs, x[:4])
    np.testing.assert_array_equal(targets, y[:4])
    assert common.load_data(tmp_path / "x.npy")[1] is None
    assert sorted(common.load_data(tmp_path / "named.npz")[0]) == ["left", "right"]
    with pytest.raises(ValueError, match="one row an example"):
        common.load_data(tmp_path / "uneven.npz")
    content = bytearray((tmp_path / "xy.npz").read_bytes())
    content[200] ^= 255  # within `x`
    (tmp_path / "damaged.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.npz' holds no arrays that can be read: Bad CRC"):
        common.load_data(tmp_path / "damaged.npz")
    with pytest.raises(ValueError, match="Received"):
        common.load_data(tmp_path / "x.csv")


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.NAME)
def test_examples_of_the_help_are_valid(command):
    for line in command.EXAMPLES:
        arguments = shlex.split(re.split(" [<>] ", line)[0])
        assert cli.make_parser().parse_args([command.NAME, *arguments]).command is command
