"""The run folder: which file holds what. Reports, sweeps and notebooks rely on it; needs no torch."""

from __future__ import annotations

import os
import re
import socket
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from iwae_cli.core.errors import UserError
from iwae_cli.core.files import EVALUATIONS, here, write_json, write_text
from iwae_cli.record import former, schema

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where it is installed: a report reads a thousand of these files."""

DERIVED = ("metrics.csv", "log_likelihood.npz", "figures/training.png", "figures/bound_vs_k.png")
OF_IMAGES = ("figures/samples.png", "figures/reconstructions.png")
SET_ASIDE = re.compile(r"\.old-\d+$")


class RunFolder:
    """Paths and small files of one run.

    Attributes:
        path: absolute path of the folder.
        identity: its name, which ends with the hash of the training.
        checkpoint: state after the last saved step.
        best: weights with the best validation bound.
        figures: folder of the pictures.
        log: what was done when, and what went wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path if path.is_absolute() else here() / path
        self.identity = self.path.name
        self.checkpoint = self.path / "checkpoint.pt"
        self.best = self.path / "best.pt"
        self.figures = self.path / "figures"
        self.log = self.path / "train.log"

    def evaluation(self, name: str) -> Path:
        """Return the folder of one evaluation."""
        return self.path / EVALUATIONS / name

    def begin(self, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
        """Write the settings: ``config.yaml`` and ``overrides.yaml``."""
        write_text(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        write_text(self.path / "overrides.yaml", yaml.safe_dump(list(overrides)))

    def set_status(self, status: str, step: int, error: str | None = None) -> None:
        """Write ``status.json``: running, interrupted, failed or finished."""
        process = {"pid": os.getpid(), "host": socket.gethostname()}
        write_json(self.path / "status.json", {"status": status, "step": step, **process, "error": error})

    def status_record(self) -> dict[str, Any]:
        """Return the content of ``status.json``; empty if there is none.

        Raises:
            UserError: it is damaged.
        """
        return schema.read_json(self.path / "status.json", schema.Process) or {}

    def status(self) -> str | None:
        """Return running, interrupted, failed or finished; None where it cannot be read."""
        with suppress(UserError):
            return self.status_record().get("status")
        return None

    def config(self, result: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the resolved configuration, that of a run of 0.2.0 with the class paths and keys of this version.

        ``result`` is what ``result()`` returns, where that has been read already.

        Raises:
            UserError: this is not a run folder, or its ``result.json`` is of another configuration.
        """
        path = self.path / "config.yaml"
        try:
            config = yaml.load(path.read_text(), LOADER)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.path} is not a run folder: it has no config.yaml") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none, no UTF-8
            raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
        config = schema.check(former.translated(config), schema.Config, path)
        try:
            result = result or self.result()
        except UserError:
            return config
        if result is not None:
            schema.check_same(config, result, path)
        return config

    def result(self) -> dict[str, Any] | None:
        """Return ``result.json`` of a finished run, or None.

        Raises:
            UserError: the file is damaged.
        """
        try:
            return schema.read_json(self.path / "result.json", schema.Result)
        except schema.Damaged as error:
            way = "remove it, the same command evaluates again"
            if not self.checkpoint.exists():
                way = "copy that of its evaluation in evaluations/ over it, or retrain with restart=true"
            raise UserError(f"{error}; {way}") from None

    def lacks(self) -> list[str]:
        """Return the derived files of a finished run that are missing or not whole; its checkpoint regenerates them."""
        result = self.result() or {}
        # Results of 0.2.0 do not hold the shape of an image.
        images = drawable(result.get("dataset", {}).get("image_shape", ()))
        files = [*DERIVED, *(OF_IMAGES if images else ())]
        if "figures" in (result.get("reasons") or {}):
            # Drawing them failed, and would fail again.
            files = [name for name in files if not name.startswith("figures/")]
        return [name for name in files if not _whole(self.path / name)]

    def set_aside(self) -> Path:
        """Rename the folder to the first free ``<identity>.old-N`` and return that; nothing is deleted."""
        n = 1
        while (aside := self.path.with_name(f"{self.identity}.old-{n}")).exists():
            n += 1
        return self.path.rename(aside)


def folder_ending(output_dir: Path, digest: str, first: str) -> RunFolder | None:
    """Return the folder in ``output_dir`` whose name ends with ``-digest``; of several the one named ``first``."""
    if os.path.lexists(output_dir / first):
        return RunFolder(output_dir / first)
    return next((RunFolder(path) for path in sorted(output_dir.glob(f"*-{digest}")) if path.is_dir()), None)


def folders_recording(output_dir: Path, text: str) -> list[RunFolder]:
    """Return the run folders in ``output_dir`` whose config.yaml holds ``text``."""
    with suppress(OSError):
        return [RunFolder(path) for path in _recording(output_dir, text, output_dir.stat().st_mtime_ns)]
    return []


@lru_cache(maxsize=4)
def _recording(output_dir: Path, text: str, changed: int) -> list[Path]:
    # Cached until a folder is added, for the jobs of a sweep.
    found = []
    for path in sorted(output_dir.glob("*/config.yaml")):
        with suppress(OSError, UnicodeDecodeError):
            if not SET_ASIDE.search(path.parent.name) and text in path.read_text():
                found.append(path.parent)
    return found


def _whole(path: Path) -> bool:
    """Return whether a file is there and ends as a complete one does; of arrays, whether every checksum is right."""
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
