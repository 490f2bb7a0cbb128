"""The CUDA sources, their cache and refusals; all but the GPU itself, on any machine."""

import os
import pathlib
import re
import shutil
import subprocess
import threading

import pytest
from helpers import BACKEND, once
from test_native_adapters import problem

from keras_bitnet import kernels
from keras_bitnet.kernels import cuda
from keras_bitnet.kernels.cuda import compiler, library

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "BUILT", tmp_path / "built")
    return tmp_path / "cache"


@once
@pytest.mark.parametrize("part", compiler.PARTS)
def test_sources_compile(part):
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    assert compiler._compile_with_nvcc(2, "sm_90a", part).startswith(b"\x7fELF")


@once
@pytest.mark.parametrize("bits", [2, compiler.ATTENTION])
def test_every_kernel_is_in_a_part(bits):
    source = (compiler.SOURCES / compiler._source(bits, "")[0]).read_text()
    assert set(re.findall(r"#ifdef KBC_(\w+)", source)) == set(compiler.parts(bits, "sm_90a"))


def test_compiled_once_and_kept(cache, monkeypatch):
    compiled = []

    def fake(bits, name, part):
        compiled.append((bits, name, part))
        return part.encode()

    monkeypatch.setattr(compiler, "_compile", fake)
    assert compiler.find(2, 90) is None
    parts = list(compiler.PARTS)
    for _ in range(3):
        assert compiler.cubins(2, 90) == [part.encode() for part in parts]
    assert sorted(compiled) == sorted((2, "sm_90a", part) for part in parts)
    assert {path.parent for path in compiler.find(2, 90)} == {cache}
    assert compiler.find(4, 90) is None
    compiler.find(2, 90)[3].unlink()
    compiler.cubins(2, 90)
    assert compiled[len(parts) :] == [(2, "sm_90a", parts[3])]


def test_many_at_once_leave_one_whole_file(cache, monkeypatch):
    data = os.urandom(1 << 20)
    monkeypatch.setattr(compiler, "_compile", lambda *part: data)
    wrong = []

    def work():
        for _ in range(20):
            wrong.append(compiler.cubins(2, 80) != [data] * 4)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)
    assert [path.suffix for path in cache.iterdir()] == [".cubin"] * 4


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(compiler, "_compile", lambda *part: b"kernels")
    assert compiler.cubins(2, 80) == [b"kernels"] * 4


def test_files_of_other_sources_are_not_taken(cache, monkeypatch):
    monkeypatch.setattr(compiler, "_compile", lambda *part: b"kernels")
    compiler.cubins(2, 80)
    monkeypatch.setattr(compiler, "_stamp", lambda: "other")
    assert compiler.find(2, 80) is None


def test_an_architecture_runs_on_later_ones_of_its_generation(cache, monkeypatch):
    monkeypatch.setattr(compiler, "_compile", lambda *part: b"kernels")
    compiler.cubins(2, 80)
    assert compiler.find(2, 89) == compiler.find(2, 80)
    assert compiler.find(2, 90) is None


def test_reasons(cache, monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiler, "nvrtc", lambda: None)
    assert "compute capability 7.5" in compiler.reason(75)
    assert "nvidia-cuda-nvrtc" in compiler.reason(90)
    monkeypatch.setattr(compiler, "_compile", lambda *part: b"kernels")
    for bits in compiler.KINDS:
        compiler.cubins(bits, 90)
    assert compiler.reason(90) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"activation_granularity": "static", "group_size": 96}, None),
        ({"activation_bits": None}, None),
        ({"activation_bits": None, "in_features": 25_000}, "accepted: at most 24576"),
        ({"activation_bits": None, "in_features": 25_000, "dtype": "bfloat16"}, None),
        ({"activation_bits": 6}, "activations of 6 bits"),
        ({"dtype": "float64"}, "dtype float64"),
        ({"group_size": 48}, "multiple of 32"),
        ({"in_features": 100_000}, "100000 inputs"),
        ({"out_features": 3_000_000}, "3000000 outputs"),
        ({"layout": "trits"}, "layout 'trits'"),
    ],
)
def test_refusals(changes, reason):
    found = cuda.refuse(problem(**changes))
    assert found is None if reason is None else reason in found


def test_explain_without_a_gpu():
    if BACKEND == "tensorflow" or library.reason(0) is None:
        pytest.skip("this backend has no such row, or there is a GPU")
    rows = dict(kernels.explain(problem(device="cuda:0")))
    assert "CUDA" in rows["cuda"]
    assert rows["reference"] is None


def test_struct_equals_the_header(tmp_path):
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    lines = ['#include "shim.h"', "#include <stddef.h>"]
    lines.append(f"static_assert(KBC_BLOCK_WEIGHTS == {library.BLOCK_WEIGHTS});")
    for struct, mirror in (
        ("kbc_matmul", library.MatmulStruct),
        ("kbc_joint", library.JointStruct),
        ("kbc_norm", library.NormStruct),
        ("kbc_fake", library.FakeStruct),
        ("kbc_attention", library.AttentionStruct),
        ("kbc_decode", library.DecodeStruct),
    ):
        for name, _ in mirror._fields_:
            field = getattr(mirror, name)
            lines.append(
                f"static_assert(offsetof({struct}, {name}) == {field.offset} && "
                f'sizeof({struct}::{name}) == {field.size}, "{name}");'
            )
    _syntax_check(tmp_path, lines, compiler.SOURCES)


def test_stream_struct_equals_the_header_of_jaxlib(tmp_path):
    jaxlib = pytest.importorskip("jaxlib")
    include = pathlib.Path(jaxlib.__file__).parent / "include"
    if COMPILER is None or not (include / "xla/ffi/api/c_api.h").exists():
        pytest.skip("this jaxlib ships no header, or there is no compiler")
    source = (compiler.SOURCES / "xla.cc").read_text()
    struct = re.search(r"struct StreamGet \{.*?\};", source, re.DOTALL).group()
    lines = [
        '#include "xla/ffi/api/c_api.h"',
        "struct Extension;" + struct,
        "static_assert(offsetof(StreamGet, stream) == offsetof(XLA_FFI_Stream_Get_Args, stream));",
        "static_assert(offsetof(StreamGet, context) == offsetof(XLA_FFI_Stream_Get_Args, ctx));",
        "static_assert(XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE == 1);",
    ]
    _syntax_check(tmp_path, lines, include)


def _syntax_check(folder, lines, include):
    source = folder / "check.cc"
    source.write_text("\n".join(lines))
    command = [COMPILER, "-std=c++17", "-fsyntax-only", f"-I{include}", source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("bits", compiler.WIDTHS)
def test_registers_of_wgmma_in_flight(bits, tmp_path):
    # ptxas can reuse the registers that an instruction in flight still reads.
    if library.reason(0) is not None:
        pytest.skip("part of the tests on a GPU: it compiles all kernels of a width")
    tools = [shutil.which(name) for name in ("nvcc", "cuobjdump", "nvdisasm")]
    if None in tools:
        pytest.skip("there are no CUDA binary tools (nvcc, cuobjdump, nvdisasm)")
    path = tmp_path / "kernels.cubin"
    listing = ""
    for part in ("WGMMA", "WGMMA16"):
        path.write_bytes(compiler._compile_with_nvcc(bits, "sm_90a", part))
        run = subprocess.run(
            ["cuobjdump", "-sass", path], capture_output=True, text=True, check=True
        )
        listing += run.stdout
    assert_no_register_is_overwritten(listing)


def assert_no_register_is_overwritten(listing):
    """Looks at every window from the first product to its wait."""
    audited = 0
    for function in listing.split("Function : ")[1:]:
        in_flight = set()
        for text in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", function):
            product = re.search(r"[IH]GMMA\.\S+ R\d+, R(\d+)", text)
            if product:
                audited += 1
                in_flight |= {int(product.group(1)) + i for i in range(4)}
            elif "WARPGROUP.DEPBAR" in text:
                in_flight = set()
            elif in_flight:
                assert not re.search(r"\bBRA\b|BSSY", text), text
                assert not in_flight & _written(text), text
    assert audited >= 12 * 8  # kernels, products of a slice


def _written(text):
    match = re.match(r"(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)\s+(?:!?U?P\d,\s*)*R(\d+)(?![\d.])", text)
    reads = ("ST", "SYNCS", "RED", "LDGSTS", "R2UR", "ATOM", "BAR")
    if not match or match.group(1).startswith(reads):
        return set()
    name, first = match.group(1), int(match.group(2))
    count = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    return set(range(first, first + count))
