"""Python imports this first in every process that a test starts: it leaves out what costs seconds and decides nothing.

Real pictures cost a process two seconds, and ``torch._dynamo``, which torch imports to tell its compiler what not to
compile, another one; and no process waits for the disk.
"""

from __future__ import annotations

import os
import sys
from base64 import b64decode
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PICTURE = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg==")


def blank(figure: Any, file: str, **_: Any) -> None:
    Path(file).write_bytes(PICTURE)


def as_it_is(function: Any = None, recursive: bool = True) -> Any:
    return function or as_it_is


def without_gradients(step: Any) -> Any:
    """For optimizers that are not differentiable, as torch's are by default."""
    from torch import no_grad

    return no_grad()(step)


REPLACED = {
    "matplotlib.figure": lambda module: setattr(module.Figure, "savefig", blank),
    "torch._compile": lambda module: setattr(module, "_disable_dynamo", as_it_is),
    "torch.optim.optimizer": lambda module: setattr(module, "_use_grad_for_differentiable", without_gradients),
}


class Replacing(MetaPathFinder):
    """Calls what ``REPLACED`` has for a module when that is imported."""

    def find_spec(self, name: str, *_: Any) -> Any:
        if name not in REPLACED:
            return None
        replace = REPLACED.pop(name)
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: Any) -> None:
            execute(module)
            replace(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Replacing())
os.fsync = lambda descriptor: None
