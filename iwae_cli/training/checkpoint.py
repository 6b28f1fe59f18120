"""The state of a run in one file, written whole or not at all.

Every random number is derived from the step it belongs to, so the state is weights, optimizer, step and what has been
accumulated; there is no generator state.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from iwae_cli.core.errors import UserError
from iwae_cli.core.files import write_bytes
from iwae_cli.data.base import Data

T = TypeVar("T")


@dataclass
class State:
    """What a run has to remember.

    Attributes:
        identity: name of the training this state belongs to.
        names: chosen name of every group, as in the name of the folder.
        data_sha256: hash of the data it was trained on.
        image_shape, levels: shape of one observation and number of grey levels, needed to build the model again.
        total_steps: steps of the whole schedule.
        plan: what was decided once and may change bits (device kind, threads, versions).
        model, optimizer: their state dicts.
        step: optimizer steps done.
        bound_sum: sum of the training bound over the images of the running pass, nats, float64.
        best: step and validation bound of the best weights so far, if any.
        seconds: time spent training, over all sessions.
    """

    identity: str
    names: dict[str, str]
    data_sha256: str
    image_shape: tuple[int, ...]
    levels: int | None
    plan: dict[str, Any]
    total_steps: int = 0
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    bound_sum: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def change_plan(self, key: str, value: int) -> None:
        """From this step on something is done otherwise than it was."""
        self.plan[key] = f"{self.plan[key]} until step {self.step}, then {value}"


def save(state: State, path: Path) -> None:
    """Write ``state`` to ``path``, atomically."""
    _write({**vars(state), "model": _alone(state.model)}, path)


def load(path: Path, identity: str | None = None) -> State:
    """Read a state back, onto the CPU.

    Raises:
        UserError: the file is missing, damaged, or belongs to another training than ``identity``.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there: the run has no checkpoint yet")
    state: State = _read(path, lambda held: State(**held))
    _require(path, state.identity, identity)
    return state


def save_best(state: State, model: Mapping[str, Tensor], path: Path) -> None:
    """Write the best weights so far to ``path``, atomically.

    Args:
        state: its ``best`` is about these weights.
        model: their state dict.
        path: of the file.
    """
    _write({"identity": state.identity, **state.best, "model": _alone(model)}, path)


def load_best(path: Path, state: State) -> tuple[int, dict[str, Tensor]]:
    """The step and the weights that ``save_best`` wrote, onto the CPU.

    Raises:
        UserError: the file is missing, damaged, or belongs to another training than ``state``.
    """
    if not path.is_file():
        if not state.best:
            raise UserError(f"{path} is not there: no validation bound was finite yet; use evaluation.weights=last")
        raise UserError(
            f"{path} is gone; evaluation.weights=last needs it not, and the command of the run with restart=true "
            "trains anew"
        )
    best: tuple[str, int, dict[str, Tensor]] = _read(path, lambda h: (h["identity"], int(h["step"]), dict(h["model"])))
    _require(path, best[0], state.identity)
    return best[1:]


def _alone(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values; a part of a larger tensor would be saved with all of it."""
    return {name: value.clone() for name, value in model.items()}


def _write(value: dict[str, Any], path: Path) -> None:
    # Through memory: torch's own writer of files tells of a full disk in C++, without saying that it is full.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def _read(path: Path, made: Callable[[dict[str, Any]], T]) -> T:
    try:
        with zipfile.ZipFile(path) as archive:
            # torch itself compares no checksum: a flipped bit would be another weight.
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        return made(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged; the command of the run "
            "with restart=true trains anew and keeps the old folder under another name"
        ) from error


def _require(path: Path, identity: str, wanted: str | None) -> None:
    # The hash decides: another version, or a user, may give the folder another readable name.
    if wanted is not None and identity.rpartition("-")[2] != wanted.rpartition("-")[2]:
        raise UserError(f"{path} is a checkpoint of {identity}, not of {wanted}")


def require_data(state: State, data: Data) -> None:
    """Refuse to go on with data that has changed.

    Raises:
        UserError: ``data`` is not what ``state`` was trained on.
    """
    if state.data_sha256 != data.sha256():
        raise UserError(
            f"the files of {data.name} are not those that {state.identity} was trained on; "
            "bring them back, or begin anew with restart=true"
        )


def fingerprint(state: State, with_optimizer: bool) -> str:
    """Hash of the weights, and of the optimizer's memory if asked, for the identity of a run that begins from them."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}", inner)
        elif isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.contiguous().numpy().tobytes())
        else:
            digest.update(f"{name} {value!r} ".encode())

    add("model", dict(state.model))
    if with_optimizer:
        add("optimizer", state.optimizer["state"])
    return digest.hexdigest()


def first_fault(error: RuntimeError) -> str:
    """What torch says first of a state dict that does not fit, without its list of everything."""
    lines = str(error).splitlines()
    return lines[1 if len(lines) > 1 else 0].strip()
