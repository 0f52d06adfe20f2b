"""The `scalable` command: list, run, compare, verify, check, record, book, doctor."""
from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from typer.core import TyperGroup

from shared import catalog
from shared.errors import MissingDependency, ReaderError, UsageError
from shared.terminal import click_main, complain, guarded, make_console, print_table

if TYPE_CHECKING:
    from shared.demo import Demo, Plan
    from shared.result import Result


class Commands(TyperGroup):
    """Commands return their exit code; what stops one becomes a line on stderr before click sees it."""

    def invoke(self, context: click.Context) -> int:
        return guarded(lambda: super(Commands, self).invoke(context))


def _addresses(incomplete: str) -> list[str]:
    return [section.number for section in catalog.sections() if section.demo and section.number.startswith(incomplete)]


app = typer.Typer(cls=Commands, rich_markup_mode=None, context_settings={"max_content_width": 100},
                  help="A program for every section of the book: run it, compare it with the library, verify it.")
FORWARD = {"allow_extra_args": True, "allow_interspersed_args": False}  # what follows the section belongs to the script
OneSection = Annotated[str, typer.Argument(metavar="SECTION", help="Such as 4.4.", autocompletion=_addresses)]
WHERE = "A section (4.4), chapter (4, ch04) or part (part1)."
_where = typer.Argument(metavar="WHERE", help=WHERE, autocompletion=_addresses)
Where, Anywhere = Annotated[str, _where], Annotated[str | None, _where]


def main() -> None:
    """Entry point of `scalable`."""
    sys.exit(guarded(lambda: click_main(typer.main.get_command(app), sys.argv[1:] or ["--help"], "scalable")))


@app.command("list")
def list_(where: Anywhere = None) -> int:
    """Sections, their scripts, what these need, and what is built."""
    columns = ["section", "title", "demo", "shortcut", "needs", "state"]
    rows = [_row(section) for section in catalog.find(where)]
    if sys.stdout.isatty():
        print_table(make_console(), columns, rows)
        return 0
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


@app.command(context_settings=FORWARD)
def run(context: typer.Context, section: OneSection) -> int:
    """Run the demo of a section. Its own options follow the section: scalable run 4.4 --help."""
    [chosen, *others] = catalog.find(section)
    if others:
        raise UsageError(f"run takes one section, such as {chosen.number}; {section} has {len(others) + 1}")
    if not chosen.demo:
        raise _nothing_there(chosen.number, [chosen])
    _load(chosen.demo).cli(context.args, f"scalable run {chosen.number}")


@app.command(context_settings=FORWARD)
def compare(context: typer.Context, where: Where) -> int:
    """Run the shortcuts: the same work by the library, checked and timed against ours."""
    chosen = catalog.find(where)
    scripts = [path for section in chosen for path in section.shortcuts]
    if not scripts:
        raise _nothing_there(where, chosen, "shortcut")
    if len(scripts) == 1:
        _load(scripts[0]).cli(context.args, f"scalable compare {where}")
    code, plans, rows = 0, [], []
    _preload(scripts)
    for path in scripts:
        if absent := catalog.missing(catalog.declaration(path).needs):
            code = absent[0].exit_code
            print(f"not run: {path.name}: {absent[0]}", file=sys.stderr)
            continue
        demo = _load(path)
        plan = demo.parse(context.args, f"scalable compare {where}")
        if isinstance(plan, int):
            return plan
        plans.append((demo, _suffixed(plan, path)))
    for demo, plan in plans:
        try:
            result = demo.execute(plan)
        except ReaderError as error:
            complain(error)
            code = 1
            continue
        code = code if result.ok else 1
        rows.extend(_compared(result))
    if rows:
        columns = ["section", "what", "library", "from scratch", "by the library", "library / ours", "agreement"]
        print_table(make_console(), columns, rows, f"compare {where}")
    return code


@app.command()
def verify(where: Anywhere = None,
           verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List all claims.")] = False) -> int:
    """Check what the scripts claim: each runs in its smoke preset, all in one process."""
    chosen = catalog.find(where)
    scripts = [path for section in chosen for path in section.scripts]
    if not scripts:
        raise _nothing_there(where, chosen)
    begin, console, claims, tally = time.perf_counter(), make_console(), [], Counter()
    _preload(scripts)
    for path in scripts:
        name = (catalog.number(path), _slug(path) if "_shortcut_" in path.name else "demo")
        if console.is_terminal:  # a still line: a spinner's thread would disturb what is being timed
            print(f"{' '.join(name)}  ({tally.total() + 1} of {len(scripts)})", end="\r", flush=True)
        try:
            state, detail, found = _verify(path)
        except KeyboardInterrupt:
            done = dict.fromkeys(map(catalog.number, scripts[:tally.total()]))
            print(f"interrupted in {' '.join(name)}; done: {', '.join(done) or 'nothing'}", file=sys.stderr)
            return 130
        finally:
            print("\x1b[2K" if console.is_terminal else "", end="")
        tally[state] += 1
        claims += [[*name, *claim] for claim in found]
        style = "" if state == "ok" else "bold red"
        console.print(f"{name[0]:<5} {name[1]:<28} {state:<7}  {detail}", style=style, soft_wrap=True)
        sys.stdout.flush()
    if listed := [claim for claim in claims if verbose or claim[2] == "FAILED"]:
        print_table(console, ["section", "script", "state", "claim"], listed, "claims" if verbose else "failed claims")
    counts = ", ".join(f"{count} {state}" for state, count in tally.items())
    print(f"scripts: {counts}; claims: {len(claims)}; {time.perf_counter() - begin:.1f} s")
    return 1 if tally["FAILED"] + tally["error"] else 3 if tally["not run"] else 0


@app.command()
def check(chapter: Annotated[str, typer.Argument(metavar="CHAPTER", help="Such as 4 or ch04.")],
          solutions: Annotated[bool, typer.Option("--solutions", help="Grade solutions.py instead.")] = False) -> int:
    """Grade your answers in a chapter's exercises.py."""
    folder, name = catalog.find(chapter)[0].folder, "solutions" if solutions else "exercises"
    if not all((folder / file).exists() for file in ("grading.py", f"{name}.py")):
        raise UsageError(f"{chapter} has no {name} to grade yet")
    grades = catalog.load(folder / "grading.py").grade(catalog.load(folder / f"{name}.py"))
    rows = [[grade.name, "ok" if grade.passed else "FAILED", grade.message] for grade in grades]
    print_table(make_console(), ["exercise", "state", ""], rows, f"{folder.name}/{name}.py")
    print(f"{sum(grade.passed for grade in grades)} of {len(grades)} pass")
    return 0 if all(grade.passed for grade in grades) else 1


@app.command()
def record(where: Annotated[list[str] | None, typer.Argument(metavar="[WHERE]...", help=WHERE,
                                                             autocompletion=_addresses)] = None,
           check: Annotated[bool, typer.Option("--check", help="Run nothing; name what is missing or stale.")] = False,
           ) -> int:
    """Run scripts in the laptop preset and keep the results that the book shows. Without WHERE: those out of date."""
    from shared import records

    chosen = list(dict.fromkeys(section for place in where or [None] for section in catalog.find(place)))
    if check:
        found = [problem for section in chosen for problem in records.problems(section)]
        if not where:
            found += [f"{path.relative_to(catalog.ROOT)}: the book has no such section" for path in records.orphans()]
        built = sum(bool(section.scripts) for section in chosen)
        print("\n".join(found) or f"{built} sections, every record is current")
        return 1 if found else 0
    if not any(section.scripts for section in chosen):
        raise _nothing_there(" ".join(where or []) or None, chosen)
    due = [section for section in chosen if section.scripts and (where or records.problems(section))]
    if absent := catalog.missing({need: 0 for section in due for path in section.scripts
                                  for need in catalog.declaration(path).needs}):
        raise absent[0]
    code = 0
    for section in due:
        try:
            for script, result in records.make(section):
                done = f"{len(result['claims'])} claims  {result['seconds']:.1f} s"
                print(f"{section.number:<5} {script.stem:<44} {done}", flush=True)
        except ReaderError as error:
            complain(error)
            code = 1
    if not due:
        print("every record is current; name a section to record it anew")
    return code


@app.command()
def book(fresh: Annotated[bool, typer.Option("--fresh", help="Build every page anew.")] = False) -> int:
    """Render the book from the repository and the recorded results: book/_build/html/index.html."""
    if absent := catalog.missing(["jupyter_book"]):
        raise absent[0]
    return subprocess.call([sys.executable, str(catalog.ROOT / "book" / "build.py"), *(["--fresh"] if fresh else [])])


@app.command()
def doctor() -> int:
    """What is installed, what each missing extra would unlock, and the machine."""
    from shared.doctor import findings

    for what, state in findings():
        print(f"{what:<22} {state}")
    return 0


def _row(section: catalog.Section) -> list[str]:
    needs = dict.fromkeys(need for path in section.scripts for need in catalog.declaration(path).needs)
    demo, shortcuts = _slug(section.demo) if section.demo else "", ", ".join(map(_slug, section.shortcuts))
    return [section.number, section.title, demo or "-", shortcuts or "-", ", ".join(needs) or "-", section.state]


def _slug(path: Path) -> str:
    """The part of a script's name that says what it does."""
    return re.sub(r"^s\d+_\d+_(shortcut_)?", "", path.stem)


def _preload(scripts: list[Path]) -> None:
    """Have the workers' server import what any of the scripts needs, once."""
    from shared.fleet import preload

    preload(*{need for path in scripts for need in catalog.declaration(path).needs})


def _load(path: Path) -> Demo:
    """The Demo of a script; MissingDependency before anything is imported."""
    if absent := catalog.missing(catalog.declaration(path).needs):
        raise absent[0]
    return catalog.load(path).main


def _nothing_there(where: str | None, chosen: list[catalog.Section], what: str = "script") -> UsageError:
    """Why there is no `what` to run, and where the nearest is."""
    first = chosen[0].number
    if any(section.demo for section in chosen):
        return UsageError(f"{where} has no {what} yet; scalable run {first} shows ours")
    near = ", ".join(catalog.nearest_ready(chosen[0])) or "nothing"
    return UsageError(f"{where or 'the book'} is planned, not built yet; ready near it: {near}")


def _verify(path: Path) -> tuple[str, str, list[list[str]]]:
    """State of one script, what to print beside it, and its claims as [state, description]."""
    from shared.result import describe

    begin = time.perf_counter()
    try:
        result = _load(path).run("smoke")
    except MissingDependency as error:
        return "not run", str(error), []
    except ReaderError as error:
        return "error", " ".join(str(error).split()), []
    except Exception:  # a bug in one script should not hide the state of the others
        return "error", traceback.format_exc(), []
    claims = [["ok" if claim["holds"] else "FAILED", describe(claim)] for claim in result.claims]
    failed = "" if result.ok else f"{sum(state == 'FAILED' for state, _ in claims)} failed   "
    detail = f"{len(claims)} claims   {failed}{time.perf_counter() - begin:.1f} s"
    return "ok" if result.ok else "FAILED", detail, claims


def _suffixed(plan: Plan, path: Path) -> Plan:
    """The plan with --json and --plot files of its own: result.json becomes result.torch_all_reduce.json."""
    files = {name: file.with_name(f"{file.stem}.{_slug(path)}{file.suffix}")
             for name in ("json", "plot") if (file := getattr(plan, name))}
    return dataclasses.replace(plan, **files)


def _compared(result: Result) -> list[list[str]]:
    """Rows of the table that closes `compare`: timings, and whether the claims that no clock decides hold."""
    agree = "yes" if all(claim["holds"] for claim in result.claims if not claim["timing"]) else "NO"
    sides = ("ours", "library", "ratio")
    timings = [[c["what"], *(c[side]["text"] for side in sides)] for c in result.comparisons] or [["-"] * 4]
    return [[result.section, what, result.library or "-", *numbers, agree] for what, *numbers in timings]


if __name__ == "__main__":
    main()
