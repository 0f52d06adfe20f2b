"""What every chapter's `grading.py` returns: one grade for each task of its `exercises.py`."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shared.errors import ReaderError, WorkerFailed


@dataclass(frozen=True)
class Grade:
    name: str
    passed: bool
    message: str = ""

    @classmethod
    def of(cls, name: str, grader: Callable[[], None]) -> Grade:
        """Run a grader, which asserts: what it raises becomes the message, as answers may raise anything."""
        try:
            grader()
        except NotImplementedError:
            return cls(name, False, "not written yet")
        except AssertionError as error:
            return cls(name, False, str(error))
        except WorkerFailed as error:
            written = "NotImplementedError" not in str(error)
            return cls(name, False, str(error) if written else "not written yet")
        except ReaderError:
            raise
        except Exception as error:
            return cls(name, False, f"raised {type(error).__name__}: {error}")
        return cls(name, True)
