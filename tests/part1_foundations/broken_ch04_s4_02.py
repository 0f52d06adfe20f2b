"""Worker functions of test_ch04_s4_02, most broken on purpose; apart, so that workers need not import pytest."""
from __future__ import annotations

from part1_foundations.ch04_communication_primitives import s4_02_send_recv_atoms as section
from part1_foundations.ch04_communication_primitives.collectives import Group


def hops_and_one_more(net, x):
    """Right sums, one message too many."""
    section.hop_all_reduce(net, x)
    if net.rank == 0:
        net.send(net.size - 1, x)
    if net.rank == net.size - 1:
        net.recv(0)
    return x


def hops_without_rank_1(net, x):
    """Rank 1 passes the running sum on without adding its own."""
    if net.rank == 1:
        x[:] = 0
    return section.hop_all_reduce(net, x)


def receive_first(net, right, left, mine, theirs):
    net.recv(left, theirs)
    net.send(right, mine)


def send_then_receive(net, right, left, mine, theirs):
    """The careless order by another name."""
    net.send(right, mine)
    net.recv(left, theirs)


def one_listener(net, right, left, mine, theirs):
    (receive_first if net.rank == 0 else send_then_receive)(net, right, left, mine, theirs)


def everyone_relays(net, x):
    """The even ranks' sum, by way of rank 1."""
    if net.rank == 0:
        net.send(1, x)
    if net.rank == 1:
        net.send(2, net.recv(0))
    if net.rank == 2:
        x += net.recv(1)
    if net.rank % 2 == 0:
        Group(net, range(0, net.size, 2)).broadcast(x, root=1)


def hops(net, vectors, all_reduce):
    return all_reduce(net, vectors[net.rank].copy()), net.stats().sent_to().messages


def pair_deadlocks_while_others_finish(net):
    if net.rank in (1, 2):
        net.recv(3 - net.rank)


def die_early(net):
    if net.rank == 0:
        raise ValueError("rank 0 gives up")
    net.recv(0)


def _both_broken(net, name, *args):
    from part1_foundations.ch04_communication_primitives import s4_02_shortcut_torch_p2p as shortcut

    setattr(shortcut, *{
        "hops": ("hop_all_reduce", hops_without_rank_1),
        "exchange": ("isend_first", _keeps_its_own),
        "group": ("even_ranks_sum", _whole_world_sum),
    }[name])
    return shortcut.both(net, *args)


def _keeps_its_own(net, right, left, mine, theirs):
    theirs[:] = mine


def _whole_world_sum(net, x):
    section.hop_all_reduce(net, x)


def both_with_broken_hops(net, *args):
    return _both_broken(net, "hops", *args)


def both_with_a_broken_exchange(net, *args):
    return _both_broken(net, "exchange", *args)


def both_with_a_broken_group(net, *args):
    return _both_broken(net, "group", *args)
