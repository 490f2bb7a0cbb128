"""A budget for a whole model: bytes, bits a weight, or time."""

import dataclasses
import re

UNITS = {
    "bit": ("bits", 1.0), "bits": ("bits", 1.0),
    "b": ("bytes", 1.0), "byte": ("bytes", 1.0), "bytes": ("bytes", 1.0),
    "kb": ("bytes", 1e3), "mb": ("bytes", 1e6), "gb": ("bytes", 1e9),
    "kib": ("bytes", 2.0**10), "mib": ("bytes", 2.0**20), "gib": ("bytes", 2.0**30),
    "us": ("seconds", 1e-6), "ms": ("seconds", 1e-3), "s": ("seconds", 1.0),
}  # fmt: skip
_TEXT = re.compile(r"\s*([0-9.]+(?:e[-+]?[0-9]+)?)\s*([a-zA-Z]+)\s*", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a model may cost.

    Attributes:
        limit: The number, positive.
        kind: `"bytes"`: of all weights in memory once packed, other layers included. `"bits"`:
            of the codes, on average over the weights of the layers that can be quantized.
            `"seconds"`: the sum of the measured latencies of those layers for one batch.
    """

    limit: float
    kind: str

    @classmethod
    def of(cls, budget):
        """Reads `"4.5 bits"`, `"1.2MB"`, `"300 KiB"` or `"3ms"`; a `Budget` is returned as it is.

        Raises:
            ValueError: It is none of these, or not positive.
        """
        if isinstance(budget, cls):
            return budget
        match = _TEXT.fullmatch(budget) if isinstance(budget, str) else None
        kind, factor = UNITS.get(match.group(2).lower(), ("", 0.0)) if match else ("", 0.0)
        try:
            limit = float(match.group(1)) * factor if match else 0.0
        except ValueError:
            limit = 0.0
        if not limit > 0:
            raise ValueError(
                "`budget` must be a positive number with a unit, such as '4.5 bits' (average of "
                "a weight), '1.2MB', '300KiB', '3ms' or '250us'. "
                f"Received: budget={budget!r}"
            )
        return cls(limit, kind)

    def format(self, value):
        """A value of this kind for people: `4.50 bits`, `1.20 MB`, `3.00 ms`."""
        return format_cost(value, self.kind)

    def __str__(self):
        return self.format(self.limit)


def format_cost(value, kind):
    """A cost for people: `4.50 bits`, `1.20 MB`, `3.00 ms`."""
    if kind == "bits":
        return f"{value:.2f} bits"
    scales = {
        "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
        "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
    }[kind]
    factor, unit = next((pair for pair in scales if value >= pair[0]), scales[-1])
    return f"{value / factor:.4g} {unit}"
