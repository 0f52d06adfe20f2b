"""shared.engines against the real servers: they answer, listen on 127.0.0.1 only, and leave nothing behind.

What ends an engine (exit, an exception, a kill) is tested in processes of its own, so that this one keeps its session.
"""
from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shared import engines
from shared.errors import MissingDependency, ReaderError, UsageError

SERVICES = ["redis", "etcd"]
# Found, not imported: Ray must not be imported before ray_cluster() has chosen its interface.
needs_spark = pytest.mark.skipif(not importlib.util.find_spec("pyspark"),
                                 reason="needs pyspark: pip install -e '.[spark]'")
needs_java = pytest.mark.skipif(not shutil.which("java"), reason="needs Java: apt-get install openjdk-17-jre-headless")
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs ray: pip install -e '.[ray]'")
needs_setpriv = pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv: apt-get install util-linux")


def needs_server(name: str) -> None:
    binary = {"redis": "redis-server", "etcd": "etcd"}[name]
    if not shutil.which(binary):
        pytest.skip(f"needs {binary}: apt-get install {name}-server")


@pytest.fixture(scope="session")
def spark() -> object:
    session = engines.spark()
    session.sparkContext.parallelize(range(64), 8).map(lambda x: x).count()  # starts Python workers, which live on
    return session


@pytest.fixture(scope="session")
def ray() -> object:
    return engines.ray_cluster()


def ask(port: int, question: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(question)
        connection.settimeout(0.5)
        answer = b""
        try:
            while piece := connection.recv(4096):
                answer += piece
        except TimeoutError:
            pass
    return answer


def servers() -> list[psutil.Process]:
    """Redis and etcd processes of this one (the workers' server may be there, too)."""
    return [child for child in psutil.Process().children()
            if any(name in " ".join(child.cmdline()) for name in ("redis-server", "etcd"))]


def listening(process: psutil.Process) -> list[str]:
    """Addresses on which a process and its descendants accept connections."""
    family = [process, *process.children(recursive=True)]
    return [c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]


def script(body: str, folder: Path) -> subprocess.Popen:
    """Runs `body` in a process whose temporary files lie in `folder`; what it prints can be read line by line."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SPARK_"))}
    environment |= dict(TMPDIR=str(folder), PYTHONPATH=os.pathsep.join(sys.path), PYTHONUNBUFFERED="1")
    command = [sys.executable, "-c", "from shared import engines\n" + textwrap.dedent(body)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def all_gone(pids: list[int], within: float) -> bool:
    deadline = time.monotonic() + within
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's socket names leave no room for pytest's long paths."""
    with tempfile.TemporaryDirectory(prefix="t-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_serves_on_loopback_and_is_gone_afterwards(name, monkeypatch, tmp_path):
    needs_server(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with engines.service(name) as (host, port):
        (server,) = servers()
        assert host == "127.0.0.1" and set(listening(server)) == {"127.0.0.1"}
        assert 0 < engines.started_in[name] < engines.ANSWER_WITHIN
        assert list(tmp_path.iterdir())
        if name == "redis":
            assert ask(port, b"SET answer 42\r\nGET answer\r\n") == b"+OK\r\n$2\r\n42\r\n"
            assert b"redis_version" in ask(port, b"INFO\r\n")
        else:
            body = b'{"key": "Zm9v", "value": "YmFy"}'  # foo, bar
            header = b"POST /v3/kv/%s HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s"
            ask(port, header % (b"put", len(body), body))
            assert b'"value":"YmFy"' in ask(port, header % (b"range", 15, b'{"key": "Zm9v"}'))
    assert not psutil.pid_exists(server.pid)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError):
        ask(port, b"")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_ends_with_its_block_when_the_block_raises(name, monkeypatch, tmp_path):
    needs_server(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError), engines.service(name):
        (server,) = servers()
        _ = 1 / 0
    assert not psutil.pid_exists(server.pid) and not list(tmp_path.iterdir())


def test_services_side_by_side_are_separate():
    needs_server("redis")
    with engines.service("redis") as (_, first), engines.service("redis") as (_, second):
        ask(first, b"SET whose first\r\n")
        assert ask(second, b"GET whose\r\n") == b"$-1\r\n"


@needs_setpriv
@pytest.mark.parametrize("name", SERVICES)
def test_a_service_dies_with_a_killed_parent(name, tmp_path):
    needs_server(name)
    parent = script(f"""
        import psutil, time
        with engines.service({name!r}):
            print(*[child.pid for child in psutil.Process().children()])
            time.sleep(60)
        """, tmp_path)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 1 and psutil.pid_exists(pids[0])
    parent.kill()
    parent.communicate()
    assert all_gone(pids, within=2)


def test_a_service_in_a_thread_works_while_the_thread_lives():
    needs_server("redis")
    answers = []

    def serve() -> None:
        with engines.service("redis") as (_, port):
            answers.append(ask(port, b"PING\r\n"))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(30)
    assert answers == [b"+PONG\r\n"]


@pytest.mark.parametrize(("name", "line"), [("redis", "redis-server is not installed: apt-get install redis-server"),
                                            ("etcd", "etcd is not installed: apt-get install etcd-server")])
def test_an_absent_service_names_its_debian_package(name, line, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency) as caught, engines.service(name):
        pass
    assert str(caught.value) == line and caught.value.exit_code == 3


def test_a_service_that_cannot_start_says_why_and_leaves_nothing(monkeypatch, tmp_path):
    """The port is taken, by something that would even answer: another server must not be mistaken for ours."""
    needs_server("redis")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(engines, "_free_port", lambda: taken.getsockname()[1])
        with pytest.raises(ReaderError, match=r"redis did not answer on 127\.0\.0\.1:\d+: .*aborting"):
            with engines.service("redis"):
                pass
    assert not servers() and not list(tmp_path.iterdir())


def test_a_service_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(engines, "_server_command", lambda *_: ["sleep", "60"])
    monkeypatch.setattr(engines, "ANSWER_WITHIN", 0.2)
    with pytest.raises(ReaderError, match="did not answer on .*: it wrote nothing"), engines.service("redis"):
        pass


@pytest.mark.parametrize(("start", "line"),
                         [(engines.spark, r"pyspark is not installed: pip install -e '\.\[spark\]'"),
                          (engines.ray_cluster, r"ray is not installed: pip install -e '\.\[ray\]'")])
def test_an_absent_engine_names_its_extra(start, line, monkeypatch):
    monkeypatch.setattr(engines, "_engines", {})
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=line):
        start()


@pytest.mark.spark
@needs_spark
def test_absent_java_names_its_debian_package(monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "_engines", {})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(MissingDependency, match="Java is not installed: apt-get install openjdk"):
        engines.spark()


@pytest.mark.spark
@needs_spark
@needs_java
def test_spark_computes_with_this_interpreter(spark):
    assert engines.spark() is spark and engines.started_in["spark"] > 0
    versions = spark.sparkContext.parallelize(range(4), 2).map(lambda _: sys.executable).distinct().collect()
    assert versions == [sys.executable]
    rows = spark.range(1000).selectExpr("id % 3 as third", "id").groupBy("third").sum("id").collect()
    assert dict(map(tuple, rows)) == {third: sum(range(third, 1000, 3)) for third in range(3)}


@pytest.mark.spark
@needs_spark
@needs_java
def test_spark_listens_on_loopback_only(spark):
    addresses = listening(psutil.Process(spark.sparkContext._gateway.proc.pid))
    assert addresses and {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}


@pytest.mark.spark
@needs_spark
@needs_java
def test_one_spark_per_process(spark):
    with pytest.raises(UsageError, match="spark runs at this machine already"):
        engines.spark("spark://elsewhere:7077")


@pytest.mark.spark
@needs_spark
@needs_java
def test_spark_is_quiet_restarts_after_stop_and_leaves_nothing_at_exit(tmp_path):
    process = script("""
        import psutil
        def family():
            return [child.pid for child in psutil.Process().children(recursive=True)]
        engines.spark()
        print(*family())
        engines.stop()
        assert not family(), family()
        assert engines.spark().sparkContext.parallelize([1, 2]).sum() == 3
        print(*family())
        raise SystemExit(7)
        """, tmp_path)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 7 and errors == ""
    families = [[int(pid) for pid in line.split()] for line in output.splitlines()]
    assert len(families) == 2 and all(families)
    assert all_gone(sum(families, []), within=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.spark
@needs_spark
@needs_java
def test_spark_dies_with_a_killed_parent(tmp_path):
    parent = script("""
        import psutil, time
        assert engines.spark().sparkContext.parallelize([1, 2]).sum() == 3
        print(*[child.pid for child in psutil.Process().children(recursive=True)])
        time.sleep(100)
        """, tmp_path)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    assert pids and all_gone(pids, within=5)


@needs_spark
@needs_java
@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 1.0])
def test_an_interrupt_while_spark_starts_leaves_no_java(tmp_path, after):
    """pyspark knows of its JVM only once that has answered, and a JVM without its parent may not end by itself."""
    process = script("engines.spark()", tmp_path)
    try:
        deadline, parent = time.monotonic() + 20, psutil.Process(process.pid)
        while not (started := [child for child in parent.children(recursive=True) if child.name() == "java"]) and (
                time.monotonic() < deadline):
            time.sleep(0.01)
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
    finally:
        process.kill()
    left = [child for child in started if child.is_running() and child.status() != "zombie"]
    for child in left:
        child.kill()
    assert started and not left


@pytest.mark.spark
@needs_spark
@needs_java
def test_an_impossible_master_is_one_line(tmp_path):
    process = script("""
        from shared.errors import ReaderError
        try:
            engines.spark("abacus://room-12")
        except ReaderError as error:
            print(error)
        """, tmp_path)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == "" and len(output.splitlines()) == 1
    assert output.startswith("Spark did not start: ") and "Master must" in output


@pytest.mark.ray
@needs_ray
def test_ray_runs_tasks_and_actors_on_loopback_only(ray):
    assert engines.ray_cluster() is ray and engines.started_in["ray"] > 0

    @ray.remote
    def square(x: int) -> tuple[int, int]:
        return x * x, os.getpid()

    @ray.remote
    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def add(self, n: int) -> int:
            self.count += n
            return self.count

    squares, pids = zip(*ray.get([square.remote(i) for i in range(8)]), strict=True)
    assert squares == tuple(i * i for i in range(8)) and os.getpid() not in pids
    counters = [Counter.remote() for _ in range(4)]  # more actors than cores
    assert ray.get([counter.add.remote(i) for i, counter in enumerate(counters)]) == [0, 1, 2, 3]
    assert {address.removeprefix("::ffff:") for address in listening(psutil.Process())} <= {"127.0.0.1", "::1"}
    for counter in counters:
        ray.kill(counter)


@pytest.mark.ray
@needs_ray
def test_one_ray_per_process(ray):
    with pytest.raises(UsageError, match="ray runs at this machine already"):
        engines.ray_cluster("10.0.0.1:6379")


@pytest.mark.ray
@needs_ray
def test_ray_is_quiet_and_leaves_nothing_at_exit(short_folder):
    process = script("""
        import psutil
        ray = engines.ray_cluster()
        print(ray.get(ray.remote(lambda: 6 * 7).remote()))
        print(*[child.pid for child in psutil.Process().children(recursive=True)])
        """, short_folder)
    output, errors = process.communicate(timeout=100)
    answer, pids = output.splitlines()
    assert process.returncode == 0 and errors == "" and answer == "42"
    assert all_gone([int(pid) for pid in pids.split()], within=2)
    assert not list(short_folder.iterdir())


@pytest.mark.ray
@needs_ray
def test_ray_dies_with_a_killed_parent(short_folder):
    parent = script("""
        import psutil, time
        engines.ray_cluster()
        print(*[child.pid for child in psutil.Process().children(recursive=True)])
        time.sleep(100)
        """, short_folder)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert pids and all_gone(pids, within=2)
    assert not list(short_folder.iterdir())


@pytest.mark.ray
@needs_ray
def test_a_ray_that_would_listen_everywhere_is_refused(short_folder):
    process = script("""
        import ray
        try:
            engines.ray_cluster()
        except RuntimeError as error:
            print(error)
        """, short_folder)
    output, _ = process.communicate(timeout=60)
    assert "ray was imported before ray_cluster()" in output


@pytest.mark.ray
@needs_ray
def test_an_unreachable_ray_is_one_line(short_folder):
    process = script("""
        from shared.errors import ReaderError
        try:
            engines.ray_cluster("127.0.0.1:1")
        except ReaderError as error:
            print(error)
        """, short_folder)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert output.startswith("Ray at 127.0.0.1:1 did not start: ") and len(output.splitlines()) == 1
