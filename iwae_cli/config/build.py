"""From plain nested dicts to checked objects: this stands between what people write and what runs.

A node is a dict with ``_target_`` (the dotted name of a class) and that class's keyword arguments. Every fault
is a ``UserError`` of one line that names the override. No Hydra here: ``iwae_cli.load`` reads a run's plain
``config.yaml`` through the same checks.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from iwae_cli.core.errors import UserError

BASES = {
    "data": "iwae_cli.data.base.Dataset",
    "model": "iwae_cli.models.base.Architecture",
    "objective": "iwae_cli.objectives.base.Objective",
    "optimizer": "torch.optim.Optimizer",
    "schedule": "iwae_cli.training.schedule.Schedule",
    "validation": "iwae_cli.training.settings.Validation",
    "evaluation": "iwae_cli.evaluation.settings.Evaluation",
    "device": "iwae_cli.core.device.Device",
    "logger": "iwae_cli.record.wandb.WandbLogger",
}
"""Group -> what every class that its ``_target_`` names must be. By name: importing them imports torch."""

ALLOW_VARIABLE = "IWAE_ALLOW_TARGETS"
"""Environment variable with further packages whose classes may be named, comma separated; no config can set it."""

OWN_PACKAGES = ("iwae_cli", "torch.optim")
"""Packages whose classes may be named."""

LARGEST_INTEGER = 2**63 - 1
"""What torch and numpy can hold."""

_PLAIN = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_PLAIN_MANY = {int: "integers", float: "numbers", bool: "true or false", str: "texts"}


def construct(config: Mapping[str, Any], groups: Iterable[str] = tuple(BASES)) -> dict[str, Any]:
    """The object of every group of a resolved, plain ``config``.

    ``optimizer`` is a ``functools.partial`` that wants the parameters.

    Raises:
        UserError: anything that cannot be as written.
    """
    objects = {}
    for group in groups:
        if group not in config:
            raise UserError(f"{group} is missing: choose one with {group}=...")
        module, _, name = BASES[group].rpartition(".")
        objects[group] = build(config[group], getattr(importlib.import_module(module), name), group)
    return objects


def build(node: Any, base: type, path: str) -> Any:
    """The object that ``node`` describes, an instance of ``base``.

    Raises:
        UserError: see the module.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UserError(f"{path} must hold a _target_, the dotted name of a class, got {_show(node)}")
    cls = resolve(node["_target_"], base, f"{path}._target_")
    values = {str(key): value for key, value in node.items() if key != "_target_"}
    if _is_optimizer(base):
        return _optimizer(cls, check_arguments(cls, values, path, given={"params"}), path)
    return call(cls, check_arguments(cls, values, path), path)


def resolve(target: Any, base: type, path: str, packages: Iterable[str] = OWN_PACKAGES) -> type:
    """The class that ``target`` names.

    Only modules of the allowed packages are imported, the class is looked up in the module's own names, and
    it must have been defined in an allowed package too: walking attributes would reach ``os`` from anywhere.

    Args:
        target: dotted name.
        base: what the class must derive from (or be).
        path: for the message.
        packages: allowed packages; those of ``IWAE_ALLOW_TARGETS`` are allowed too.

    Raises:
        UserError: not such a class.
    """
    allowed = (*packages, *_further_packages())
    wanted = f"{path} must name a class of {' or '.join(allowed)}"
    if base is not object:
        wanted += f" derived from {base.__name__}"
    if not isinstance(target, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", target):
        raise UserError(f"{wanted}, got {_show(target)}")
    module_name, _, name = target.rpartition(".")
    if not _is_within(module_name, allowed):
        raise UserError(f"{wanted}, got {target} (the environment variable {ALLOW_VARIABLE} allows more)")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{path}={target} cannot be imported: {error}") from None
    found = vars(module).get(name)
    if not inspect.isclass(found):
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
        raise UserError(f"{wanted}, got {target}{nearest(name, classes)}")
    if not _is_defined_in(allowed, found) or not issubclass(found, base) or inspect.isabstract(found):
        raise UserError(f"{wanted}, got {target}")
    return found


def check_arguments(cls: type, values: Mapping[str, Any], path: str, given: Iterable[str] = ()) -> dict[str, Any]:
    """``values`` checked against the annotations of ``cls``'s constructor, nested nodes built.

    Args:
        cls: the class.
        values: keyword arguments as written.
        path: where they were written; empty for the root.
        given: arguments that come from elsewhere.

    Raises:
        UserError: unknown or missing key, wrong type.
    """
    given = set(given)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in given
    }
    for key in values:
        if key not in parameters:
            raise UserError(unknown_key(_join(path, key), path, parameters))
    hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    for name, parameter in parameters.items():
        if name not in values and parameter.default is parameter.empty:
            key = _join(path, name)
            raise UserError(f"{key} is missing: write {key}=... ({_describe(hints.get(name, Any))})")
    return {key: convert(value, hints.get(key, Any), _join(path, key)) for key, value in values.items()}


def call(cls: type, arguments: Mapping[str, Any], path: str) -> Any:
    """``cls(**arguments)``, its ValueError told as a fault of the override at ``path``.

    Raises:
        UserError: the constructor refused a value.
    """
    try:
        return cls(**arguments)
    except ValueError as error:
        message = one_line(error)
        named = re.match(r"[^\W\d]\w*", message)
        if named and named[0] in arguments:
            raise UserError(_join(path, message)) from error
        raise UserError(f"{path}: {message}" if path else message) from error


def convert(value: Any, hint: Any, path: str) -> Any:
    """``value`` as an instance of the annotation ``hint``; an int serves as a float, a bool serves as no number.

    Raises:
        UserError: it is not one.
    """
    if hint is Any:
        return value
    if type(value) is int and abs(value) > LARGEST_INTEGER:
        raise UserError(f"{path} must be at most {LARGEST_INTEGER} in size, got a number of {len(str(value))} digits")
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in options:
            return None
        writable = [option for option in options if option is not NoneType and _is_writable(option, value)]
        if len(writable) == 1:
            return convert(value, writable[0], path)
        for option in writable:
            try:
                return convert(value, option, path)
            except UserError:
                continue
    elif origin is Literal:
        # 1 == True in Python, so types are compared as well.
        if any(value == option and type(value) is type(option) for option in options):
            return value
        raise UserError(f"{path} must be {_describe(hint)}, got {_show(value)}{nearest(value, options)}")
    elif origin is list:
        if isinstance(value, (list, tuple)):
            return [convert(item, options[0], f"{path}[{i}]") for i, item in enumerate(value)]
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            items = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
            if len(items) == len(value):
                return tuple(convert(v, o, f"{path}[{i}]") for i, (v, o) in enumerate(zip(value, items, strict=True)))
    elif origin is dict or hint is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint in (int, bool, str, NoneType):
        if type(value) is hint:
            return value
    elif isinstance(hint, type):
        return build(value, hint, path)
    raise UserError(f"{path} must be {_describe(hint)}, got {_show(value)}{_as_text(value, hint, path)}")


def unknown_key(key: str, path: str, known: Iterable[str]) -> str:
    """The line for a key that is not one of ``known`` under ``path``."""
    known = list(known)
    line = f"{key} is unknown"
    close = difflib.get_close_matches(key.rpartition(".")[2], known, n=1, cutoff=0.5)
    if close:
        line += f"; did you mean {_join(path, close[0])}?"
    return f"{line} ({f'{path} has' if path else 'there are'} {', '.join(known) or 'no keys'})"


def nearest(value: Any, known: Iterable[Any]) -> str:
    """``; did you mean ...?`` or nothing."""
    close = difflib.get_close_matches(str(value), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def one_line(error: BaseException | str) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split())


def _optimizer(cls: type, arguments: Mapping[str, Any], path: str) -> functools.partial[Any]:
    closure = inspect.signature(vars(cls).get("step", lambda closure=None: None)).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(f"{path}._target_ must take a step without a closure, which {cls.__name__} does not")
    for key, value in arguments.items():
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{path}.{key} must be finite, got {_show(value)}")
    return functools.partial(cls, **arguments)


def try_optimizer(cls: Callable[..., Any], arguments: Mapping[str, Any], path: str, on_cpu: bool) -> None:
    """Make an optimizer of two small parameters on the processor, and let it take a step with dense gradients.

    Args:
        cls, arguments: the class, and its keyword arguments.
        path: where they were written.
        on_cpu: whether that is where it will be used. If not, what ``capturable`` asks of the device says nothing.

    Raises:
        UserError: it refuses, or torch cannot make the folder that it wants first.
    """
    import torch

    def refusal(kept: Mapping[str, Any]) -> str | None:
        try:
            # A matrix and a vector, since some optimizers take only one of them.
            tried = [torch.nn.Parameter(torch.zeros(1, 1)), torch.nn.Parameter(torch.zeros(1))]
            optimizer = cls(tried, **kept)
            for parameter in tried:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            of_the_device = isinstance(error, AssertionError) and "capturable" in str(error)
            return None if of_the_device and not on_cpu else one_line(error)
        except OSError as error:
            # The first optimizer has torch import its compiler, which makes its folder at once.
            raise UserError(
                f"torch cannot make the folder {error.filename} for compiled code ({error.strerror}): "
                "set TORCHINDUCTOR_CACHE_DIR to one that can be written to"
            ) from error
        return None

    message = refusal(arguments)
    if message is not None:
        # torch names the quantity ("learning rate"), not the key: the key is the one whose default would do.
        guilty = [key for key in arguments if refusal({k: v for k, v in arguments.items() if k != key}) is None]
        where = f"{path}.{guilty[0]}={_show(arguments[guilty[0]])}" if guilty else path
        raise UserError(f"{where} is refused by {cls.__name__}: {message}")


def _is_optimizer(base: type) -> bool:
    optim = sys.modules.get("torch.optim")
    return optim is not None and issubclass(base, optim.Optimizer)


def _further_packages() -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in os.environ.get(ALLOW_VARIABLE, "").split(",")) if name)


def _is_defined_in(packages: Iterable[str], cls: type) -> bool:
    home = sys.modules.get(cls.__module__)
    return _is_within(cls.__module__, packages) and home is not None and vars(home).get(cls.__name__) is cls


def _is_within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _is_writable(hint: Any, value: Any) -> bool:
    """Whether an option of a union can be written in a config: a class such as Tensor only as a node."""
    plain = get_origin(hint) is not None or hint in (*_PLAIN, dict)
    return plain or (isinstance(value, Mapping) and "_target_" in value)


def _describe(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if hint is NoneType:
        return "null"
    if origin in (Union, UnionType):
        return " or ".join(_describe(o) for o in options if o is NoneType or _is_writable(o, None))
    if origin is Literal:
        return f"one of {', '.join(map(str, options))}" if len(options) > 1 else str(options[0])
    if origin is list:
        return f"a list of {_describe_many(options[0])}"
    if origin is tuple and options[-1] is Ellipsis:
        return f"a list of {_describe_many(options[0])}"
    if origin is tuple:
        return f"a list of {len(options)}: {', '.join(map(_describe, options))}"
    if hint is Any:
        return "anything"
    return "keys and values" if origin is dict or hint is dict else f"a {hint.__name__}"


def _describe_many(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if hint in _PLAIN_MANY:
        return _PLAIN_MANY[hint]
    if origin is list:
        return f"lists of {_describe_many(options[0])}"
    if origin is Literal:
        return ", ".join(map(str, options))
    return _describe(hint)


def _show(value: Any) -> str:
    """``value`` as it would be typed."""
    if isinstance(value, str):
        return value if value and value == value.strip() else repr(value)
    try:
        return json.dumps(value).replace('"', "")
    except (TypeError, ValueError):
        return repr(value)


def _as_text(value: Any, hint: Any, path: str) -> str:
    """What to type instead of a number (or list, or truth value) in quotes, which is a text; else nothing."""
    if not isinstance(value, str):
        return ""
    try:
        convert(json.loads(value), hint, path)
    except (ValueError, UserError):
        return ""
    return f" as a text: write {path}={value} without quotes (of a variable: {path}=$NAME)"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
