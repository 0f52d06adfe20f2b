"""Declaration, recorder, claims, results and files, in one process with demos written for the purpose."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import typer
from jsonschema import Draft202012Validator

from shared import Run, catalog, demo
from shared.demo import Demo, code_lines
from shared.errors import MissingDependency, ReaderError, UsageError, WorkerFailed
from shared.files import check_target, write_atomically
from shared.measure import Timing
from shared.result import Result, describe, holds, plain

SCHEMA = Draft202012Validator(json.loads((Path(catalog.__file__).parent / "result.schema.json").read_text()))
HEADER = '''"""Section 4.4: a demo for the tests.

Question   Does it work,
           on two lines?
Method     It runs.
"""
from shared import Run, demo
'''
numbered = itertools.count()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Demo]:
    """Writes a script, imports it, returns its Demo."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> Demo:
        path = tmp_path / f"s4_04_of_test_demo_{next(numbered)}.py"
        path.write_text(HEADER + source)
        return catalog.load(path).main

    return write


def code_of(main: Demo, *argv: object) -> int:
    with pytest.raises(SystemExit) as left:
        main.cli([str(word) for word in argv])
    return left.value.code


@demo("4.4", smoke=dict(workers=2), laptop=dict(workers=8, mebibytes=16.0))
def everything(
    run: Run,
    workers: int = 4,
    mebibytes: float = 1.0,
    link: str = "1gbe",
    overlap: bool = True,
    skew: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.0,
    seed: int = 0,
) -> None:
    """Uses all that Run has.

    Args:
        mebibytes (float): Size of what is sent.
    """
    run.table(
        "by dict",
        [{"K": workers, "seconds": 0.00123456}, {"K": 10**6, "seconds": math.nan}],
        note="a note [not markup]",
    )
    run.table("by sequence", [(1, "3.42 ms [3.31, 3.60]"), np.array([2, 3])], columns=["n", "time"])
    run.record("curve", np.arange(3, dtype=np.float32) / 0.5)
    run.record("odd", {1: (np.int64(2), math.inf), "ok": np.bool_(True)})
    run.note("a line")
    assert list(run.progress(range(3), "counting")) == [0, 1, 2]
    run.claim("the seed is kept", measured=run.seed, equals=seed)
    run.claim("workers", measured=np.float32(workers), between=(1, 100), unit="processes", timing=True)
    run.claim("a long array", measured=np.arange(100.0) + 0.5, equals=np.arange(100), tolerance=0.5)


# The command line from the signature


def test_defaults_preset_and_explicit_options_in_rising_order() -> None:
    assert everything.run().parameters["workers"] == 4
    laptop = everything.run("laptop")
    assert (laptop.preset, laptop.parameters["workers"], laptop.parameters["mebibytes"]) == ("laptop", 8, 16.0)
    assert everything.run("laptop", workers=3).parameters["workers"] == 3
    plan = everything.parse(["--preset", "laptop", "--workers", "4", "--no-overlap"])
    assert plan.overrides == {"workers": 4, "overlap": False}  # 4 is the default, but was asked for


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--mebibytes", "-1"], "--mebibytes must be a number above 0, got -1.0"),
        (["--mebibytes", "0"], "--mebibytes must be a number above 0"),
        (["--mebibytes", "nan"], "--mebibytes must be a number above 0, got nan"),
        (["--mebibytes", "inf"], "--mebibytes must be a number above 0, got inf"),
        (["--workers", "many"], "--workers"),
        (["--skew", "1.5"], "--skew"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--preset", "huge"], "no preset 'huge'; test_demo.py has: smoke, laptop"),
        (["--preset", "cluster"], "no preset 'cluster'"),
        (["--wrokers", "3"], "--wrokers"),
        (["4"], "unexpected extra argument"),
        (["--json", "/proc/x.json"], "cannot write /proc/x.json"),
        (["--json", "/dev/null"], "not a regular file"),
        (["--json", f"{__file__}/x.json"], "cannot write"),
        (["--json", "/"], "not a regular file"),
        (["--plot", "x.gif"], "must end in .png"),
        (["--plot", "x.png"], "draws no figure"),
    ],
)
def test_bad_input_is_one_line_and_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(everything, *argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and message in printed.err


def test_numbers_are_checked_in_programs_too_and_zero_is_fine_where_declared() -> None:
    assert everything.run(skew=0.0, seed=0).ok
    for bad in (dict(workers=0), dict(skew=1.01), dict(skew=math.nan), dict(seed=-1), dict(workres=1)):
        with pytest.raises(UsageError):
            everything.run(**bad)


def test_help_shows_types_defaults_texts_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(everything, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "All-Reduce Algorithms",
        "--workers INTEGER",
        "Worker processes. [default: 4]",
        "--overlap / --no-overlap",
        "Size of what is sent. [default: 1]",
        "--preset smoke|laptop",
        "laptop: workers 8, mebibytes 16.0",
    ):
        assert expected in text
    assert "\\" not in text


def test_a_preset_of_a_parameter_that_main_lacks_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="preset smoke sets steps"):

        @demo("4.4", smoke=dict(steps=1))
        def main(run: Run, workers: int = 1) -> None: ...


def test_a_missing_library_is_one_line_and_3_but_a_usage_error_comes_first(script, capsys) -> None:
    main = script(
        '@demo("4.4", needs=("json", "no_such_library"))\ndef main(run: Run, workers: int = 1) -> None: ...\n'
    )
    assert code_of(main) == 3
    assert capsys.readouterr().err == "error: no_such_library is not installed: install no_such_library\n"
    assert code_of(main, "--workers", 0) == 2
    with pytest.raises(MissingDependency):
        main.run()


def test_what_a_failed_worker_says_is_shown_indented(script, capsys) -> None:
    main = script(
        'from shared.errors import WorkerFailed\n@demo("4.4")\ndef main(run: Run) -> None:\n'
        '    raise WorkerFailed(3, "raised ValueError:\\n no", "Traceback:\\n  line 1\\nValueError: no\\n")\n'
    )
    assert code_of(main) == 1
    assert capsys.readouterr().err == (
        "error: worker 3 raised ValueError: no\n    Traceback:\n      line 1\n    ValueError: no\n"
    )
    with pytest.raises(WorkerFailed):
        main.run()


def test_a_bug_keeps_its_traceback(script) -> None:
    with pytest.raises(ZeroDivisionError):
        script('@demo("4.4")\ndef main(run: Run) -> None:\n    1 / 0\n').cli([])


def test_a_failed_claim_is_1_and_says_why_also_when_quiet(script, capsys, tmp_path: Path) -> None:
    main = script(
        '@demo("4.4")\ndef main(run: Run) -> None:\n    run.claim("two", measured=3, equals=2, unit="B")\n'
        '    run.claim("one", measured=1, equals=1)\n'
    )
    target = tmp_path / "out.json"
    assert code_of(main, "--json", target) == 1
    out = capsys.readouterr().out
    assert "FAILED  two: 3 B (= 2 B)\n" in out and "ok      one: 1 (= 1)\n" in out and "2 claims, 1 failed" in out
    assert Result.load(target).ok is False
    assert code_of(main, "--quiet") == 1
    assert capsys.readouterr() == ("", "claim failed: two: 3 B (= 2 B)\n")


# What is recorded


def test_a_real_result_follows_the_schema_and_survives_the_file(tmp_path: Path) -> None:
    result = everything.run("smoke", seed=5)
    SCHEMA.validate(result.to_json())
    result.save(tmp_path / "a.json")
    assert Result.load(tmp_path / "a.json") == result
    recorded = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)  # no NaN in the file
    assert recorded["ok"] is True and recorded["parameters"]["seed"] == 5 and recorded["section"] == "4.4"
    assert recorded["title"] == catalog.find("4.4")[0].title
    assert recorded["script"] == "tests/shared/test_demo.py" and recorded["versions"]["numpy"] == np.__version__
    assert recorded["tables"][0]["rows"] == [[2, 0.00123456], [10**6, None]]
    assert recorded["tables"][1] == {
        "title": "by sequence",
        "columns": ["n", "time"],
        "note": None,
        "rows": [[1, "3.42 ms [3.31, 3.60]"], [2, 3]],
    }
    assert recorded["records"] == {"curve": [0.0, 2.0, 4.0], "odd": {"1": [2, None], "ok": True}}
    assert recorded["notes"] == ["a line"] and recorded["seconds"] > 0
    assert recorded["peak_memory_bytes"] > 2**20 and recorded["machine"]["cores"] >= 1
    long = recorded["claims"][2]
    assert long["holds"] and long["measured"] == "float64 array (100,), largest difference 0.5"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("claims"),
        lambda r: r.update(extra=1),
        lambda r: r["claims"][0].update(relation="about"),
        lambda r: r["tables"][0].update(columns=[]),
        lambda r: r.update(script_sha256="x"),
        lambda r: r["machine"].update(cores=0),
    ],
)
def test_the_schema_refuses_what_is_wrong(spoil: Callable[[dict], object]) -> None:
    recorded = everything.run("smoke").to_json()
    spoil(recorded)
    assert not SCHEMA.is_valid(recorded)


def test_what_is_printed_is_plain_in_a_pipe_and_brackets_survive(capsys) -> None:
    assert code_of(everything) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"4.4  {catalog.find('4.4')[0].title}"
    assert "\x1b" not in out and max(map(len, out.splitlines())) <= 100
    for expected in (
        "workers=4",
        "0.001235",
        "1,000,000",
        "3.42 ms [3.31, 3.60]",
        "a note [not markup]",
        "a line",
        "ok      workers: 4 processes (in [1, 100] processes)",
        "3 claims, 0 failed",
    ):
        assert expected in out
    everything.run()
    assert capsys.readouterr().out == ""


def test_the_question_is_read_over_its_lines(script) -> None:
    assert script('@demo("4.4")\ndef main(run: Run) -> None: ...\n').run().question == "Does it work, on two lines?"


@pytest.mark.parametrize(
    ("rows", "columns"), [([(1, 2)], ["a"]), ([(1, 2)], None), ([], None), ([(1,), (1, 2)], ["a"])]
)
def test_a_table_that_does_not_fit_is_refused(script, rows: list, columns: list | None) -> None:
    main = script(f'@demo("4.4")\ndef main(run: Run) -> None:\n    run.table("t", {rows!r}, {columns!r})\n')
    with pytest.raises(TypeError, match="one value for each column"):
        main.run()


def test_plain_refuses_what_json_cannot_hold() -> None:
    for strange in (object(), {1, 2}, lambda: 0, b"x"):
        with pytest.raises(TypeError, match="cannot record"):
            plain(strange)


def test_comparison_lines_of_code_and_what_the_library_handles(script, capsys) -> None:
    main = script('''from shared.measure import Timing
def ours(x):
    """A docstring
    of two lines."""

    # a comment
    y = (x +
         1)
    return y
def theirs(x): return x
@demo("4.4", library="torch", handles=("rendezvous", "tags"))
def main(run: Run) -> None:
    run.compare("16 MiB", Timing((1.0, 2.0, 4.0)), Timing((2.0, 4.0, 8.0)))
    run.lines_of_code([ours], [theirs])
''')
    assert code_of(main) == 0
    out = capsys.readouterr().out
    assert "lines of code: 4 from scratch, 1 with torch" in out
    assert "torch also handles: rendezvous, tags" in out and "16 MiB" in out
    result = main.run()
    SCHEMA.validate(result.to_json())
    assert result.comparisons[0]["ratio"]["median"] == 2.0 and result.comparisons[0]["ours"]["samples"] == [
        1.0,
        2.0,
        4.0,
    ]
    assert result.comparisons[0]["library"]["text"] == str(Timing((2.0, 4.0, 8.0)))
    names = {side: [f"{main.function.__module__}:{name}"] for side, name in (("ours", "ours"), ("library", "theirs"))}
    assert result.lines_of_code == {"ours": 4, "library": 1, "of": names} and result.library == "torch"
    assert code_lines(main) == 4  # decorator, def and two statements


# Claims


@pytest.mark.parametrize(
    ("measured", "relation", "expected", "slack", "expectation"),
    [
        (2, "equals", 2, {}, True),
        (2, "equals", 2.0, {}, True),
        (2.0000001, "equals", 2, {}, False),
        (1.25, "equals", 1.0, dict(tolerance=0.25), True),
        (1.26, "equals", 1.0, dict(tolerance=0.25), False),
        (0.75, "equals", 1.0, dict(tolerance=0.25), True),
        (5.0, "equals", 4.0, dict(relative=0.25), True),
        (-5.0, "equals", -4.0, dict(relative=0.25), True),
        (5.01, "equals", 4.0, dict(relative=0.25), False),
        (2**60 + 1, "equals", 2**60, {}, False),
        (math.inf, "equals", math.inf, {}, True),
        (True, "equals", True, {}, True),
        ("ring", "equals", "ring", {}, True),
        ("ring", "equals", "tree", {}, False),
        ("1", "equals", 1, {}, False),
        ([1, 2], "equals", (1, 2), {}, True),
        ([1, 2], "equals", [2, 1], {}, False),
        ([1, 1], "equals", 1, {}, False),
        (np.ones(3), "equals", np.ones(3), {}, True),
        (np.ones(3), "equals", np.ones((3, 1)), dict(tolerance=1), False),
        (np.ones(3), "equals", [1, 1, 1.5], dict(tolerance=0.5), True),
        ([1, math.nan], "equals", [1, math.nan], {}, False),
        (["a", "b"], "equals", ["a", "b"], {}, True),
        (2, "at_least", 2, {}, True),
        (1.999, "at_least", 2, {}, False),
        (1.5, "at_least", 2, dict(tolerance=0.5), True),
        (1.49, "at_least", 2, dict(tolerance=0.5), False),
        (1.5, "at_least", 2, dict(relative=0.25), True),
        (2, "at_most", 2, {}, True),
        (2.001, "at_most", 2, {}, False),
        (2.5, "at_most", 2, dict(relative=0.25), True),
        (2, "above", 2, {}, False),
        (2.001, "above", 2, {}, True),
        (2**60, "above", 2**60 - 1, {}, True),
        (2, "below", 2, {}, False),
        (1.999, "below", 2, {}, True),
        (1, "between", (1, 2), {}, True),
        (2, "between", (1, 2), {}, True),
        (0.999, "between", (1, 2), {}, False),
        (2.001, "between", (1, 2), {}, False),
        (2.5, "between", (1, 2), dict(tolerance=0.5), True),
        (np.float32(2), "at_least", 2, {}, True),
        (np.array([2]), "at_least", 2, {}, True),
    ],
)
def test_relations_at_their_boundaries(measured, relation: str, expected, slack: dict, expectation: bool) -> None:
    assert holds(measured, relation, expected, **slack) is expectation


@pytest.mark.parametrize("relation", ["equals", "at_least", "at_most", "above", "below", "between"])
@pytest.mark.parametrize("slack", [{}, {"tolerance": 1e9}])
def test_nan_never_holds(relation: str, slack: dict) -> None:
    for nan in (math.nan, np.float32("nan")):
        assert not holds(nan, relation, (0, 1) if relation == "between" else 0, **slack)
    assert not holds(math.nan, relation, (math.nan, math.nan) if relation == "between" else math.nan, **slack)


def test_nan_and_infinity_are_named_in_the_record(script) -> None:
    main = script(
        '@demo("4.4")\ndef main(run: Run) -> None:\n    run.claim("x", measured=float("nan"), below=float("inf"))\n'
    )
    result = main.run()
    SCHEMA.validate(result.to_json())
    assert not result.ok and (result.claims[0]["measured"], result.claims[0]["expected"]) == ("nan", "inf")


@pytest.mark.parametrize("relations", ["", "equals=1, above=0", "about=1"])
def test_a_claim_takes_exactly_one_relation(script, relations: str) -> None:
    main = script(f'@demo("4.4")\ndef main(run: Run) -> None:\n    run.claim("x", measured=1, {relations})\n')
    with pytest.raises(TypeError, match="exactly one of"):
        main.run()


def test_a_claim_that_fails_beyond_the_digits_shown_shows_them() -> None:
    claim = {
        "text": "sum",
        "measured": 0.30000000000000004,
        "expected": 0.3,
        "relation": "equals",
        "tolerance": 0.0,
        "relative": 0.0,
        "unit": "",
    }
    assert describe(claim) == "sum: 0.30000000000000004 (= 0.3)"
    assert describe(claim | {"measured": 0.31, "tolerance": 0.1, "relative": 0.05}) == "sum: 0.31 (= 0.3 +- 0.1 +- 5 %)"


# Files


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch, broken: str, error) -> None:
    target = tmp_path / "a.json"
    write_atomically(target, b"old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises((ReaderError, KeyboardInterrupt)) as raised:
        write_atomically(target, b"new")
    if isinstance(error, OSError):
        assert str(raised.value) == f"cannot write {target}: No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and target.read_bytes() == b"old"


def test_a_full_disk_is_one_line_and_1(tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert code_of(everything, "--quiet", "--json", tmp_path / "a.json") == 1
    assert capsys.readouterr().err == f"error: cannot write {tmp_path}/a.json: No space left on device\n"
    assert not list(tmp_path.iterdir())


def test_files_are_readable_by_others_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "link", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"x"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640


def test_the_check_of_a_target_leaves_no_trace(tmp_path: Path) -> None:
    check_target(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="No such file or directory"):
        check_target(tmp_path / "gone" / "a.json")


def test_the_targets_are_checked_before_the_work(script, tmp_path: Path) -> None:
    main = script(f'@demo("4.4")\ndef main(run: Run) -> None:\n    open({str(tmp_path / "ran")!r}, "w")\n')
    assert code_of(main, "--json", tmp_path / "gone" / "a.json") == 2
    assert not (tmp_path / "ran").exists()


def test_the_figure_is_drawn_from_the_record(script, tmp_path: Path) -> None:
    main = script("""@demo("4.4")
def main(run: Run) -> None:
    run.record("x", [1, 2])
def draw(result, axes):
    assert type(result) is dict and result["records"] == {"x": [1, 2]} and result["ok"]
    axes.plot(result["records"]["x"])
""")
    assert code_of(main, "--quiet", "--plot", tmp_path / "a.svg", "--json", tmp_path / "a.json") == 0
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml") and (tmp_path / "a.json").exists()


# The package


def test_the_decorator_wins_over_the_module_of_the_same_name() -> None:
    code = (
        "import shared.demo, shared.cli; from shared import Run, demo; assert callable(demo) and Run.__name__ == 'Run'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_importing_shared_loads_nothing_heavy() -> None:
    code = "import sys, shared; print(*{'numpy', 'torch', 'matplotlib', 'rich', 'typer', 'yaml'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True).stdout
        == "\n"
    )
