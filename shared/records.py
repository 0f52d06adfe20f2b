"""Recorded results: one file per section under book/records, and whether the code that made it is still the same.

A record holds, for each script of a section, what one run in the `laptop` preset reported and a hash of the code that
ran: the script and every module of the parts that it imports, directly or not. Comments, docstrings and blank lines
are no part of that code, for no number depends on them.
"""
from __future__ import annotations

import ast
import hashlib
import io
import json
import signal
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from shared import catalog
from shared.errors import ReaderError, UsageError
from shared.files import write_atomically
from shared.terminal import make_console, print_table, show

PRESET = "laptop"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def folder() -> Path:
    return catalog.ROOT / "book" / "records"


def record_file(section: str) -> Path:
    """book/records/ch04/4.4.json for "4.4"."""
    return folder() / f"ch{int(section.partition('.')[0]):02d}" / f"{section}.json"


def load(section: str) -> dict[str, Any] | None:
    """The record of a section: {"section", "scripts": [{"sources": {file: hash}, "result": {...}}]}."""
    path = record_file(section)
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"section": record["section"], "scripts": list(record["scripts"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ReaderError(f"{path} is no record ({error}): remove it, then scalable record {section}") from error


def recorded(script: Path) -> dict[str, Any]:
    """The recorded result of one script; UsageError if there is none."""
    section = catalog.number(script)
    for entry in (load(section) or {"scripts": []})["scripts"]:
        if Path(entry["result"]["script"]).name == script.name:
            return entry["result"]
    raise UsageError(f"{script.name} has no recorded result yet: scalable record {section}")


def problems(section: catalog.Section) -> list[str]:
    """Why the record of a section cannot be shown as it is; empty if it can. One line for each reason."""
    record = load(section.number)
    if record is None:
        return [f"{section.number}: no record"] if section.scripts else []
    entries = {Path(entry["result"]["script"]).name: entry for entry in record["scripts"]}
    found = []
    for script in section.scripts:
        if script.name not in entries:
            found.append(f"{section.number}: no record of {script.name}")
            continue
        entry, now = entries.pop(script.name), sources(script)
        if changed := sorted(file for file in now | entry["sources"] if now.get(file) != entry["sources"].get(file)):
            found.append(f"{section.number}: stale record of {script.name}: changed since: {', '.join(changed)}")
        if not entry["result"]["ok"]:
            found.append(f"{section.number}: a recorded claim of {script.name} failed")
    return found + [f"{section.number}: a record of {name}, which is gone" for name in entries]


def orphans() -> list[Path]:
    """Record files of sections that the table of contents lacks or that have no scripts."""
    known = {record_file(section.number) for section in catalog.sections() if section.scripts}
    return sorted(set(folder().rglob("*.json")) - known)


def make(section: catalog.Section) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Run each script of a section in a process of its own, yield what it reported, and then write the record.

    ReaderError, and no record, if a run fails or a claim does not hold.
    """
    entries = []
    for script in section.scripts:
        before = sources(script)
        result = _run(script)
        if sources(script) != before:
            raise ReaderError(f"{script.name} or a module of its chapter changed during the run; not recorded")
        entries.append({"sources": before, "result": result})
        yield script, result
    target = record_file(section.number)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, f"{_json({'section': section.number, 'scripts': entries})}\n".encode())


def sources(script: Path) -> dict[str, str]:
    """Path below the repository root -> hash of its code, for the script and all modules of the parts it imports."""
    found: dict[str, str] = {}
    waiting = [script.resolve()]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(catalog.ROOT).as_posix()
        if name not in found:
            found[name], imports = _examined(path, path.stat().st_mtime_ns)
            waiting += imports
    return dict(sorted(found.items()))


@cache
def code_hash(text: str) -> str:
    """Of the source without comments, docstrings, blank lines and trailing blanks."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            for row in range(node.body[0].lineno, node.body[0].end_lineno + 1):
                lines[row - 1] = ""
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()


def print_beside(here: dict[str, Any], there: dict[str, Any]) -> None:
    """Print the numbers of this run beside the recorded ones: timings, the tables row by row, the claims."""
    console = make_console()
    machine = there["machine"]
    console.print(f"\nrecorded on {there['date'][:10]}, {machine['cores']} cores of {machine['cpu']}, "
                  f"Python {machine['python']}", style="bold", soft_wrap=not console.is_terminal)
    others = [f"{name}={show(value)} (recorded {show(there['parameters'].get(name))})"
              for name, value in here["parameters"].items() if value != there["parameters"].get(name)]
    if others:
        console.print(f"parameters that differ: {', '.join(others)}", soft_wrap=True)
    old_timings = {comparison["what"]: comparison for comparison in there["comparisons"]}
    rows = [[what, *(comparison[side]["text"] for side in ("ours", "library", "ratio"))]
            for timing in here["comparisons"] for what, comparison in
            ((f"{timing['what']}: here", timing), ("   recorded", old_timings.get(timing["what"]))) if comparison]
    if rows:
        print_table(console, ["timing", "from scratch", here["library"] or "library", "library / ours"], rows)
    old_tables = {table["title"]: table for table in there["tables"]}
    for table in here["tables"]:
        old = old_tables.get(table["title"])
        if old and old["columns"] == table["columns"] and len(old["rows"]) == len(table["rows"]):
            rows = []
            for mine, theirs in zip(table["rows"], old["rows"]):
                rows += [["", *mine]] if mine == theirs else [["here", *mine], ["recorded", *theirs]]
            print_table(console, ["", *table["columns"]], rows, table["title"], table["note"])
    old_claims = {claim["text"]: claim for claim in there["claims"]}
    rows = []
    for claim in here["claims"]:
        old = old_claims.get(claim["text"])
        rows.append([claim["text"], show(claim["measured"]), show(old["measured"]) if old else "-",
                     "ok" if claim["holds"] else "FAILED"])
    print_table(console, ["claim", "here", "recorded", ""], rows)
    rows = [["seconds", f"{here['seconds']:.1f}", f"{there['seconds']:.1f}"],
            ["peak memory", *(f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB" for result in (here, there))]]
    print_table(console, ["the whole run", "here", "recorded"], rows)


@cache
def _examined(path: Path, _changed: int) -> tuple[str, list[Path]]:
    """Hash of a module's code, and the modules of the parts that it imports, wherever in the file."""
    text = path.read_text(encoding="utf-8")
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = [catalog.ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in sorted(names)
             if name.startswith("part")]
    return code_hash(text), [file for file in files if file.exists()]


def _run(script: Path) -> dict[str, Any]:
    """What `python script --preset laptop --quiet` reports. ReaderError with the last line on stderr if it fails."""
    with tempfile.TemporaryDirectory(prefix="scalable-record-") as scratch:
        target = Path(scratch) / "result.json"
        command = [sys.executable, str(script), "--preset", PRESET, "--quiet", "--json", str(target)]
        process = subprocess.Popen(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   process_group=0)  # Ctrl-C comes through this process alone
        try:
            _, errors = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGINT)  # once, so that it can end its own workers
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
        if process.returncode:
            lines = [line for line in errors.splitlines() if line and not line.startswith(" ")] or ["no message"]
            raise ReaderError(f"{script.name} left with {process.returncode}, not recorded: {lines[-1]}")
        if not target.exists():
            raise ReaderError(f"{script.name} reported nothing, not recorded: it must end with main.cli()")
        return json.loads(target.read_text(encoding="utf-8"))


def _json(value: Any, margin: str = "") -> str:
    """JSON in which a list of plain values takes one line: files that people can read and compare."""
    inner = margin + " "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(key)}: {_json(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{margin}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) and item for item in value):
        return "[\n" + ",\n".join(inner + _json(item, inner) for item in value) + f"\n{margin}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
