"""The rendered pages as files: every link leads somewhere, nothing comes from elsewhere, numbers are as recorded."""
from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from functools import cache
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from book import build
from book.contents import Book, document
from shared import catalog, records
from shared.catalog import ROOT
from shared.errors import MissingDependency
from shared.terminal import show

BUILT = [section for section in catalog.sections() if section.scripts]


class Page(HTMLParser):
    """Ids, addresses (tag, attribute, value), tags and visible text of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[tuple[str, str, str]] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self.ids += [given["id"]] if given.get("id") else []
        self.addresses += [(tag, name, given[name]) for name in ("href", "src", "xlink:href") if given.get(name)]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


@cache
def read(path: Path) -> Page:
    return Page(path)


@pytest.fixture(scope="module")
def files(rendered: Path) -> list[Path]:
    return sorted(rendered.rglob("*.html"))


def own(files: list[Path]) -> list[Path]:
    """Without the theme's own fragments."""
    return [path for path in files if "_static" not in path.parts]


def test_every_internal_link_and_anchor_leads_somewhere(rendered: Path, files) -> None:
    broken, checked = [], 0
    for path in own(files):
        for tag, _, address in read(path).addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            checked += 1
            if not target.is_file():
                broken.append(f"{path.relative_to(rendered)}: {tag} {address}: no such file")
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read(target).ids:
                broken.append(f"{path.relative_to(rendered)}: {tag} {address}: no such anchor")
    assert not broken, "\n".join(broken[:20])
    assert checked > 1000


def test_nothing_is_loaded_from_elsewhere(rendered: Path, files) -> None:
    for path in own(files):
        for tag, name, address in read(path).addresses:
            loads = tag != "a" and not (tag == "link" and "canonical" in address)
            assert not (loads and urlsplit(address).scheme in ("http", "https")), f"{path}: <{tag} {name}={address}>"
    for sheet in rendered.rglob("*.css"):
        outside = re.findall(r"(?:url\(|@import)\s*['\"]?(https?:[^)'\"]+)", sheet.read_text(encoding="utf-8"))
        assert not outside, f"{sheet}: {outside}"


@pytest.mark.parametrize("section", BUILT, ids=lambda section: section.number)
def test_a_rendered_page_shows_the_recorded_numbers(section: catalog.Section, rendered: Path) -> None:
    typed = str.maketrans("‘’“”…", "''\"\".")  # as before the typographer
    words = read(rendered / f"{document(section)}.html").words.translate(typed)
    for entry in records.load(section.number)["scripts"]:
        for table in entry["result"]["tables"]:
            for row in table["rows"]:
                assert " ".join(" ".join(show(cell) for cell in row).split()) in words, row
        for claim in entry["result"]["claims"]:
            assert " ".join(claim["text"].split()) in words


def test_every_page_is_a_page(files) -> None:
    for path in own(files):
        page = read(path)
        tags = [tag for tag, _ in page.tags]
        assert dict(page.tags)["html"].get("lang") == "en" and tags.count("title") >= 1, path
        assert tags.count("main") == 1, path
        if path.name != "search.html":
            headings = [given for tag, given in page.tags if tag == "h1"]
            assert 1 <= len(headings) <= 2, path  # the second one is the theme's, for print only
        duplicates = {name for name in page.ids if page.ids.count(name) > 1}
        assert not duplicates, f"{path}: ids used twice: {sorted(duplicates)[:5]}"
        drawings = [given for tag, given in page.tags if tag == "svg" and "aria-label" in given]
        assert all(given.get("role") == "img" and given["aria-label"].startswith("Figure: ") for given in drawings)


def test_figures_are_drawn_from_the_page_s_ink(rendered: Path) -> None:
    drawn = 0
    for section in BUILT:
        text = (rendered / f"{document(section)}.html").read_text(encoding="utf-8")
        for figure in re.findall(r'<figure class="drawn">(.*?)</figure>', text, re.DOTALL):
            drawn += 1
            assert "currentColor" in figure and "#7d7d7d" not in figure and "DejaVu" not in figure
            assert "#ffffff" not in figure.lower() or "fill: #ffffff" not in figure.lower()  # no white box in the dark
    assert drawn >= len(BUILT)


def test_planned_sections_are_in_the_sidebar_without_a_link(rendered: Path) -> None:
    book = Book()
    for part in book.parts:
        text = (rendered / f"{document(part)}.html").read_text(encoding="utf-8")
        nav = re.search(r'<nav class="bd-links bd-docs-nav book-nav".*?</nav>', text, re.DOTALL)[0]
        for chapter in part.chapters:
            built = chapter in book.open_chapters
            pattern = rf"{'</?a[^>]*>' if built else '<span class=.planned-entry.>'}{chapter.number} "
            assert re.search(rf'<a [^>]*>{chapter.number} ', nav) if built else re.search(pattern, nav), chapter.title


def test_a_second_build_changes_no_page_and_takes_seconds(rendered: Path) -> None:
    def state() -> dict[Path, str]:
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in rendered.rglob("*.html")}

    before, begin = state(), time.perf_counter()
    command = [sys.executable, str(ROOT / "book/build.py"), "--output", str(rendered.parent.parent)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0 and " 0 written" in done.stdout, done.stdout + done.stderr
    assert state() == before
    assert time.perf_counter() - begin < 20


def test_the_search_index_knows_every_page(rendered: Path, files) -> None:
    index = (rendered / "searchindex.js").read_text(encoding="utf-8")
    names = {path.relative_to(rendered).with_suffix("").as_posix() for path in own(files)} - {"search", "genindex"}
    assert all(f'"{name}"' in index for name in names)


def test_absent_mathjax_is_one_line(monkeypatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(MissingDependency, match=r"^sphinx-mathjax-offline is not installed: pip install -e '\.\[book"):
        build.mathjax()
