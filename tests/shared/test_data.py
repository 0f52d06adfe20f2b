"""shared.data: the same data every time, on every machine, with the truth that was planted in it."""
from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import data
from shared.errors import MissingDependency, ReaderError


@pytest.mark.parametrize(
    ("load", "shape", "classes"),
    [(data.digits, (1797, 64), 10), (data.breast_cancer, (569, 30), 2), (data.diabetes, (442, 10), None)],
)
def test_scikit_learn_sets_are_plain_arrays(load, shape, classes):
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install -e '.[sklearn]'")
    x, y = load()
    assert type(x) is type(y) is np.ndarray
    assert x.shape == shape and x.dtype == np.float64 and x.flags.c_contiguous and np.isfinite(x).all()
    assert y.shape == shape[:1]
    if classes:
        assert y.dtype == np.int64 and set(y) == set(range(classes))
    assert np.array_equal(load().x, x)


def test_digits_can_be_learned_and_lie_between_0_and_1():
    """Nearest neighbour in NumPy: were the labels shuffled against the images, it would be right one time in ten."""
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install -e '.[sklearn]'")
    x, y = data.digits()
    assert (x.min(), x.max()) == (0, 1)
    known, asked = x[:1500], x[1500:]
    nearest = np.argmin((known**2).sum(axis=1) - 2 * asked @ known.T, axis=1)
    assert np.mean(y[:1500][nearest] == y[1500:]) > 0.9


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingDependency, match=r"scikit-learn is not installed: pip install -e '\.\[sklearn\]'"):
        data.digits()


@pytest.mark.parametrize("kind", ["text", "code"])
@pytest.mark.parametrize("max_bytes", [0, 1, 100, 99_999, 470_000])
def test_corpus_fills_its_limit_exactly_or_stops_short_of_a_split_character(kind, max_bytes):
    documents = data.corpus(max_bytes, kind)
    size = sum(len(document.encode()) for document in documents)
    assert max_bytes - 3 <= size <= max_bytes
    assert all(documents)


@pytest.mark.parametrize("kind", ["text", "code"])
def test_a_larger_corpus_begins_with_the_smaller_one(kind):
    small, large = data.corpus(200_000, kind), data.corpus(300_000, kind)
    assert large[: len(small) - 1] == small[:-1]
    assert large[len(small) - 1].startswith(small[-1])


def test_corpus_is_the_same_in_another_process_whatever_its_hash_seed():
    script = "from shared.data import corpus; import zlib; print(zlib.crc32(repr(corpus(600_000)).encode()))"
    checksums = set()
    for seed in "12":
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        checksums.add(int(subprocess.check_output([sys.executable, "-c", script], env=environment)))
    assert len(checksums) == 1


def test_corpus_holds_the_language_reference_and_then_docstrings_of_the_library():
    documents = data.corpus(800_000)
    assert any("lambda_expr" in document for document in documents)
    assert any(inspect.getdoc(argparse.ArgumentParser) in text for text in documents)
    assert len(set(documents)) > 0.95 * len(documents)


def test_code_is_python():
    documents = data.corpus(300_000, "code")[:-1]
    assert len(documents) > 5
    for document in documents:
        compile(document, "a module", "exec", dont_inherit=True)


def test_a_python_without_its_source_is_an_error_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ReaderError, match="without the source of its standard library"):
        data.corpus(1000, "code")


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(0, 200), features=st.integers(1, 6), noise=st.floats(0, 3), seed=st.integers(0, 2**32))
def test_linear_is_the_planted_line_plus_noise_of_the_stated_size(rows, features, noise, seed):
    x, y, weights = data.linear(rows, features, noise, seed)
    assert (x.shape, y.shape, weights.shape) == ((rows, features), (rows,), (features,))
    assert np.array_equal(y, data.linear(rows, features, noise, seed).y)
    noise_seen = y - x @ weights
    assert np.abs(noise_seen).max(initial=0) <= 6 * noise
    if rows >= 100:
        assert noise_seen.std() == pytest.approx(noise, rel=0.4)


def test_least_squares_finds_the_planted_weights():
    x, y, weights = data.linear(5000, 10, noise=0.1)
    assert np.linalg.lstsq(x, y, rcond=None)[0] == pytest.approx(weights, abs=0.01)
    assert not np.array_equal(x, data.linear(5000, 10, seed=1).x)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(0, 200), clusters=st.integers(1, 8), features=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_blobs_are_balanced_and_lie_around_separate_centres(rows, clusters, features, seed):
    x, labels, centres = data.blobs(rows, clusters, features, separation=12.0, seed=seed)
    assert (x.shape, labels.shape, centres.shape) == ((rows, features), (rows,), (clusters, features))
    assert np.ptp(np.bincount(labels, minlength=clusters)) <= 1
    between = [np.linalg.norm(a - b) for i, a in enumerate(centres) for b in centres[:i]]
    assert min(between, default=12.0) == pytest.approx(12.0)
    nearest = np.argmin(np.linalg.norm(x[:, None] - centres, axis=-1), axis=1)
    assert np.mean(nearest == labels) == 1 if rows else nearest.size == 0
    assert np.array_equal(x, data.blobs(rows, clusters, features, separation=12.0, seed=seed).x)


def test_k_means_finds_the_planted_blobs():
    cluster = pytest.importorskip("sklearn.cluster", reason="needs scikit-learn: pip install -e '.[sklearn]'")
    x, _, centres = data.blobs(400, 4, 3)
    found = cluster.KMeans(4, n_init=5, random_state=0).fit(x).cluster_centers_
    assert np.linalg.norm(found[:, None] - centres, axis=-1).min(axis=0).max() < 0.6
