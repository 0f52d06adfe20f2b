"""The record of one run in plain JSON types (see result.schema.json): claims, tables, numbers, machine and versions."""
from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import catalog
from shared.files import write_atomically
from shared.terminal import show

RELATIONS = {"equals": "=", "differs": "!=", "at_least": ">=", "at_most": "<=", "above": ">", "below": "<",
             "between": "in"}
SHOWN = 8  # a claim keeps arrays of up to this many elements; of longer ones the shape and the largest difference


@dataclass
class Result:
    """Everything a run recorded. Sizes in bytes, times in seconds, date in UTC, `preset` None for the defaults."""

    section: str
    title: str
    question: str
    script: str
    script_sha256: str
    library: str | None
    handles: list[str]
    preset: str | None
    parameters: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    date: str
    tables: list[dict[str, Any]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    records: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    lines_of_code: dict[str, Any] | None = None
    errata: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def ok(self) -> bool:
        return all(claim["holds"] for claim in self.claims)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ok": self.ok}

    def save(self, path: str | Path) -> None:
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(path, f"{text}\n".encode())

    @classmethod
    def load(cls, path: str | Path) -> Result:
        recorded = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{f.name: recorded[f.name] for f in dataclasses.fields(cls)})


def make_claim(text: str, measured: Any, kind: str, expected: Any, tolerance: float, relative: float, unit: str,
               timing: bool) -> dict[str, Any]:
    """One claim as it is recorded, judged."""
    shown, wanted = _recorded(measured, expected)
    return {"text": text, "holds": holds(measured, kind, expected, tolerance, relative), "measured": shown,
            "relation": kind, "expected": wanted, "tolerance": float(tolerance), "relative": float(relative),
            "unit": unit, "timing": timing}


def holds(measured: Any, kind: str, expected: Any, tolerance: float = 0.0, relative: float = 0.0) -> bool:
    """Whether the relation holds, widened by tolerance + relative * |expected|. NaN never does.

    Boundaries count, except for above and below. Arrays must have equal shapes, and without tolerance be exactly equal.
    `differs` is the opposite of equals, and a NaN does not hold there either.
    """
    import numpy as np

    if kind == "differs":
        known = not any(np.asarray(side).dtype.kind == "f" and np.isnan(side).any() for side in (measured, expected))
        return known and not holds(measured, "equals", expected, tolerance, relative)
    if kind == "equals":
        ours, theirs = np.asarray(measured), np.asarray(expected)
        if ours.shape != theirs.shape:
            return False
        if not tolerance and not relative:
            return bool(np.array_equal(ours, theirs))
        return bool(np.isclose(ours, theirs, rtol=relative, atol=tolerance).all())
    value = np.asarray(measured).item()
    low, high = expected if kind == "between" else (expected, expected)
    low, high = (edge + sign * (tolerance + relative * abs(edge) or 0) for edge, sign in ((low, -1), (high, 1)))
    return {"at_least": value >= low, "at_most": value <= high, "above": value > low, "below": value < high,
            "between": low <= value <= high}[kind]


def describe(claim: dict[str, Any]) -> str:
    """One line: the claim, what was measured, what was expected."""
    measured, expected = show(claim["measured"]), show(claim["expected"])
    if measured == expected and claim["measured"] != claim["expected"]:  # they differ beyond the digits shown
        measured, expected = str(claim["measured"]), str(claim["expected"])
    slack = f" +- {claim['tolerance']:.4g}" if claim["tolerance"] else ""
    slack += f" +- {100 * claim['relative']:.4g} %" if claim["relative"] else ""
    unit = f" {claim['unit']}" if claim["unit"] else ""
    return f"{claim['text']}: {measured}{unit} ({RELATIONS[claim['relation']]} {expected}{unit}{slack})"


def plain(value: Any) -> Any:
    """JSON's own types: arrays become lists, dataclasses dicts, NaN and infinities null. TypeError for what is none."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"cannot record a {type(value).__name__}: give numbers, text, arrays, lists or dicts")


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory in bytes, operating system, Python."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model[1] if model else platform.machine(), "cores": cores, "memory_bytes": memory,
            "os": platform.platform(),
            "python": platform.python_version()}


def versions(needs: Iterable[str]) -> dict[str, str]:
    """Of NumPy and of every library in `needs`; executables have none."""
    names = dict.fromkeys(["numpy", *(need for need in needs if not need.startswith("exe:"))])
    return {name: version for name in names if (version := catalog.version(name))}


def _recorded(measured: Any, expected: Any) -> tuple[Any, Any]:
    """Both sides in JSON types; long arrays as one line of text, NaN and infinities by name."""
    import numpy as np

    ours, theirs = np.asarray(measured), np.asarray(expected)
    if max(ours.size, theirs.size) <= SHOWN:
        sides = ((value, plain(value)) for value in (measured, expected))
        return tuple(str(value) if value is not None and kept is None else kept for value, kept in sides)
    difference = ""
    if ours.shape == theirs.shape and ours.dtype.kind in "biuf":
        difference = f", largest difference {np.abs(ours.astype(float) - theirs).max():.3g}"
    return f"{ours.dtype} array {ours.shape}{difference}", f"{theirs.dtype} array {theirs.shape}"
