"""Other builds of the native library: sanitizers, and NEON under an emulator."""

import pathlib
import platform
import shutil
import subprocess

import pytest
from helpers import once

ROOT = pathlib.Path(__file__).parent.parent

pytestmark = once


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build(folder, *options, compiler="c++", flags="", optimization="-O2"):
    """Builds the self-check driver with CMake and returns its path."""
    run(
        "cmake",
        *("-S", ROOT, "-B", folder, "-DKBN_SELF_CHECK=ON", "-DKBN_ADAPTERS=OFF"),
        *(f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_CXX_FLAGS={flags}"),
        *(f"-DCMAKE_CXX_FLAGS_RELEASE={optimization}", *options),
    )
    run("cmake", "--build", folder, "--target", "self_check", "--parallel", "2")
    return folder / "self_check"


def require(*programs):
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing")


def require_sanitizer(folder, flag):
    require("cmake", "c++")
    source = folder / "empty.cc"
    source.write_text("int main() {}")
    for command in (["c++", flag, source, "-o", folder / "empty"], [folder / "empty"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"{flag} does not work here: {result.stderr.strip()[-200:]}")


def test_address_and_undefined_behaviour(tmp_path):
    flag = "-fsanitize=address,undefined"
    require_sanitizer(tmp_path, flag)
    program = build(
        tmp_path / "build", flags=f"{flag} -fno-sanitize-recover=all -g1", optimization="-O1"
    )
    assert "forked child agrees" in run(program, "fork")


def test_data_races(tmp_path):
    flag = "-fsanitize=thread"
    require_sanitizer(tmp_path, flag)
    program = build(tmp_path / "build", flags=f"{flag} -g1", optimization="-O1")
    assert "concurrent callers agree" in run(program)


def test_neon(tmp_path):
    if platform.machine() in ("arm64", "aarch64"):
        pytest.skip("this machine runs NEON itself, see test_native_core.py")
    require("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")
    program = build(
        tmp_path / "build",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        compiler="aarch64-linux-gnu-g++",
    )
    emulator = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu")
    # No fork here: the emulator itself asserts at times when a process with threads forks.
    output = run(*emulator, "max", program)
    assert "neon: " in output
    output = run(*emulator, "cortex-a53", program)  # no dotprod there
    assert "generic: " in output
    assert "neon: " not in output
