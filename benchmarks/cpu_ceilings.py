"""What bounds a low-bit matmul on this processor, measured: see `ceilings.cc`."""

import ctypes
import os
import pathlib
import shutil
import statistics
import subprocess
import tempfile
import time

import numpy as np

SOURCE = pathlib.Path(__file__).parent / "ceilings.cc"


class Ceilings:
    """Compiles `ceilings.cc` and measures again and again; the medians count.

    Args:
        threads: Threads that read and multiply together.
        has_vnni: Whether the processor has AVX-512 VNNI.
        nbytes: Bytes that are read, no fewer than what is held against them reads: large servers
            have last-level caches of hundreds of megabytes.
    """

    def __init__(self, threads, has_vnni=False, nbytes=384 << 20):
        self.threads, self.has_vnni = threads, has_vnni
        self.memory = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
        self.reads, self.peaks = [], []
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if compiler is None:
            raise SystemExit("The benchmark needs a C++ compiler to measure what bounds it.")
        with tempfile.TemporaryDirectory() as folder:
            library = pathlib.Path(folder) / "ceilings.so"
            command = [compiler, "-O2", "-std=c++17", "-pthread", "-shared", "-fPIC", SOURCE]
            subprocess.run([*command, "-o", library], check=True)
            self.library = ctypes.CDLL(str(library))
        self.library.bench_read.restype = self.library.bench_peak.restype = ctypes.c_double
        self.library.bench_read.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def measure(self):
        """Adds one measurement of each: the best of some, as all else can only slow them.

        A framework's threads spin for a while after their last work, and a new thread may share
        the processor of the calling one for its first milliseconds.
        """
        time.sleep(0.1)
        at, size = self.memory.ctypes.data, self.memory.size
        read, peak = self.library.bench_read, self.library.bench_peak
        self.reads.append(max(read(at, size, self.threads) for _ in range(2)))
        if self.has_vnni:
            self.peaks.append(max(peak(self.threads) for _ in range(5)))

    @property
    def read(self):
        """Bytes a second that come from memory."""
        return statistics.median(self.reads)

    @property
    def peak(self):
        """Multiply-adds a second of `vpdpbusd`, or `None`."""
        return statistics.median(self.peaks) if self.peaks else None
