"""The type checker of the package's annotations during tests; see ``conftest``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# Accept an int for a float, as PEP 484 does.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(what: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``what`` with its arguments and result checked; return definitions inside functions unchanged.

    Beartype would compile their checks again at every call of the outer function. Before each call jaxtyping checks the
    arguments, by a function without a result, and after it the arguments and the result: there the result is enough.
    Checks are compiled at the first call: a process calls few of all functions.
    """
    if "<locals>" in what.__qualname__:
        return what
    result = what.__annotations__.get("return", Any)
    if result is not Any:
        what.__annotations__ = {"return": result}
    compiled: Callable[..., Any] | None = None

    def check(*arguments: Any, **named: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = _beartype(what)
        return compiled(*arguments, **named)

    return check
