"""The pages say what the repository holds: generated parts are up to date, links resolve, commands exist."""
from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from shared import catalog
from shared.catalog import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("part[1-8]_*/**/README.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def generator(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_generator", root / "tools/readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """The ids that a Markdown host gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [LINK.sub(lambda m: m[0].partition("]")[0].lstrip("!["), heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or heading does not exist."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(target)
    return broken


def commands(page: Path) -> Iterator[list[str]]:
    """Every command a page shows, in a console block or in backquotes, that starts with a word of this repository."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:console|bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in lines:
        words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else line.split()
        if words and words[0].removeprefix(".venv/bin/") in ("make", "scalable", "python", "pip", "torchrun", "pytest"):
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def unknown(command: list[str]) -> str | None:
    """Why a command cannot be typed as shown, or None."""
    program, *words = command
    plain = [word for word in words if not word.startswith("-")]
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        bad = [word for word in plain if "=" not in word and word not in targets]
        return f"make has no target {bad[0]}" if bad else None
    if program == "scalable" and plain:
        if plain[0] not in subcommands():
            return f"scalable has no command {plain[0]}"
        if len(plain) > 1 and re.fullmatch(r"[\d.]+", plain[1]):
            catalog.find(plain[1])
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [extra for word in words for listed in re.findall(r"\.\[(.+)\]", word) for extra in listed.split(",")]
        bad = [extra for extra in named if extra not in extras]
        return f"pyproject.toml has no extra {bad[0]}" if bad else None
    missing = [word for word in plain if word.endswith(".py") and not (ROOT / word).exists()]
    return f"no file {missing[0]}" if missing else None


@cache
def subcommands() -> set[str]:
    shown = subprocess.run([sys.executable, "-c", "from shared.cli import main; main()", "--help"], cwd=ROOT, text=True,
                           capture_output=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    return set(re.findall(r"^[\s│|]+([a-z][\w-]+)\s{2,}", shown.stdout, re.MULTILINE))


def test_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, ROOT / "tools/readme.py", "--check"]
    check = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert check.returncode == 0, check.stderr


def test_drift_is_one_line_per_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that was edited by hand, and one that was lost, are each named; the others are not."""
    for page in PAGES:
        copy = tmp_path / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, copy)
    monkeypatch.setattr(catalog, "ROOT", tmp_path)
    readme = generator(ROOT)
    for path, text in readme.pages().items():
        path.write_text(text, encoding="utf-8")
    assert readme.drift() == []
    with (tmp_path / "part2_data/README.md").open("a") as page:
        page.write("typed by hand\n")
    (tmp_path / "part3_distributed_ml/README.md").unlink()
    assert [line.split()[0] for line in readme.drift()] == ["part2_data/README.md", "part3_distributed_ml/README.md"]


def test_a_figure_may_differ_by_how_a_processor_rounds() -> None:
    same = generator(ROOT).same
    figure = '<svg><path id="m0123456789" d="M 59.673678 -2.5e-06 L 7.000000 1"/></svg>'
    rounded = figure.replace("59.673678", "59.673677").replace("m0123456789", "m9876543210")
    assert same(figure, rounded) and not same(figure, figure.replace("59.67", "59.69"))
    assert not same(figure, figure.replace("path", "line")) and not same("1.500001", "1.500002")


def test_a_part_without_chapters_holds_its_readme_alone() -> None:
    for part in catalog.parts():
        if not any(chapter.folder.exists() for chapter in part.chapters):
            assert [path.name for path in part.folder.iterdir() if path.name != "__pycache__"] == ["README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# A heading\n[a](README.md#a-heading) [b](gone.md) [c](#no-heading) [d](https://example.org/x)\n")
    assert broken_links(page) == ["gone.md", "#no-heading"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_shown_exist(page: Path) -> None:
    problems = {shlex.join(command): unknown(command) for command in commands(page)}
    assert not {command: why for command, why in problems.items() if why}


def test_readme_shows_both_commands() -> None:
    shown = list(commands(ROOT / "README.md"))
    assert ["make", "demo"] in shown and ["make", "test"] in shown


@pytest.mark.parametrize("line", ["make dinner", "scalable dance", "python part1/gone.py", "pip install -e .[nothing]"])
def test_a_command_that_does_not_exist_is_found(tmp_path: Path, line: str) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"```console\n$ {line}\n```\n")
    (command,) = commands(page)
    assert unknown(command)
