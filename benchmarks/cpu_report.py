"""The Markdown table and the roofline picture of `cpu_matmul.py`."""


def _medians(report):
    return {(r["name"], r["in"], r["out"], r["rows"]): r for r in report["rows"]}


def _unique(report, *keys):
    return list(dict.fromkeys(tuple(r[key] for key in keys) for r in report["rows"]))


def table(report):
    """Median microseconds, with the factor to `BitLinear` in brackets."""
    found = _medians(report)
    bandwidth = sorted(report["read_bytes_per_second"])[len(report["read_bytes_per_second"]) // 2]
    rows = [m for (m,) in _unique(report, "rows")]
    lines = [
        f"{report['cpu']}, {report['threads']} threads, {report['isa']}, backend "
        f"{report['backend']}, {report['bits']} bits, kernel {report['kernel']}; median "
        f"microseconds of {report['rounds']} rounds (times BitLinear); cold read "
        f"{bandwidth / 1e9:.1f} GB/s; load at start {report['load']:.1f}",
        "",
        "| in x out | candidate | " + " | ".join(f"m={m}" for m in rows) + " |",
        "|---" * (len(rows) + 2) + "|",
    ]
    for name, k, n in _unique(report, "name", "in", "out"):
        cells = []
        for m in rows:
            row, own = found.get((name, k, n, m)), found[("BitLinear", k, n, m)]
            factor = "" if name == "BitLinear" else f" ({row['median'] / own['median']:.1f}x)"
            cells.append(f"{row['median'] * 1e6:.0f}{factor}")
        lines.append(f"| {k}x{n} | {name} | " + " | ".join(cells) + " |")
    lines += [f"\n{name} skipped: {reason}" for name, reason in report["skipped"].items()]
    return "\n".join(lines)


def roofline(report, path):
    """Speed over arithmetic intensity of the packed weight, below the line of cold reads."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for (name,) in _unique(report, "name")]
    figure, axes = plt.subplots(figsize=(8, 5))
    for i, name in enumerate(names):
        rows = [r for r in report["rows"] if r["name"] == name]
        work = [r["rows"] * r["in"] * r["out"] for r in rows]
        intensity = [8 * w / r["bits_read"] for w, r in zip(work, rows, strict=True)]
        speed = [w / r["median"] / 1e9 for w, r in zip(work, rows, strict=True)]
        axes.scatter(intensity, speed, s=18, label=name, color=f"C{i}")
    bandwidth = max(report["read_bytes_per_second"])
    ends = [min(intensity) / 2, max(intensity) * 2]
    axes.plot(ends, [bandwidth * e / 1e9 for e in ends], "k--", lw=1,
              label=f"cold read, {bandwidth / 1e9:.1f} GB/s")  # fmt: skip
    best = max(r["rows"] * r["in"] * r["out"] / r["best"] / 1e9 for r in report["rows"])
    axes.set_ylim(top=3 * best)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("multiply-adds per byte of the packed weight")
    axes.set_ylabel("multiply-adds a second (1e9)")
    axes.set_title(f"{report['bits']}-bit packed matmul, {report['backend']}, "
                   f"{report['threads']} threads")  # fmt: skip
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
