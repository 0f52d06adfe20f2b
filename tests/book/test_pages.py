"""What the pages say: the recorded numbers and no others, all that is built, nothing planned, text as it was typed."""
from __future__ import annotations

import copy
import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
from docutils import nodes
from docutils.frontend import get_default_settings
from docutils.utils import new_document
from hypothesis import given, settings
from hypothesis import strategies as st
from myst_parser.parsers.docutils_ import Parser

from book import contents, pages, sources
from book import markdown as md
from book.contents import Book, Thread, document
from shared import catalog, records
from shared.errors import ReaderError
from shared.terminal import show

BUILT = [section for section in catalog.sections() if section.scripts]


def no_figure(script: Path, result: dict) -> None:
    return None


def written(book: Book, figure=no_figure) -> dict[str, str]:
    return dict(pages.pages(book, figure))


@pytest.fixture(scope="module")
def book_pages() -> dict[str, str]:
    return written(Book())


def doctree(text: str) -> nodes.document:
    parser = Parser()
    options = get_default_settings(Parser)
    options.myst_enable_extensions = {"colon_fence", "dollarmath", "attrs_block", "attrs_inline"}
    options.report_level = 5
    document = new_document("page", options)
    parser.parse(text, document)
    return document


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", BUILT, ids=lambda section: section.number)
def test_a_page_shows_every_recorded_number(section: catalog.Section, book_pages) -> None:
    page, record = book_pages[document(section)], records.load(section.number)
    assert len(record["scripts"]) == len(section.scripts)
    for result in (entry["result"] for entry in record["scripts"]):
        for table in result["tables"]:
            for row in table["rows"]:
                line = " | ".join(md.plain(show(cell)) or " " for cell in row)
                assert f"| {line} |" in page
        for claim in result["claims"]:
            measured, expected = pages._sides(claim)
            assert f"| {md.plain(claim['text'])} | {md.plain(measured)} | {md.plain(expected)} |" in page
        for comparison in result["comparisons"]:
            assert all(md.plain(comparison[side]["text"]) in page for side in ("ours", "library", "ratio"))
        if result["lines_of_code"]:
            ours, library = (result["lines_of_code"][side] for side in ("ours", "library"))
            assert f"**{ours}** from scratch, **{library}**" in page
        assert f"Recorded on {result['date'][:10]}" in page and md.plain(result["machine"]["cpu"]) in page
        for name, value in result["parameters"].items():
            assert md.prose(f"{name} {show(value)}") in page
    assert f"scalable run {section.number}" in page and f"scalable verify {section.number}" in page


def test_other_numbers_in_the_record_give_another_page_and_nothing_else_changes(book_pages) -> None:
    def changed(section: str) -> dict | None:
        record = copy.deepcopy(records.load(section))
        if section == "4.4":
            record["scripts"][0]["result"]["tables"][0]["rows"][0][1] = "9.876 ms"
            record["scripts"][0]["result"]["claims"][0]["measured"] = 987654
        return record

    after = written(Book(record=changed))
    differ = {name for name in book_pages if book_pages[name] != after[name]}
    assert differ == {"ch04/s4_04", "claims"} and after.keys() == book_pages.keys()
    assert "9.876 ms" in after["ch04/s4_04"] and "987,654" in after["ch04/s4_04"] and "987,654" in after["claims"]
    assert records.load("4.4")["scripts"][0]["result"]["tables"][0]["rows"][0][1] not in after["ch04/s4_04"]


def test_a_failed_claim_and_a_stale_record_are_shown_as_such() -> None:
    def failed(section: str) -> dict:
        record = copy.deepcopy(records.load(section))
        record["scripts"][0]["result"]["claims"][0]["holds"] = False
        return record

    text = written(Book(record=failed, problems=lambda section: [f"{section.number}: stale: changed since: x_y.py"]))
    assert "[FAILED]{.failed}" in text["ch04/s4_04"] and 'class="failed">FAILED' in text["claims"]
    assert f"{len(BUILT)} fail" in text["claims"]
    assert "These numbers are out of date" in text["ch04/s4_04"] and r"x\_y.py" in text["ch04/s4_04"]


def test_without_a_record_a_page_shows_no_number_and_says_why() -> None:
    book = Book(record=lambda section: None, problems=lambda section: [f"{section.number}: no record"])
    text = written(book)
    page = text["ch04/s4_04"]
    assert "4.4: no record" in page and "What it measured" not in page and "| claim |" not in page
    assert "The whole demo: s4_04_all_reduce_algorithms.py" in page and "0 claims of" in text["claims"]


def test_the_figure_is_asked_for_with_the_recorded_result(book_pages) -> None:
    asked = []

    def figure(script: Path, result: dict) -> str:
        asked.append((script.name, result["date"]))
        return f"<svg>{script.stem}</svg>"

    text = written(Book(), figure)
    assert "<svg>s4_04_all_reduce_algorithms</svg>" in text["ch04/s4_04"]
    assert "<svg>s4_04_shortcut_torch_all_reduce</svg>" in text["ch04/s4_04"]
    assert "<svg>s4_04_all_reduce_algorithms</svg>" in text["ch04/index"]  # in place of the README's own file
    assert "figures/s4_04.svg" not in text["ch04/index"]
    kept = {(Path(e["result"]["script"]).name, e["result"]["date"])
            for s in BUILT for e in records.load(s.number)["scripts"]}
    assert set(asked) == kept


def test_the_claims_page_lists_every_claim_once(book_pages) -> None:
    page = book_pages["claims"]
    rows = Counter(re.findall(r"<tr data-chapter.*?</tr>", page, re.DOTALL))
    claims = [claim for section in BUILT for entry in records.load(section.number)["scripts"]
              for claim in entry["result"]["claims"]]
    assert sum(rows.values()) == len(claims) and set(rows.values()) == {1}
    assert f"{len(claims)} claims of {len(BUILT)} sections" in page
    assert page.count('data-kind="timing"') == sum(claim["timing"] for claim in claims) > 0


# --- what there is ----------------------------------------------------------------------------------------------------


def test_every_built_section_has_a_page_and_no_planned_one_has(book_pages) -> None:
    book = Book()
    for section in book.sections.values():
        assert (document(section) in book_pages) == bool(section.demo)
    listed = re.findall(r"'file': '([^']+)'", str(pages.contents(book)))
    assert Counter(["index", *listed]) == Counter(book_pages.keys())  # each page in the table of contents, once
    planned = [section for section in book.sections.values() if not section.demo]
    tree = str(pages.navigation(book))
    assert all(f"'number': '{section.number}', 'title': {section.title!r}, 'page': None" in tree for section in planned)
    assert all(f"{section.number} {md.plain(section.title)} [planned]{{.planned}}" in
               book_pages[document(section.chapter.part)] for section in planned)


def test_the_page_says_what_the_docstring_says(book_pages) -> None:
    page = book_pages["ch04/s4_04"]
    for label, text in sources.labelled(Book().sections["4.4"].demo).items():
        assert md.prose(text) in page, label


def test_the_essential_lines_are_those_that_the_shortcut_counted(book_pages) -> None:
    for section in BUILT:
        [entry] = [e["result"] for e in records.load(section.number)["scripts"] if e["result"]["library"]]
        for name in (name for side in ("ours", "library") for name in entry["lines_of_code"]["of"][side]):
            assert sources.excerpt(name).text in book_pages[document(section)], name


def test_threads_lead_forth_and_back(book_pages) -> None:
    book = Book()
    assert book.threads and not book.mistakes()
    for thread in book.threads:
        page = book_pages[thread.document]
        for number in thread.sections:
            assert f"{number} {md.plain(book.sections[number].title)}" in page
        for number in thread.begins:
            later = ", ".join(thread.returns)
            unlinked = re.sub(r"\[([\d.]+)\]\([^)]+\)", r"\1", book_pages[document(book.sections[number])])
            assert f"begins here and returns in {later}" in unlinked


def test_exercises_stand_on_the_page_of_their_section(book_pages) -> None:
    chapter = next(c for c in Book().chapters if c.number == 4)
    tasks = sources.exercises(chapter.folder)
    assert [task.section for task in tasks] == ["4.4", "4.4", "4.6", "4.10"]
    for task in tasks:
        for name, page in book_pages.items():
            here = name == document(Book().sections[task.section])
            assert (f"Exercise: {task.name}" in page) == here
        assert f"def {task.name}(" in task.signature and f"def {task.name}(" in task.solution
        assert "NotImplementedError" not in task.solution


def test_an_exercise_without_a_section_stands_on_the_chapter_page(monkeypatch) -> None:
    task = sources.Exercise("homeless", None, "Do it.", "def homeless(): ...", "def homeless(): return 1")
    monkeypatch.setattr(pages, "exercises", lambda folder: [task])
    text = written(Book())
    assert "Exercise: homeless" in text["ch04/index"] and "Exercise: homeless" not in text["ch04/s4_04"]


def test_errata_are_on_their_page_and_in_the_list() -> None:
    def with_erratum(section: str) -> dict:
        record = copy.deepcopy(records.load(section))
        if section == "4.4":
            record["scripts"][0]["result"]["errata"] = [
                {"what": "total ticks", "printed": 10235, "computed": 10300, "why": "Its own code gives the other."}]
        return record

    text = written(Book(record=with_erratum))
    assert "| [4.4](ch04/s4_04.md) | total ticks | 10,235 | 10,300 | Its own code gives the other. |" in text["errata"]
    assert "prints 10,235 for total ticks; its inputs give 10,300" in text["ch04/s4_04"]
    assert "None was found" in written(Book())["errata"]


@pytest.mark.parametrize(("threads", "complaint"), [
    ([Thread("A", ["4.4"], ["99.9"])], "no section 99.9"),
    ([Thread("A", ["10.3"], ["4.4"])], "returns before it begins"),
    ([Thread("A", ["4.4"], ["4.4"])], "returns before it begins"),
    ([Thread("A", [], ["4.4"])], "needs sections"),
    ([Thread("A", ["4.4"], ["10.3"]), Thread("a", ["4.5"], ["16.4"])], "'a' is declared twice"),
])
def test_impossible_threads_are_named(threads: list[Thread], complaint: str) -> None:
    book = Book()
    book.threads = threads
    assert any(complaint in line for line in book.mistakes()), book.mistakes()


def test_a_chapter_with_sections_needs_a_page() -> None:
    book = Book()
    book.open_chapters = [chapter for chapter in book.open_chapters if chapter.number != 4]
    assert any("Chapter 4 has built sections and no README.md" in line for line in book.mistakes())


@pytest.mark.parametrize(("section", "complaint"),
                         [("99.9", "no section 99.9"), ("41.1", "is not built"), ("4.4", None)])
def test_a_term_is_taught_in_a_built_section(section: str, complaint: str | None) -> None:
    book = Book()
    book.terms = [contents.Term("ring", "A circle.", section)]
    assert [complaint in line for line in book.mistakes()] == ([True] if complaint else [])


def test_a_table_with_a_missing_cell_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# C\n\n## Terms\n\n| term | meaning | taught |\n|---|---|---|\n| ring | x |\n")
    chapter = dataclasses.replace(BUILT[0].chapter, folder=tmp_path)
    with pytest.raises(ReaderError, match="three cells"):
        contents.declared(chapter, "Terms")
    assert contents.declared(chapter, "Where these return") == []


# --- quoting and escaping ---------------------------------------------------------------------------------------------


def test_excerpts_are_the_lines_of_the_file() -> None:
    here = "part1_foundations.ch04_communication_primitives"
    ring = sources.excerpt(f"{here}.collectives:ring")
    assert ring.text.startswith("def ring(net,") and ring.text.endswith("return ring_all_gather(net, x)")
    lines = (catalog.ROOT / ring.file).read_text().splitlines()
    assert lines[ring.line - 1:ring.line - 1 + ring.lines] == ring.text.splitlines()
    assert sources.excerpt(f"{here}.s4_04_all_reduce_algorithms:main").text.startswith("@demo(")  # decorators included
    assert sources.excerpt(f"{here}.zero:Zero").text.startswith("class Zero")
    assert sources.excerpt("shared.demo:Run.claim").text.startswith("    def claim(")
    whole = sources.excerpt(f"{here}.costs")
    assert whole.text.startswith("from __future__") and whole.line > 1
    for gone in (f"{here}.collectives:gone", f"{here}.nowhere:ring", "shared.demo:Run.gone"):
        with pytest.raises(KeyError):
            sources.excerpt(gone)


readable = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")) | st.just(" "), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(readable)
def test_escaped_text_is_shown_as_it_is(text: str) -> None:
    text = " ".join(text.split())
    tree = doctree(f"before {md.plain(text)} after")
    assert tree.astext() == f"before {text} after"
    assert not list(tree.findall(nodes.reference)) and not list(tree.findall(nodes.emphasis))


@pytest.mark.parametrize("text", ["2(K-1)/K * n_bytes * 3", "a | b", "<b>", "$x$ and $y$", "[x](y)", "{role}`x`", "# 1",
                                  "a\\*b", "~~x~~", "^1", "![x](y)"])
def test_typical_text_survives_a_table_cell(text: str) -> None:
    tree = doctree(md.table(["one", "two"], [[md.plain(text), "x"]]))
    cells = [entry.astext() for entry in tree.findall(nodes.entry)]
    assert cells == ["one", "two", text, "x"]


def test_prose_keeps_code_and_joins_lines() -> None:
    tree = doctree(md.prose("Run `scalable_x *y*` and\n   2*3*4."))
    assert [code.astext() for code in tree.findall(nodes.literal)] == ["scalable_x *y*"]
    assert tree.astext() == "Run scalable_x *y* and 2*3*4."


def test_a_directive_holds_directives() -> None:
    inner = md.callout("note", "Inner", md.code('"""\n```\n:::\n"""'))
    outer = md.callout("exercise", "Outer", f"text\n\n{inner}")
    tree = doctree(outer)
    titles = [admonition[0].astext() for admonition in tree.findall(nodes.admonition)]
    assert titles == ["Outer", "Inner"]
    [block] = tree.findall(nodes.literal_block)
    assert block.astext() == '"""\n```\n:::\n"""'


def test_numeric_columns_are_aligned_to_the_right() -> None:
    rows = [["x", 1, "1.00 KiB"], ["y", 2.5, "3 ms"]]
    recorded = {"title": "t", "columns": ["a", "b", "c"], "note": None, "rows": rows}
    assert "| --- | --: | --: |" in md.recorded_table(recorded)
