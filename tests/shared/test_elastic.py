"""shared.elastic: the same launch in processes that torchrun or a person has started, and values that cross hosts."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.elastic import decode, encode
from shared.errors import TransportError
from shared.transport import Count, Stats

ROOT = Path(__file__).parents[2]
PROGRAM = [str(ROOT / "tests/shared/elastic_program.py")]

# --- values on the wire -----------------------------------------------------------------------------------------------

numpy_arrays = hnp.arrays(
    st.one_of(hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes(),
              hnp.complex_number_dtypes(), hnp.byte_string_dtypes(), hnp.unicode_string_dtypes(),
              hnp.datetime64_dtypes(), hnp.timedelta64_dtypes()),
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4))
keys = st.one_of(st.integers(), st.text(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), numpy_arrays,
              st.builds(Count, st.integers(), st.integers()),
              st.builds(Stats, st.dictionaries(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.builds(Count)))),
    lambda inner: st.one_of(st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(keys, inner)), max_leaves=8)


def same(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(map(same, a.values(), b.values()))
    return repr(a) == repr(b)  # nan and -0.0 too


@settings(deadline=None, max_examples=150)
@given(values)
def test_values_come_back_as_they_were(value):
    assert same(decode(encode(value)), value)


@pytest.mark.parametrize("value", [np.float32(1.5), np.int64(-3), np.bool_(True), np.complex64(1j), np.array(7, "u2"),
                                   np.str_("text")])
def test_scalars_keep_their_type(value):
    back = decode(encode(value))
    assert back.dtype == value.dtype and back == value and np.shape(back) == ()


def test_arrays_come_back_writable_and_in_order():
    array = np.arange(12).reshape(3, 4).T[::2]
    back = decode(encode([array]))[0]
    np.testing.assert_array_equal(back, array)
    back[0] = 0


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", print, np.array([object()]), np.zeros(2, "i4,f8"),
                                   [1, {"a": (2, object())}], np.zeros(1, "V8")[0], 1j])
def test_what_is_not_plain_is_refused(value):
    with pytest.raises(TransportError, match="cannot be returned across hosts"):
        encode(value)


# --- worlds started from outside --------------------------------------------------------------------------------------


def free_port() -> int:
    """A port whose successor is free too: `launch` meets there, as torchrun keeps the first one."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue


def check(folder: Path, size: int) -> list[dict]:
    """Every rank has heard the same, and the right thing."""
    heard = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    assert all(other == heard[0] for other in heard)
    first = heard[0]
    for name, ranks, start in [("part", size - 1, 10), ("whole", size, 20), ("again", size, 30)]:
        assert first[name] == [[rank, ranks, start + (rank - 1) % ranks, 8e6] for rank in range(ranks)]
    assert first["too many"] == ["UsageError", f"torchrun started {size} processes but {size + 1} workers are needed"]
    assert first["paced"][0] == "UsageError" and "--link none" in first["paced"][1]
    kind, message, traceback = first["one fails"]
    assert (kind, message) == ("WorkerFailed", "worker 1 raised ValueError('no more')")
    assert "in fail_at" in traceback
    assert first["not plain"][0] == "WorkerFailed" and "worker 2 raised TransportError" in first["not plain"][1]
    return heard


def environment(**variables: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "SCALABLE"))}
    return {**kept, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}


def test_a_world_started_by_hand(tmp_path):
    port = free_port()
    ranks = [subprocess.Popen([sys.executable, *PROGRAM, tmp_path], text=True, stderr=subprocess.PIPE,
                              env=environment(RANK=rank, WORLD_SIZE=3, MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
             for rank in range(3)]
    try:
        errors = [process.communicate(timeout=60)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert errors == [""] * 3
    check(tmp_path, 3)


def test_a_taken_port_is_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = "from shared.fleet import launch; launch(1, print)"
        done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60,
                              env=environment(RANK=0, WORLD_SIZE=1, SCALABLE_PORT=port))
    last = done.stderr.splitlines()[-1]
    assert "Error: " in last and f"rank 0 at 127.0.0.1:{port}" in last and "set SCALABLE_PORT" in last


def test_a_world_started_by_torchrun(tmp_path):
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "3",
               "--master-addr", "127.0.0.1", "--master-port", str(free_port()), *PROGRAM, str(tmp_path), "torch"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=110,
                          env=environment(GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo"))
    assert done.returncode == 0, done.stderr
    for heard in check(tmp_path, 3):
        assert heard["torch"] == [[rank, 3, 999 * 3 + 2.5 * 3] for rank in range(3)]
        assert heard["torch too many"][0] == "UsageError"
