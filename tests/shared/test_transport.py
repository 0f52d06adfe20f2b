"""shared.transport: what arrives is what was sent, is counted, is paced as declared, and hostile bytes are refused."""
from __future__ import annotations

import math
import random
import resource
import socket
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import transport as wires
from shared.errors import PeerLost, TransportError, UsageError, WorkerFailed
from shared.fleet import SharedMemory, launch
from shared.transport import (
    AXES,
    CONTROL,
    DATA,
    DTYPE_CODE,
    HEADER,
    HELLO,
    INLINE,
    MAGIC,
    MAX_BYTES,
    SLOT,
    Board,
    Fabric,
    Link,
    Transport,
    tcp_mesh,
)
from tests.shared import transport_workers as workers

WIRES = ("unix", "tcp", "shm")
every_wire = pytest.mark.parametrize("wire", WIRES)


def ends(peers: int = 1) -> tuple[Transport, list[socket.socket]]:
    """A transport of rank 0 built by hand, and the far ends of its connections to ranks 1, 2, ..."""
    pairs = [socket.socketpair() for _ in range(peers)]
    return Transport(0, peers + 1, {i + 1: (a, a) for i, (a, _) in enumerate(pairs)}), [b for _, b in pairs]


def frame(shape: tuple[int, ...] = (2,), dtype: str = "i4", tag: int = 0, *, magic: bytes = MAGIC, kind: int = DATA,
          code: int | None = None, ndim: int | None = None, nbytes: int | None = None, at: float = 0.0,
          payload: bytes | None = None) -> bytes:
    """A frame as a sender would write it, with any field replaced."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    header = HEADER.pack(magic, kind, DTYPE_CODE[np.dtype(dtype)] if code is None else code,
                         len(shape) if ndim is None else ndim, tag, size if nbytes is None else nbytes,
                         shape[0] if shape else 0, at)
    return header + b"".join(AXES.pack(axis) for axis in shape[1:]) + (bytes(size) if payload is None else payload)


# --- what arrives -----------------------------------------------------------------------------------------------------


@every_wire
def test_every_array_arrives_as_it_was_sent(wire):
    _, verdicts = launch(2, workers.round_trips, wire=wire)
    assert len(verdicts) == len(workers.arrays()) > 80
    assert [name for name, verdict in verdicts.items() if verdict != (True, True, True)] == []


@every_wire
def test_a_receive_reduces_in_place_as_numpy_does(wire):
    for verdicts in launch(2, workers.reductions, wire=wire):
        assert len(verdicts) > 60
        assert [name for name, right in verdicts.items() if not right] == []


@every_wire
def test_tags_may_be_received_in_any_order(wire):
    assert launch(2, workers.out_of_order, wire=wire)[1] == [[30, 31], [0, 1], [40, 41], [10, 11], [20, 21]]


@pytest.mark.parametrize("size", [1, 3])
def test_messages_to_oneself(size):
    for rank, (got, complaint, stats) in enumerate(launch(size, workers.to_itself)):
        assert got == [10, 11, 12, 0, 1, 2]
        assert "before sending" in complaint
        assert (stats.sent_to(rank, 7).bytes, stats.received_from(rank).messages) == (24, 2)


@every_wire
def test_counts_per_peer_and_tag_are_what_was_sent(wire):
    rng = random.Random(wire)
    plan = [(*rng.sample(range(4), 2), rng.randrange(3), rng.choice((0, 1, 1000, INLINE + 1, 3 * SLOT + 7)))
            for _ in range(60)]
    sent, received = Counter(), Counter()
    for src, dst, tag, n in plan:
        sent[src, dst, tag] += n
        received[dst, src, tag] += n
    outcomes = launch(4, workers.follow_plan, plan, wire=wire)
    for rank, (stats, sent_after_reset, received_after_reset) in enumerate(outcomes):
        assert {(rank, *key): count.bytes for key, count in stats.sent.items()} == {
            key: n for key, n in sent.items() if key[0] == rank}
        assert {(rank, *key): count.bytes for key, count in stats.received.items()} == {
            key: n for key, n in received.items() if key[0] == rank}
        for peer in range(4):
            assert stats.sent_to(peer).messages == sum(src == rank and dst == peer for src, dst, _, _ in plan)
        assert stats.received_from(tag=1).messages == sum(dst == rank and tag == 1 for _, dst, tag, _ in plan)
        assert sent_after_reset == received_after_reset == 0


@every_wire
def test_a_receive_times_out_and_the_message_still_comes_later(wire):
    message, waited, value = launch(2, workers.time_out_then_receive, wire=wire)[1]
    assert message == "rank 1 got no message from rank 0 (tag 5) in time"
    assert 0.1 <= waited < 5
    assert value == 42.0


@every_wire
def test_isend_cures_what_send_first_deadlocks_on(wire):
    nbytes = 4 << 20
    with pytest.raises(WorkerFailed) as failure:
        launch(2, workers.exchange, nbytes, False, wire=wire, socket_buffer=1 << 17, stall=0.5)
    assert "rank 0 is sending to rank 1" in str(failure.value)
    assert launch(2, workers.exchange, nbytes, True, wire=wire, socket_buffer=1 << 17) == [nbytes, 0]


@every_wire
def test_a_rank_that_lost_a_peer_goes_on_with_the_others(wire):
    assert launch(3, workers.outlive, wire=wire) == ["lost 1, heard 2", "gone", "sent"]


@pytest.mark.parametrize(("array", "tag", "dst"), [
    (np.array(["text"]), 0, 1), (np.array([object()]), 0, 1), (np.zeros(2, "i4,f8"), 0, 1), (np.zeros(2, ">i4"), 0, 1),
    (np.zeros((1,) * 9), 0, 1), (np.broadcast_to(np.zeros(1), (MAX_BYTES // 8 + 1,)), 0, 1), (np.zeros(2), -1, 1),
    (np.zeros(2), 1 << 32, 1), (np.zeros(2), 0, 2), (np.zeros(2), 0, -1)])
def test_what_cannot_be_sent_is_refused_and_not_counted(array, tag, dst, monkeypatch):
    net, _ = ends()
    monkeypatch.setattr(wires.np, "ascontiguousarray", lambda x: x)  # do not make 4 GiB of the broadcast one
    if array.nbytes > MAX_BYTES:
        monkeypatch.setattr(wires.np, "shape", lambda x: x.shape)
    with pytest.raises(TransportError):
        net.send(dst, array, tag)
    assert net.stats().sent == {}


def test_an_output_that_does_not_fit_costs_that_message_only():
    net, (far,) = ends()
    far.sendall(frame((3,)) + frame((2,), "i8") + frame((2,), payload=np.array([5, 6], "i4").tobytes()))
    with pytest.raises(TransportError, match=r"12 bytes int32 from rank 1 does not fit an output of 16 bytes int32"):
        net.recv(1, np.zeros(4, "i4"))
    with pytest.raises(TransportError, match="does not fit"):
        net.recv(1, np.zeros(2, "f8"))
    assert net.recv(1, np.zeros((1, 2), "i4")).tolist() == [[5, 6]]
    with pytest.raises(TransportError, match="contiguous"):
        net.recv(1, np.zeros((4, 4))[:, 0])


# --- hostile bytes ----------------------------------------------------------------------------------------------------

HOSTILE = {
    "wrong magic": frame(magic=b"HTTP"),
    "no kind of ours": frame(kind=9),
    "unknown dtype": frame(code=len(DTYPE_CODE)),
    "nine dimensions": frame((1,) * 9),
    "255 dimensions": frame(ndim=255),
    "more bytes than the bound": frame((MAX_BYTES + 1,), "u1", payload=b""),
    "2^64 - 1 bytes": frame((2**64 - 1,), "u1", payload=b""),
    "a product beyond 64 bits": frame((2**63, 2**63), "u1", nbytes=0, payload=b""),
    "nothing, of a monstrous shape": frame((2**62, 0), "f8", payload=b""),
    "more bytes than the shape holds": frame((2,), nbytes=9),
    "fewer bytes than the shape holds": frame((1000, 1000), nbytes=8, payload=b""),
    "bytes in an empty shape": frame((0,), nbytes=8),
    "never delivered": frame(at=math.inf),
    "no delivery time": frame(at=math.nan),
    "delivered before time began": frame(at=-math.inf),
    "delivered next year": frame(at=wires.now() + 3e7),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_frame_is_refused(raw):
    net, (far,) = ends()
    far.sendall(raw)
    with pytest.raises(TransportError, match="malformed frame from rank 1"):
        net.recv(1, timeout=5)
    far.sendall(frame())
    with pytest.raises(TransportError, match="was cut"):  # nothing behind it is believed
        net.recv(1, timeout=5)


@pytest.mark.parametrize("length", [0, 1, HEADER.size - 1, HEADER.size, HEADER.size + 4, HEADER.size + 11])
def test_a_connection_cut_in_mid_frame_is_a_lost_peer(length):
    net, (far,) = ends()
    far.sendall(frame((3, 1), "i4")[:length])
    far.close()
    for _ in range(2):
        with pytest.raises(PeerLost, match="lost rank 1"):
            net.recv(1)


@pytest.mark.parametrize("length", [5, HEADER.size + 4])
def test_a_frame_that_stops_half_way_times_out_and_is_not_resumed(length):
    net, (far,) = ends()
    whole = frame((3,), "i4")
    far.sendall(whole[:length])
    with pytest.raises(TransportError, match="in time"):
        net.recv(1, timeout=0.02)
    far.sendall(whole[length:])
    with pytest.raises(TransportError, match="was cut"):
        net.recv(1, timeout=5)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's lazy pages")
def test_what_is_only_announced_takes_no_memory():
    net, (far,) = ends()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    far.sendall(frame((2 << 30,), "u1", payload=b"only this"))
    far.close()
    with pytest.raises(PeerLost):
        net.recv(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def drain(raw: bytes) -> list[np.ndarray]:
    """Receive until the bytes are used up or refused: anything but an array or a TransportError is a bug."""
    net, (far,) = ends()
    far.sendall(raw)
    far.close()
    got = []
    with pytest.raises(TransportError):
        while True:
            got.append(net.recv(1, timeout=5))
    net.close()
    return got


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused(raw, with_magic):
    drain(MAGIC + raw if with_magic else raw)


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from([DATA, CONTROL, 0, 7]), code=st.integers(0, 20), ndim=st.integers(0, 10),
       tag=st.integers(0, 3), nbytes=st.integers(0, 40) | st.integers(0, 2**64 - 1),
       first=st.integers(0, 5) | st.integers(0, 2**64 - 1), at=st.floats() | st.just(0.0), rest=st.binary(max_size=120))
def test_random_headers_are_refused_or_right(kind, code, ndim, tag, nbytes, first, at, rest):
    if at > wires.now() and at < wires.now() + 4000:
        at = 0.0  # a legal delivery time in the near future would be waited for
    for array in drain(HEADER.pack(MAGIC, kind, code, ndim, tag, nbytes, first, at) + rest):
        assert array.nbytes <= len(rest)


def test_strangers_are_turned_away_while_the_ranks_connect():
    token, size = b"t" * 16, 3
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
    addresses = [listener.getsockname() for listener in listeners]
    strangers = []
    for address in addresses[:2]:  # the last rank accepts nobody
        for greeting in (b"GET / HTTP/1.1\r\n\r\n" + bytes(32), HELLO.pack(MAGIC, b"x" * 16, 1),
                         HELLO.pack(MAGIC, token, 0), HELLO.pack(MAGIC, token, 99), b"short"):
            stranger = socket.create_connection(address)
            stranger.sendall(greeting)
            if greeting == b"short":
                stranger.shutdown(socket.SHUT_WR)
            strangers.append(stranger)
    strangers.append(socket.create_connection(addresses[0]))  # says nothing at all
    meshes: dict[int, dict] = {}

    def join(rank: int) -> None:
        meshes[rank] = tcp_mesh(rank, addresses, listeners[rank], token, timeout=20)

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {rank: sorted(mesh) for rank, mesh in meshes.items()} == {0: [1, 2], 1: [0, 2], 2: [0, 1]}
    nets = [Transport(rank, size, meshes[rank]) for rank in range(size)]
    for src in range(size):
        for dst in set(range(size)) - {src}:
            nets[src].send(dst, np.array([src, dst]))
            assert nets[dst].recv(src, timeout=5).tolist() == [src, dst]
    for stranger in strangers:
        stranger.settimeout(5)
        try:
            assert stranger.recv(1) == b""
        except ConnectionResetError:
            pass
        stranger.close()
    for net in nets:
        net.close()


def test_a_rank_that_never_connects_is_named():
    listener = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(TransportError, match=r"rank 0 waited 0.2 s for ranks \[1, 2\] to connect"):
        tcp_mesh(0, [listener.getsockname()] * 3, listener, b"t" * 16, timeout=0.2)
    listener.close()


def test_a_rank_that_is_not_there_is_a_lost_peer():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = listener.getsockname()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(PeerLost, match="rank 1 cannot reach rank 0"):
            tcp_mesh(1, [gone, listener.getsockname()], listener, b"t" * 16, timeout=2)


# --- lost peers -------------------------------------------------------------------------------------------------------


def test_a_peer_lost_while_sending_is_told_to_those_who_send_to_it():
    net, (gone, alive) = ends(2)
    work = net.isend(1, np.zeros(16 << 20, np.uint8))
    gone.close()
    alive.sendall(frame((2,)))
    assert net.recv(2, timeout=5).tolist() == [0, 0]  # not this peer's fault
    for _ in range(2):
        with pytest.raises(PeerLost, match="lost rank 1 while sending"):
            work.wait()
    with pytest.raises(PeerLost, match="lost rank 1"):
        net.send(1, np.zeros(1))
    with pytest.raises(PeerLost, match="lost rank 1"):
        net.recv(1)
    net.send(2, np.zeros(1))
    net.close()


# --- paced links ------------------------------------------------------------------------------------------------------

SLOW = Link(latency=0.02, bandwidth=1e6, overhead=0.01, name="slow")
NBYTES = 20_000  # 0.03 s on the wire, 0.05 s in all


def arrival(fabric: Fabric | Link | None, pairs: list[tuple[int, int]], size: int = 4) -> tuple[float, float]:
    """Seconds from the first start to the last arrival: of the fastest repeat and of the slowest."""
    times = np.array(launch(size, workers.flows, pairs, NBYTES, 5, fabric=fabric))  # rank, repeat, (began, ended)
    involved = sorted({rank for pair in pairs for rank in pair})
    seconds = times[involved, :, 1].max(axis=0) - times[involved, :, 0].min(axis=0)
    return float(seconds.min()), float(seconds.max())


@pytest.mark.timing
def test_a_message_takes_alpha_plus_beta_times_its_bytes():
    fastest, _ = arrival(SLOW, [(0, 1)], size=2)
    assert SLOW.seconds(NBYTES) == pytest.approx(0.05)
    assert 0.05 <= fastest < 0.06


@pytest.mark.timing
def test_two_senders_to_one_receiver_take_turns():
    fastest, _ = arrival(SLOW, [(0, 2), (1, 2)])
    assert 0.08 <= fastest < 0.09


@pytest.mark.timing
def test_one_sender_to_two_receivers_sends_one_after_the_other():
    fastest, _ = arrival(SLOW, [(0, 1), (0, 2)])
    assert 0.08 <= fastest < 0.09


@pytest.mark.timing
def test_disjoint_pairs_do_not_wait_for_each_other():
    fastest, _ = arrival(SLOW, [(0, 1), (2, 3)])
    assert 0.05 <= fastest < 0.06


@pytest.mark.timing
def test_both_directions_of_a_link_are_free_at_once():
    fastest, _ = arrival(SLOW, [(0, 1), (1, 0)], size=2)
    assert 0.05 <= fastest < 0.06


@pytest.mark.timing
def test_ranks_of_a_node_share_its_uplink():
    fastest, _ = arrival(Fabric((0, 0, 1, 1), SLOW), [(0, 2), (1, 3)])
    assert 0.08 <= fastest < 0.09


@pytest.mark.timing
def test_inside_a_node_nothing_is_paced_unless_asked_for():
    fastest, _ = arrival(Fabric((0, 0, 1, 1), SLOW), [(0, 1), (2, 3)])
    assert fastest < 0.02
    fastest, _ = arrival(Fabric((0, 0, 1, 1), SLOW, inner=SLOW), [(0, 1), (2, 3)])
    assert 0.05 <= fastest < 0.06


def test_a_barrier_does_not_let_a_paced_message_overtake_its_link():
    assert launch(2, workers.barrier_overtakes, fabric=Link(0.2, 1e9))[1] >= 0.2


def test_a_time_out_counts_on_a_paced_link_too():
    timed_out, seconds = launch(2, workers.late_by_the_link, fabric=Link(0.3, 1e9))[1]
    assert timed_out
    assert seconds >= 0.3


def test_the_schedule_of_a_fabric_by_the_book(monkeypatch):
    """The bookings themselves, on a clock that stands still: exact, whatever the machine is doing."""
    monkeypatch.setattr(wires, "now", lambda: 100.0)
    board = Board(SharedMemory(Board.nbytes(4)), 4)
    fabric = Fabric((0, 0, 1, 2), outer=Link(0.5, 10.0, 1.0))  # 10 bytes: 2 s on the wire, 0.5 s in the air
    book = [board.reserve(*fabric.route(src, dst), 10) for src, dst in [(0, 2), (1, 3), (3, 2), (2, 0), (0, 2)]]
    assert book == [
        (102.0, 102.5),
        (104.0, 104.5),  # the uplink of node 0 is busy
        (104.0, 104.5),  # the downlink of node 1 is busy until 102.5, from 102 on as seen from its sender
        (102.0, 102.5),  # the other direction is free
        (106.0, 106.5),
    ]
    assert fabric.route(0, 1)[0] is None


@pytest.mark.parametrize(("text", "link"), [
    ("none", None),
    ("1gbe", wires.LINKS["1gbe"]),
    ("0.1ms+0.9ms/50MBps", Link(1e-4, 50e6, 9e-4, "0.1ms+0.9ms/50MBps")),
    ("2ms/0.5MBps", Link(2e-3, 0.5e6, 0.0, "2ms/0.5MBps")),
    ("0ms/1MBps", Link(0.0, 1e6, 0.0, "0ms/1MBps")),
])
def test_links_by_name(text, link):
    named = Link.named(text)
    assert named == (link and Link(pytest.approx(link.latency), pytest.approx(link.bandwidth),
                                   pytest.approx(link.overhead), link.name))


@pytest.mark.parametrize("text", ["", "2gbe", "1ms", "50MBps", "1ms/0MBps", "-1ms/5MBps", "1..2ms/5MBps", "ms/MBps",
                                  "1ms/5MBps ", "1e3ms/5MBps", "nanms/5MBps", "1ms+/5MBps", "."])
def test_an_unknown_link_is_one_clear_line(text):
    with pytest.raises(UsageError, match="unknown link .*: one of none, 100mbe, .* or like ") as error:
        Link.named(text)
    assert "\n" not in str(error.value)
