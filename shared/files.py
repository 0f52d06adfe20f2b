"""Files written whole or not at all."""
from __future__ import annotations

import os
import tempfile
from pathlib import Path

from shared.errors import ReaderError, UsageError


def check_target(path: str | Path) -> Path:
    """The regular file that `path` names, links followed. UsageError if it cannot be written."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UsageError(f"cannot write {path}: it is not a regular file")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror} ({target.parent})") from error
    os.close(handle)
    os.unlink(name)
    return target


def write_atomically(path: str | Path, data: bytes) -> None:
    """Put `data` in `path` through a temporary file beside it. On any failure, Ctrl-C included, `path` stays as it was.

    Raises ReaderError naming the file and the cause (a full disk, a folder that vanished or cannot be written).
    """
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise ReaderError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            os.unlink(temporary)
