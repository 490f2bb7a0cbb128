"""The Markdown table and the roofline picture of `cpu_matmul.py`."""


def _medians(report):
    return {(r["name"], r["in"], r["out"], r["rows"]): r for r in report["rows"]}


def _unique(report, *keys):
    return list(dict.fromkeys(tuple(r[key] for key in keys) for r in report["rows"]))


def table(report):
    """Median microseconds, with the factor to `BitLinear` in brackets."""
    found, settings = _medians(report), report["settings"]
    peak = report["vpdpbusd_per_second"]
    peak = f", vpdpbusd {peak / 1e9:.0f} GMAC/s" if peak else ""
    rows = [m for (m,) in _unique(report, "rows")]
    lines = [
        f"{report['machine']['processor']}, {settings['threads']} threads, {report['isa']}, "
        f"backend {report['backend']}, {settings['bits']} bits, kernel {report['kernel']}; median "
        f"microseconds of {settings['rounds']} rounds (times BitLinear); cold read "
        f"{report['read_bytes_per_second'] / 1e9:.1f} GB/s{peak}; load at start "
        f"{report['machine']['load_average'][0]}",
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


LOW_BIT_PEERS = ("OpenVINO u2", "ggml TQ2_0", "ggml TQ1_0", "ONNX Runtime int4", "Keras int4")


def verdicts(report):
    """How `BitLinear` stands to what bounds it and to its peers, as ratios of this run.

    At one row the peers and the float layer are also compared with its smallest layout.
    """
    found = _medians(report)
    lines = [
        "| in x out | m | cold read reached | vpdpbusd reached | best low-bit peer | oneDNN int8 | "
        "Keras float32 |",
        "|---" * 7 + "|",
    ]
    for k, n, m in _unique(report, "in", "out", "rows"):
        row = found["BitLinear", k, n, m]
        seconds = [row["median"]]
        if m == 1 and ("BitLinear, 1.6 bits", k, n, m) in found:
            seconds.append(found["BitLinear, 1.6 bits", k, n, m]["median"])
        peers = {name: found[name, k, n, m]["median"] for name in LOW_BIT_PEERS
                 if (name, k, n, m) in found}  # fmt: skip
        best = min(peers, key=peers.get, default=None)
        cells = [
            f"{k}x{n}",
            m,
            _percent(row["bits_read"] / 8 / seconds[0], report["read_bytes_per_second"]),
            _percent(m * k * n / seconds[0], report["vpdpbusd_per_second"]),
            f"{_times(peers.get(best), seconds)} {best}",
            _times(found.get(("torch oneDNN int8", k, n, m), {}).get("median"), seconds),
            _times(found["Keras float32", k, n, m]["median"], seconds),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _percent(reached, ceiling):
    return f"{100 * reached / ceiling:.0f} %" if ceiling else "-"


def _times(other, seconds):
    return " / ".join(f"{other / own:.2f}x" for own in seconds) if other else "-"


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
    bandwidth = report["read_bytes_per_second"]
    ends = [min(intensity) / 2, max(intensity) * 2]
    axes.plot(ends, [bandwidth * e / 1e9 for e in ends], "k--", lw=1,
              label=f"cold read, {bandwidth / 1e9:.1f} GB/s")  # fmt: skip
    speeds = [r["rows"] * r["in"] * r["out"] / r["median"] / 1e9 for r in report["rows"]]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(min(speeds) / 2, max(speeds) * 3)
    axes.set_xlabel("multiply-adds per byte of the packed weight")
    axes.set_ylabel("multiply-adds a second (1e9)")
    settings, peak = report["settings"], report["vpdpbusd_per_second"]
    if peak:
        axes.axhline(peak / 1e9, color="k", ls=":", lw=1, label=f"vpdpbusd, {peak / 1e9:.0f}e9/s")
    axes.set_title(f"{settings['bits']}-bit packed matmul, {report['backend']}, "
                   f"{settings['threads']} threads")  # fmt: skip
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
