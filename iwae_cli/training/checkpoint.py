"""The state of a run in one file, written whole or not at all.

Every random number is derived from the step it belongs to, so the state is weights, optimizer, step and what has been
accumulated; there is no generator state.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from iwae_cli.core.errors import UserError
from iwae_cli.core.files import atomic_path, write_bytes

T = TypeVar("T")

log = logging.getLogger("iwae_cli")


@dataclass
class State:
    """Everything that a run needs to resume.

    Attributes:
        identity: name of the training.
        names: chosen name of every config group.
        data_sha256: hash of the data it was trained on.
        image_shape, levels: shape of one observation and number of grey levels, needed to build the model again.
        total_steps: steps of the whole schedule.
        plan: what may change bits (device kind, threads, versions, form of the step), for the record.
        model, optimizer: their state dicts.
        average: moving average of the weights, by name; empty without ``training.ema``.
        step: optimizer steps done.
        bound_sum: sum of the training bound over the images of the running pass, nats, float64.
        diagnostics: sum of each of ``diagnostics`` over the measured steps of the running pass.
        measured: number of these steps.
        best: step and validation bound of the best weights so far, if any.
        seconds: time spent training, over all sessions.
        draws: draws of q that the steps have scored, over all images; None after versions before 0.6.
        before_extra: of a last pass that is validated only as such: ``best`` before it, and the ``row`` of its metrics
            in a longer training, which may start from this state.
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
    diagnostics: dict[str, float] = field(default_factory=dict)
    measured: int = 0
    best: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    draws: int | None = None
    average: dict[str, Tensor] = field(default_factory=dict)
    before_extra: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """What is evaluated: the average of the weights where there is one."""
        return self.average or self.model

    @property
    def compiled(self) -> bool | None:
        """Whether the steps so far were compiled; None before the first one."""
        return self._current("compiler") != "None" if self.step else None

    def update_plan(self, **now: Any) -> list[str]:
        """Record in ``plan`` how steps are made from here on; return what changed, one phrase each."""
        changes = []
        for key, value in now.items():
            if self.step and key in self.plan:
                before = self.plan[key]
                if self._current(key) != str(value):
                    changes.append(f"{key} was {before} and is {value}")
                    self.plan[key] = f"{before} until step {self.step}, then {value}"
            else:
                self.plan[key] = value
        return changes

    @property
    def sources(self) -> dict[str, str]:
        """The hashes of the source files in ``plan``, see ``identity.sources``."""
        return {name: self._current(name) for name in self.plan if name.endswith(".py")}

    def _current(self, key: str) -> str:
        """Return ``plan[key]`` after its last change."""
        return str(self.plan.get(key)).rpartition(", then ")[2]


def previous(path: Path) -> Path:
    """Return where ``save`` keeps the checkpoint that was at ``path`` before."""
    return path.with_name(f"previous-{path.name}")


def save(state: State, path: Path) -> None:
    """Write ``state`` to ``path``, atomically; the checkpoint there becomes the ``previous`` one if it is whole."""
    if path.exists() and _is_whole(path):
        with atomic_path(previous(path)) as temporary:
            shutil.copyfile(path, temporary)
    _write({**vars(state)}, path)


def drop_previous(path: Path) -> None:
    """Remove the previous checkpoint once the one at ``path`` has been read back."""
    if previous(path).exists() and _is_whole(path):
        previous(path).unlink()


def load(path: Path, identity: str | None = None) -> State:
    """Read a state, on the CPU; where it is damaged, the previous one, with a warning.

    Raises:
        UserError: the file is missing, damaged without a previous one, or of another training than ``identity``.
    """
    if not exists(path):
        raise UserError(f"{path} is not there: the run has no checkpoint yet")
    try:
        state = _read(path, _usable)
    except UserError:
        if not (previous(path).exists() and _is_whole(previous(path))):
            raise
        state = _read(previous(path), _usable)
        fault = "damaged" if path.exists() else "gone"
        log.warning(
            "%s, saved at step %s, is %s; the one of step %d is used", path, _last_step(path), fault, state.step
        )
    _require(path, state.identity, identity)
    return state


def exists(path: Path) -> bool:
    """Return whether there is a checkpoint, or a previous one."""
    return path.exists() or previous(path).exists()


def _usable(held: dict[str, Any]) -> State:
    """Return the state; of a training that is not finished, versions before 0.5 could save weights that are NaN."""
    state = State(**held)
    if state.step < state.total_steps and any(value.isnan().any() for value in state.model.values()):
        raise ValueError("weights are NaN")
    return state


def not_finite(state: State, weights: Iterable[str]) -> str | None:
    """Return in words what of a state is not finite, such as one of these ``weights``; None if all is.

    Other tensors of the model may be infinite: a mask is.
    """
    for name in weights:
        if not state.model[name].isfinite().all():
            return f"weights {name}"
    for parameter in state.optimizer["state"].values():
        for name, value in parameter.items():
            if isinstance(value, Tensor) and not value.isfinite().all():
                return f"{name} of the optimizer"
    return None if math.isfinite(state.bound_sum) else "bound"


def _last_step(path: Path) -> object:
    """Return the step at which a damaged checkpoint was saved, as the status of the run records it."""
    try:
        return json.loads(path.with_name("status.json").read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def save_best(state: State, model: Mapping[str, Tensor], path: Path) -> None:
    """Write the best weights so far, described by ``state.best``, to ``path``, atomically.

    Those of ``before_extra`` become the ``previous`` ones.
    """
    if path.exists() and (before := state.before_extra.get("best")) and before != state.best:
        with suppress(UserError):
            if load_best(path, state)[0] == before["step"]:
                with atomic_path(previous(path)) as temporary:
                    shutil.copyfile(path, temporary)
    _write({"identity": state.identity, **state.best, "model": model}, path)


def load_best(path: Path, state: State) -> tuple[int, dict[str, Tensor]]:
    """Return the step and the weights that ``save_best`` wrote, on the CPU.

    Raises:
        UserError: the file is missing, damaged, or belongs to another training than ``state``.
    """
    if not path.is_file():
        # With schedule.patience the training's own command refuses the last weights.
        last = "use iwae-eval RUN_FOLDER evaluation.weights=last"
        if not state.best:
            raise UserError(f"{path} is not there: no validation bound was finite yet; {last}")
        raise UserError(f"{path} is gone; {last}, or retrain by the run's command with restart=true")
    best: tuple[str, int, dict[str, Tensor]] = _read(path, lambda h: (h["identity"], int(h["step"]), dict(h["model"])))
    _require(path, best[0], state.identity)
    return best[1:]


def _write(value: dict[str, Any], path: Path) -> None:
    # Copies: torch saves a slice with the whole tensor that it is part of.
    value["model"] = {name: tensor.clone() for name, tensor in value["model"].items()}
    # Through memory: where the disk is full, torch's own file writer raises an error that does not say so.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def _read(path: Path, convert: Callable[[dict[str, Any]], T]) -> T:
    try:
        with zipfile.ZipFile(path) as archive:
            # torch does not compare checksums: a flipped bit would be another weight.
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        return convert(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged; the run's command with "
            "restart=true retrains and keeps the old folder under another name"
        ) from error


def _is_whole(path: Path) -> bool:
    try:
        return _read(path, bool)
    except UserError:
        return False


def _require(path: Path, identity: str, wanted: str | None) -> None:
    # The hash decides: another version, or a user, may give the folder another readable name.
    if wanted is not None and identity.rpartition("-")[2] != wanted.rpartition("-")[2]:
        raise UserError(f"{path} is a checkpoint of {identity}, not of {wanted}")


def require_data(identity: str, trained_on: str, sha256: str, name: str) -> None:
    """Refuse data that has changed.

    Raises:
        UserError: the data called ``name``, with hash ``sha256``, is not what ``identity`` was trained on.
    """
    if trained_on != sha256:
        raise UserError(
            f"the files of {name} are not those that {identity} was trained on; "
            "restore them, or retrain with restart=true"
        )


def fingerprint(state: State, with_optimizer: bool) -> str:
    """Return a hash of the weights, and of the optimizer's state if asked, for the identity of a later run."""
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

    add("model", dict(state.weights))
    if with_optimizer:
        add("optimizer", state.optimizer["state"])
    return digest.hexdigest()
