"""What this machine has, what it lacks, and the command that adds it: the findings of `scalable doctor`."""
from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator

import psutil

from shared import catalog

CORE = ("numpy", "matplotlib", "rich", "typer", "PyYAML", "simpy", "psutil")
SERVICES = ("redis-server", "etcd", "postgres", "nginx", "mpirun")
GIB = 2**30


def findings() -> Iterator[tuple[str, str]]:
    """One (what, state) pair a line. Nothing heavy is imported: versions come from the installed metadata."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(catalog.ROOT)
    yield "python", f"{platform.python_version()}  {sys.executable}"
    yield "core", _installed(CORE)
    yield "cores", f"{psutil.cpu_count(logical=False)} physical, {len(psutil.Process().cpu_affinity())} usable"
    yield "memory", f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB free"
    yield "disk", f"{disk.free / GIB:.1f} GiB free at {catalog.ROOT}"
    yield "gpu", _gpus()
    for name in ("java", *SERVICES):
        path = catalog.executable(name)
        yield name, path or f"missing: apt-get install {catalog.DEBIAN[name]}"
    waiting = _waiting()
    for extra, names in catalog.extras().items():
        absent = [name for name in names if not catalog.version(name)]
        if not absent:
            yield f"extra {extra}", _installed(names)
            continue
        sections = dict.fromkeys(number for name in absent for number in waiting.get(name, ()))
        unlocks = ", ".join(sections) or "nothing built yet"
        remedy = f"pip install -e '.[{extra}]' -c constraints.txt"
        yield f"extra {extra}", f"missing {', '.join(absent)}; unlocks {unlocks}: {remedy}"


def _installed(names: tuple[str, ...] | list[str]) -> str:
    return "  ".join(f"{name} {catalog.version(name) or 'MISSING'}" for name in names)


def _gpus() -> str:
    if not shutil.which("nvidia-smi"):
        return "none seen (no nvidia-smi); everything runs on the CPU"
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip().splitlines()
    return "; ".join(listed) or "nvidia-smi lists none"


def _waiting() -> dict[str, list[str]]:
    """Distribution -> the sections whose scripts need it."""
    waiting: dict[str, list[str]] = {}
    for section in catalog.sections():
        for need in {need for path in section.scripts for need in catalog.declaration(path).needs}:
            waiting.setdefault(catalog.DISTRIBUTIONS.get(need, need), []).append(section.number)
    return waiting
