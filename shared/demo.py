"""How a script declares itself and reports: the decorator `demo` and the recorder `Run`.

A decorated function becomes a `Demo`: its signature is the command line (`main.cli()`), and tests call it in place
(`main.run("smoke")`).
"""
from __future__ import annotations

import ast
import copy
import hashlib
import inspect
import io
import math
import re
import sys
import textwrap
import time
import tokenize
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from shared import catalog
from shared.environment import world
from shared.errors import UsageError
from shared.files import check_target
from shared.result import RELATIONS, Result, describe, machine, make_claim, plain, versions
from shared.terminal import click_main, guarded, make_console, print_table, show

if TYPE_CHECKING:
    import click

    from shared.measure import Ratio, Timing

HELP = {
    "workers": "Worker processes.", "nodes": "Machines.", "repeats": "Timed repeats of each measurement.",
    "steps": "Training steps.",
    "seed": "Seed of every random choice.", "link": "Pace of the links between the workers, by name.",
    "mebibytes": "Size of the buffer in MiB (2**20 bytes).", "device": "cpu, cuda or auto.",
}


class Run:
    """Handed to a demo's main function: prints what it is told and records it."""

    def __init__(self, demo: Demo, preset: str | None, parameters: dict[str, Any], quiet: bool) -> None:
        self.preset, self.parameters, self.seed = preset, parameters, parameters.get("seed", 0)
        self.console, self.quiet = make_console(quiet), quiet
        title, question = demo.title_and_question()
        inside = demo.path.is_relative_to(catalog.ROOT)
        script = demo.path.relative_to(catalog.ROOT).as_posix() if inside else demo.path.name
        self.result = Result(
            section=demo.section, title=title, question=question, script=script,
            script_sha256=hashlib.sha256(demo.path.read_bytes()).hexdigest(), library=demo.library,
            handles=list(demo.handles),
            preset=preset, parameters=plain(parameters), machine=machine(), versions=versions(demo.needs),
            date=datetime.now(UTC).isoformat(timespec="seconds"))
        self._line(f"{demo.section}  {title}", "bold")
        self._line(question)
        given = "  ".join(f"{name}={show(value)}" for name, value in self.result.parameters.items())
        self._line(f"{given}  on {self.result.machine['cores']} cores", "dim")
        self._begin = time.perf_counter()

    def table(self, title: str, rows: Iterable[dict[str, Any] | Sequence[Any]], columns: Sequence[str] | None = None,
              note: str | None = None) -> None:
        """Print and record a table. Rows are dicts (columns default to the first one's keys) or sequences of cells."""
        rows = list(rows)
        columns = list(columns or (rows[0] if rows and isinstance(rows[0], dict) else ()))
        cells = plain([[row.get(name) for name in columns] if isinstance(row, dict) else list(row) for row in rows])
        if not columns or any(len(row) != len(columns) for row in cells):
            raise TypeError(f"table {title!r}: every row needs one value for each column of {columns}")
        self.result.tables.append({"title": title, "columns": columns, "rows": cells, "note": note})
        print_table(self.console, columns, cells, title, note)

    def claim(self, text: str, *, measured: Any, tolerance: float = 0.0, relative: float = 0.0, unit: str = "",
              timing: bool = False, **relation: Any) -> bool:
        """Record whether `measured` stands in the one relation given, a key of RELATIONS (equals, at_least, ...).

        `between` takes (low, high). `tolerance` (absolute) and `relative` (a share of the expected value) widen any of
        them. NaN never holds. Arrays and text go with `equals` and `differs` only, where shapes must agree too.
        `timing` marks what depends on a clock. Claims are printed at the end of the run.
        """
        if len(relation) != 1 or not relation.keys() <= RELATIONS.keys():
            given = ", ".join(relation) or "none"
            raise TypeError(f"claim {text!r} needs exactly one of {', '.join(RELATIONS)}, got {given}")
        [(kind, expected)] = relation.items()
        self.result.claims.append(make_claim(text, measured, kind, expected, tolerance, relative, unit, timing))
        return self.result.claims[-1]["holds"]

    def erratum(self, what: str, *, printed: Any, computed: Any, why: str, relative: float = 0.01) -> None:
        """A figure printed in the book that does not follow from its stated inputs: recorded, and claimed.

        `computed` comes out of this run; the claim fails once both agree within `relative`.
        """
        self.claim(f"the book's {what} does not follow from its inputs", measured=computed, differs=printed,
                   relative=relative)
        self.result.errata.append({"what": what, "printed": plain(printed), "computed": plain(computed), "why": why})

    def record(self, name: str, value: Any) -> None:
        """Keep numbers, arrays or dicts for draw() and the JSON file. Keys become text, NaN and infinities null."""
        self.result.records[name] = plain(value)

    def note(self, text: str) -> None:
        """Print and record one line."""
        self.result.notes.append(text)
        self._line(text)

    def progress(self, iterable: Iterable[Any], what: str) -> Iterable[Any]:
        """`iterable`, with a bar on a terminal that vanishes at the end."""
        if self.quiet or not self.console.is_terminal:
            return iterable
        from rich.progress import track

        return track(iterable, description=what, console=self.console, transient=True, refresh_per_second=2)

    def lines_of_code(self, ours: Iterable[Callable | ModuleType], library: Iterable[Callable | ModuleType]) -> None:
        """Count, print and record the lines of code that each side needs, and what was counted.

        The rendered book shows what is named here as the essential lines of both sides, in this order.
        """
        sides = {"ours": list(ours), "library": list(library)}
        counted: dict[str, Any] = {side: sum(map(code_lines, things)) for side, things in sides.items()}
        counted["of"] = {side: list(map(_dotted, things)) for side, things in sides.items()}
        self.result.lines_of_code = counted
        library_name = self.result.library or "the library"
        self._line(f"lines of code: {counted['ours']} from scratch, {counted['library']} with {library_name}")

    def compare(self, what: str, ours: Timing, library: Timing, pairs: Ratio | None = None) -> None:
        """Print and record two timings of one interleaved run and their ratio library / ours (`pairs`, if at hand)."""
        from shared.measure import ratio

        pairs = pairs or ratio(library, ours)
        sides = {"ours": ours, "library": library, "ratio": pairs}
        self.result.comparisons.append({"what": what} | {
            side: plain({"median": t.median, "low": t.low, "high": t.high, "spread": t.spread, "samples": t.samples,
                         "text": str(t)})
            for side, t in sides.items()})
        columns = ["median [95 % interval]", "from scratch", self.result.library or "library", "library / ours"]
        print_table(self.console, columns, [[what, *map(str, sides.values())]])

    def finish(self) -> Result:
        """Print claims and wall time; the complete result."""
        from shared.measure import peak_memory

        result = self.result
        result.seconds, result.peak_memory_bytes = time.perf_counter() - self._begin, peak_memory()
        self._line("")
        if result.handles:
            self._line(f"{result.library} also handles: {', '.join(result.handles)}")
        for claim in result.claims:
            mark, style = ("ok    ", "green") if claim["holds"] else ("FAILED", "bold red")
            self._line(f"{mark}  {describe(claim)}", style)
        failed = sum(not claim["holds"] for claim in result.claims)
        self._line(f"{len(result.claims)} claims, {failed} failed, {result.seconds:.1f} s", "dim")
        return result

    def _line(self, text: str, style: str = "") -> None:
        # In a pipe one line stays one line.
        self.console.print(text, style=style, soft_wrap=not self.console.is_terminal)


@dataclass(frozen=True)
class Plan:
    """One parsed command line."""

    preset: str | None
    overrides: dict[str, Any]
    json: Path | None
    plot: Path | None
    quiet: bool
    against: dict[str, Any] | None = None  # the recorded result to compare with


class Demo:
    """A script's main function together with its declaration."""

    def __init__(self, function: Callable[..., None], section: str, presets: dict[str, dict[str, Any]],
                 needs: Sequence[str], library: str | None, handles: Sequence[str]) -> None:
        self.function, self.section, self.presets = function, section, presets
        self.needs, self.library, self.handles = tuple(needs), library, tuple(handles)
        self.path = Path(function.__code__.co_filename).resolve()
        self.module = catalog.module_name(self.path)
        self.defaults = {name: p.default for name, p in list(inspect.signature(function).parameters.items())[1:]}
        for name, values in presets.items():
            if unknown := values.keys() - self.defaults.keys():
                raise TypeError(f"{self.path.name}: preset {name} sets {', '.join(unknown)}, no parameter of main")

    def run(self, preset: str | None = None, quiet: bool = True, **overrides: Any) -> Result:
        """Run in this process. ReaderError for a bad value, missing library, failed worker; not for a failed claim."""
        parameters = self.settle(preset, overrides)
        if absent := catalog.missing(self.needs):
            raise absent[0]
        if not world():
            from shared.fleet import preload

            preload(*self.needs)  # the workers' server imports torch while this process does
        run = Run(self, preset, parameters, quiet)
        self.function(run, **parameters)
        return run.finish()

    def cli(self, argv: Sequence[str] | None = None, program: str | None = None) -> NoReturn:
        """The command line. Leaves with 0, 1 (a claim or worker failed), 2 (usage), 3 (missing), 130, 143 (stopped)."""
        if self.function.__module__ == "__main__":  # worker functions must pickle under a name that others can import
            getattr(catalog.load(self.path), self.function.__name__).cli(argv, program)

        def body() -> int:
            plan = self.parse(argv, program)
            return plan if isinstance(plan, int) else 0 if self.execute(plan).ok else 1

        sys.exit(guarded(body))

    def parse(self, argv: Sequence[str] | None = None, program: str | None = None) -> Plan | int:
        """What the arguments ask for, checked before any work; 0 if it was help, which has then been printed."""
        plan = click_main(self._command(), argv, program or self.path.name)
        if isinstance(plan, Plan):
            if plan.against and not plan.preset:
                plan = replace(plan, overrides=plan.against["parameters"] | plan.overrides)
            self.settle(plan.preset, plan.overrides)
            if plan.plot:
                self._draw(plan.plot)
            for target in filter(None, (plan.json, plan.plot)):
                check_target(target)
        return plan

    def execute(self, plan: Plan) -> Result:
        """Run, print, and write the files asked for, also when a claim failed."""
        if (world() or (0, 1))[0]:  # under torchrun rank 0 speaks for all
            return self.run(plan.preset, **plan.overrides)
        result = self.run(plan.preset, plan.quiet, **plan.overrides)
        for claim in result.claims if plan.quiet else ():
            if not claim["holds"]:
                print(f"claim failed: {describe(claim)}", file=sys.stderr)
        if plan.against and not plan.quiet:
            from shared.records import print_beside

            print_beside(result.to_json(), plan.against)
        if plan.json:
            result.save(plan.json)
        if plan.plot:
            from shared import plot

            plot.save(plot.figure(result.to_json(), self._draw(plan.plot)), plan.plot)
        return result

    def settle(self, preset: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
        """The parameters: defaults, then the preset's, then those given. UsageError if one makes no sense."""
        if preset is not None and preset not in self.presets:
            raise UsageError(f"no preset {preset!r}; {self.path.name} has: {', '.join(self.presets) or 'none'}")
        if unknown := overrides.keys() - self.defaults.keys():
            takes = ", ".join(self.defaults)
            raise UsageError(f"{self.path.name} takes no {', '.join(sorted(unknown))}; it takes {takes}")
        values = self.defaults | self.presets.get(preset, {}) | overrides
        hints = typing.get_type_hints(self.function, include_extras=True)
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                _check_number(name, value, _option(hints.get(name)))
        if "workers" in values and not world():
            from shared.fleet import check_workers

            check_workers(values["workers"])
        return values

    def title_and_question(self) -> tuple[str, str]:
        """The section's title in the table of contents, and the Question of the script's docstring."""
        doc = sys.modules[self.function.__module__].__doc__ or self.path.stem
        question = re.search(r"^Question\s+(.+(?:\n[ \t]+.+)*)", doc, re.MULTILINE)
        titles = {section.number: section.title for section in catalog.sections()}
        return titles.get(self.section, doc.splitlines()[0]), " ".join(question[1].split()) if question else ""

    def _draw(self, target: Path) -> Callable[..., None]:
        from shared.plot import check_format

        check_format(target)
        if draw := getattr(sys.modules[self.function.__module__], "draw", None):
            return draw
        raise UsageError(f"{self.path.name} draws no figure: leave out --plot")

    def _command(self) -> click.Command:
        """The signature as a typer command that returns a Plan: its parameters and the five options of every script."""
        import typer
        from click.core import ParameterSource

        def collect(context: typer.Context, **values: Any) -> Plan:
            given = {name: values[name] for name in self.defaults
                     if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
            against = None
            if values["against_record"]:
                from shared.records import recorded

                against = recorded(self.path)
            return Plan(values["preset"], given, values["json"], values["plot"], values["quiet"], against)

        arguments = (self.function.__doc__ or "").partition("Args:")[2]
        described = HELP | dict(re.findall(r"^ +(\w+)(?: \(.*?\))?: (.+)$", arguments, re.MULTILINE))
        hints = typing.get_type_hints(self.function, include_extras=True)
        types = typing.get_type_hints(self.function)
        options: dict[str, tuple[Any, Any, Any]] = {}  # name -> type, typer's option, default
        for name, default in self.defaults.items():
            option = copy.copy(_option(hints[name])) or typer.Option()
            option.help = f"{option.help or described.get(name, '')} [default: {show(default)}]".strip()
            option.show_default = False  # typer's own would print a backslash before the bracket
            options[name] = (types[name], option, default)
        named = typer.Option(metavar="|".join(self.presets) or "NAME", help="Named parameters; explicit options win.")
        options["preset"] = (str | None, named, None)
        options["json"] = (Path | None, typer.Option(metavar="FILE", help="Write everything recorded to FILE."), None)
        options["plot"] = (Path | None, typer.Option(metavar="FILE", help="Draw the figure: .png, .svg or .pdf."), None)
        options["quiet"] = (bool, typer.Option("--quiet", help="Print failed claims only."), False)
        beside = "Run with the parameters of the recorded run and print both results side by side."
        options["against_record"] = (bool, typer.Option("--against-record", help=beside), False)
        keyword = inspect.Parameter.KEYWORD_ONLY
        signature = [inspect.Parameter("context", keyword, annotation=typer.Context)]
        signature += [inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, option])
                      for name, (kind, option, default) in options.items()]
        collect.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        collect.__annotations__ = {parameter.name: parameter.annotation for parameter in signature}
        presets = [f"{name}: {', '.join(f'{k} {v}' for k, v in given.items())}" for name, given in self.presets.items()]
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(context_settings={"max_content_width": 100}, help="\n\n".join(self.title_and_question()),
                    epilog=f"Presets. {'; '.join(presets)}" if presets else None)(collect)
        return typer.main.get_command(app)


def demo(section: str, *, smoke: dict[str, Any] | None = None, laptop: dict[str, Any] | None = None,
         cluster: dict[str, Any] | None = None, needs: Sequence[str] = (), library: str | None = None,
         handles: Sequence[str] = ()) -> Callable[[Callable[..., None]], Demo]:
    """Declare `main(run, ...)` as the program of a section or, with `library`, as a shortcut.

    A preset is a dict of parameters, or None where there is none. `needs` are import names ("torch") or executables
    ("exe:mpirun"), looked for before the run. `handles` is what the library does that the twin does not.
    """
    given = {"smoke": smoke, "laptop": laptop, "cluster": cluster}
    presets = {name: values for name, values in given.items() if values is not None}
    return lambda function: Demo(function, section, presets, needs, library, handles)


def code_lines(thing: Callable | ModuleType | Demo) -> int:
    """Lines of a function's or module's source that hold code: no blank lines, comments or docstrings."""
    source = textwrap.dedent(inspect.getsource(getattr(thing, "function", thing)))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {line for node in ast.walk(ast.parse(source))
                  if isinstance(node, documented) and ast.get_docstring(node) is not None
                  for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    return len({line for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in silent
                for line in range(token.start[0], token.end[0] + 1)} - docstrings)


def _dotted(thing: Callable | ModuleType | Demo) -> str:
    """ "shared.demo:Run.claim" of a function or class, "shared.demo" of a module."""
    thing = getattr(thing, "function", thing)
    return thing.__name__ if inspect.ismodule(thing) else f"{thing.__module__}:{thing.__qualname__}"


def _option(hint: Any) -> Any:
    """The typer.Option of an Annotated type, or None."""
    return next((extra for extra in getattr(hint, "__metadata__", ()) if hasattr(extra, "param_decls")), None)


def _check_number(name: str, value: float, option: Any) -> None:
    """Numbers are above 0 unless their option sets its own bounds; a seed may be 0."""
    flag = f"--{name.replace('_', '-')}"
    low, high = (option.min, option.max) if option else (None, None)
    if low is None and high is None and name != "seed":
        if not 0 < value < math.inf:
            rule = "at least 1" if isinstance(value, int) else "a number above 0"
            raise UsageError(f"{flag} must be {rule}, got {value}")
        return
    low = 0 if name == "seed" and low is None else low
    if not (low is None or value >= low) or not (high is None or value <= high):
        bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise UsageError(f"{flag} must be {' and '.join(bounds)}, got {value}")
