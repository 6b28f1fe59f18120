"""Checks of the package's annotations, shapes included, while tests run; see ``conftest``."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

CALLS = 20
"""Calls of each function that each test checks: a check often costs more than what it checks."""

calls: Counter[Any] = Counter()
"""Calls of each function in this test."""

# Accept an int for a float, as PEP 484 does.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped


def install(package: str) -> None:
    """Check the functions of ``package``, which is not imported yet."""
    # The import hook puts jaxtyping.jaxtyped(typechecker=...) above every definition.
    jaxtyping.jaxtyped = lambda typechecker: checked
    jaxtyping.install_import_hook(package, "shape_checks.checked")


def checked(what: Any) -> Any:
    """Return a function with its first calls in each test checked; a dataclass with such an ``__init__``.

    Definitions inside functions stay as they are: their checks would be compiled again at every call of the outer one.
    """
    if inspect.isclass(what):
        if is_dataclass(what) and "__init__" in vars(what):
            what.__init__ = checked(what.__init__)  # type: ignore[method-assign]  # that of the dataclass, replaced
        return what
    if "<locals>" in what.__qualname__:
        return what
    # Compiled at the first call: a process calls few of all functions.
    compiled: Callable[..., Any] | None = None

    @functools.wraps(what)
    def check(*arguments: Any, **named: Any) -> Any:
        nonlocal compiled
        calls[what] += 1
        if calls[what] > CALLS:
            return what(*arguments, **named)
        if compiled is None:
            compiled = _jaxtyped(what, typechecker=_of_result)
        return compiled(*arguments, **named)

    return check


def _of_result(what: Callable[..., Any]) -> Callable[..., Any]:
    """Before each call jaxtyping checks the arguments, after it the arguments and the result: one is enough."""
    result = what.__annotations__.get("return", Any)
    if result is not Any:
        what.__annotations__ = {"return": result}
    return _beartype(what)
