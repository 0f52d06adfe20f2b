"""The graders behind `scalable check 4`: properties that any right answer has, on real processes and random inputs."""
from __future__ import annotations

import importlib
from collections.abc import Iterator
from math import ceil, log2
from types import ModuleType

import numpy as np
import simpy

from part1_foundations.ch04_communication_primitives import costs
from part1_foundations.ch04_communication_primitives.collectives import ALL_REDUCE
from shared.errors import ReaderError
from shared.exercises import Grade
from shared.fleet import launch

SEED = 4


def grade(exercises: ModuleType) -> list[Grade]:
    """One grade for each task, in the order of the file. `exercises` is importable by name, so that workers can."""
    graders = [("halving_doubling, powers of two", lambda: _halving_doubling(exercises, (2, 4, 8, 16))),
               ("halving_doubling, any number of workers", lambda: _halving_doubling(exercises, (3, 5, 6))),
               ("choose_algorithm", lambda: _choose_algorithm(exercises)),
               ("all_to_all_v", lambda: _all_to_all_v(exercises)),
               ("schedule_buckets", lambda: _schedule_buckets(exercises))]
    return [Grade.of(name, grader) for name, grader in graders]


def _halving_doubling(exercises: ModuleType, worlds: tuple[int, ...]) -> None:
    for workers in worlds:
        for length in (workers, 1000, 37):
            for rank, (right, messages, sent) in enumerate(launch(workers, _run_halving, exercises.__name__, length)):
                core = 1 << (workers.bit_length() - 1)
                assert right, f"rank {rank} of {workers} does not hold the sum of {length} elements"
                if workers == core:
                    enough = 2 * sum(ceil(length / 2**step) for step in range(1, core.bit_length()))
                    assert messages == 2 * log2(workers), f"rank {rank} of {workers} sent {messages} messages"
                    assert sent <= enough, f"rank {rank} of {workers} sent {sent} of {length} elements, {enough} do"


def _run_halving(net, module: str, length: int) -> tuple[bool, int, int]:
    function = importlib.import_module(module).halving_doubling
    inputs = np.random.default_rng(SEED).integers(-1000, 1000, (net.size, length))
    total = function(net.rank, net.size, inputs[net.rank].copy(), net.isend, net.recv)
    sent = net.stats().sent_to()
    net.barrier()
    return bool(np.array_equal(total, inputs.sum(axis=0))), sent.messages, sent.bytes // inputs.itemsize


def _choose_algorithm(exercises: ModuleType) -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(1000):
        nbytes, workers = 10 ** rng.uniform(1, 9), int(rng.integers(2, 200))
        alpha, beta = 10 ** rng.uniform(-6, -2), 10 ** rng.uniform(-11, -7)
        table = {name: costs.seconds(name, workers, nbytes, alpha, beta) for name in ALL_REDUCE}
        chosen = exercises.choose_algorithm(nbytes, workers, alpha, beta)
        assert chosen in table, f"{chosen!r} is none of {', '.join(table)}"
        best = min(table, key=table.get)
        assert table[chosen] <= table[best] * (1 + 1e-9), (
            f"{nbytes:.3g} bytes, {workers} workers, alpha {alpha:.2g}, beta {beta:.2g}: {best} beats {chosen}")


def _all_to_all_v(exercises: ModuleType) -> None:
    for workers, largest in ((4, 50), (3, 60_000), (1, 10)):
        try:
            ranks = launch(workers, _run_all_to_all, exercises.__name__, largest, socket_buffer=4096, stall=1.0)
        except ReaderError as error:
            if "NotImplementedError" in str(error):
                raise NotImplementedError from None
            raise AssertionError(f"{workers} workers, up to {largest} elements: {error}") from None
        for rank, problem in enumerate(ranks):
            assert not problem, f"rank {rank} of {workers}: {problem}"


def _run_all_to_all(net, module: str, largest: int) -> str:
    function = importlib.import_module(module).all_to_all_v
    rng = np.random.default_rng(SEED)
    counts = rng.integers(0, largest, (net.size, net.size)) * (rng.random((net.size, net.size)) > 0.3)

    def chunk(source: int, target: int) -> np.ndarray:
        return np.arange(counts[source, target]) * 1000 + source * 10 + target

    incoming = function([chunk(net.rank, target) for target in range(net.size)], net)
    net.barrier()
    if len(incoming) != net.size:
        return f"{len(incoming)} arrays came back instead of {net.size}"
    wrong = [source for source in range(net.size) if not np.array_equal(incoming[source], chunk(source, net.rank))]
    return f"what came from rank {wrong[0]} is not what it sent" if wrong else ""


def _schedule_buckets(exercises: ModuleType) -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(200):
        depth = int(rng.integers(1, 40))
        layers = list(zip(rng.uniform(0.1, 5, depth).tolist(), rng.uniform(1, 30, depth).tolist()))
        cap, alpha, beta = float(rng.uniform(0, 200)), float(rng.uniform(0, 1)), float(rng.uniform(0, 0.5))
        expected = _simulate(layers, cap, alpha, beta)
        got = exercises.schedule_buckets(layers, cap, alpha, beta)
        assert abs(got - expected) < 1e-9 * expected, f"{depth} layers, cap {cap:.3g}: {got} instead of {expected}"
        slower = exercises.schedule_buckets(layers, cap, alpha, 2 * beta + 0.01)
        assert slower >= got, "a slower link shortened the step"


def _simulate(layers: list[tuple[float, float]], cap: float, alpha: float, beta: float) -> float:
    """The same question as a discrete-event simulation: a backward process, and a link for one bucket at a time."""
    env = simpy.Environment()
    link = simpy.Resource(env)

    def backward() -> Iterator:
        bucket, sends = [], []
        for index in reversed(range(len(layers))):
            yield env.timeout(layers[index][0])
            bucket.append(layers[index][1])
            if sum(bucket) >= cap or index == 0:
                sends.append(env.process(all_reduce(sum(bucket))))
                bucket = []
        yield env.all_of(sends)

    def all_reduce(nbytes: float) -> Iterator:
        with link.request() as turn:
            yield turn
            yield env.timeout(alpha + beta * nbytes)

    env.run(env.process(backward()))
    return env.now


