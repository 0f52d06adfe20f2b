"""What the book quotes from Python files, read without running them: docstrings, functions, exercises."""
from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shared.catalog import ROOT

LABELS = ("Question", "Method", "Read", "Source")


@dataclass(frozen=True)
class Excerpt:
    """Some lines of a file of this repository."""

    name: str
    file: str
    line: int
    text: str

    @property
    def lines(self) -> int:
        return self.text.count("\n") + 1


@dataclass(frozen=True)
class Exercise:
    name: str
    section: str | None
    task: str
    signature: str
    solution: str


def module_docstring(path: Path) -> str:
    return ast.get_docstring(_tree(path)) or ""


def labelled(path: Path) -> dict[str, str]:
    """Question, Method, Read and Source of a script's docstring, each as one paragraph."""
    pattern = rf"^({'|'.join(LABELS)}) +(.*(?:\n +.*)*)"
    return {label: " ".join(text.split())
            for label, text in re.findall(pattern, module_docstring(path), re.MULTILINE)}


def excerpt(dotted: str) -> Excerpt:
    """The source of "package.module:Class.function", decorators included; of a module everything below its docstring.

    KeyError if the repository has no such thing any more.
    """
    module, _, name = dotted.partition(":")
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not path.exists():
        raise KeyError(dotted)
    node: ast.AST = _tree(path)
    for part in filter(None, name.split(".")):
        node = next((child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part), None)
        if node is None:
            raise KeyError(dotted)
    file = path.relative_to(ROOT).as_posix()
    if isinstance(node, ast.Module):
        return body(path)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return Excerpt(name, file, first, "\n".join(_lines(path)[first - 1:node.end_lineno]))


def body(path: Path) -> Excerpt:
    """A file below its docstring, which the page shows as text."""
    tree, lines = _tree(path), _lines(path)
    first = tree.body[0].end_lineno if ast.get_docstring(tree) else 0
    while first < len(lines) and not lines[first].strip():
        first += 1
    return Excerpt(path.name, path.relative_to(ROOT).as_posix(), first + 1, "\n".join(lines[first:]))


def exercises(folder: Path) -> list[Exercise]:
    """The stubs of a chapter's exercises.py with their tasks, and the answer of the same name in solutions.py."""
    if not (folder / "exercises.py").exists():
        return []
    solved = {node.name: node for node in _tree(folder / "solutions.py").body if isinstance(node, ast.FunctionDef)}
    found = []
    for node in _tree(folder / "exercises.py").body:
        if not isinstance(node, ast.FunctionDef):
            continue
        task = ast.get_docstring(node) or ""
        section = re.search(r"\bSection (\d+\.\d+)\b", task)
        answer = solved[node.name]
        lines = _lines(folder / "exercises.py")[node.lineno - 1:node.body[0].lineno - 1]
        found.append(Exercise(node.name, section[1] if section else None, task, "\n".join(lines),
                              "\n".join(_lines(folder / "solutions.py")[answer.lineno - 1:answer.end_lineno])))
    return found


def parse(path: Path) -> ast.Module:
    return _tree(path)


def _tree(path: Path) -> ast.Module:
    return _parsed(path, path.stat().st_mtime_ns)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@cache
def _parsed(path: Path, _changed: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
