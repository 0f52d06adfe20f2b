"""What the book contains and which scripts show it: toc.yml joined with the file names. Light: runs no script.

The rule of names: Section 4.4 is `s4_04_<slug>.py` in its chapter's folder, its shortcuts `s4_04_shortcut_<slug>.py`.
"""
from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
import shutil
import sys
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from shared.errors import MissingDependency, UsageError

ROOT = Path(__file__).resolve().parent.parent
# Names that the libraries' distributions do not share with what one imports, and the Debian packages of executables.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "faiss": "faiss-cpu", "yaml": "PyYAML", "fbgemm_gpu": "fbgemm-gpu-cpu",
                 "xgboost": "xgboost-cpu", "pyspiel": "open-spiel", "kafka": "kafka-python",
                 "torch_geometric": "torch-geometric",
                 "sentence_transformers": "sentence-transformers", "jupyter_book": "jupyter-book"}
DEBIAN = {"mpirun": "openmpi-bin", "java": "openjdk-17-jre-headless", "redis-server": "redis-server",
          "etcd": "etcd-server",
          "postgres": "postgresql", "nginx": "nginx"}


@dataclass(frozen=True, eq=False)
class Section:
    number: str
    title: str
    chapter: Chapter = field(repr=False)
    folder: Path
    demo: Path | None
    shortcuts: list[Path]

    @property
    def state(self) -> str:
        return "planned" if not self.demo else "ready" if self.shortcuts else "demo only"

    @property
    def scripts(self) -> list[Path]:
        return [self.demo, *self.shortcuts] if self.demo else self.shortcuts


@dataclass(frozen=True, eq=False)
class Chapter:
    number: int
    title: str
    folder: Path
    part: Part = field(repr=False)
    sections: list[Section] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Part:
    number: int
    title: str
    folder: Path
    chapters: list[Chapter] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Declaration:
    """The arguments of a script's `@demo(...)`, read without importing it; what is not a literal is its source text."""

    section: str = ""
    needs: tuple[str, ...] = ()
    library: str | None = None
    handles: tuple[str, ...] = ()
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)


def parts() -> list[Part]:
    """The book in its order, with the scripts that exist now."""
    book = []
    for p in _contents():
        part = Part(p["part"], p["title"], ROOT / p["folder"])
        book.append(part)
        for c in p["chapters"]:
            chapter = Chapter(c["chapter"], c["title"], ROOT / c["folder"], part)
            part.chapters.append(chapter)
            scripts = sorted(chapter.folder.glob("s*.py"))
            chapter.sections.extend(_section(chapter, s["section"], s["title"], scripts) for s in c["sections"])
    return book


def sections() -> list[Section]:
    return [section for part in parts() for chapter in part.chapters for section in chapter.sections]


def find(address: str | None = None) -> list[Section]:
    """Sections of "4.4" (one), "4" or "ch04" (a chapter), "part1" or None (all); else UsageError with the nearest."""
    everything = sections()
    if address is None:
        return everything
    prefix = r"^(ch|chapter|part|section)?[ _]*0*(?=\d)"
    wanted = re.sub(prefix, lambda m: "part" if m[1] == "part" else "", address.strip().lower())
    found = [s for s in everything if wanted in (s.number, str(s.chapter.number), f"part{s.chapter.part.number}")]
    if not found:
        known = [a for s in everything for a in (s.number, str(s.chapter.number), f"part{s.chapter.part.number}")]
        nearest = difflib.get_close_matches(wanted, dict.fromkeys(known), n=1, cutoff=0.0)
        raise UsageError(f"the book has no {address!r}; the nearest is {nearest[0]} (see: scalable list)")
    return found


def nearest_ready(section: Section, count: int = 3) -> list[str]:
    """Numbers of the built sections closest to `section` in the book's order."""
    everything = sections()
    here = [s.number for s in everything].index(section.number)
    built = sorted((abs(i - here), s.number) for i, s in enumerate(everything) if s.demo)
    return [number for _, number in built[:count]]


def declaration(path: Path) -> Declaration:
    """Parses the lines of the decorator alone: a whole syntax tree for each of 700 scripts would take a second."""
    text = re.search(r"^@demo\(.*?(?=^(?:async )?def )", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if not text:
        return Declaration()
    call = ast.parse(f"{text[0]}def main(): ...").body[0].decorator_list[0]
    given = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
    presets = {name: given[name] for name in ("smoke", "laptop", "cluster") if given.get(name) is not None}
    return Declaration(_literal(call.args[0]), tuple(given.get("needs", ())), given.get("library"),
                       tuple(given.get("handles", ())), presets)


def module_name(path: Path) -> str:
    """The dotted name of a script below the repository root; the bare name of any other."""
    path = path.resolve()
    return ".".join(path.relative_to(ROOT).with_suffix("").parts) if path.is_relative_to(ROOT) else path.stem


def number(path: Path) -> str:
    """ "4.4" of s4_04_all_reduce_algorithms.py."""
    chapter, section, *_ = path.stem[1:].split("_")
    return f"{chapter}.{int(section)}"


def load(path: Path) -> ModuleType:
    """Import a script under its real dotted name, under which what it defines can be unpickled by other processes."""
    home = ROOT if path.resolve().is_relative_to(ROOT) else path.resolve().parent
    if str(home) not in sys.path:
        sys.path.insert(0, str(home))
    return importlib.import_module(module_name(path))


def extras() -> dict[str, list[str]]:
    """Extra -> distributions, from pyproject.toml itself: an editable install's metadata does not follow its edits."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {extra: [re.match(r"[\w.-]+", line)[0] for line in lines if not line.startswith(project["name"])]
             for extra, lines in project.get("optional-dependencies", {}).items()}
    return {extra: names for extra, names in found.items() if names}  # one that only points to another adds nothing


def missing(needs: Iterable[str]) -> list[MissingDependency]:
    """What of `needs` is not here: import names ("torch") and executables ("exe:mpirun")."""
    return [problem for need in needs if (problem := _missing(need))]


def version(name: str) -> str | None:
    """Of the installed library imported as `name`."""
    from importlib import metadata

    with suppress(metadata.PackageNotFoundError):
        return metadata.version(DISTRIBUTIONS.get(name, name))
    return None


def executable(name: str) -> str | None:
    """Path of a program, on PATH or where Debian hides PostgreSQL's servers."""
    hidden = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(hidden[-1]) if hidden else None)


def _missing(need: str) -> MissingDependency | None:
    if need.startswith("exe:"):
        name = need.removeprefix("exe:")
        return None if executable(name) else MissingDependency(name, debian=DEBIAN.get(name, name))
    if importlib.util.find_spec(need):
        return None
    extra = next((extra for extra, names in extras().items() if DISTRIBUTIONS.get(need, need) in names), None)
    return MissingDependency(need, extra=extra)


def _section(chapter: Chapter, number: str, title: str, scripts: list[Path]) -> Section:
    prefix = "s{}_{:02d}_".format(*map(int, number.split(".")))
    mine = [path for path in scripts if path.name.startswith(prefix)]
    shortcuts = [path for path in mine if path.name.startswith(f"{prefix}shortcut_")]
    demo = next((path for path in mine if path not in shortcuts), None)
    return Section(number, title, chapter, chapter.folder, demo, shortcuts)


@cache
def _contents() -> list[dict[str, Any]]:
    import yaml

    return yaml.load((Path(__file__).parent / "toc.yml").read_text(encoding="utf-8"), yaml.CSafeLoader)["parts"]


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
