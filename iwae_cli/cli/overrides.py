"""Read overrides by Hydra's grammar; where that fails, say how the same text is written."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from iwae_cli.cli.resolve import first_line, hide_environment
from iwae_cli.core.errors import UserError, clip

MAX_JOBS = 10_000
"""Jobs of one sweep at most; each is checked before the first begins, which takes hundredths of a second."""
_GRAMMAR_ERRORS = (HydraException, ValueError, RecursionError)
"""ValueError also for an integer of thousands of digits."""


def parse(overrides: Sequence[str], parser: OverridesParser, groups: Mapping[str, Sequence[str]]) -> list[Override]:
    """Return the overrides, each key once; ``groups`` holds the choices of every group."""
    parsed: dict[str, Override] = {}
    for number, text in enumerate(overrides):
        hide_environment(text, None)
        override = _read(_at_home(text), parser)
        if override is None:
            following = overrides[number + 1] if number + 1 < len(overrides) else ""
            raise UserError(_unreadable(text, following, parser, groups))
        key = override.key_or_group
        if override.package is not None:
            raise UserError(f"{clip(text)}: packages cannot be changed, write {clip(key)}=...")
        if override.is_delete():
            raise UserError(f"~{clip(key)}: nothing can be taken away, choose another value with {clip(key)}=...")
        before = parsed.setdefault(key, override)
        # As text: in Python 1, 1.0 and true are equal.
        if before.type != override.type or repr(before.value()) != repr(override.value()):
            raise UserError(f"{clip(str(before.input_line))} and {clip(text)} contradict each other: write one of them")
    return list(parsed.values())


def values(override: Override, is_grid: bool) -> list[str]:
    """Return what the jobs of a sweep have in place of ``override``, as Hydra's basic sweeper writes it."""
    key, asked = override.get_key_element(), clip(str(override.input_line))
    if override.is_sweep_override() and not override.is_discrete_sweep():
        if is_grid:
            raise UserError(f"{asked} is a range for a search: add hydra/sweeper=optuna")
        value: Any = override.value()
        return [f"{key}={value.start}"]
    try:
        if not override.is_sweep_override():
            return [f"{key}={override.get_value_element_as_str()}"]
        found = [f"{key}={text}" for text in islice(override.sweep_string_iterator(), MAX_JOBS + 1)]
    except (*_GRAMMAR_ERRORS, ArithmeticError) as error:
        raise UserError(f"{asked}: {first_line(error)}") from None
    if not found:
        raise UserError(f"{asked} gives no job")
    return found


def several(override: Override, in_python: bool) -> str:
    """Return the message for an override that asks for several runs where one is possible."""
    text = quoted(str(override.input_line).partition("=")[2], Quote.double)
    as_text = shlex.quote(f"{override.get_key_element()}={text}")
    way = "call iwae_cli.train once for each" if in_python else "add -m"
    return f"{clip(str(override.input_line))} asks for several runs: {way} (a list is written [1,2], a text {as_text})"


def quoted(text: str, by: Quote = Quote.single) -> str:
    """Return ``text`` as a quoted value of Hydra's grammar."""
    return QuotedString(text, by).with_quotes()


def _read(text: str, parser: OverridesParser) -> Override | None:
    try:
        (override,) = parser.parse_overrides([text])
    except _GRAMMAR_ERRORS:
        return None
    return override if override.key_or_group else None


def _at_home(text: str) -> str:
    """Return an override with ``~`` at the start of its values replaced: neither the shell nor Hydra reads it there."""
    key, equals, value = text.partition("=")
    home = re.compile(r"~[^\0'\"\[\]{}()]*")
    parts = [quoted(os.path.expanduser(part)) if home.fullmatch(part) else part for part in value.split(",")]
    return f"{key}{equals}{','.join(parts)}"


def _unreadable(text: str, following: str, parser: OverridesParser, groups: Mapping[str, Sequence[str]]) -> str:
    """Return the message for an argument that is no override, with the form that works where there is one."""
    key, equals, value = (part.strip() for part in text.partition("="))
    homes = [group for group, names in groups.items() if key in names]
    if text.startswith("-"):
        return f"cannot read {clip(text, 100)!r}: options are for the command line, here write key=value"
    if key in ("help", "version"):
        better = f"--{key}"
    elif not equals and following.startswith("="):
        better = f"{key}=..., without blanks around ="
    elif not equals and (key in groups or re.fullmatch(r"[\w.]+\.\w+|seed|batch_size", key)) and "=" not in following:
        better = f"{key}={following or '...'}"
    elif not equals and len(homes) == 1:
        better = f"{homes[0]}={key}"
    elif not equals:
        better = "key=value, and quote values with blanks: 'key=\"a b\"'"
    elif value.startswith("[") and "]" not in value and "]" in following:
        better = shlex.quote(f"{key}={value}{following}")
    elif re.search(r"\s[\w.]+=", value):
        better = "the overrides without quotes around all of them"
    else:
        value = value.lstrip("=")
        listed = re.fullmatch(r"\[(.*)\]", value)
        parts = listed and ",".join(quoted(part.strip(), Quote.double) for part in listed[1].split(","))
        tries = [f"{key}={value}", *([f"{key}=[{parts}]"] if parts else []), f"{key}={quoted(value, Quote.double)}"]
        is_open = re.match(r"[\[{(]", value) and not listed
        found = [] if is_open else [shlex.quote(again) for again in tries if _read(again, parser)]
        better = clip(found[0], 120) if found else "key=value, quote special characters: 'key=\"...\"'"
    return f"cannot read {clip(text, 100)!r}: write {better}"
