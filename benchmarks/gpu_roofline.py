"""Draws the results of gpu_matmul.py as a roofline; needs no GPU.

    python benchmarks/gpu_roofline.py [--input results/gpu_matmul_torch.json]

Every point is a product: operations a second over operations a byte, where the bytes are those that
must pass through memory once: weights (packed, or bfloat16), activations, results. The roof is the
fastest pure read and the fastest product of the same run. Writes `results/gpu_roofline.png`.
"""

import argparse
import json
import pathlib

import common
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

KERNELS = {"bit_matmul": "o", "cuBLAS bf16": "x"}


def point(row, kernel):
    """`(operations a byte, operations a second)` of a kernel in a row of the results."""
    n, k, m = row["out"], row["in"], row["rows"]
    weights = 2 * n * k if kernel == "cuBLAS bf16" else row["packed_bytes"]
    operations = 2 * n * k * m
    seconds = row["microseconds"][kernel]["median"] * 1e-6
    return operations / (weights + 2 * m * (n + k)), operations / seconds


def roof(rows):
    """The fastest read in bytes a second, and the fastest product in operations a second."""
    times = [(r["packed_bytes"], r["microseconds"].get("read")) for r in rows]
    read = max(nbytes / (time["median"] * 1e-6) for nbytes, time in times if time)
    return read, max(point(r, kernel)[1] for r in rows for kernel in KERNELS)


def draw(content, path):
    """Draws the rows of two-bit weights."""
    rows = [row for row in content["rows"] if row["bits"] == 2]
    read, product = roof(content["rows"])
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    x = np.geomspace(0.7, 5000, 200)
    axes.plot(x, np.minimum(x * read, product) / 1e12, color="0.4", zorder=0)
    axes.text(1.0, 1.6 * read / 1e12, f"read {read / 1e12:.2f} TB/s", rotation=38, color="0.4")
    axes.text(30, product / 1e12 * 0.94, f"{product / 1e12:.0f} TOP/s", color="0.4")
    shapes = list(dict.fromkeys((row["out"], row["in"]) for row in rows))
    for color, shape in enumerate(shapes):
        for kernel, marker in KERNELS.items():
            points = [point(r, kernel) for r in rows if (r["out"], r["in"]) == shape]
            label = f"{shape[0]}x{shape[1]}" if kernel == "bit_matmul" else None
            axes.plot(*np.transpose([(a, b / 1e12) for a, b in points]), marker, ls=":", lw=0.8,
                      color=f"C{color}", label=label)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TOP/s")
    axes.set_title(f"W1.58A8 (circles) and bfloat16 (crosses), {content['settings']['gpu']}")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(title="outputs x inputs", fontsize=8)
    figure.savefig(path, dpi=130)


def main():
    """Reads the results and draws them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", default=common.RESULTS / "gpu_matmul_torch.json")
    parser.add_argument("--output", default=common.RESULTS / "gpu_roofline.png")
    arguments = parser.parse_args()
    draw(json.loads(pathlib.Path(arguments.input).read_text()), arguments.output)


if __name__ == "__main__":
    main()
