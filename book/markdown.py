"""MyST text from plain values: escaping, tables, callouts, code. Knows nothing of the book's contents."""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from shared.terminal import show

SPECIAL = re.compile(r"([\\`*_{}\[\]<>|$~#^])")


def plain(text: Any) -> str:
    """Text that Markdown shows as it is."""
    return SPECIAL.sub(r"\\\1", str(text))


def prose(text: str) -> str:
    """Text of a docstring: `code` in backticks stays code, everything else is shown as it is, in one paragraph."""
    pieces = re.split(r"(`+[^`]+`+)", " ".join(text.split()))
    return "".join(piece if piece.startswith("`") else plain(piece) for piece in pieces)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[bool] = ()) -> str:
    """A pipe table of finished cells. `numeric` columns are aligned to the right."""
    rule = ["--:" if i < len(numeric) and numeric[i] else "---" for i in range(len(columns))]
    lines = [columns, rule, *rows]
    return "\n".join(f"| {' | '.join(str(cell) or ' ' for cell in line)} |" for line in lines)


def recorded_table(recorded: dict[str, Any]) -> str:
    """A recorded table with its title and note, as the script printed it."""
    rows, columns = recorded["rows"], recorded["columns"]
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    cells = [[plain(show(value)) for value in row] for row in rows]
    note = f"\n\n{{.note}}\n{prose(recorded['note'])}" if recorded["note"] else ""
    return f"{{.table-title}}\n{plain(recorded['title'])}\n\n{table(list(map(plain, columns)), cells, numeric)}{note}"


def callout(kind: str, title: str, body: str) -> str:
    """A box. `kind` is one of big-picture, key-insight, library-shortcut, exercise, note, warning (see book.css)."""
    return directive("admonition", title, body, {"class": kind})


def folded(title: str, body: str, kind: str = "fold") -> str:
    """What a reader opens with a click; works without JavaScript and opens when printed (see book.css)."""
    return directive("dropdown", title, body, {"class-container": kind})


def code(text: str, language: str = "python", first_line: int | None = None) -> str:
    options = {"lineno-start": str(first_line)} if first_line else {}
    return directive("code-block", language, text.rstrip("\n"), options, fence="`")


def directive(name: str, argument: str, body: str, options: dict[str, str] | None = None, fence: str = ":") -> str:
    """A directive whose fence is longer than any in its body."""
    longest = max((len(run) for run in re.findall(rf"^ *({re.escape(fence)}{{3,}})", body, re.MULTILINE)), default=2)
    marks = fence * max(3, longest + 1)
    lines = [f":{key}: {value}" for key, value in (options or {}).items()]
    return "\n".join([f"{marks}{{{name}}} {argument}".rstrip(), *lines, "", body, marks])


def html(text: str) -> str:
    return directive("raw", "html", text, fence="`")


def _is_number(value: Any) -> bool:
    number = r"[-+]?[\d.,]+(e[-+]?\d+)?( ?(%|ms|us|s|KiB|MiB|GiB|B|n|MB/s|GB/s))?"
    return isinstance(value, (int, float)) and not isinstance(value, bool) or (
        isinstance(value, str) and re.fullmatch(number, value) is not None)
