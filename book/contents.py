"""What the book contains: the built and the planned sections, their records, and what the chapter READMEs declare.

A chapter's README declares two things in tables that the book reads. Under "Where these return", one row for each
thread: its name, the sections in which it begins, the sections in which it returns. Under "Terms", one row for each
term: the term, its meaning, the section that teaches it.
"""
from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from book.sources import parse
from shared import catalog, records
from shared.errors import ReaderError

ROMAN = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII")
SECTION = re.compile(r"\b\d+\.\d+\b")


@dataclass(frozen=True)
class Thread:
    """An idea that a chapter introduces and later chapters import."""

    name: str
    begins: list[str]
    returns: list[str]

    @property
    def document(self) -> str:
        return f"threads/{re.sub(r'[^a-z0-9]+', '_', self.name.lower()).strip('_')}"

    @property
    def sections(self) -> list[str]:
        return [*self.begins, *self.returns]


@dataclass(frozen=True)
class Term:
    name: str
    meaning: str
    section: str


@dataclass
class Book:
    parts: list[catalog.Part] = field(default_factory=catalog.parts)
    record: Callable[[str], dict[str, Any] | None] = records.load
    problems: Callable[[catalog.Section], list[str]] = records.problems

    @cached_property
    def chapters(self) -> list[catalog.Chapter]:
        return [chapter for part in self.parts for chapter in part.chapters]

    @cached_property
    def sections(self) -> dict[str, catalog.Section]:
        return {section.number: section for chapter in self.chapters for section in chapter.sections}

    @cached_property
    def built(self) -> list[catalog.Section]:
        return [section for section in self.sections.values() if section.demo]

    @cached_property
    def open_chapters(self) -> list[catalog.Chapter]:
        """Those with a page of their own."""
        return [chapter for chapter in self.chapters if readme(chapter).exists()]

    def results(self, section: catalog.Section) -> dict[Path, dict[str, Any]]:
        """Script -> recorded result, for the scripts that have one."""
        record = self.record(section.number) or {"scripts": []}
        by_name = {Path(entry["result"]["script"]).name: entry["result"] for entry in record["scripts"]}
        return {script: by_name[script.name] for script in section.scripts if script.name in by_name}

    @cached_property
    def threads(self) -> list[Thread]:
        return [Thread(name, SECTION.findall(begins), SECTION.findall(returns))
                for chapter in self.open_chapters
                for name, begins, returns in declared(chapter, "Where these return")]

    @cached_property
    def terms(self) -> list[Term]:
        terms = [Term(name, meaning, section) for chapter in self.open_chapters
                 for name, meaning, section in declared(chapter, "Terms")]
        return sorted(terms, key=lambda term: term.name.lower())

    def mistakes(self) -> list[str]:
        """What the READMEs declare that cannot be: unknown sections, a return before its beginning, a term twice."""
        lines = [f"Chapter {chapter.number} has built sections and no README.md" for chapter in self.chapters
                 if chapter not in self.open_chapters and any(section.demo for section in chapter.sections)]
        order = {number: place for place, number in enumerate(self.sections)}
        for thread in self.threads:
            lines += [f"thread {thread.name!r}: the book has no section {n}" for n in thread.sections if n not in order]
            if not (thread.begins and thread.returns):
                lines.append(f"thread {thread.name!r} needs sections to begin in and to return in")
            elif all(n in order for n in thread.sections) and (
                    min(map(order.get, thread.returns)) <= max(map(order.get, thread.begins))):
                lines.append(f"thread {thread.name!r} returns before it begins")
        for term in self.terms:
            if term.section not in order:
                lines.append(f"term {term.name!r}: the book has no section {term.section}")
            elif not self.sections[term.section].demo:
                lines.append(f"term {term.name!r}: Section {term.section}, which teaches it, is not built")
        names = [item.name.lower() for item in (*self.threads, *self.terms)]
        return lines + [f"{name!r} is declared twice" for name in sorted(set(names))
                        if sum(item.name.lower() == name for item in self.threads) > 1
                        or sum(item.name.lower() == name for item in self.terms) > 1]


def readme(chapter: catalog.Chapter) -> Path:
    return chapter.folder / "README.md"


def declared(chapter: catalog.Chapter, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of a chapter's README, three cells each; [] without the heading."""
    text = readme(chapter).read_text(encoding="utf-8")
    block = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\|(.+)\|$", block[1], re.MULTILINE)[2:] if block else []
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    if wrong := [row for row in cells if len(row) != 3]:
        raise ReaderError(f"{readme(chapter)}: {heading}: three cells are needed in {' | '.join(wrong[0])}")
    return cells


def modules(chapter: catalog.Chapter) -> list[Path]:
    """The Python files of a chapter that are no scripts: what its sections share, and its exercises."""
    return [path for path in sorted(chapter.folder.glob("*.py"))
            if not re.match(r"s\d+_\d+_", path.name) and path.stem not in ("__init__", "grading")]


def imports(path: Path) -> list[Path]:
    """Files of the parts that a file imports itself, in their order."""
    return _imports(path, path.stat().st_mtime_ns)


@cache
def _imports(path: Path, _changed: int) -> list[Path]:
    names: dict[str, None] = {}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("part"):
            names |= dict.fromkeys([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    files = [catalog.ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names]
    return [file for file in files if file.exists()]


def document(target: catalog.Section | catalog.Chapter | catalog.Part | Path) -> str:
    """The page of something, without suffix: ch04/s4_04, ch04/index, part1, ch04/collectives."""
    if isinstance(target, catalog.Part):
        return f"part{target.number}"
    if isinstance(target, catalog.Chapter):
        return f"ch{target.number:02d}/index"
    if isinstance(target, catalog.Section):
        chapter, section = map(int, target.number.split("."))
        return f"ch{chapter:02d}/s{chapter}_{section:02d}"
    folder = re.match(r"ch\d+", target.parent.name)[0]
    script = re.match(r"s\d+_\d+", target.stem)
    return f"{folder}/{script[0] if script else target.stem}"
