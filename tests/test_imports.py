"""Imports point down: `shared` imports no part, a chapter `shared` and chapters with its own or a smaller number."""
from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.catalog import ROOT

RING = "part1_foundations/ch04_x/s4_04_ring.py"  # a made-up script of Chapter 4
PART = re.compile(r"part[1-8]_\w+")
CHAPTER = re.compile(r"ch(\d\d)_\w+")


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a module of `package` imports, also in functions and by import_module("...")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def chapter_number(names: tuple[str, ...] | list[str]) -> int | None:
    found = CHAPTER.fullmatch(names[1]) if len(names) > 1 and PART.fullmatch(names[0]) else None
    return int(found[1]) if found else None


def offenders(root: Path) -> list[str]:
    """One line for each import below `shared` and the parts that points up or out of the house."""
    lines = []
    files = [path for folder in (root / "shared", *root.glob("part[1-8]_*")) for path in sorted(folder.rglob("*.py"))]
    for path in files:
        package = path.relative_to(root).parent.parts
        here = chapter_number(package)
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8")), package):
            names = name.split(".")
            there = chapter_number(names)
            if names[0] in ("tests", "tools", "book"):
                why = "what readers import must not need it"
            elif package[0] == "shared" and PART.fullmatch(names[0]):
                why = "shared imports no part"
            elif there is not None and here is not None and there > here:
                why = f"Chapter {there} comes later"
            else:
                continue
            lines.append(f"{path.relative_to(root)}:{line} imports {name}: {why}")
    return lines


def test_imports_point_down() -> None:
    found = offenders(ROOT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("shared/demo.py", "import part1_foundations.ch04_x.collectives", "shared imports no part"),
        ("shared/demo.py", "def f():\n    from part2_data import ch06_x", "shared imports no part"),
        ("shared/demo.py", "import_module('part1_foundations.ch01_x')", "shared imports no part"),
        (RING, "from part1_foundations.ch05_y import harness", "Chapter 5 comes later"),
        (RING, "from part1_foundations import ch05_y", "Chapter 5 comes later"),
        (RING, "from ..ch05_y.harness import load", "Chapter 5 comes later"),
        (RING, "from part4_parallel_dl.ch15_z import ddp", "Chapter 15 comes later"),
        (RING, "from tests.conftest import left_behind", "must not need it"),
    ],
)
def test_planted_offender_is_found(tmp_path: Path, file: str, source: str, why: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    (line,) = offenders(tmp_path)
    assert line.startswith(f"{file}:{source.count(chr(10)) + 1} imports ") and why in line


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("shared/demo.py", "import numpy\nfrom shared.measure import timed"),
        ("part4_parallel_dl/ch15_z/s15_02_ddp.py", "from part1_foundations.ch04_x.collectives import ring"),
        (RING, "from shared import Run\nfrom . import collectives\nfrom .collectives import ring"),
        (RING, "from ..ch04_x import collectives\nimport part1_foundations.ch03_w.alpha_beta"),
    ],
)
def test_import_that_points_down_is_allowed(tmp_path: Path, file: str, source: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    assert offenders(tmp_path) == []
