"""The type checker of the package's annotations during tests; see ``conftest``."""

from __future__ import annotations

from typing import TypeVar

from beartype import BeartypeConf, beartype

T = TypeVar("T")

# Accept an int for a float, as PEP 484 does.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(what: T) -> T:
    """Return ``what`` with its arguments and results checked; return definitions inside functions unchanged.

    Beartype would compile their checks again at every call of the outer function.
    """
    return what if "<locals>" in getattr(what, "__qualname__", "") else _beartype(what)
