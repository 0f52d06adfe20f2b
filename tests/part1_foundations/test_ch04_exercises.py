"""The graders of Chapter 4: the solutions pass, the stubs fail, and so does every typical mistake."""
from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

from part1_foundations.ch04_communication_primitives import exercises, grading, solutions

TASKS = ["halving_doubling, powers of two", "halving_doubling, any number of workers", "choose_algorithm",
         "all_to_all_v", "schedule_buckets"]


def test_solutions_pass():
    grades = grading.grade(solutions)
    assert [grade.name for grade in grades] == TASKS
    assert all(grade.passed for grade in grades), grades


def test_stubs_fail():
    assert [grade.message for grade in grading.grade(exercises)] == ["not written yet"] * len(TASKS)


# --- mistakes; this module stands in for exercises.py, in the workers too --------------------------------------


def halving_doubling(rank, workers, x, send, recv):
    """Right for powers of two, but by sending the whole buffer each time."""
    x, distance = x.copy(), 1
    while distance < workers:
        send(rank ^ distance, x.copy())
        x += recv(rank ^ distance)
        distance *= 2
    return x


def choose_algorithm(nbytes, workers, alpha, beta):
    return "ring"


def all_to_all_v(outgoing, transport):
    """Sends everything before receiving anything."""
    for peer in range(transport.size):
        transport.send(peer, outgoing[peer])
    return [transport.recv(peer) for peer in range(transport.size)]


def schedule_buckets(layers, cap, alpha, beta):
    """Forgets that the last, unfilled bucket is sent too."""
    clock = link = held = 0.0
    for seconds, nbytes in reversed(layers):
        clock, held = clock + seconds, held + nbytes
        if held >= cap:
            link, held = max(clock, link) + alpha + beta * held, 0.0
    return max(clock, link)


def test_typical_mistakes_fail():
    grades = {grade.name: grade for grade in grading.grade(sys.modules[__name__])}
    assert not any(grade.passed for grade in grades.values()), grades
    assert "messages" in grades[TASKS[0]].message
    assert "beats ring" in grades["choose_algorithm"].message
    assert "hangs" in grades["all_to_all_v"].message


def test_an_answer_that_raises_or_returns_nonsense_fails_with_its_reason():
    broken = ModuleType("broken")
    broken.choose_algorithm = lambda *cell: "quantum"
    broken.schedule_buckets = lambda *model: 1 / 0
    graded = {grade.name: grade for grade in (grading.Grade.of("c", lambda: grading._choose_algorithm(broken)),
                                              grading.Grade.of("s", lambda: grading._schedule_buckets(broken)))}
    assert graded["c"].message.startswith("'quantum' is none of")
    assert graded["s"].message == "raised ZeroDivisionError: division by zero"


@pytest.mark.parametrize("cap", [0.0, 1e9])
def test_simulation_agrees_with_hand_computed_extremes(cap):
    layers = [(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)]
    expected = {0.0: 3 + 0.5 + 3.0 + 0.5 + 2.0 + 0.5 + 1.0, 1e9: 6 + 0.5 + 6.0}[cap]  # the first bucket at t=3, ...
    assert grading._simulate(layers, cap, 0.5, 0.1) == pytest.approx(expected)
    assert np.isclose(solutions.schedule_buckets(layers, cap, 0.5, 0.1), expected)
