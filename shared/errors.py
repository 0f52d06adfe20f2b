"""Errors that a reader can cause or meet: each is one line on stderr and one exit code, never a traceback."""
from __future__ import annotations


class ReaderError(Exception):
    """Something the reader can act on. The message names the cause and the remedy in one line."""

    exit_code = 1


class UsageError(ReaderError):
    """A value that makes no sense or does not fit this machine."""

    exit_code = 2


class MissingDependency(ReaderError):
    """Not installed: a library of an `extra`, one that `pip` finds under these arguments, or a `debian` package."""

    exit_code = 3

    def __init__(self, what: str, *, extra: str | None = None, debian: str | None = None,
                 pip: str | None = None) -> None:
        pip = f"-e '.[{extra}]'" if extra else pip
        remedy = f"pip install {pip}" if pip else f"apt-get install {debian}" if debian else f"install {what}"
        super().__init__(f"{what} is not installed: {remedy}")


class TransportError(ReaderError):
    """A message could not be sent or received: the peer is gone, the frame is malformed, or time ran out."""


class PeerLost(TransportError):
    """The other end of a connection closed. Usually the consequence of another worker's failure."""


class WorkerFailed(ReaderError):
    """A worker process raised, died or hung. `worker_traceback` is empty unless it raised."""

    def __init__(self, rank: int, what: str, worker_traceback: str = "") -> None:
        super().__init__(f"worker {rank} {what}")
        self.rank = rank
        self.worker_traceback = worker_traceback
