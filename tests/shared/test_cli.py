"""The `scalable` command as a reader meets it: a process with arguments, exit code, stdout and stderr."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared import catalog

CHAPTER = "part1_foundations/ch04_communication_primitives"
# Runs the command on another repository: the one named by the first argument.
LAUNCHER = (
    "import sys; from pathlib import Path; from shared import catalog; catalog.ROOT = Path(sys.argv.pop(1));"
    "sys.path.insert(0, str(catalog.ROOT)); from shared.cli import main; main()"
)
HEADER = '"""Section.\n\nQuestion   Why?\n"""\nfrom shared import Run, demo\n'
GOOD = """
@demo("{section}", smoke=dict(workers=2), laptop=dict(workers=8))
def main(run: Run, workers: int = 4) -> None:
    run.claim("workers", measured=workers, above=0)
    print(f"{{__name__}} {{workers}}") if not run.quiet else None
"""
FALSE = """
@demo("{section}", smoke=dict())
def main(run: Run) -> None:
    run.claim("two is one", measured=2, equals=1)
"""
BROKEN = """
from shared.errors import WorkerFailed
@demo("{section}", smoke=dict())
def main(run: Run) -> None:
    raise WorkerFailed(2, "was killed by signal 9")
"""
MISSING = """
import no_such_library
@demo("{section}", smoke=dict(), needs=("no_such_library",))
def main(run: Run) -> None: ...
"""
BUG = """
@demo("{section}", smoke=dict())
def main(run: Run) -> None:
    1 / 0
"""
WAITING = """import os, time
@demo("{section}", smoke=dict())
def main(run: Run) -> None:
    try:
        print("waiting", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
"""
SHORTCUT = """from shared.measure import Timing
@demo("{section}", smoke=dict(), library="{library}", handles=("tags",))
def main(run: Run, rows: int = 3) -> None:
    run.compare("1 MiB", Timing((1.0, 1.0)), Timing(({seconds}, {seconds})))
    run.claim("the same answer", measured=1, equals={answer})
"""


class House:
    """A repository in a temporary folder, and the command run on it."""

    def __init__(self, root: Path) -> None:
        self.root, self.chapter = root, root / CHAPTER
        self.chapter.mkdir(parents=True)
        (root / "pyproject.toml").write_text('[project]\nname = "scalable-ai"\n')

    def add(self, name: str, source: str, **values: object) -> Path:
        path = self.chapter / f"{name}.py"
        path.write_text(HEADER + source.format(section=catalog.number(path), **values))
        return path

    def command(self, *argv: object) -> list[str]:
        return [sys.executable, "-c", LAUNCHER, str(self.root), *map(str, argv)]

    def run(self, *argv: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*argv), capture_output=True, text=True, timeout=60)

    def usage_error(self, *argv: object) -> str:
        done = self.run(*argv)
        assert (done.returncode, done.stdout) == (2, ""), done
        return one_line(done.stderr)

    def interrupt(self, with_signal: int, *argv: object) -> tuple[int, str, str]:
        """Start, wait until the script waits, send the signal: exit code, stdout, stderr."""
        with subprocess.Popen(
            self.command(*argv),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process:
            out = ""
            while "waiting" not in out:
                line = process.stdout.readline()
                assert line, process.stderr.read()
                out += line
            process.send_signal(with_signal)
            rest, error = process.communicate(timeout=20)
            return process.returncode, out + rest, error


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def one_line(text: str) -> str:
    assert text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n"), text
    return text.strip()


# list, help, doctor


@pytest.mark.timing
@pytest.mark.parametrize("argv", [["list"], ["--help"], ["list", "4.4"], ["run", "--help"]])
def test_list_and_help_start_quickly(argv: list[str]) -> None:
    """Processor time is asserted, not wall time: it is the same on an idle machine, and neighbours do not double it."""

    def seconds() -> tuple[float, float]:
        used, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-m", "shared.cli", *argv], check=True, stdout=subprocess.DEVNULL, timeout=60)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        return now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, time.perf_counter() - begin

    processor, wall = map(statistics.median, zip(*(seconds() for _ in range(3)), strict=True))
    print(f"scalable {' '.join(argv)}: {processor:.3f} s of processor, {wall:.3f} s of wall time")
    assert processor < 0.6


@pytest.mark.parametrize("argv", [["list"], ["--help"], ["run", "--help"]])
def test_list_and_help_import_nothing_heavy(argv: list[str]) -> None:
    heavy = {"numpy", "torch", "matplotlib", "scipy", "pandas"}
    code = (
        f"import sys; sys.argv[1:] = {argv}\ntry:\n    import shared.cli; shared.cli.main()\n"
        f"finally:\n    print({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()", done


def test_list_in_a_pipe_is_one_whole_line_a_section(house: House) -> None:
    house.add("s4_04_all_reduce", GOOD)
    house.add("s4_04_shortcut_torch_x", MISSING)
    house.add("s4_05_gather", GOOD)
    [header, *rows] = house.run("list", "4").stdout.splitlines()
    assert header.split() == ["section", "title", "demo", "shortcut", "needs", "state"] and len(rows) == 10
    cells = [re.split("  +", row) for row in rows]
    assert cells[3] == ["4.4", catalog.find("4.4")[0].title, "all_reduce", "torch_x", "no_such_library", "ready"]
    assert cells[4][2:] == ["gather", "-", "-", "demo only"] and cells[0][2:] == ["-", "-", "-", "planned"]
    assert len(house.run("list").stdout.splitlines()) == 1 + 366
    for address in ("ch04", "4"):
        assert house.run("list", address).stdout.splitlines() == [header, *rows]
    assert len(house.run("list", "4.10").stdout.splitlines()) == 2
    assert all(row.split()[0].split(".")[0] in "12345" for row in house.run("list", "part1").stdout.splitlines()[1:])


def test_list_and_verify_on_a_terminal(house: House) -> None:
    house.add("s4_04_all_reduce", GOOD)
    for argv, expected in ((["list", "4.4"], ["all_reduce", "demo", "only"]), (["verify"], ["4.4", "ok", "1 claims"])):
        parent, child = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
        with subprocess.Popen(house.command(*argv), stdout=child, stderr=subprocess.PIPE, env=environment) as process:
            os.close(child)
            text = b""
            try:
                while data := os.read(parent, 65536):
                    text += data
            except OSError:  # the other end is closed
                pass
            assert process.wait(30) == 0, process.stderr.read()
        os.close(parent)
        assert all(word in text.decode() for word in expected), text


def test_doctor_names_what_is_here_what_is_missing_and_the_remedy(house: House) -> None:
    (house.root / "pyproject.toml").write_text(
        '[project]\nname = "scalable-ai"\n[project.optional-dependencies]\n'
        'plain = ["numpy>=2"]\nodd = ["no_such_library>=1"]\n'
    )
    house.add("s4_04_shortcut_x", MISSING)
    done = house.run("doctor")
    lines = dict(re.split("  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert done.returncode == 0 and sys.executable in lines["python"]
    assert {
        "core",
        "cores",
        "memory",
        "gpu",
        "java",
        "redis-server",
        "etcd",
        "postgres",
        "nginx",
        "mpirun",
    } <= lines.keys()
    assert lines["extra plain"].startswith("numpy 2")
    assert lines["extra odd"] == ("missing no_such_library; unlocks 4.4: pip install -e '.[odd]' -c constraints.txt")
    for service in ("java", "redis-server", "nginx"):
        assert lines[service].startswith("/") or lines[service] == f"missing: apt-get install {catalog.DEBIAN[service]}"


def test_help_of_everything() -> None:
    for argv in (
        [],
        ["--help"],
        *([name, "--help"] for name in ("list", "run", "compare", "verify", "check", "doctor")),
    ):
        done = subprocess.run([sys.executable, "-m", "shared.cli", *argv], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout.startswith("Usage: scalable") and not done.stderr


def test_completion_offers_the_built_sections(house: House) -> None:
    house.add("s4_04_x", GOOD)
    environment = os.environ | {
        "_SCALABLE_COMPLETE": "complete_bash",
        "COMP_WORDS": "scalable run 4",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(house.command(), capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.split() == ["4.4"]


# Mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "4.44"], "no '4.44'; the nearest is 4.4"),
        (["list", "ch99"], "the nearest is"),
        (["verify", "9.99"], "the nearest is 9."),
        (["run", "4"], "run takes one section, such as 4.1"),
        (["run"], "Missing argument 'SECTION' (see: scalable run --help)"),
        (["run", "4.5"], "4.5 is planned, not built yet; ready near it: 4.4"),
        (["verify", "5"], "planned, not built yet; ready near it: 4.4"),
        (["compare", "5"], "planned, not built yet"),
        (["compare", "4.4"], "4.4 has no shortcut yet; scalable run 4.4"),
        (["run", "--workers", "8", "4.4"], "No such option"),
        (["dance"], "No such command 'dance'"),
        (["run", "4.4", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["run", "4.4", "--preset", "x"], "no preset 'x'"),
        (["run", "4.4", "--wrokers", "1"], "No such option"),
        (["check", "4"], "4 has no exercises to grade yet"),
    ],
)
def test_a_mistake_is_one_line_and_2(house: House, argv: list[str], message: str) -> None:
    house.add("s4_04_x", GOOD)
    assert message in house.usage_error(*argv)


def test_a_target_that_cannot_be_written_is_one_line_and_2(house: House) -> None:
    script = house.add("s4_04_x", GOOD)
    for target in (f"{script}/x.json", "/proc/x.json", "/dev/null", house.chapter, house.chapter / "gone" / "x.json"):
        assert f"cannot write {target}" in house.usage_error("run", "4.4", "--json", target)


def test_a_closed_pipe_is_silent_and_a_full_device_one_line(house: House) -> None:
    house.add("s4_04_x", GOOD)
    for argv in (["list"], ["run", "4.4"], ["verify"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(house.command(*argv), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, "")
        with open("/dev/full", "w") as full:
            done = subprocess.run(house.command(*argv), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        assert (done.returncode, one_line(done.stderr)) == (
            1,
            "error: cannot write the output: No space left on device",
        )


# run


def test_run_passes_options_on_and_writes_the_result(house: House, tmp_path: Path) -> None:
    script = house.add("s4_04_x", GOOD)
    done = house.run("run", "4.4", "--preset", "laptop", "--json", tmp_path / "a.json")
    name = f"{CHAPTER.replace('/', '.')}.s4_04_x"
    assert done.returncode == 0 and f"{name} 8\n" in done.stdout
    assert f"{name} 3\n" in house.run("run", "4.4", "--preset", "laptop", "--workers", "3").stdout
    recorded = json.loads((tmp_path / "a.json").read_text())
    assert recorded["script"] == script.relative_to(house.root).as_posix() and recorded["parameters"] == {"workers": 8}
    done = house.run("run", "4.4", "--workers", "8", "--help")
    assert (
        done.returncode == 0
        and "Usage: scalable run 4.4 [OPTIONS]" in done.stdout
        and "--workers INTEGER" in done.stdout
    )


def test_exit_codes_of_run(house: House) -> None:
    house.add("s4_01_a", FALSE)
    house.add("s4_02_a", BROKEN)
    house.add("s4_03_a", MISSING)
    failed = house.run("run", "4.1")
    assert failed.returncode == 1 and "FAILED  two is one: 2 (= 1)" in failed.stdout and not failed.stderr
    broken = house.run("run", "4.2")
    assert (broken.returncode, one_line(broken.stderr)) == (1, "error: worker 2 was killed by signal 9")
    missing = house.run("run", "4.3")  # checked before the import, which would fail
    assert (missing.returncode, missing.stdout) == (3, "") and "no_such_library is not installed" in one_line(
        missing.stderr
    )


@pytest.mark.parametrize(
    ("with_signal", "code", "said"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_a_stopped_run_cleans_up_and_leaves_no_file(house: House, with_signal: int, code: int, said: str) -> None:
    house.add("s4_04_x", WAITING)
    (house.root / "out").mkdir()
    left, out, error = house.interrupt(with_signal, "run", "4.4", "--json", house.root / "out" / "a.json")
    assert (left, error) == (code, said) and out.endswith("cleaned up\n")
    assert not list((house.root / "out").iterdir())


def test_a_script_runs_by_path_under_its_importable_name(house: House, tmp_path: Path) -> None:
    script = house.add("s4_04_by_path", GOOD)
    script.write_text(script.read_text() + '\nif __name__ == "__main__":\n    main.cli()\n')
    done = subprocess.run(
        [sys.executable, script, "--workers", "6"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0 and "s4_04_by_path 6\n" in done.stdout and "__main__" not in done.stdout
    bad = subprocess.run(
        [sys.executable, script, "--workers", "x"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert bad.returncode == 2 and "--workers" in one_line(bad.stderr)


# compare


def test_compare_of_one_shortcut_is_that_script(house: House, tmp_path: Path) -> None:
    house.add("s4_04_x", GOOD)
    house.add("s4_04_shortcut_fast", SHORTCUT, library="fast", seconds=0.5, answer=1)
    done = house.run("compare", "4.4", "--rows", "4", "--json", tmp_path / "a.json")
    assert done.returncode == 0 and "fast also handles: tags" in done.stdout
    assert json.loads((tmp_path / "a.json").read_text())["parameters"] == {"rows": 4}
    assert "Usage: scalable compare 4.4" in house.run("compare", "4.4", "--help").stdout


def test_compare_of_several_ends_with_one_table_and_a_file_each(house: House, tmp_path: Path) -> None:
    house.add("s4_04_shortcut_fast", SHORTCUT, library="fastlib", seconds=0.5, answer=1)
    house.add("s4_04_shortcut_slow", SHORTCUT, library="slowlib", seconds=3.0, answer=2)
    house.add("s4_05_shortcut_absent", MISSING)
    (tmp_path / "out").mkdir()
    done = house.run("compare", "ch04", "--json", tmp_path / "out" / "a.json")
    assert done.returncode == 1
    assert done.stderr.startswith("not run: s4_05_shortcut_absent.py: no_such_library is not installed")
    table = done.stdout[done.stdout.index("compare ch04") :]
    assert re.search(r"4\.4 +1 MiB +fastlib .*0\.50x .*yes\s", table) and re.search(
        r"4\.4 +1 MiB +slowlib .*3\.00x .*NO\s", table
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.fast.json", "a.slow.json"]
    assert "--rows must be at least 1" in one_line(house.run("compare", "4.4", "--rows", "0").stderr)


def test_compare_is_3_when_only_a_library_is_missing(house: House) -> None:
    house.add("s4_04_shortcut_fast", SHORTCUT, library="fastlib", seconds=0.5, answer=1)
    house.add("s4_05_shortcut_absent", MISSING)
    assert house.run("compare", "4").returncode == 3
    assert house.run("compare", "4.5").returncode == 3


# verify and check


def test_verify_goes_on_after_every_kind_of_failure(house: House) -> None:
    for name, source in (
        ("s4_01_a", GOOD),
        ("s4_02_a", FALSE),
        ("s4_03_a", BROKEN),
        ("s4_04_a", MISSING),
        ("s4_05_a", BUG),
    ):
        house.add(name, source)
    house.add("s4_06_shortcut_fast", SHORTCUT, library="fastlib", seconds=0.5, answer=1)
    done = house.run("verify", "4")
    progress = done.stdout[: done.stdout.index("failed claims")].splitlines()
    states = {line.split()[0]: line for line in progress if re.match(r"4\.\d ", line)}
    assert done.returncode == 1 and not done.stderr
    assert re.fullmatch(r"4\.1 +demo +ok +1 claims   \d+\.\d s", states["4.1"])
    assert re.fullmatch(r"4\.2 +demo +FAILED +1 claims   1 failed   \d+\.\d s", states["4.2"])
    assert re.fullmatch(r"4\.3 +demo +error +worker 2 was killed by signal 9", states["4.3"])
    assert re.fullmatch(r"4\.4 +demo +not run +no_such_library is not installed: .*", states["4.4"])
    assert "4.5" in states and "ZeroDivisionError" in done.stdout
    assert re.fullmatch(r"4\.6 +fast +ok +1 claims   \d+\.\d s", states["4.6"])
    assert (
        "failed claims" in done.stdout and "two is one: 2 (= 1)" in done.stdout and "the same answer" not in done.stdout
    )
    assert re.search(r"scripts: 2 ok, 1 FAILED, 2 error, 1 not run; claims: 3; \d+\.\d s\n$", done.stdout)
    assert "the same answer: 1 (= 1)" in house.run("verify", "4", "--verbose").stdout


def test_exit_codes_of_verify(house: House) -> None:
    house.add("s4_01_a", GOOD)
    assert house.run("verify").returncode == 0
    house.add("s4_02_a", MISSING)
    assert house.run("verify").returncode == 3
    assert house.run("verify", "4.1").returncode == 0
    house.add("s4_03_a", FALSE)
    assert house.run("verify").returncode == 1


def test_an_interrupted_verify_says_what_was_done(house: House) -> None:
    house.add("s4_01_a", GOOD)
    house.add("s4_02_a", GOOD)
    house.add("s4_03_a", WAITING)
    left, out, error = house.interrupt(signal.SIGINT, "verify", "4")
    assert (left, error) == (130, "interrupted in 4.3 demo; done: 4.1, 4.2\n") and "cleaned up" in out


@pytest.mark.parametrize(
    ("argv", "code", "tally"),
    [(["check", "4"], 1, "1 of 2 pass"), (["check", "ch04", "--solutions"], 0, "2 of 2 pass")],
)
def test_check_grades_exercises_and_solutions(house: House, argv: list[str], code: int, tally: str) -> None:
    (house.chapter / "grading.py").write_text(
        "from collections import namedtuple\nGrade = namedtuple('Grade', 'name passed message')\n"
        "def grade(answers):\n"
        "    return [Grade('first', answers.value == 1, 'value is 1'), Grade('second', True, '')]\n"
    )
    (house.chapter / "exercises.py").write_text("value = 0\n")
    (house.chapter / "solutions.py").write_text("value = 1\n")
    done = house.run(*argv)
    assert done.returncode == code and done.stdout.endswith(f"{tally}\n") and ("FAILED" in done.stdout) is (code == 1)


# book


def test_book_without_its_libraries_names_the_extra_and_otherwise_runs_the_generator(monkeypatch) -> None:
    from shared import cli
    from shared.errors import MissingDependency

    asked = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command: asked.append(command) or 7)
    monkeypatch.setattr(catalog, "missing", lambda needs: [MissingDependency(next(iter(needs)), extra="book")])
    with pytest.raises(MissingDependency, match=r"\[book\]"):
        cli.book()
    monkeypatch.setattr(catalog, "missing", lambda needs: [])
    assert cli.book() == 7 and cli.book(fresh=True) == 7
    assert [command[2:] for command in asked] == [[], ["--fresh"]]
    assert all(command[:2] == [sys.executable, str(catalog.ROOT / "book" / "build.py")] for command in asked)
