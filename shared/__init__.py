"""Plumbing of the companion code: `from shared import Run, demo` is all that most scripts need.

Imported at once, not lazily: the decorator `demo` and the module `shared.demo` share a name, and only a binding made
here, after the module has been imported, makes `from shared import demo` give the decorator whatever was imported
before. It costs some 20 ms (standard library only). For the module itself use `from shared.demo import ...`.
"""
from shared.demo import Run, demo

__all__ = ["Run", "demo"]
