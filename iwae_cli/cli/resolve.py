"""Plain values from composed ones: interpolations, values of the environment, which no message shows, and ``~``."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from iwae_cli.core.errors import UserError, clip, hide, without_hidden
from iwae_cli.core.files import expanded

_ENVIRONMENT = re.compile(r"""(?:oc\.env|variable)\s*:\s*['"]?(\w*)""")
_NO_SECRETS = re.compile(r"IWAE_(DATA|OUTPUT)_DIR|WANDB_(?!API_KEY)\w+")


def resolved(cfg: Any, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the plain values of a config, or of some of its ``keys``, with ``~`` replaced."""
    cfg = cfg if keys is None else OmegaConf.masked_copy(cfg, list(keys))
    texts = list(texts_in(plain(cfg)))
    for path, text in texts:
        hide_environment(text, None)
        if found := re.search(r"\$\{\s*(hydra|now)\s*:", text):
            raise UserError(
                f"{'.'.join(map(str, path))}={clip(text)}: ${{{found[1]}:...}} cannot be used, since the same command "
                'has to find its run again; write the value itself, or have the shell write it: "$(date +%F)"'
            )
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        is_missing = isinstance(error, MissingMandatoryValue)
        why = f" has no value: write {error.full_key}=..." if is_missing else f": {first_line(error)}"
        raise UserError(f"{error.full_key}{why}") from None
    for path, text in texts:
        hide_environment(text, functools.reduce(lambda node, part: node[part], path, values))
    return _at_home(values)


def plain(cfg: Any) -> Any:
    """Return a config with its interpolations as they are written."""
    return OmegaConf.to_container(cfg, resolve=False)


def texts_in(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield every text inside ``node`` that holds an interpolation, and where it is."""
    if isinstance(node, str):
        yield from [(path, node)] if "${" in node else []
    elif isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from texts_in(child, (*path, key))


def _at_home(node: Any) -> Any:
    if isinstance(node, dict):
        return {str(key): _at_home(child) for key, child in node.items()}
    if isinstance(node, list):
        return [_at_home(child) for child in node]
    return expanded(node) if isinstance(node, str) else node


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (without_hidden(str(error)).strip().splitlines() or [type(error).__name__])[0].strip()


def secrets_in(written: str) -> list[str]:
    """Return which variables a text of a config takes from the environment, but for those that hold no secret."""
    return [name for name in _ENVIRONMENT.findall(written) if not _NO_SECRETS.fullmatch(name)]


def hide_environment(written: Any, value: Any) -> None:
    """Hide from messages what ``written``, a text of a config, takes from the environment, and its ``value``."""
    names = secrets_in(written)
    for name in names:
        hide(os.environ.get(name, ""), f"${{oc.env:{name}}}")
    if names:
        hide(value, written)


def _variable(name: str, default: Any) -> Any:
    """Resolve ``${variable:NAME,default}``: an empty variable is none, and a list as default makes commas separate."""
    text = os.environ.get(name, "").strip()
    if isinstance(default, list):
        # A container of OmegaConf: it resolves no list in place.
        return OmegaConf.create([part.strip() for part in text.split(",") if part.strip()] if text else default)
    return text or default


OmegaConf.register_new_resolver("variable", _variable, replace=True)
