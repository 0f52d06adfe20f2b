"""Variants of mini_ray, each wrong in one way, and functions for tasks: what head and workers import by name."""
from __future__ import annotations

import copy
import os
import pickle
import time
from pathlib import Path

import numpy as np

from part7_infrastructure.ch33_cluster_scheduling import mini_ray
from part7_infrastructure.ch33_cluster_scheduling.mini_ray import Head, MiniRay


def share_without_its_last(x, i, readers):
    return float(np.array_split(x, readers)[i][:-1].sum())


class PutsNothing(MiniRay):
    """A reference that is the value itself, so that each task gets a copy."""

    def put(self, value):
        return value


class OneCopyOfAll(MiniRay):
    """What is passed by value is stored once, and every later task gets that copy."""

    def put(self, value):
        return super()._put(mini_ray.pack(value))

    def _put(self, parts):
        size = sum(part.nbytes for part in parts)
        self.copies = getattr(self, "copies", {})
        if size not in self.copies:
            self.copies[size] = super()._put(parts)
        return self.copies[size]


class LeavesAFile(MiniRay):
    def close(self):
        Path("/dev/shm", self.name).write_bytes(b"left")
        super().close()


def writable_worker(*args):
    real = mini_ray.unseal
    mini_ray.unseal = lambda fd: copy.deepcopy(real(fd))
    mini_ray.worker_process(*args)


class WritableViews(MiniRay):
    worker = staticmethod(writable_worker)


def forgetful_worker(*args):
    real = mini_ray.run_task

    def run_task(tasks, sealed, actors, name):
        scratch = copy.deepcopy(actors)
        answer = real(tasks, sealed, scratch, name)
        for actor, state in scratch.items():
            actors.setdefault(actor, state)
        return answer

    mini_ray.run_task = run_task
    mini_ray.worker_process(*args)


class ForgetfulActors(MiniRay):
    worker = staticmethod(forgetful_worker)


class LosesEverything(Head):
    def bury(self, worker):
        super().bury(worker)
        for owned in self.objects.values():
            if owned.task:
                self.drop(owned)


class NeverEvicts(Head):
    def drop(self, owned):
        if not owned.references:
            super().drop(owned)


class MakesZeros(Head):
    """What is made again is made wrongly."""

    def dispatch(self, task, result, worker):
        if task.attempts:
            task.body = pickle.dumps((zeros, []))
        return super().dispatch(task, result, worker)


def zeros():
    return np.zeros(4)


def lose_everything(*args):
    LosesEverything(*args).run()


def never_evict(*args):
    NeverEvicts(*args).run()


def make_zeros(*args):
    MakesZeros(*args).run()


class TooMuchLineage(MiniRay):
    head = staticmethod(lose_everything)


class NoEviction(MiniRay):
    head = staticmethod(never_evict)


class WrongLineage(MiniRay):
    head = staticmethod(make_zeros)


# --- functions for tasks ----------------------------------------------------------------------------------------------


def end_this_worker():
    os._exit(1)


def node(i, *inputs):
    """One node of a random graph: an array that depends on all it reads."""
    return np.full(50, i, dtype=float) + sum(inputs, np.zeros(50))


def late(value, seconds):
    time.sleep(seconds)
    return value


def hold_on():
    """A driver to be killed: it says what its memory is called, and stays."""
    with MiniRay(2) as ray:
        kept = ray.put(np.ones(100_000)), ray.remote(np.ones, 100_000)
        ray.get(kept[1])
        print(ray.name, ray.segments(), *ray._fleet.pids, flush=True)
        time.sleep(60)


class Log:
    def __init__(self):
        self.lines = []

    def add(self, line):
        self.lines.append(line)
        return list(self.lines)
