"""Data that is on every machine already: scikit-learn's small real sets, text that comes with Python, planted truths.

Nothing is downloaded. The same arguments (and, for `corpus`, the same Python version) always give the same data.
"""
from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from shared.errors import MissingDependency, ReaderError

# Debian ships these apart, and what pip installed is not the standard library.
NOT_EVERYWHERE = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}


class Samples(NamedTuple):
    """`x` (rows, features) float64, `y` (rows,) class as int64 or, for a regression, value as float64."""

    x: np.ndarray
    y: np.ndarray


class Linear(NamedTuple):
    """`x` (rows, features), `y` = x @ weights + noise (rows,), and the planted `weights` (features,)."""

    x: np.ndarray
    y: np.ndarray
    weights: np.ndarray


class Blobs(NamedTuple):
    """`x` (rows, features), the planted `labels` (rows,) int64 and `centres` (clusters, features)."""

    x: np.ndarray
    labels: np.ndarray
    centres: np.ndarray


def digits() -> Samples:
    """1,797 handwritten digits of 8 x 8 pixels between 0 and 1, as rows of 64; y is the digit."""
    return _scikit_learn("load_digits", largest=16.0)


def breast_cancer() -> Samples:
    """569 tumours, 30 measurements each in their own units; y is 1 for benign."""
    return _scikit_learn("load_breast_cancer")


def diabetes() -> Samples:
    """442 patients, 10 measurements each, standardised; y is the progression of the disease after a year."""
    return _scikit_learn("load_diabetes")


def _scikit_learn(loader: str, largest: float = 1.0) -> Samples:
    try:
        from sklearn import datasets
    except ImportError as missing:
        raise MissingDependency("scikit-learn", extra="sklearn") from missing
    x, y = getattr(datasets, loader)(return_X_y=True)
    return Samples(np.ascontiguousarray(x, dtype=np.float64) / largest, y)


def corpus(max_bytes: int = 1_000_000, kind: Literal["text", "code"] = "text") -> list[str]:
    """Documents that come with Python, in a fixed order, at most `max_bytes` of UTF-8 in all (the last one is cut).

    "text" is English: the language reference (`pydoc_data.topics`, 0.46 MB, at once), then the docstrings of the
    standard library, a document for each module (2.1 MB in all, 4 s). "code" is its source, file by file (11 MB).
    """
    documents, left = [], max_bytes
    for document in {"text": _prose, "code": _sources}[kind]():
        if left <= 0:
            break
        encoded = document.encode(errors="replace")[:left]
        documents.append(encoded.decode(errors="ignore"))
        left -= len(encoded)
    return documents


def _prose() -> Iterator[str]:
    from pydoc_data.topics import topics
    yield from (topics[name] for name in sorted(topics))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for source in _sources():
        docstrings = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
        if any(docstrings):
            yield "\n\n".join(filter(None, docstrings))


def _sources() -> Iterator[str]:
    library = sysconfig.get_path("stdlib")
    if not Path(library, "argparse.py").exists():
        raise ReaderError(f"this Python came without the source of its standard library (looked in {library})")
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = sorted(name for name in subfolders if name not in NOT_EVERYWHERE)
        files = [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
        yield from (text for file in files if (text := file.read_text("utf-8")).strip())


def linear(rows: int, features: int, noise: float = 0.1, seed: int = 0) -> Linear:
    """Least squares with a planted truth: x and weights are standard normal, the noise on y has deviation `noise`."""
    rng = np.random.default_rng(seed)
    x, weights = rng.standard_normal((rows, features)), rng.standard_normal(features)
    return Linear(x, x @ weights + noise * rng.standard_normal(rows), weights)


def blobs(rows: int, clusters: int, features: int = 2, separation: float = 8.0, seed: int = 0) -> Blobs:
    """Gaussian clusters of deviation 1 and (nearly) equal size; the two closest centres are `separation` apart."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, features))
    if clusters > 1:
        distances = np.linalg.norm(centres[:, None] - centres, axis=-1)
        centres *= separation / distances[~np.eye(clusters, dtype=bool)].min()
    labels = rng.permutation(np.arange(rows) % clusters)
    return Blobs(centres[labels] + rng.standard_normal((rows, features)), labels, centres)
