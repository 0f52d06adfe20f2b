"""Worker functions of test_ch04_s4_06, most broken on purpose; apart, so that workers need not import pytest."""
from __future__ import annotations

from functools import partial

import numpy as np

from part1_foundations.ch04_communication_primitives import s4_06_moe_dispatch as section
from part1_foundations.ch04_communication_primitives.collectives import all_to_all
from shared.fleet import paced


def patched(name, broken, net, *args):
    """The demo's worker, in a process where one of its pieces is replaced."""
    setattr(section, name, broken)
    return section.route_and_return(net, *args)


def combine_that_leaves_the_rows_sorted(net, processed, plan, rows, combine=section.combine):
    home = combine(net, processed, plan, rows)
    home[np.sort(plan.order)] = home[plan.order]
    return home


def combine_that_loses_a_rank(net, processed, plan, rows, combine=section.combine):
    """Reads what rank 0 returned as zeros: a dropped message."""
    home = combine(net, processed, plan, rows)
    home[plan.order[:plan.sent[0]]] = 0
    return home


def dispatch_padded_to_the_longest(net, rows, plan):
    """Correct rows, but every message is as long as the longest one from its sender."""
    pieces = np.split(rows[plan.order], np.cumsum(plan.sent)[:-1])
    padded = [np.resize(np.concatenate([piece, rows]), (plan.sent.max(), *rows.shape[1:])) for piece in pieces]
    arrived = all_to_all(net, padded)
    return np.concatenate([piece[:count] for piece, count in zip(arrived, plan.received)])


def plan_with_stale_send_counts(net, choices, routed, make_plan=section.make_plan):
    """Announces what was asked for, not what the capacity left."""
    return make_plan(net, routed)._replace(sent=np.bincount(choices[:, 0], minlength=net.size))


def layer_with_stale_send_counts(net, tokens, choices, *args, layer=section.moe_layer):
    y, routed, plan = layer(net, tokens, choices, *args)
    section.audit = lambda *_: 0  # the audit sends again, by the counts that are wrong
    return y, routed, plan_with_stale_send_counts(net, choices, routed)


def assign_beyond_capacity(net, choices, capacity):
    return choices[:, 0]


def assign_one_short(net, choices, capacity, assign=section.assign):
    return assign(net, choices, capacity - 1)


def assign_with_a_jumped_queue(net, choices, capacity, assign=section.assign):
    """Rank 1 moves one of its served tokens to expert 0, which is full."""
    routed = assign(net, choices, capacity)
    if net.rank == 1:
        routed[np.flatnonzero(routed > 0)[0]] = 0
    return routed


def pace_of_the_mean(seconds):
    """An expert padded to a fixed size, which takes as long however few or many tokens it got."""
    return paced(0.03)


def ragged_choices(seed, rank, experts):
    rng = np.random.default_rng((seed, rank))
    return rng.integers(0, experts, (rng.integers(0, 12), 2))


def layers(net, seeds):
    """On one rank: assign and the whole layer for ragged random choices; the expert adds 1000 times its rank."""
    results = []
    for seed in seeds:
        choices, capacity = ragged_choices(seed, net.rank, net.size), seed % 7
        x = np.arange(len(choices), dtype=float)[:, None] + 100 * net.rank
        y, routed, plan = section.moe_layer(net, x, choices, lambda rows: rows + 1000 * (1 + net.rank), capacity)
        results.append((routed.tolist(), y, x, plan))
    return results


def book_device(net):
    """One of the book's eight devices: its tokens through the layer; how many its expert was sent."""
    rng = np.random.default_rng(7)
    tokens = [rng.standard_normal((512, 16)) for _ in range(8)][net.rank]
    routed = [rng.choice(8, 512, p=[.30, .22, .16, .11, .08, .06, .04, .03]) for _ in range(8)][net.rank]
    y, _, plan = section.moe_layer(net, tokens, routed[:, None], np.negative)
    return int(plan.received.sum()), bool((y == -tokens).all())


def both_patched(name, broken, *args):
    from part1_foundations.ch04_communication_primitives import s4_06_shortcut_all_to_all_single as shortcut

    setattr(shortcut, name, partial(broken, getattr(shortcut, name)))
    return shortcut.both(*args)


def outputs_off_by_one_row(library_layer, *args):
    outputs, received = library_layer(*args)
    return outputs.roll(1, 0), received


def counts_not_exchanged(library_layer, tokens, routed, expert, size):
    return library_layer(tokens, routed, expert, size)[0], routed.bincount(minlength=size)
