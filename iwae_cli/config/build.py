"""Build checked objects from plain nested dicts: every value a person writes passes through here before anything runs.

A node is a dict with ``_target_`` (the dotted name of a class) and keyword arguments of that class. Every fault is a
``UserError`` of one line that names the override. No Hydra here: ``iwae_cli.load`` builds from a run's plain
``config.yaml`` with the same checks.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from iwae_cli.config.guesses import closest, nearest, unknown_key
from iwae_cli.core.errors import UserError, clip, one_line

BASES = {
    "data": "iwae_cli.data.base.Dataset",
    "model": "iwae_cli.models.base.Architecture",
    "objective": "iwae_cli.objectives.base.Objective",
    "optimizer": "torch.optim.Optimizer",
    "schedule": "iwae_cli.training.schedule.Schedule",
    "validation": "iwae_cli.training.settings.Validation",
    "evaluation": "iwae_cli.evaluation.settings.Evaluation",
    "device": "iwae_cli.core.device.Device",
    "logger": "iwae_cli.record.loggers.Logger",
}
"""Group -> base class of the classes it may name. Strings, because importing them imports torch."""

ALLOW_VARIABLE = "IWAE_ALLOW_TARGETS"
"""Environment variable with further packages whose classes may be named, comma separated; no config can set it."""

OWN_PACKAGES = ("iwae_cli", "torch.optim")
"""Packages whose classes may be named."""

LARGEST_INTEGER = 2**63 - 1
"""What torch and numpy can hold."""

_PLAIN = (int, float, bool, str, Path, dict, list, tuple, NoneType, Any)
_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "missing": "given",
}
"""pydantic's name of an error -> what to write; other errors keep pydantic's words."""


_trusted: list[Path] = []
"""Folders of ``--config-dir`` and what they lie in, see ``trust``."""


def trust(folders: Any) -> None:
    """Let classes be imported and named that are defined in these folders of ``--config-dir``, or beside them.

    What was trusted before is so no longer, so that a run never gets a class from the folder of another run. A relative
    path, which no run records, would mean another folder in every current one: it is ignored.
    """
    given = convert(folders, str | list[str] | None, "config_dir")
    named = map(Path, [given] if isinstance(given, str) else given or ())
    _trusted[:] = [place for folder in named if folder.is_absolute() for place in (folder, folder.parent)]
    # At the end: a file of a user must not take the place of a module of Python.
    sys.path += [str(place) for place in dict.fromkeys(_trusted) if str(place) not in sys.path]


def construct(config: Mapping[str, Any], groups: Iterable[str] = tuple(BASES)) -> dict[str, Any]:
    """Return the object of every group of a resolved, plain ``config``.

    ``optimizer`` is a ``functools.partial`` without its parameters; ``logger``, which holds any number of nodes, each
    under a name, is a tuple of objects.
    """
    trust(config.get("config_dir"))
    objects: dict[str, Any] = {}
    for group in groups:
        module, _, name = BASES[group].rpartition(".")
        base = getattr(importlib.import_module(module), name)
        if group == "logger":
            nodes = config.get(group, {})
            if "_target_" in nodes:
                raise UserError("logger: a yaml of this group holds a name, and below it _target_ and its keys")
            objects[group] = tuple(build(node, base, f"logger.{key}") for key, node in nodes.items())
        elif group in config:
            objects[group] = build(config[group], base, group)
        else:
            raise UserError(f"{group} is missing: choose one with {group}=...")
    return objects


def build(node: Any, base: type, path: str) -> Any:
    """Return the object that ``node`` describes, an instance of ``base``; ``path`` is where the node was written."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UserError(f"{path} must hold a _target_, the dotted name of a class, got {show(node)}")
    cls = resolve(node["_target_"], base, f"{path}._target_")
    values = {str(key): value for key, value in node.items() if key != "_target_"}
    if base.__module__ == "torch.optim.optimizer":
        return _optimizer(cls, check_arguments(cls, values, path, given={"params"}), path)
    return call(cls, check_arguments(cls, values, path), path)


def resolve(target: Any, base: type, path: str, packages: Iterable[str] = OWN_PACKAGES) -> type:
    """Return the class that the dotted name ``target`` names, derived from ``base``; ``path`` is for the message.

    Only modules of ``packages``, of those in ``IWAE_ALLOW_TARGETS`` and of trusted folders are imported, the class is
    looked up in the module's own names, and it must be defined in an allowed module too: walking attributes would
    reach ``os`` from anywhere.
    """
    allowed = (*packages, *(name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(",") if name.strip()))
    wanted = f"{path} must name a class of {' or '.join(allowed)}"
    if base is not object:
        wanted += f" derived from {base.__name__}"
    if not isinstance(target, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", target):
        raise UserError(f"{wanted}, got {show(target)}")
    module_name, _, name = target.rpartition(".")
    if not _is_within(module_name, allowed):
        allows = f"the environment variable {ALLOW_VARIABLE} allows more, --config-dir what lies in it and beside it"
        if gone := [str(folder) for folder in _trusted if not folder.is_dir()]:
            allows = f"{gone[0]} is gone; --config-dir names another place"
        raise UserError(f"{wanted}, got {target} ({allows})")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # what a module of a user does when it is imported
        raise UserError(f"{path}={target} cannot be imported: {described(error)}") from error
    found = vars(module).get(name)
    if not inspect.isclass(found):
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
        raise UserError(f"{wanted}, got {target}{nearest(name, classes)}")
    home = vars(sys.modules.get(found.__module__, object))
    is_ours = _is_within(found.__module__, allowed) and home.get(found.__name__) is found
    if not is_ours or not issubclass(found, base):
        raise UserError(f"{wanted}, got {target}")
    lacking = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
    if lacking:
        raise UserError(f"{path}={target}: {name} lacks {lacking}, needed for every class derived from {base.__name__}")
    return found


def check_arguments(cls: type, values: Mapping[str, Any], path: str, given: Container[str] = ()) -> dict[str, Any]:
    """Return ``values`` checked against the annotations of ``cls``'s constructor, nested nodes built.

    ``path`` is where the values were written, empty for the root; arguments in ``given`` come from elsewhere.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in given
    }
    for key in values:
        if key not in parameters:
            raise UserError(unknown_key(_join(path, key), path, parameters))
    for name, parameter in parameters.items():
        if name not in values and parameter.default is parameter.empty:
            key = _join(path, name)
            raise UserError(f"{key} is missing: write {key}=...")
    hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    return {key: convert(value, hints.get(key, Any), _join(path, key)) for key, value in values.items()}


def call(cls: type, arguments: Mapping[str, Any], path: str) -> Any:
    """Return ``cls(**arguments)``; where that raises a ValueError, the UserError names the override."""
    try:
        return cls(**arguments)
    except ValueError as error:
        message = one_line(error)
        named = re.match(r"[^\W\d]\w*", message)
        if named and named[0] in arguments:
            raise UserError(_join(path, message)) from error
        raise UserError(f"{path}: {message}" if path else message) from error


def convert(value: Any, hint: Any, path: str) -> Any:
    """Return ``value`` as an instance of the annotation ``hint``: an int serves as a float, a bool never as a number.

    A node (see the module) serves where ``hint`` is, or may be, a class.
    """
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    classes = [option for option in options if not _is_plain(option)]
    if classes and (len(classes) == len(options) or (isinstance(value, Mapping) and "_target_" in value)):
        return build(value, classes[0], path)
    # Half a tenth of a second, which --help does not need.
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(_strict(hint)).validate_python(value)
    except ValidationError as error:
        raise UserError(_complaint(error.errors(), hint, path)) from None


def described(error: BaseException) -> str:
    """Return type, message and, if it is in code of a user, the place of an error, in one line."""
    return f"{type(error).__name__}: {one_line(error)[:150]}{place_outside(error)}"


def place_outside(error: BaseException) -> str:
    """Return the last place in code of a user that an error came through, in brackets; empty if there is none."""
    ours = (str(Path(__file__).parents[1]), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    theirs = [frame for frame in frames if "/lib/python" not in frame.filename]
    return f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""


def _optimizer(cls: type, arguments: Mapping[str, Any], path: str) -> functools.partial[Any]:
    for key, value in arguments.items():
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{path}.{key} must be finite, got {show(value)}")
    return functools.partial(cls, **arguments)


def _is_within(module: str, packages: Iterable[str]) -> bool:
    """Whether ``module`` is in one of ``packages``, or its file is where its name says in a trusted folder."""
    if any(module == package or module.startswith(f"{package}.") for package in packages):
        return True
    place = Path(*module.split("."))
    files = [folder / part for folder in _trusted for part in (place.with_suffix(".py"), place / "__init__.py")]
    loaded = getattr(sys.modules.get(module), "__file__", None)
    return any(file.is_file() and (loaded is None or file.samefile(loaded)) for file in files)


def _is_plain(hint: Any) -> bool:
    """Whether values of ``hint`` can be written in a config without a node."""
    return get_origin(hint) is not None or hint in _PLAIN


def _strict(hint: Any) -> Any:
    """Return ``hint`` for pydantic: scalars are not coerced, lists serve as tuples, classes in a union are left out."""
    from pydantic import Field

    origin, options = get_origin(hint), get_args(hint)
    if hint is int:
        return Annotated[int, Field(strict=True, ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)]
    if hint in (float, bool, str):
        return Annotated[hint, Field(strict=True)]
    if origin in (Union, UnionType):
        return Union[tuple(_strict(option) for option in options if _is_plain(option))]  # noqa: UP007 (the options are known at run time only)
    if origin in (list, tuple, dict):
        return origin[tuple(_strict(option) for option in options)]
    return hint


def _complaint(errors: list[Any], hint: Any, path: str) -> str:
    """Return one line about the deepest of pydantic's ``errors``; equally deep ones are the options of a union."""
    # Besides indices, a location holds names of union members, which nobody writes.
    places = [[part for part in error["loc"] if isinstance(part, int)] for error in errors]
    depth = max(map(len, places))
    deepest = [(place, error) for place, error in zip(places, errors, strict=True) if len(place) == depth]
    place = deepest[0][0]
    wanted = dict.fromkeys(_wanted(error) for where, error in deepest if where == place)
    got = deepest[0][1]["input"]
    line = f"{path}{''.join(f'[{index}]' for index in place)} must be {' or '.join(wanted)}, got {show(got)}"
    if "a list" in wanted and not place and isinstance(got, str | int | float):
        return f"{line}: write {shlex.quote(f'{path}=[{closest(got, literals(hint)) or show(got)}]')}"
    span = re.fullmatch(r"(\d{1,9})(?:\.\.|-|:)(\d{1,9})", str(got))
    if "an integer" in wanted and span and int(span[1]) < int(span[2]):
        return f"{line}; for several runs write -m {shlex.quote(f'{path}=range({span[1]},{int(span[2]) + 1})')}"
    return line + nearest(got, literals(hint))


def _wanted(error: Mapping[str, Any]) -> str:
    if error["type"] in ("too_long", "too_short"):
        return f"a list of {error['ctx'].get('max_length', error['ctx'].get('min_length'))}"
    if error["type"] == "literal_error":
        choices = str(error["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
        return f"one of {choices}" if "," in choices else choices
    return _EXPECTED.get(error["type"]) or error["msg"].removeprefix("Input should be ").replace("'", "")


def literals(hint: Any) -> list[str]:
    """Return the texts among the literals inside ``hint``."""
    options = get_args(hint)
    return [o for o in options if isinstance(o, str)] + [text for option in options for text in literals(option)]


def show(value: Any) -> str:
    """Return ``value`` as it would be typed, its middle left out where it is long."""
    if isinstance(value, int) and len(digits := str(value)) > 100:
        return f"a number of {len(digits)} digits"
    if isinstance(value, str):
        return clip(value) if value and value == value.strip() else clip(repr(value))
    try:
        return clip(json.dumps(value).replace('"', ""))
    except (TypeError, ValueError, RecursionError):
        return clip(repr(value))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
