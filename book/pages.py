"""The text of every page, as MyST: a pure function of the repository and of the recorded results."""
from __future__ import annotations

import html as escape
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from book import markdown as md
from book.contents import ROMAN, Book, Thread, document, imports, modules, readme
from book.sources import Excerpt, Exercise, body, excerpt, exercises, labelled, module_docstring
from shared import catalog
from shared.errors import ReaderError
from shared.result import RELATIONS
from shared.terminal import show

SHOWN_LINES = 60  # of a section's essential lines; the rest is folded
CALLOUTS = {"key insight": "key-insight", "library shortcut": "library-shortcut", "big picture": "big-picture",
            "warning": "warning", "exercise": "exercise"}
Figure = Callable[[Path, dict[str, Any]], str | None]


def pages(book: Book, figure: Figure) -> Iterator[tuple[str, str]]:
    """(document name, text) of every page. `figure` turns a script and its recorded result into an <svg> element."""
    yield "index", landing(book)
    for part in book.parts:
        yield document(part), part_page(book, part)
        for chapter in part.chapters:
            if chapter not in book.open_chapters:
                continue
            yield document(chapter), chapter_page(book, chapter, figure)
            tasks = exercises(chapter.folder)
            for section in chapter.sections:
                if section.demo:
                    mine = [task for task in tasks if task.section == section.number]
                    yield document(section), section_page(book, section, figure, mine)
            for module in modules(chapter):
                yield document(module), module_page(book, chapter, module)
    yield "claims", claims_page(book)
    yield "libraries", libraries_page(book)
    yield "threads/index", threads_page(book)
    for thread in book.threads:
        yield thread.document, thread_page(book, thread)
    yield "glossary", glossary_page(book)
    yield "errata", errata_page(book)


def contents(book: Book) -> dict[str, Any]:
    """The table of contents as sphinx-external-toc wants it: the pages in their order."""
    parts = []
    for part in book.parts:
        chapters = [{"file": document(chapter), "sections": [
            {"file": document(section)} for section in chapter.sections if section.demo]}
            for chapter in part.chapters if chapter in book.open_chapters]
        page = {"file": document(part)} | ({"sections": chapters} if chapters else {})
        parts.append({"caption": f"Part {ROMAN[part.number]}", "chapters": [page]})
    threads = {"file": "threads/index"}
    if book.threads:
        threads["sections"] = [{"file": thread.document} for thread in book.threads]
    parts.append({"caption": "Across the book", "chapters": [
        {"file": "claims"}, {"file": "libraries"}, threads, {"file": "glossary"}, {"file": "errata"}]})
    shared = [{"file": document(path)} for chapter in book.open_chapters for path in modules(chapter)]
    if shared:
        parts.append({"caption": "Modules", "chapters": shared})  # last: who turns pages does not meet them
    return {"format": "jb-book", "root": "index", "options": {"titlesonly": True}, "parts": parts}


def navigation(book: Book) -> dict[str, Any]:
    """What the sidebar shows (see extension.py): every part, chapter and section, built or planned."""
    tree = []
    for part in book.parts:
        chapters = []
        for chapter in part.chapters:
            sections = [{"number": section.number, "title": section.title,
                         "page": document(section) if section.demo else None} for section in chapter.sections]
            opened = chapter in book.open_chapters
            chapters.append({"number": str(chapter.number), "title": chapter.title,
                             "page": document(chapter) if opened else None, "sections": sections,
                             "modules": [{"title": path.name, "page": document(path)} for path in modules(chapter)]
                             if opened else []})
        tree.append({"number": ROMAN[part.number], "title": part.title, "page": document(part), "chapters": chapters})
    across = [{"title": title, "page": page, "below": below} for title, page, below in (
        ("All claims", "claims", []), ("Sections and libraries", "libraries", []),
        ("Threads", "threads/index", [{"title": t.name, "page": t.document} for t in book.threads]),
        ("Glossary", "glossary", []), ("Errata", "errata", []))]
    return {"parts": tree, "across": across}


# --- parts and chapters -----------------------------------------------------------------------------------------------


def landing(book: Book) -> str:
    """The README's opening, what is built, and the way in."""
    text = (catalog.ROOT / "README.md").read_text(encoding="utf-8")
    title, opening = re.match(r"# ([^\n]+)\n\n(.+?)\n\n", text, re.DOTALL).groups()
    counts = Counter(claim["holds"] for section in book.built for result in book.results(section).values()
                     for claim in result["claims"])
    rows = []
    for part in book.parts:
        sections = [section for chapter in part.chapters for section in chapter.sections]
        built = sum(bool(section.demo) for section in sections)
        rows.append([f"[{ROMAN[part.number]}. {md.plain(part.title)}]({document(part)}.md)",
                     f"{part.chapters[0].number} to {part.chapters[-1].number}", str(len(sections)), str(built)])
    first = next(iter(book.built), None)
    start = f"\n\nThe first built section is {link(first, 'index')}." if first else ""
    return _joined(
        f"# {md.plain(title)}", f":::{{div}} lead\n{opening}\n:::",
        md.callout("big-picture", "How to read it", (
            "Each section's page shows the question, the numbers that one run measured and the machine that measured "
            "them, what the run claims, the code, and the same work done by a library. Get your own numbers:\n\n"
            + md.code("make demo                              # set up, and run Section 4.4\n"
                      "scalable run 4.4 --against-record      # your numbers beside the book's\n"
                      "scalable verify 4                      # every claim of a chapter, on your machine", "sh"))
            + start),
        "## The parts", md.table(["part", "chapters", "sections", "built"], rows, [False, False, True, True]),
        "## Across the book",
        f"- [All claims](claims.md): {sum(counts.values())} recorded, {counts[False]} of them failing\n"
        "- [Sections and libraries](libraries.md): which demo, which shortcut, which library\n"
        f"- [Threads](threads/index.md): {len(book.threads)} ideas and where they return\n"
        f"- [Glossary](glossary.md): {len(book.terms)} terms, each defined where it is taught\n"
        "- [Errata](errata.md): printed figures that do not follow from their inputs")


def part_page(book: Book, part: catalog.Part) -> str:
    blocks = [f"# Part {ROMAN[part.number]}: {md.plain(part.title)}"]
    for chapter in part.chapters:
        title = f"Chapter {chapter.number}: {md.plain(chapter.title)}"
        if chapter in book.open_chapters:
            title = f"[{title}]({document(chapter)}.md)"
            question = re.search(r"^\*\*The question\.\*\* (.+?)\n\n", readme(chapter).read_text(encoding="utf-8"),
                                 re.MULTILINE | re.DOTALL)
            intro = [question[1]] if question else []
        else:
            intro = []
        blocks += [f"## {title}", *intro, "\n".join(f"- {link(section, part)}" for section in chapter.sections)]
    return _joined(*blocks)


def chapter_page(book: Book, chapter: catalog.Chapter, figure: Figure) -> str:
    """The chapter's README with links to pages, figures from the recorded numbers and callouts as boxes."""
    text = readme(chapter).read_text(encoding="utf-8")
    here = document(chapter)

    def linked(match: re.Match) -> str:
        label, target = match.groups()
        path = (chapter.folder / target).resolve()
        if path.suffix == ".py" and path.exists() and path.stem != "grading":
            return f"[{label}]({relative(document(path), here)}.md)"
        other = next((c for c in book.open_chapters if readme(c) == path), None)
        return f"[{label}]({relative(document(other), here)}.md)" if other else label

    def drawn(match: re.Match) -> str:
        label, number, variant = match.groups()
        section = book.sections.get(f"{chapter.number}.{int(number)}")
        if section is None:
            raise ReaderError(f"{readme(chapter)}: {match[0]}: the chapter has no such section")
        for script, result in book.results(section).items():
            if ("_shortcut_" in script.name) == bool(variant) and (svg := figure(script, result)):
                return _figure(svg, f"{label[0].upper()}{label[1:]} ({link(section, chapter)})", prefix="c-")
        return ""

    def boxed(match: re.Match) -> str:
        title, rest = match.groups()
        inner = re.sub(r"^> ?", "", rest, flags=re.MULTILINE)
        return md.callout(CALLOUTS.get(title.lower().rstrip("."), "note"), title.rstrip("."), inner.strip()) + "\n"

    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", linked, text)
    text = re.sub(r"!\[([^\]]+)\]\(figures/s\d+_(\d+)(_shortcut)?\.svg\)", drawn, text)
    text = re.sub(r"^> \*\*(.+?)\*\*(.*(?:\n>.*)*)\n?", boxed, text, flags=re.MULTILINE)
    text = re.sub(r"^\|.+\|$(?:\n\|.+\|$)+", lambda match: _sections_linked(book, match[0], here), text,
                  flags=re.MULTILINE)
    tasks = exercises(chapter.folder)
    unplaced = [task for task in tasks if task.section not in book.sections]
    return _joined(text, *(_exercise(task, chapter) for task in unplaced))


def _sections_linked(book: Book, table: str, here: str) -> str:
    """The numbers of built sections in a table's cells become links, unless the cell links already."""
    def cell(text: str) -> str:
        if "](" in text or "`" in text:
            return text
        return re.sub(r"\b\d+\.\d+\b", lambda m: _number(book, m[0], here), text)

    return "\n".join("|".join(map(cell, line.split("|"))) for line in table.splitlines())


# --- a section --------------------------------------------------------------------------------------------------------


def section_page(book: Book, section: catalog.Section, figure: Figure, tasks: list[Exercise]) -> str:
    says, results = labelled(section.demo), book.results(section)
    result = results.get(section.demo)
    blocks = [f"# {section.number} {md.plain(section.title)}",
              f":::{{div}} lead\n{md.prose(says.get('Question', ''))}\n:::"]
    if stale := book.problems(section):
        blocks.append(md.callout("warning", "These numbers are out of date",
                                 "\n".join(f"- {md.plain(line)}" for line in stale)))
    blocks.append(md.callout("big-picture", "Big picture", _joined(
        f"**What runs.** {md.prose(says.get('Method', ''))}",
        f"**What to look at.** {md.prose(says.get('Read', ''))}")))
    blocks += ["## Run it", md.code(_commands(section), "sh")]
    if result:
        blocks += ["## What it measured", _provenance(result)]
        if svg := figure(section.demo, result):
            blocks.append(_figure(svg))
        blocks += [md.recorded_table(recorded) for recorded in result["tables"] if recorded["rows"]]
        blocks += [f"- {md.prose(note)}" for note in result["notes"]]
        blocks += _errata(result)
        blocks += ["## What it claims", claims_table(result)]
    shortcuts = [(script, results.get(script)) for script in section.shortcuts]
    essential = next((r["lines_of_code"]["of"]["ours"] for _, r in shortcuts if r and r["lines_of_code"]), [])
    blocks += ["## From scratch", *_code(essential, section.demo, section, book)]
    for script, recorded in shortcuts:
        blocks += _shortcut(script, recorded, section, figure)
    blocks += _threads(book, section)
    if tasks:
        blocks += ["## Exercises", *(_exercise(task, section.chapter) for task in tasks)]
    if says.get("Source"):
        blocks += ["## Sources", md.prose(says["Source"])]
    return _joined(*blocks)


def _commands(section: catalog.Section) -> str:
    lines = [(f"scalable run {section.number}", "the demo"),
             (f"scalable run {section.number} --against-record", "your numbers beside these"),
             (f"scalable compare {section.number}", "against the library") if section.shortcuts else None,
             (f"scalable verify {section.number}", "check the claims, in seconds")]
    lines = [line for line in lines if line]
    width = max(len(command) for command, _ in lines)
    return "\n".join(f"{command.ljust(width)}   # {what}" for command, what in lines)


def _provenance(result: dict[str, Any]) -> str:
    """When and where the numbers were made, in one small paragraph."""
    machine = result["machine"]
    given = ", ".join(f"{name} {show(value)}" for name, value in result["parameters"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"{machine['cores']} cores of {machine['cpu']} with {machine['memory_bytes'] / 2**30:.0f} GiB"
    cost = f"{result['seconds']:.1f} s, at most {result['peak_memory_bytes'] / 2**20:,.0f} MiB"
    text = (f"Recorded on {result['date'][:10]} with `--preset {result['preset']}` ({given}) on {where}, "
            f"Python {machine['python']}, {versions}; {cost}.")
    return f"{{.provenance}}\n{md.prose(text)}"


def claims_table(result: dict[str, Any]) -> str:
    rows = [[_verdict(claim), md.plain(claim["text"]), *map(md.plain, _sides(claim))] for claim in result["claims"]]
    return md.table(["", "claim", "measured", "expected"], rows)


def _verdict(claim: dict[str, Any]) -> str:
    return "[holds]{.ok}" if claim["holds"] else "[FAILED]{.failed}"


def _sides(claim: dict[str, Any]) -> tuple[str, str]:
    """Measured and expected, with unit and tolerance, as the script prints them."""
    measured, expected = show(claim["measured"]), show(claim["expected"])
    if measured == expected and claim["measured"] != claim["expected"]:
        measured, expected = str(claim["measured"]), str(claim["expected"])
    unit = f" {claim['unit']}" if claim["unit"] else ""
    slack = f" ± {claim['tolerance']:.4g}" if claim["tolerance"] else ""
    slack += f" ± {100 * claim['relative']:.4g} %" if claim["relative"] else ""
    return f"{measured}{unit}", f"{RELATIONS[claim['relation']]} {expected}{unit}{slack}"


def _code(names: list[str], script: Path, section: catalog.Section, book: Book) -> list[str]:
    """The essential lines, as the shortcut counted them, then the whole file folded, then where the rest is."""
    shown, hidden, lines = [], [], 0
    for found in (excerpt(name) for name in names):
        (shown if not shown or lines + found.lines <= SHOWN_LINES else hidden).append(found)
        lines += found.lines
    blocks = _quoted(shown)
    if hidden:
        title = f"What it stands on: {', '.join(found.name for found in hidden)}"
        blocks.append(md.folded(title, _joined(*_quoted(hidden))))
    whole = body(script)
    blocks.append(md.folded(f"The whole demo: {script.name}, {whole.lines} lines", _listing(whole)))
    used = [f"[{path.name}]({relative(document(path), document(section))}.md)" for path in imports(script)
            if any(path in modules(chapter) for chapter in book.open_chapters)]
    if used:
        blocks.append(f"It imports {', '.join(used)}.")
    return blocks


def _quoted(found: list[Excerpt]) -> list[str]:
    """One listing for neighbours in one file, with the file's name above it."""
    blocks = []
    for file, pieces in groupby(found, lambda piece: piece.file):
        blocks += [f"{{.file}}\n`{file}`", md.code("\n\n\n".join(piece.text for piece in pieces))]
    return blocks


def _listing(found: Excerpt) -> str:
    return md.code(found.text, "python", found.line)


def _shortcut(script: Path, result: dict[str, Any] | None, section: catalog.Section, figure: Figure) -> list[str]:
    declared, says = catalog.declaration(script), labelled(script)
    blocks = [f"## The shortcut: {md.plain(declared.library or script.stem)}"]
    handled = f"\n\nIt also handles: {', '.join(map(md.plain, declared.handles))}." if declared.handles else ""
    blocks.append(md.callout("library-shortcut", "Library shortcut", _joined(
        f"**{md.prose(says.get('Question', ''))}**", md.prose(says.get("Method", "")), md.prose(says.get("Read", "")))
        + handled))
    if result:
        for comparison in result["comparisons"]:
            blocks.append(md.table(
                ["median [95 % interval]", "from scratch", md.plain(result["library"]), "library / ours"],
                [[md.plain(comparison["what"]),
                  *(md.plain(comparison[side]["text"]) for side in ("ours", "library", "ratio"))]]))
        counted = result["lines_of_code"]
        if counted:
            blocks.append(f"Lines of code: **{counted['ours']}** from scratch, **{counted['library']}** with "
                          f"{md.plain(result['library'])} (counted, without blank lines, comments and docstrings).")
            blocks += _quoted([excerpt(name) for name in counted["of"]["library"]])
        if svg := figure(script, result):
            blocks.append(_figure(svg))
        blocks += [md.recorded_table(recorded) for recorded in result["tables"] if recorded["rows"]]
        blocks += [f"- {md.prose(note)}" for note in result["notes"]]
        blocks += _errata(result)
        blocks += [_provenance(result), claims_table(result)]
    whole = body(script)
    return [*blocks, md.folded(f"The whole shortcut: {script.name}, {whole.lines} lines", _listing(whole))]


def _threads(book: Book, section: catalog.Section) -> list[str]:
    here, lines = document(section), []
    for thread in book.threads:
        name = f"[{md.plain(thread.name)}]({relative(thread.document, here)}.md)"
        if section.number in thread.begins:
            later = ", ".join(_number(book, number, here) for number in thread.returns)
            lines.append(f"- {name} begins here and returns in {later}.")
        elif section.number in thread.returns:
            first = ", ".join(_number(book, number, here) for number in thread.begins)
            others = ", ".join(_number(book, n, here) for n in thread.returns if n != section.number)
            lines.append(f"- {name}, from {first}, returns here{f'; also in {others}' if others else ''}.")
    users = [other for other in book.built if other.chapter is not section.chapter
             and any(path in section.scripts for script in other.scripts for path in imports(script))]
    lines += [f"- {link(user, section)} imports this section's code." for user in users]
    return ["## Where it returns", "\n".join(lines)] if lines else []


def _exercise(task: Exercise, chapter: catalog.Chapter) -> str:
    text = _joined(*map(md.prose, task.task.split("\n\n")), md.code(task.signature),
                   f"Write it in `exercises.py`; `scalable check {chapter.number}` grades it.",
                   md.folded("One solution", md.code(task.solution), "solution"))
    return md.callout("exercise", f"Exercise: {task.name}", text)


def _errata(result: dict[str, Any]) -> list[str]:
    return [md.callout("warning", "Erratum", (
        f"The book prints {md.plain(show(erratum['printed']))} for {md.plain(erratum['what'])}; its inputs give "
        f"{md.plain(show(erratum['computed']))}. {md.prose(erratum['why'])}")) for erratum in result["errata"]]


def module_page(book: Book, chapter: catalog.Chapter, module: Path) -> str:
    """A file that several sections of a chapter share."""
    users = [section for section in chapter.sections if any(module in imports(script) for script in section.scripts)]
    links = ", ".join(f"[{user.number}]({relative(document(user), document(module))}.md)" for user in users)
    used = f"Used by {links}." if users else ""
    paragraphs = [md.prose(text) for text in module_docstring(module).split("\n\n")]
    whole = _listing(body(module))
    if module.stem == "solutions":
        whole = md.folded("The solutions", whole, "solution")
    path = module.relative_to(catalog.ROOT).as_posix()
    return _joined(f"# {md.plain(module.name)}", f"{{.file}}\n`{path}`", *paragraphs, used, whole)


# --- across the book --------------------------------------------------------------------------------------------------


def claims_page(book: Book) -> str:
    """Every recorded claim in one table that a script filters; without scripts it is complete."""
    rows, count = [], Counter()
    for section in book.built:
        for result in book.results(section).values():
            side = result["library"] or "demo"
            for claim in result["claims"]:
                measured, expected = map(escape.escape, _sides(claim))
                kind = "timing" if claim["timing"] else "exact"
                count[claim["holds"]] += 1
                count[kind] += 1
                verdict = "holds" if claim["holds"] else "FAILED"
                rows.append(
                    f'<tr data-chapter="{section.chapter.number}" data-kind="{kind}" data-verdict="{verdict}">'
                    f'<td><a href="{document(section)}.html">{section.number}</a></td><td>{escape.escape(side)}</td>'
                    f"<td>{escape.escape(claim['text'])}</td><td data-label=\"measured\">{measured}</td>"
                    f'<td data-label="expected">{expected}</td><td>{kind}</td>'
                    f'<td class="{"ok" if claim["holds"] else "failed"}">{verdict}</td></tr>')
    chapters = "".join(f'<option value="{chapter.number}">{chapter.number} {escape.escape(chapter.title)}</option>'
                       for chapter in book.open_chapters)
    head = "".join(f'<th scope="col">{name}</th>' for name in
                   ("section", "script", "claim", "measured", "expected", "kind", ""))
    form = (
        '<form id="claims-filter" class="filter" role="search" aria-label="Filter the claims" hidden>'
        '<label>Words <input type="search" name="words" placeholder="ring bytes"></label>'
        f'<label>Chapter <select name="chapter"><option value="">all</option>{chapters}</select></label>'
        '<label>Kind <select name="kind"><option value="">all</option><option value="exact">exact</option>'
        '<option value="timing">timing</option></select></label>'
        '<label>Verdict <select name="verdict"><option value="">all</option><option>holds</option>'
        '<option>FAILED</option></select></label><output name="count" aria-live="polite"></output></form>')
    body = "\n".join(rows)
    return _joined(
        "# All claims",
        f"{count[True] + count[False]} claims of {len(book.built)} sections, as last recorded: {count[True]} hold, "
        f"{count[False]} fail. {count['timing']} depend on a clock, {count['exact']} do not and hold on any machine. "
        "`scalable verify` checks them all on yours.",
        md.html(f'{form}\n<div class="pst-scrollable-table-container" tabindex="0" role="region" aria-label="Claims">\n'
                f'<table class="table" id="claims"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>\n'
                '</div>\n<script src="_static/book/claims.js"></script>'))


def libraries_page(book: Book) -> str:
    rows, by_library = [], {}
    for section in book.built:
        demo = catalog.declaration(section.demo)
        shortcuts = [(script, catalog.declaration(script)) for script in section.shortcuts]
        rows.append([link(section, "libraries"), md.plain(_slug(section.demo)),
                     "<br>".join(md.plain(_slug(script)) for script, _ in shortcuts) or "none yet",
                     "<br>".join(md.plain(declared.library) for _, declared in shortcuts) or "none",
                     md.plain(", ".join(dict.fromkeys(
                         need.removeprefix("exe:") for d in (demo, *(d for _, d in shortcuts)) for need in d.needs)))])
        for _, declared in shortcuts:
            by_library.setdefault(declared.library, []).append(section)
    libraries = [[md.plain(name), ", ".join(f"[{s.number}]({document(s)}.md)" for s in found)]
                 for name, found in sorted(by_library.items(), key=lambda item: item[0].lower())]
    return _joined("# Sections and libraries",
                   "Each built section, its demo, its shortcut, and what both need installed.",
                   md.table(["section", "demo", "shortcut", "library", "needs"], rows),
                   "## By library", md.table(["library", "sections"], libraries))


def threads_page(book: Book) -> str:
    rows = [[f"[{md.plain(thread.name)}]({thread.document.removeprefix('threads/')}.md)",
             ", ".join(_number(book, number, "threads/index") for number in thread.begins),
             ", ".join(_number(book, number, "threads/index") for number in thread.returns)] for thread in book.threads]
    return _joined("# Threads", "Primitives return, scaled out: what one chapter builds later chapters import. Numbers "
                   "with a link lead to built sections, the others are planned.",
                   md.table(["thread", "begins in", "returns in"], rows))


def thread_page(book: Book, thread: Thread) -> str:
    def listed(numbers: list[str]) -> str:
        lines = []
        for number in numbers:
            section = book.sections[number]
            question = f": {md.prose(labelled(section.demo).get('Question', ''))}" if section.demo else ""
            lines.append(f"- {link(section, thread.document)}{question}")
        return "\n".join(lines)

    return _joined(f"# Thread: {md.plain(thread.name)}", "## It begins in", listed(thread.begins),
                   "## It returns in", listed(thread.returns))


def glossary_page(book: Book) -> str:
    entries = "\n\n".join(
        f"{term.name}\n  {term.meaning} {_number(book, term.section, 'glossary', 'Section ')}." for term in book.terms)
    return _joined("# Glossary", "Each term as the section defines it that teaches it.",
                   md.directive("glossary", "", entries) if entries else "No term is defined yet.")


def errata_page(book: Book) -> str:
    rows = [[f"[{section.number}]({document(section)}.md)", md.plain(erratum["what"]),
             md.plain(show(erratum["printed"])), md.plain(show(erratum["computed"])), md.prose(erratum["why"])]
            for section in book.built for result in book.results(section).values() for erratum in result["errata"]]
    found = md.table(["section", "figure", "printed", "computed", "why"], rows) if rows else (
        f"None was found in the {len(book.built)} sections built so far.")
    return _joined("# Errata", "Figures printed in the book that do not follow from their stated inputs, each proved "
                   "by a run of the section's demo.", found)


# --- links ------------------------------------------------------------------------------------------------------------


def link(section: catalog.Section, here: catalog.Part | catalog.Chapter | catalog.Section | str) -> str:
    """ "4.4 Title", a link where there is a page, marked where there is none."""
    start = here if isinstance(here, str) else document(here)
    title = f"{section.number} {md.plain(section.title)}"
    return f"[{title}]({relative(document(section), start)}.md)" if section.demo else f"{title} [planned]{{.planned}}"


def relative(target: str, start: str) -> str:
    """The path from one document to another."""
    up = "../" * start.count("/")
    return f"{up}{target}"


def _number(book: Book, number: str, here: str, before: str = "") -> str:
    section, text = book.sections.get(number), f"{before}{number}"
    return f"[{text}]({relative(document(section), here)}.md)" if section and section.demo else text


def _figure(svg: str, caption: str = "", prefix: str = "") -> str:
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}", svg) if prefix else svg
    drawn = md.html(f'<figure class="drawn">{svg}</figure>')
    return f"{drawn}\n\n{{.caption}}\n{caption}" if caption else drawn


def _slug(script: Path) -> str:
    return re.sub(r"^s\d+_\d+_(shortcut_)?", "", script.stem)


def _joined(*blocks: str) -> str:
    return "\n\n".join(block.strip("\n") for block in blocks if block) + "\n"
