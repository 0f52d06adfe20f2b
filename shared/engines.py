"""Spark, Ray, Redis and etcd, each started where a user would have one: quiet, on 127.0.0.1, gone with this process.

    spark = engines.spark()                          # a SparkSession
    ray = engines.ray_cluster()                      # the module `ray`, initialised
    with engines.service("redis") as (host, port):   # a server of its own on a free port, in a temporary folder

Spark and Ray start once in a process, every later call gets the same one, and exit or `stop()` ends them. The seconds
that each took are in `started_in`, to be printed beside a measurement, never inside it.
"""
from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import psutil

from shared.errors import MissingDependency, ReaderError, UsageError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ANSWER_WITHIN = 20.0  # seconds a server may take until it answers
_ASK = {"redis": (b"PING\r\n", b"+PONG"), "etcd": (b"GET /health HTTP/1.0\r\n\r\n", b'"health":"true"')}
started_in: dict[str, float] = {}  # seconds that each engine took to start, by name: "spark", "ray", "redis", "etcd"
_engines: dict[str, tuple[str | None, object]] = {}  # name -> (master or address asked for, engine)
_running = ExitStack()
stop = atexit.register(_running.close)  # stop(): end Spark and Ray now; their processes and folders are gone on return
_DIE_WITH_US = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []


def spark(master: str | None = None) -> SparkSession:
    """The Spark session of this process: local on all cores, or on `master`, such as "spark://host:7077".

    Local mode binds to 127.0.0.1 and keeps its files, also what the JVM prints, in a folder that goes with the session.
    """
    return _once("spark", "pyspark", master, _start_spark)


def ray_cluster(address: str | None = None) -> ModuleType:
    """The initialised module `ray`: a local instance bound to 127.0.0.1, or connected to `address`, such as "auto".

    Take `ray` from here, inside a function: imported earlier, Ray would listen on all network interfaces.
    """
    return _once("ray", "ray", address, _start_ray)


def _once(name: str, module: str, where: str | None, start: Callable[[str | None], object]) -> object:
    if not importlib.util.find_spec(module):
        raise MissingDependency(module, extra=name)
    if name not in _engines:
        begin = time.perf_counter()
        _engines[name] = where, start(where)
        started_in[name] = time.perf_counter() - begin
        _running.callback(_engines.pop, name)
    if _engines[name][0] != where:
        raise UsageError(f"{name} runs at {_engines[name][0] or 'this machine'} already: one per process")
    return _engines[name][1]


def _start_spark(master: str | None) -> SparkSession:
    if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        raise MissingDependency("Java", debian="openjdk-17-jre-headless")
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    from pyspark.sql import SparkSession

    folder = _running.enter_context(tempfile.TemporaryDirectory(prefix="spark-"))
    options = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.shuffle.partitions": "4",
        "spark.sql.warehouse.dir": f"{folder}/warehouse",
        "spark.driver.memory": "1g",
        # One user's short session: cheap collector and compiler start sooner. No file in /tmp outside the folder.
        "spark.driver.extraJavaOptions": "-XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData "
        f"-Djava.io.tmpdir={folder} -Dderby.system.home={folder}",
    }
    if master is None:
        os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    builder = SparkSession.builder.master(master or "local[*]").config(map=options)
    before = set(psutil.Process().children(recursive=True))
    try:
        with _stderr_into(log := Path(folder, "jvm.log")):
            session = builder.getOrCreate()
    except Exception as error:
        raise ReaderError(f"Spark did not start: {_complaint(log, error)}") from error
    except BaseException:  # Ctrl-C: pyspark has lost sight of a half started JVM, which need not end by itself
        for child in set(psutil.Process().children(recursive=True)) - before:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        raise
    _running.callback(_stop_spark, session)
    return session


@contextmanager
def _stderr_into(log: Path) -> Iterator[None]:
    """What starts meanwhile complains to `log`, for good: the JVM prints three lines that no setting silences."""
    sys.stderr.flush()
    kept = os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _stop_spark(session: SparkSession) -> None:
    context = type(session.sparkContext)
    session.stop()
    gateway, context._gateway, context._jvm = context._gateway, None, None
    gateway.shutdown()
    gateway.proc.kill()  # were this process killed instead, the JVM would end with its standard input
    gateway.proc.wait()


def _start_ray(address: str | None) -> ModuleType:
    options: dict[str, object] = {"address": address}
    if address is None:
        loopback = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0" binds to 127.0.0.1; read when ray is imported
        if "ray" in sys.modules and os.environ.get(loopback) != "0":
            raise RuntimeError("ray was imported before ray_cluster() could bind it to 127.0.0.1: take ray from there")
        os.environ |= {loopback: "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled",
                       "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        folder, guard = tempfile.mkdtemp(prefix="ray-"), Path(__file__).with_name("ray_guard.py")
        _running.callback(subprocess.Popen([sys.executable, "-I", guard, folder], stdin=subprocess.PIPE,
                                           start_new_session=True).communicate)
        options = {"address": "local", "include_dashboard": False, "_temp_dir": folder, "object_store_memory": 1 << 28,
                   "num_cpus": max(2, os.cpu_count() or 1)}
    import ray

    try:
        if address and address.count(":") == 1:  # host:port; Ray itself notices after 80 s that nobody is there
            socket.create_connection(address.split(":"), timeout=5).close()
        ray.init(log_to_driver=False, logging_level="error", **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ReaderError(f"Ray at {address or 'this machine'} did not start: {error}".splitlines()[0]) from error
    _running.callback(ray.shutdown)  # never `ray stop`: it ends every Ray on the machine
    return ray


def _server_command(name: str, folder: str, port: int) -> list[str]:
    if name == "redis":
        return ["redis-server", *f"--bind 127.0.0.1 --port {port} --dir {folder} --appendonly no --save".split(), ""]
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{_free_port()}"
    return (f"etcd --data-dir {folder}/data --listen-client-urls {client} --advertise-client-urls {client} "
            f"--listen-peer-urls {peer} --initial-advertise-peer-urls {peer} --initial-cluster default={peer} "
            "--logger zap --log-level error").split()


@contextmanager
def service(name: str) -> Iterator[tuple[str, int]]:
    """A fresh Redis or etcd ("redis", "etcd"): (host, port), stopped and its folder removed when the block ends.

    Linux also kills the server when the thread that entered the block dies: a killed demo leaves no server behind.
    """
    question, begin, port = _ASK[name], time.perf_counter(), _free_port()
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        command = _server_command(name, folder, port)
        if not shutil.which(command[0]):
            raise MissingDependency(command[0], debian=f"{name}-server")
        with (log := Path(folder, "log")).open("wb") as output:
            process = subprocess.Popen(_DIE_WITH_US + command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            if not _answers(process, port, *question):
                raise ReaderError(f"{name} did not answer on 127.0.0.1:{port}: {_complaint(log, 'it wrote nothing')}")
            started_in[name] = time.perf_counter() - begin
            yield "127.0.0.1", port
        finally:
            process.kill()  # no need to ask: its data go with its folder
            process.wait()


def _answers(process: subprocess.Popen, port: int, question: bytes, answer: bytes) -> bool:
    """Asks until a line with `answer` comes back (True), the process has ended or ANSWER_WITHIN has passed (False)."""
    deadline = time.monotonic() + ANSWER_WITHIN
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(question)
            if any(answer in line for line in connection.makefile("rb")):
                return process.poll() is None
        time.sleep(0.01)
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _complaint(log: Path, otherwise: object) -> str:
    """The line that names the error or else the last one; `otherwise` stands in for an empty log."""
    lines = log.read_text(errors="replace").strip().splitlines() or str(otherwise).splitlines()
    return next((line for line in lines if "Error" in line or "Exception" in line), lines[-1]).strip()
