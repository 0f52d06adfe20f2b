"""Run beside a local Ray, `python ray_guard.py FOLDER`: when its standard input ends, Ray's leftovers and FOLDER go.

The input is a pipe from the process that started Ray, so it also ends when that process is killed. Ray's daemons then
die with it, but the two agents that its raylet started live on for a minute (seen with Ray 2.60).
"""
from __future__ import annotations

import shutil
import sys
import time
from contextlib import suppress

import psutil


def leftovers(folder: str) -> list[psutil.Process]:
    """Ray's own processes (their titles begin with "ray::") that hold a file of this instance's folder open."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            titled = process.name().startswith("ray::")
            if titled and any(file.path.startswith(f"{folder}/") for file in process.open_files()):
                found.append(process)
    return found


if __name__ == "__main__":
    sys.stdin.read()
    while left := leftovers(sys.argv[1]):
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)
    shutil.rmtree(sys.argv[1], ignore_errors=True)
