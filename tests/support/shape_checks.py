"""What checks the annotations of the package while its tests run; see ``conftest``."""

from __future__ import annotations

from typing import TypeVar

from beartype import BeartypeConf, beartype

T = TypeVar("T")

# An int is a float, as PEP 484 has it and beartype by itself has not.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(what: T) -> T:
    """A class or function that checks what it is given; one inside another function is made, and left, as it is.

    Beartype would write a new check for it whenever that other one is called, which takes longer than most of them do.
    """
    return what if "<locals>" in getattr(what, "__qualname__", "") else _beartype(what)
