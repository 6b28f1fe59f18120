"""Weights & Biases as a logger; the only file that imports wandb."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from iwae_cli.record.loggers import Logger, Metrics, RunInfo, Status

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]
AXIS = "step"
ONLINE = "wandb/run-*"
UPLOAD_SECONDS = 60
"""Time that wandb has for uploads when a run ends."""

log = logging.getLogger("iwae_cli")


@final
@dataclass(kw_only=True, eq=False)
class WandbLogger(Logger):
    """One W&B run for every run.

    Offline, everything is in ``<run folder>/wandb/offline-run-*``, to be uploaded with ``sync_command()``. The id
    follows the identity of the run, so uploading twice, or uploading a run that was resumed, makes one run there.
    A resumed run begins a new offline folder with its whole history, so the newest folder alone is complete.

    Args:
        mode: ``online`` falls back to ``offline``, with a warning, where there is no key or no network;
            ``disabled`` does nothing at all.
        project: name of the project there.
        entity: user or team; None is W&B's own default.
        group: what runs are grouped by; None takes the group of the sweep, if there is one.
        tags: labels.
        name: what the run is called; None takes its identity.

    Raises:
        ValueError: a name is empty, too long or has a character that W&B refuses.
    """

    mode: Mode
    project: str
    entity: str | None
    group: str | None
    tags: list[str]
    name: str | None
    _run: wandb.Run | None = field(default=None, init=False)
    _folder: Path | None = field(default=None, init=False)
    _to_upload: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 0 < len(self.project) <= 128 or set(self.project) & set("/\\#?%:"):
            raise ValueError(f"project must have 1 to 128 characters and none of / \\ # ? % :, got {self.project!r}")
        for key in ("entity", "group", "name"):
            value = getattr(self, key)
            if value is not None and not 0 < len(value) <= 128:
                raise ValueError(f"{key} must have 1 to 128 characters or be null, got {value!r}")
        for tag in self.tags:
            if not 0 < len(tag) <= 64:
                raise ValueError(f"tags must have 1 to 64 characters each, got {tag!r}")

    def open(self, run: RunInfo, history: Sequence[tuple[int, Metrics]]) -> None:
        """Begin a W&B run and replay ``history`` into it."""
        if self.mode == "disabled":
            return
        # A shell's way to unset one, which wandb would refuse as a value.
        for variable in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
            del os.environ[variable]
        # Read by wandb when it is first imported; what the user has set wins. Without the first it would look up
        # the address of its error reporting even offline; a silent wandb does not ask for a key at a terminal.
        for variable, value in {
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",
            "WANDB_INIT_TIMEOUT": "20",
            "WANDB_FINISH_TIMEOUT": str(UPLOAD_SECONDS),
        }.items():
            os.environ.setdefault(variable, value)
        self._run, self._to_upload = self._started(run)
        self._folder = Path(self._run.settings.sync_dir).resolve()
        self._run.define_metric(AXIS)
        self._run.define_metric("*", step_metric=AXIS)
        for step, metrics in history:
            self.log(step, metrics)

    def log(self, step: int, metrics: Metrics) -> None:
        """Record one row; a metric that is None has no point there."""
        if self._run is not None:
            self._run.log({AXIS: step} | {name: value for name, value in metrics.items() if value is not None})

    def image(self, step: int, name: str, path: Path) -> None:
        """Record a picture, copied into W&B's folder."""
        if self._run is not None:
            import wandb

            self._run.log({AXIS: step, name: wandb.Image(str(path))})

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Record a histogram of the finite ``values``; -inf is a proper log-weight but has no place on an axis."""
        if self._run is not None and (finite := [value for value in map(float, values) if math.isfinite(value)]):
            import wandb

            self._run.log({AXIS: step, name: wandb.Histogram(finite)})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the final numbers; nested names are joined with ``/``."""
        if self._run is not None:
            self._run.summary.update(dict(_flat(values)))

    def close(self, status: Status) -> None:
        """Finish, waiting ``UPLOAD_SECONDS`` for uploads."""
        if self._run is None:
            return
        uploads, self._to_upload = not self._to_upload, True
        self._run.finish(exit_code=0 if status == "finished" else 1)
        # Where wandb raised, or hangs, the record is left to be uploaded.
        self._to_upload = not uploads

    def sync_command(self) -> str | None:
        """Return ``wandb sync`` with the newest folder, if that holds anything not uploaded."""
        if not self._to_upload or self._folder is None:
            return None
        return _sync(self._folder)

    def _started(self, run: RunInfo) -> tuple[wandb.Run, bool]:
        """Return a new W&B run, and whether it has to be uploaded by hand."""
        if self.mode == "offline":
            return self._init(run, "offline"), True
        before = {*run.folder.glob(ONLINE)}
        try:
            online = self._init(run, "online")
            log.info("W&B: recording at %s", online.url)
            return online, False
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("W&B: cannot go online (%s); recording offline instead", why)
        if leftovers := {*run.folder.glob(ONLINE)} - before:
            import wandb

            # The service keeps trying, and refuses the same id until then.
            wandb.teardown()
            for leftover in leftovers:
                shutil.rmtree(leftover, ignore_errors=True)
        return self._init(run, "offline"), True

    def _init(self, run: RunInfo, mode: Literal["online", "offline"]) -> wandb.Run:
        import wandb

        return wandb.init(
            mode=mode,
            dir=str(run.folder),
            id=hashlib.blake2b(run.identity.encode(), digest_size=8).hexdigest(),
            project=self.project,
            entity=self.entity,
            group=self.group or run.group,
            job_type="train",
            tags=self.tags or None,
            name=self.name or run.identity,
            notes=" ".join(run.overrides) or None,
            config=dict(run.config),
            # Apart from any other run in this process: neither returned for it nor finished by it.
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                finish_timeout_raises=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_save_requirements=False,
                # What a kill -9 may cost of the offline file, in seconds.
                x_transaction_log_flush_interval=1.0,
            ),
        )


def left_to_upload(run_folder: Path) -> str | None:
    """Return ``wandb sync`` with the newest record in a run folder, if that is offline and not uploaded."""
    # By their time of day, which follows "run-".
    records = sorted((run_folder / "wandb").glob("*run-*-*"), key=lambda path: path.name.partition("run-")[2])
    if not records or not records[-1].name.startswith("offline-") or any(records[-1].glob("*.wandb.synced")):
        return None
    return _sync(records[-1].resolve())


def _sync(folder: Path) -> str:
    here = Path.cwd()
    return f"wandb sync {shlex.quote(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
