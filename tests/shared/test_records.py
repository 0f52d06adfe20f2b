"""Recorded results: what makes one stale, that only a clean run is recorded, and what a reader sees beside it."""
from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from pathlib import Path

import jsonschema
import psutil
import pytest

from shared import catalog, records
from shared.result import holds
from tests.shared.test_cli import CHAPTER, House, one_line

SCHEMA = json.loads((catalog.ROOT / "shared" / "result.schema.json").read_text())
TAIL = """
if __name__ == "__main__":
    main.cli()
"""
DEMO = """
@demo("{section}", smoke=dict(workers=2), laptop=dict(workers=8))
def main(run: Run, workers: int = 4, points: int = 3) -> None:
    run.table("squares", [(i, (i * workers) ** 2) for i in range(points)], ["i", "square"])
    run.claim("workers", measured=workers, above=0)
"""
SHORTCUT = """from shared.measure import Timing
@demo("{section}", smoke=dict(), laptop=dict(rows=5), library="{library}", handles=("tags",))
def main(run: Run, rows: int = 3) -> None:
    run.compare("1 MiB", Timing((1.0, 1.0)), Timing((2.0, 2.0)))
    run.claim("the same answer", measured=1, equals={answer})
"""
SLOW = """import os, time
from shared.fleet import launch
def nap(net) -> None:
    time.sleep(60)
@demo("{section}", laptop=dict())
def main(run: Run) -> None:
    launch(2, nap)
"""


class Scripts(House):
    """Whose scripts also run by their path."""

    def add(self, name: str, source: str, **values: object) -> Path:
        return super().add(name, source + TAIL, **values)


@pytest.fixture
def house(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


@pytest.fixture
def here(house: House, monkeypatch: pytest.MonkeyPatch) -> House:
    """The same repository for functions called in this process."""
    monkeypatch.setattr(catalog, "ROOT", house.root)
    return house


def kept(house: House, section: str = "4.4") -> Path:
    return house.root / "book" / "records" / f"ch{int(section.split('.')[0]):02d}" / f"{section}.json"


# What a hash covers


CODE = '''"""Module."""
import os  # why


class A:
    """What it is."""

    x = "a # b"

    def f(self):
        """Says so.

        At length.
        """
        return """
# kept
"""
'''


@pytest.mark.parametrize("edit", [
    ("import os  # why", "import os"), ("import os  # why", "import os  # another\n# line"), ('"""Module."""\n', ""),
    ('    """What it is."""\n', '    """It is\n    another thing."""\n'), ("\n\n\nclass", "\nclass"),
    ("        At length.\n", ""), ('        """Says so.', '        # first\n        """Says so.'),
    ("import os  # why", "import os   "),
])
def test_words_about_the_code_do_not_count(edit: tuple[str, str]) -> None:
    changed = CODE.replace(*edit)
    assert changed != CODE and records.code_hash(changed) == records.code_hash(CODE)


@pytest.mark.parametrize("edit", [
    ("import os", "import sys"), ('"a # b"', '"a # c"'), ("# kept", "# changed"), ("# kept\n", ""),
    ("def f", "def g"), ('    x = "a', '    "no docstring"\n    x = "a'), ('x = "a', 'y = "a'),
    ("class A:", "class A(object):"),
])
def test_everything_else_counts(edit: tuple[str, str]) -> None:
    changed = CODE.replace(*edit)
    assert changed != CODE and records.code_hash(changed) != records.code_hash(CODE)


def test_what_a_script_imports_counts_however_far_away(here: House) -> None:
    package = CHAPTER.replace("/", ".")
    script = here.add("s4_04_x", f"from {package} import near\n" + DEMO)
    (here.chapter / "near.py").write_text(f"def f():\n    from {package}.far import g\n    return g\n")
    (here.chapter / "far.py").write_text("import json\ndef g(): return 1\n")
    (here.chapter / "other.py").write_text("x = 1\n")
    assert [Path(name).name for name in records.sources(script)] == ["far.py", "near.py", "s4_04_x.py"]
    before = records.sources(script)
    (here.chapter / "far.py").write_text("import json\ndef g(): return 2\n")
    (here.chapter / "other.py").write_text("x = 2\n")
    after = records.sources(script)
    assert {name for name in before if before[name] != after[name]} == {f"{CHAPTER}/far.py"}


# scalable record


def test_record_and_check(house: House) -> None:
    house.add("s4_04_x", DEMO)
    house.add("s4_04_shortcut_numpy", SHORTCUT, library="numpy", answer=1)
    missing = house.run("record", "--check")
    assert (missing.returncode, missing.stdout) == (1, "4.4: no record\n")
    done = house.run("record", "4.4")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("1 claims") == 2
    record = json.loads(kept(house).read_text())
    demo, shortcut = (entry["result"] for entry in record["scripts"])
    for result in (demo, shortcut):
        jsonschema.validate(result, SCHEMA)
        assert result["preset"] == "laptop" and result["ok"]
    assert demo["parameters"] == {"workers": 8, "points": 3} and demo["tables"][0]["rows"][2] == [2, 256]
    assert shortcut["library"] == "numpy" and shortcut["comparisons"][0]["ratio"]["median"] == 2.0
    assert house.run("record", "--check").stdout == "1 sections, every record is current\n"
    assert house.run("record").stdout == "every record is current; name a section to record it anew\n"
    assert house.run("record", "--check", "4.5").returncode == 0  # planned: nothing to record


def test_check_names_what_is_wrong_and_record_mends_that_alone(house: House) -> None:
    for name in ("s4_03_w", "s4_04_x", "s4_05_y"):
        house.add(name, DEMO)
    assert house.run("record", "4.3", "4.4", "4.5").returncode == 0
    before = kept(house, "4.3").stat().st_mtime_ns
    house.add("s4_04_x", DEMO.replace("above=0", "above=1"))
    record = json.loads(kept(house, "4.5").read_text())
    record["scripts"][0]["result"]["ok"] = False
    record["scripts"].append({"sources": {}, "result": record["scripts"][0]["result"] | {"script": "s4_05_gone.py"}})
    kept(house, "4.5").write_text(json.dumps(record))
    house.add("s4_06_z", DEMO)
    orphan = kept(house, "9.9")
    orphan.parent.mkdir()
    orphan.write_text('{"section": "9.9", "scripts": []}')
    done = house.run("record", "--check")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"4.4: stale record of s4_04_x.py: changed since: {CHAPTER}/s4_04_x.py",
        "4.5: a recorded claim of s4_05_y.py failed", "4.5: a record of s4_05_gone.py, which is gone",
        "4.6: no record", "book/records/ch09/9.9.json: the book has no such section"]
    again = house.run("record")
    assert [line.split()[0] for line in again.stdout.splitlines()] == ["4.4", "4.5", "4.6"]
    assert kept(house, "4.3").stat().st_mtime_ns == before
    orphan.unlink()
    assert house.run("record", "--check").returncode == 0


@pytest.mark.parametrize(("source", "code", "line"), [
    (DEMO.replace("above=0", "above=10"), 1,
     "error: s4_04_x.py left with 1, not recorded: claim failed: workers: 8 (> 10)"),
    (DEMO + "    raise OSError('bug')\n", 1, "error: s4_04_x.py left with 1, not recorded: OSError: bug"),
    ("import no_such\n" + DEMO.replace("laptop=", "needs=('no_such',), laptop="), 3, "error: no_such is not installed"),
    (DEMO + "    open(__file__, 'a').write('x = 1\\n')\n", 1, "error: s4_04_x.py or a module of its chapter changed"),
    (DEMO.replace("laptop=dict(workers=8)", "cluster=dict()"), 1, "error: s4_04_x.py left with 2, not recorded: error"),
    (DEMO + "if __name__ == '__main__': raise SystemExit\n", 1, "error: s4_04_x.py reported nothing, not recorded"),
], ids=["claim", "crash", "missing library", "edited while it ran", "no laptop preset", "no command line"])
def test_what_went_wrong_is_not_recorded(house: House, source: str, code: int, line: str) -> None:
    house.add("s4_04_x", DEMO)
    assert house.run("record", "4.4").returncode == 0
    before = kept(house).read_bytes()
    house.add("s4_04_x", source)
    done = house.run("record", "4.4")
    assert done.returncode == code and one_line(done.stderr).startswith(line), done
    assert kept(house).read_bytes() == before


def test_one_failure_does_not_stop_the_others(house: House) -> None:
    house.add("s4_04_x", DEMO.replace("above=0", "above=10"))
    house.add("s4_05_y", DEMO)
    done = house.run("record", "4")
    assert done.returncode == 1 and not kept(house, "4.4").exists() and kept(house, "4.5").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"section": "4.4", "scripts": 1}'])
def test_a_damaged_record_is_one_clear_line(house: House, content: str) -> None:
    house.add("s4_04_x", DEMO)
    kept(house).parent.mkdir(parents=True)
    kept(house).write_text(content)
    for argv in (["record", "--check"], ["run", "4.4", "--against-record"]):
        done = house.run(*argv)
        assert done.returncode == 1 and "is no record" in one_line(done.stderr)


def test_a_wrong_address_and_a_planned_section(house: House) -> None:
    assert "99.9" in house.usage_error("record", "99.9")
    assert "planned" in house.usage_error("record", "4.4")
    assert "99.9" in house.usage_error("record", "--check", "99.9")


@pytest.mark.parametrize(("with_signal", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_recording_can_be_stopped(house: House, with_signal: int, code: int) -> None:
    """The signal goes to the parent alone; the script, its workers and the temporary folder are gone within seconds."""
    import subprocess

    house.add("s4_04_x", SLOW)
    folders = set(Path(tempfile.gettempdir()).glob("scalable-record-*"))
    with subprocess.Popen(house.command("record", "4.4"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as process:
        me, deadline = psutil.Process(process.pid), time.monotonic() + 30
        while len(me.children(recursive=True)) < 4 and time.monotonic() < deadline:  # script, server, two workers
            time.sleep(0.05)
        time.sleep(0.3)
        running = me.children(recursive=True)
        os.kill(process.pid, with_signal)
        begin = time.monotonic()
        _, error = process.communicate(timeout=20)
    assert len(running) >= 4 and process.returncode == code, error
    assert time.monotonic() - begin < 6
    _, alive = psutil.wait_procs(running, timeout=3)
    assert not alive and not kept(house).exists()
    assert set(Path(tempfile.gettempdir()).glob("scalable-record-*")) <= folders


# --against-record


@pytest.fixture
def recorded(house: House) -> House:
    house.add("s4_04_x", DEMO)
    house.add("s4_04_shortcut_numpy", SHORTCUT, library="numpy", answer=1)
    assert house.run("record", "4.4").returncode == 0
    record = json.loads(kept(house).read_text())
    demo, shortcut = (entry["result"] for entry in record["scripts"])
    demo["tables"][0]["rows"][1][1], demo["claims"][0]["measured"] = 4711, 815
    demo["date"] = "2020-02-02T00:00:00+00:00"
    shortcut["comparisons"][0]["ratio"]["text"] = "7.77 [7, 8]"
    kept(house).write_text(json.dumps(record))
    return house


def test_against_record_uses_its_parameters_and_shows_both(recorded: House) -> None:
    done = recorded.run("run", "4.4", "--against-record", "--json", recorded.root / "mine.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((recorded.root / "mine.json").read_text())["parameters"] == {"workers": 8, "points": 3}
    after = done.stdout.partition("recorded on 2020-02-02")[2]
    rows = [line.split() for line in after.splitlines()]
    assert ["here", "1", "64"] in rows and ["recorded", "1", "4711"] in rows and ["0", "0"] in rows
    assert ["workers", "8", "815", "ok"] in rows and "parameters that differ" not in after


def test_against_record_names_what_the_reader_changed(recorded: House) -> None:
    done = recorded.run("run", "4.4", "--against-record", "--workers", "2")
    assert "parameters that differ: workers=2 (recorded 8)" in done.stdout
    smoke = recorded.run("run", "4.4", "--against-record", "--preset", "smoke", "--points", "2")
    assert "workers=2 (recorded 8), points=2 (recorded 3)" in smoke.stdout
    assert "recorded  1" not in smoke.stdout  # tables of another shape are not paired


def test_against_record_of_a_shortcut(recorded: House) -> None:
    done = recorded.run("compare", "4.4", "--against-record")
    assert done.returncode == 0 and "7.77 [7, 8]" in done.stdout and "1 MiB: here" in done.stdout


def test_against_record_is_quiet_when_told_to_be(recorded: House) -> None:
    done = recorded.run("run", "4.4", "--against-record", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_a_record_it_says_so(house: House) -> None:
    house.add("s4_04_x", DEMO)
    assert house.usage_error("run", "4.4", "--against-record") == (
        "error: s4_04_x.py has no recorded result yet: scalable record 4.4")


# differs, errata, lines of code


@pytest.mark.parametrize(("measured", "expected", "slack", "expectation"), [
    (1, 2, {}, True), (2, 2, {}, False), ([1, 2], [1, 3], {}, True), ([1, 2], [1, 2], {}, False),
    ([1], [1, 1], {}, True),
    (100.0, 101.0, {"relative": 0.02}, False), (100.0, 101.0, {"relative": 0.001}, True),
    (float("nan"), 1.0, {}, False), ([1.0, float("nan")], [1.0, 2.0], {}, False), ("a", "b", {}, True),
])
def test_differs(measured, expected, slack, expectation) -> None:
    assert holds(measured, "differs", expected, **slack) is expectation


def test_an_erratum_stands_only_while_the_printed_figure_cannot_be_had(here: House, capsys) -> None:
    source = """
@demo("{section}", smoke=dict(), laptop=dict())
def main(run: Run, ticks: int = 10300) -> None:
    run.erratum("total ticks", printed=10235, computed=ticks, why="Its code gives another.", relative=0.001)
"""
    demo = catalog.load(here.add("s4_07_of_test_records", source)).main
    result = demo.run()
    jsonschema.validate(result.to_json(), SCHEMA)
    assert result.ok and result.errata == [{"what": "total ticks", "printed": 10235, "computed": 10300,
                                            "why": "Its code gives another."}]
    assert not demo.run(ticks=10235).ok


# The records of this repository


@pytest.mark.parametrize("section", [s for s in catalog.sections() if s.scripts], ids=lambda section: section.number)
def test_every_built_section_has_a_current_record(section: catalog.Section) -> None:
    assert records.problems(section) == []
    for script in section.scripts:
        result = records.recorded(script)
        jsonschema.validate(result, SCHEMA)
        assert result["ok"] and result["preset"] == "laptop" and result["tables"] and result["claims"]
        assert result["parameters"] | catalog.declaration(script).presets["laptop"] == result["parameters"]


def test_no_record_is_orphaned() -> None:
    assert records.orphans() == []
