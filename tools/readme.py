"""Writes what the READMEs say about the book's contents: the page of each part, the table of parts, the figures.

Pages follow from shared/toc.yml and the files found. Figures that a chapter's README shows (figures/s4_04.svg is that
of Section 4.4) are drawn from the recorded results. `--check` writes nothing, prints one line for each file that
differs and exits 1.
"""
from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from shared import plot, records
from shared.catalog import ROOT, Chapter, Part, Section, load, parts

ROMAN = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII")
COORDINATE = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
ELEMENT = re.compile(r"\b[a-z][0-9a-f]{10}\b")  # an id, made of a hash of what it draws
BEGIN, END = "<!-- parts: written by tools/readme.py -->", "<!-- end of parts -->"


def link(path: Path, start: Path, text: str | None = None) -> str:
    return f"[{text or path.name}]({path.relative_to(start).as_posix()})"


def progress(sections: list[Section]) -> str:
    """'planned', '3 of 10 ready' or 'ready': how many sections have both a demo and a shortcut."""
    ready = sum(section.state == "ready" for section in sections)
    if ready == len(sections):
        return "ready"
    return f"{ready} of {len(sections)} ready" if any(section.demo for section in sections) else "planned"


def section_row(section: Section, start: Path) -> str:
    demo = link(section.demo, start) if section.demo else ""
    shortcuts = "<br>".join(link(path, start) for path in section.shortcuts)
    return f"| {section.number} | {section.title} | {demo} | {shortcuts} | {section.state} |"


def chapter_block(chapter: Chapter, start: Path) -> str:
    """A chapter under way as a table with links; a planned one as the list of its sections."""
    title = f"Chapter {chapter.number}: {chapter.title}"
    readme = chapter.folder / "README.md"
    heading = f"## {link(readme, start, title) if readme.exists() else title}\n\n{progress(chapter.sections)}\n\n"
    if not any(section.scripts for section in chapter.sections):
        return heading + "\n".join(f"- {section.number} {section.title}" for section in chapter.sections)
    rows = ["| section | title | demo | shortcut | state |", "|---|---|---|---|---|"]
    return heading + "\n".join(rows + [section_row(section, start) for section in chapter.sections])


def part_page(part: Part) -> str:
    head = (f"# Part {ROMAN[part.number]}: {part.title}\n\n"
            "`scalable run` with a section's number shows its demo, `scalable compare` its shortcut; "
            "a section is *ready* when it has both. This page is written by `make readme`.\n\n")
    return head + "\n\n".join(chapter_block(chapter, part.folder) for chapter in part.chapters) + "\n"


def parts_table() -> str:
    rows = ["| part | chapters | sections | state |", "|---|---|---|---|"]
    for part in parts():
        sections = [section for chapter in part.chapters for section in chapter.sections]
        name = link(part.folder / "README.md", ROOT, f"{ROMAN[part.number]}. {part.title}")
        chapters = f"{part.chapters[0].number} to {part.chapters[-1].number}"
        rows.append(f"| {name} | {chapters} | {len(sections)} | {progress(sections)} |")
    return "\n".join(rows)


def front_page() -> str:
    """README.md with the block between the markers written anew; everything else is kept as it is typed."""
    before, begin, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"error: README.md has lost the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{parts_table()}\n{END}{after}"


def figures() -> dict[Path, str]:
    """The figures that the READMEs of the chapters name, drawn anew where the section has a record."""
    drawn = {}
    for chapter in (chapter for part in parts() for chapter in part.chapters):
        page = chapter.folder / "README.md"
        named = re.findall(r"\(figures/(s\d+_(\d+)\.svg)\)", page.read_text("utf-8") if page.exists() else "")
        for name, section in named:
            script = next(s.demo for s in chapter.sections if s.number == f"{chapter.number}.{int(section)}")
            if not records.load(f"{chapter.number}.{int(section)}"):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                plot.save(plot.figure(records.recorded(script), load(script).draw), Path(scratch) / name)
                drawn[chapter.folder / "figures" / name] = (Path(scratch) / name).read_text(encoding="utf-8")
    return drawn


def pages() -> dict[Path, str]:
    written = {part.folder / "README.md": part_page(part) for part in parts()}
    return {ROOT / "README.md": front_page()} | written | figures()


def outdated() -> dict[Path, str]:
    """The pages and figures that do not say what the files say, with what they should say."""
    return {path: text for path, text in pages().items()
            if not path.exists() or not same(path.read_text(encoding="utf-8"), text)}


def same(old: str, new: str) -> bool:
    """Equal texts; in a figure, coordinates within a hundredth of a point: processors round differently."""
    if old == new or "<svg" not in new:
        return old == new
    shapes = [COORDINATE.sub("0", ELEMENT.sub("id", text)) for text in (old, new)]
    coordinates = [[float(number) for number in COORDINATE.findall(ELEMENT.sub("id", text))] for text in (old, new)]
    return shapes[0] == shapes[1] and all(abs(a - b) < 0.01 for a, b in zip(*coordinates, strict=True))


def drift() -> list[str]:
    """One line for each page that does not say what the files say."""
    return [f"{path.relative_to(ROOT)} differs from what the files and the records say: make readme"
            for path in outdated()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page differs")
    if parser.parse_args().check:
        sys.exit("\n".join(drift()) or 0)
    for path, text in outdated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
