"""What every benchmark needs: facts about the machine, fair timing, results that are whole."""

import concurrent.futures
import contextlib
import datetime
import functools
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import random
import statistics
import subprocess
import tempfile
import time

RESULTS = pathlib.Path(__file__).parent / "results"
_PACKAGES = (
    "keras-bitnet", "keras", "numpy", "jax", "tensorflow", "tensorflow-cpu", "torch", "openvino",
    "onnxruntime", "llama-cpp-python", "gemlite", "humming-kernels",
)  # fmt: skip


def machine():
    """Facts about this machine: processor, instruction sets, cores, load, memory."""
    cpu = _cpu_facts()
    return {
        "processor": cpu.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "isa": [flag for flag in _ISA if flag in cpu.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "settings": {name: value for name in _SETTINGS if (value := os.environ.get(name))},
    }  # fmt: skip


_ISA = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_SETTINGS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "XLA_FLAGS", "TF_NUM_INTRAOP_THREADS", "GLIBC_TUNABLES",
)  # fmt: skip


def _cpu_facts():
    path = pathlib.Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    facts.setdefault("flags", facts.get("Features", ""))
    return facts


def inference():
    """The context in which a user of the present backend only infers."""
    import keras

    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.inference_mode()


def gpu():
    """Name of the GPU that the backend computes on, or `None`."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(gpus[0])["device_name"] if gpus else None


def memory(field):
    """Bytes of this process in a field of Linux: `"VmRSS"`, `"VmHWM"` (its peak), `"RssAnon"`."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def versions():
    """Versions of Python, the package and the frameworks that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def revision():
    """The commit of the package that is imported, `+` where files differ from it, or `None`."""
    import keras_bitnet

    folder = pathlib.Path(keras_bitnet.__file__).parent
    commands = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "."])
    runs = [
        subprocess.run(["git", *c], cwd=folder, capture_output=True, text=True, check=False)
        for c in commands
    ]
    if any(run.returncode for run in runs):
        return None
    return runs[0].stdout.strip() + ("+" if runs[1].stdout.strip() else "")


def header(**settings):
    """The head of every result: when, on what, with what versions and settings."""
    import keras

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backend": keras.backend.backend(),
        "machine": machine(),
        "versions": versions(),
        "revision": revision(),
        "settings": settings,
    }


def write_json(path, content):
    """Writes a JSON file whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def publish(path, settings, start, rows, table):
    """Writes the rows of a benchmark that began at `start`, and prints `table(rows)`."""
    seconds = round(time.perf_counter() - start)
    write_json(path, {**header(**settings), "seconds": seconds, "results": rows})
    print(table(rows), f"\n{seconds} s")


def in_processes(function, calls, jobs):
    """Results of `function(*call)` for each of some calls, in their order.

    Args:
        function: A function of a module, that takes and returns what can be pickled.
        calls: Tuples of arguments.
        jobs: Calls at a time, each in a process of its own; 1 makes them here.
    """
    if jobs == 1:
        return [function(*call) for call in calls]
    context = multiprocessing.get_context("spawn")  # frameworks with threads do not fork
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        return list(pool.map(function, *zip(*calls, strict=True)))


class Skip(Exception):  # noqa: N818 (no error)
    """A peer cannot run here; the message is the reason."""


def peer(name):
    """The module of a peer, or a `Skip`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skip(f"{name} cannot be imported ({error})") from error


def in_turns(functions, repeats, warmup=2):
    """What functions return that are called in turns: what else the machine does hits all alike.

    The order is another one each turn: a call finds in the caches what the one before it left.

    Args:
        functions: Dictionary of functions without arguments, each measures itself.
        repeats: Turns that count.
        warmup: Turns before that do not.

    Returns:
        A dictionary of lists, one entry a turn.
    """
    found = {name: [] for name in functions}
    names, order = list(functions), random.Random(0)
    for turn in range(-warmup, repeats):
        order.shuffle(names)
        for name in names:
            value = functions[name]()
            if turn >= 0:
                found[name].append(value)
    return found


def interleaved_times(functions, repeats=15, warmup=2, clock=time.perf_counter):
    """Times functions in turns.

    Args:
        functions: Dictionary of functions without arguments that return when the work is done.
        repeats: Turns to time.
        warmup: Turns before that are not timed.
        clock: `time.process_time` counts the processor time of this process instead, which
            other work on the machine disturbs less; with one thread they are comparable.

    Returns:
        A dictionary of lists of seconds, one a turn.
    """

    def timed(function):
        start = clock()
        function()
        return clock() - start

    timers = {name: functools.partial(timed, function) for name, function in functions.items()}
    return in_turns(timers, repeats, warmup)


def spread(values):
    """Median, fastest and the interquartile range of a list of numbers."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "min": min(values), "iqr": high - low, "n": len(values)}


def markdown(headers, rows):
    """A Markdown table; every cell is shown by `str`."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
