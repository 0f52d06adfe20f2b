"""The same fleet under mpirun: `launch(K, fn)` runs `fn(net, *args)` in K MPI processes.

`net` is our Transport over shared memory between the same ranks, so that MPI (`mpi4py.MPI.COMM_WORLD`) and our own code
can be timed in turns. mpirun runs in a session of its own, out of reach of Ctrl-C, and is ended with this process,
however that ends. Arguments and results travel as JSON files in a folder that goes with the run.
"""
from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shared import transport as wires
from shared.catalog import ROOT, executable, missing
from shared.elastic import decode, encode
from shared.errors import WorkerFailed
from shared.fleet import ONE_THREAD, SharedMemory, check_workers
from shared.measure import note_fleet_memory
from shared.transport import Transport

NEEDS = ("mpi4py", "exe:mpirun")
QUIET = ONE_THREAD | {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_plm": "isolated", "OMPI_MCA_oob_tcp_if_include": "lo",  # this machine only
    "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,vader", "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",  # its ranks poll; without this they are 100 times slower on a busy machine
    "OMPI_MCA_orte_abort_print_stack": "0", "OMPI_MCA_odls_base_sigkill_timeout": "0",
}
FOLDERS = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # MPI's shared memory goes into the folder, too
DIE_WITH_US = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


def launch(workers: int, fn: Callable, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run `fn(net, *args)` in `workers` MPI processes; results by rank. `fn` lives at the top level of a module.

    Raises: MissingDependency; UsageError for a worker count this machine cannot hold; WorkerFailed when a rank raises
    or dies, or when the run outlasts `timeout` seconds.
    """
    if absent := missing(NEEDS):
        raise absent[0]
    check_workers(workers)
    with tempfile.TemporaryDirectory(prefix="mpi-", dir=FOLDERS, ignore_cleanup_errors=True) as folder:
        Path(folder, "job").write_bytes(encode((fn.__module__, fn.__qualname__, args)))
        places = {"OMPI_MCA_orte_tmpdir_base": folder, "OMPI_MCA_btl_vader_backing_directory": folder}
        command = [*DIE_WITH_US, executable("mpirun"), "-n", str(workers), sys.executable, "-m", __name__, folder]
        with open(f"{folder}/log", "wb") as log, _swept(folder):
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | QUIET | places, stdin=subprocess.DEVNULL,
                                       stdout=log, stderr=log, start_new_session=True)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise WorkerFailed(0, f"and the rest of mpirun were still running after {timeout:g} s") from None
            finally:
                _end(process)
        return _results(Path(folder), workers)


@contextlib.contextmanager
def _swept(folder: str) -> Iterator[None]:
    """Should this process be killed, a shell notices the end of its input and removes what mpirun could not."""
    sweep = ["sh", "-c", 'read _; sleep 1; rm -rf "$0"', folder]
    with subprocess.Popen(sweep, stdin=subprocess.PIPE, start_new_session=True) as sweeper:
        try:
            yield
        finally:
            sweeper.kill()


def _end(process: subprocess.Popen) -> None:
    """Ask mpirun to end its ranks and clean up; after a second the kernel ends all of them."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()  # each rank asked to be killed with it
        process.wait()


def _results(folder: Path, workers: int) -> list[Any]:
    for path in sorted(folder.glob("error.*")):
        text = path.read_text()
        raise WorkerFailed(int(path.suffix[1:]), f"raised {text.splitlines()[-1]}", text)
    outcomes = []
    for rank in range(workers):
        path = folder / f"result.{rank}"
        if not path.exists():
            log = (folder / "log").read_text(errors="replace").splitlines()
            why = next((line for line in log if "exited on signal" in line), "mpirun ended early")
            raise WorkerFailed(rank, f"gave no result: {why}")
        outcomes.append(decode(path.read_bytes()))
    note_fleet_memory(sum(peak for _, peak in outcomes))
    return [value for value, _ in outcomes]


# --- inside a rank ----------------------------------------------------------------------------------------------------


def _rank(folder: Path) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with mpirun
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    try:
        module, name, args = decode((folder / "job").read_bytes())
        value = getattr(importlib.import_module(module), name)(transport(comm, folder), *args)
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        (folder / f"result.{comm.rank}").write_bytes(encode((value, peak)))
        comm.Barrier()  # keep the connections open until everyone has what was sent on them
    except BaseException:
        (folder / f"error.{comm.rank}").write_text(traceback.format_exc())
        comm.Abort(1)


def transport(comm, folder: Path) -> Transport:
    """A Transport over shared memory between the ranks of `comm`, which meet at sockets in `folder`."""
    others = [peer for peer in range(comm.size) if peer != comm.rank]
    outgoing = {peer: socket.socket(socket.AF_UNIX) for peer in others}
    incoming: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/{comm.rank}.sock")
        listener.listen(comm.size)
        comm.Barrier()
        for peer, sock in outgoing.items():
            sock.connect(f"{folder}/{peer}.sock")
            sock.sendall(bytes([comm.rank]))
        for _ in others:
            sock, _ = listener.accept()
            incoming[sock.recv(1)[0]] = sock
    shape = (comm.size, comm.size, wires.SLOTS, wires.SLOT)
    nbytes = comm.size**2 * wires.SLOTS * wires.SLOT
    if comm.rank == 0:
        memory = SharedMemory(nbytes)
        for sock in outgoing.values():
            socket.send_fds(sock, [b"\0"], [memory.fd])
    else:
        memory = SharedMemory(nbytes, socket.recv_fds(incoming[0], 1, 1)[1][0])
    slots = memory.array(shape, "uint8")
    comm.Barrier()
    return Transport(comm.rank, comm.size, {peer: (outgoing[peer], incoming[peer]) for peer in others},
                     rings=lambda src, dst: slots[src, dst])


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
