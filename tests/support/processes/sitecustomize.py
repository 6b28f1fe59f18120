"""Python imports this first in every process that a test starts: blank pictures, and no wait for the disk.

Real pictures cost a process two seconds.
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


class BlankPictures(MetaPathFinder):
    """Replaces ``Figure.savefig`` when matplotlib is imported, which costs nothing where it is not."""

    def find_spec(self, name: str, *_: Any) -> Any:
        if name != "matplotlib.figure":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: Any) -> None:
            execute(module)
            module.Figure.savefig = lambda figure, file, **_: Path(file).write_bytes(PICTURE)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, BlankPictures())
os.fsync = lambda descriptor: None
