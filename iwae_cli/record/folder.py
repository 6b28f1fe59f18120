"""The run folder: which file holds what. A contract that reports, sweeps and notebooks build on; needs no torch."""

from __future__ import annotations

import json
import os
import socket
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from iwae_cli.core.errors import UserError
from iwae_cli.core.files import write_json, write_text

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where it is: a report reads a thousand of these files."""

DERIVED = ("metrics.csv", "log_likelihood.npz", "figures/training.png", "figures/bound_vs_k.png")
OF_IMAGES = ("figures/samples.png", "figures/reconstructions.png")


class RunFolder:
    """Paths and small files of one run.

    Attributes:
        path: absolute path of the folder; its name is the identity of the training.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def identity(self) -> str:
        """Name of the training."""
        return self.path.name

    @property
    def checkpoint(self) -> Path:
        """State after the last saved step."""
        return self.path / "checkpoint.pt"

    @property
    def best(self) -> Path:
        """State with the best validation bound."""
        return self.path / "best.pt"

    @property
    def figures(self) -> Path:
        """Pictures."""
        return self.path / "figures"

    @property
    def log(self) -> Path:
        """What was done when, and what went wrong."""
        return self.path / "train.log"

    def evaluation(self, name: str) -> Path:
        """Folder of one evaluation."""
        return self.path / "evaluations" / name

    def begin(self, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
        """Write what was asked for: ``config.yaml`` and ``overrides.yaml``."""
        write_text(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        write_text(self.path / "overrides.yaml", yaml.safe_dump(list(overrides)))

    def set_status(self, status: str, step: int, error: str | None = None) -> None:
        """Write ``status.json``: running, interrupted, failed or finished."""
        value = {
            "status": status,
            "step": step,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "error": error,
        }
        write_json(self.path / "status.json", value)

    def status(self) -> str | None:
        """running, interrupted, failed or finished; None where it cannot be read."""
        try:
            return str(json.loads((self.path / "status.json").read_text())["status"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run.

        Raises:
            UserError: this is not a run folder.
        """
        path = self.path / "config.yaml"
        try:
            config = yaml.load(path.read_text(), LOADER)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.path} is not a run folder: it has no config.yaml") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
        if not isinstance(config, dict):
            raise UserError(f"{path} is damaged: it holds no configuration")
        for group in ("data", "model", "objective", "optimizer"):
            if not isinstance(config.get(group), dict):
                raise UserError(f"{path} is damaged: it names no {group}")
        return config

    def result(self) -> dict[str, Any] | None:
        """``result.json`` of a finished run; None where there is none."""
        path = self.path / "result.json"
        try:
            result: dict[str, Any] = json.loads(path.read_text())
            if not {"identity", "steps", "evaluation"} <= result.keys():
                raise ValueError("it holds no result")
            str(result["evaluation"]["name"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it, the same command evaluates again") from None
        return result

    def lacks(self, pictures: bool) -> list[str]:
        """Which files are not there, or not whole, that a finished run has and that can be made of the others.

        Args:
            pictures: whether its observations are images.
        """
        files = [*DERIVED, *(OF_IMAGES if pictures else ())]
        if "figures" in ((self.result() or {}).get("reasons") or {}):
            # They could not be drawn when they were to be: another try would come to the same.
            files = [name for name in files if not name.startswith("figures/")]
        return [name for name in files if not _whole(self.path / name)]

    def set_aside(self) -> Path:
        """Rename the folder to the first free ``<identity>.old-N``; nothing is deleted."""
        n = 1
        while (aside := self.path.with_name(f"{self.identity}.old-{n}")).exists():
            n += 1
        return self.path.rename(aside)


def _whole(path: Path) -> bool:
    """Whether a file is there, and ends as what was written whole does; of arrays, whether every bit is right."""
    if not path.is_file():
        return False
    if path.suffix == ".npz":
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        except (zipfile.BadZipFile, EOFError, zlib.error):
            return False
    end = b"IEND\xaeB`\x82" if path.suffix == ".png" else b"\n"
    return path.read_bytes().endswith(end)


def drawable(image_shape: Sequence[int]) -> bool:
    """Return whether observations of this shape are images: (height, width), or with 1 or 3 channels in front."""
    return len(image_shape) == 2 or (len(image_shape) == 3 and image_shape[0] in (1, 3))
