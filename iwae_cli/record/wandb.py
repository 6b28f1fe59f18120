"""Weights & Biases as a logger; the only file that imports wandb."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from iwae_cli.core.files import shown, write_json
from iwae_cli.record.loggers import Logger, Metrics, RunInfo, Status, flat

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]
AXIS = "step"
SWEEP = "WANDB_SWEEP_ID"
SYNC = "wandb sync "
MEMORY = "wandb.json"
"""File of a run folder: id, project and entity of its W&B run, mode asked for, place and content of the record."""
UPLOAD_SECONDS = 60
"""Time that wandb has for uploads when a run ends."""

log = logging.getLogger("iwae_cli")


@final
@dataclass(kw_only=True, eq=False)
class WandbLogger(Logger):
    """One W&B run for every run folder.

    Offline, everything is in ``<run folder>/wandb/offline-run-*``, or where ``WANDB_DIR`` says, to be uploaded with
    ``left_to_upload``. The id is random and kept in ``wandb.json``: uploading twice, or uploading a run that was
    resumed, makes one run there, and the same training in another folder is another run. ``WANDB_RUN_ID``, which
    ``wandb agent`` sets, comes first. A resumed run begins a new offline folder with its whole history, so the newest
    folder alone is complete.

    ``mode=online`` falls back to ``offline``, with a warning, where there is no key or no network; ``disabled`` does
    nothing at all. Beside the ``tags`` it has the names of data, model and objective.

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
    _info: RunInfo | None = field(default=None, init=False)
    _memory: dict[str, Any] = field(default_factory=dict, init=False)

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
        self._info = run
        self._run = self._started(run)
        folder, own = Path(self._run.settings.sync_dir).resolve(), run.folder.resolve()
        self._remember(id=self._run.id, folder=str(folder.relative_to(own) if folder.is_relative_to(own) else folder))
        self._run.define_metric(AXIS, hidden=True)
        self._run.define_metric("pass", step_metric=AXIS, hidden=True)
        self._run.define_metric("*", step_metric=AXIS)
        for step, metrics in history:
            self.log(step, metrics)

    def log(self, step: int, metrics: Metrics) -> None:
        """Record one row; a metric that is None has no point there."""
        if self._run is not None:
            self._run.log({AXIS: step} | {name: value for name, value in metrics.items() if value is not None})

    def image(self, step: int, name: str, path: Path) -> None:
        """Record a picture, copied into W&B's folder."""
        self._media(step, name, "Image", str(path))

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Record a histogram of the finite ``values``; -inf is a proper log-weight but has no place on an axis."""
        if finite := [value for value in map(float, values) if math.isfinite(value)]:
            self._media(step, name, "Histogram", finite)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._media(step, name, "Table", list(columns), [list(row) for row in rows])

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the final numbers; nested names are joined with ``/``."""
        if self._run is not None:
            self._run.summary.update(flat(values))

    def close(self, status: Status) -> None:
        """Finish, waiting ``UPLOAD_SECONDS`` for uploads."""
        if self._run is None or self._info is None:
            return
        self._run.finish(exit_code=0 if status == "finished" else 1)
        # Where wandb raised, or hangs, the record is left to be uploaded.
        self._remember(holds=self._info.evaluation if status == "finished" else None, uploaded=not self._run.offline)

    def recorded(self, run: RunInfo) -> bool:
        """Return whether W&B, or the disk where offline is asked for, has the result in this project, by this id."""
        known = _memory(run.folder)
        asked = {"project": self.project, "entity": self.entity, "holds": run.evaluation, **_from_agent()}
        if self.mode == "disabled":
            return True
        # A record of an earlier version lacks most of this, and is complete.
        if not known or any(known.get(key, value) != value for key, value in asked.items()):
            return False
        # Where online was not to be had, the same command does not wait for it again: it prints the line that uploads.
        is_enough = self.mode in ("offline", known.get("mode"))
        return known["uploaded"] or (is_enough and (run.folder / known["folder"]).is_dir())

    def _media(self, step: int, name: str, kind: str, *content: Any) -> None:
        if self._run is not None:
            import wandb

            value = getattr(wandb, kind)(*content)
            if kind == "Table":
                # Otherwise wandb keeps another copy of it in the home folder, for an artifact.
                value.bind_to_run(self._run, name, step)
            self._run.log({AXIS: step, name: value})

    def _remember(self, **changed: Any) -> None:
        assert self._info is not None
        self._memory |= changed
        write_json(self._info.folder / MEMORY, self._memory)

    def _started(self, run: RunInfo) -> wandb.Run:
        """Return a new W&B run, offline where it cannot be online."""
        new = secrets.token_hex(8)
        start = {"id": _memory(run.folder).get("id", new), "project": self.project, "entity": self.entity}
        self._remember(**(start | _from_agent()), mode=self.mode, folder="", holds=None, uploaded=False)
        place = Path(os.environ.get("WANDB_DIR") or run.folder).expanduser().absolute()
        place.mkdir(parents=True, exist_ok=True)
        while self.mode == "online":
            before = {*place.glob("wandb/run-*")}
            try:
                online = self._init(run, place, "online")
                log.info("W&B: recording at %s", online.url)
                return online
            except Exception as error:
                why = f"{type(error).__name__}: {error}".splitlines()[0]
            if leftovers := {*place.glob(f"wandb/run-*-{self._memory['id']}")} - before:
                import wandb

                # The service keeps trying, and refuses the same id until then.
                wandb.teardown()
                for leftover in leftovers:
                    shutil.rmtree(leftover, ignore_errors=True)
            # The id of a run that was deleted there is never free again; one that was asked for stays.
            if "HTTP 409" not in why or self._memory["id"] == new or _from_agent():
                log.warning("W&B: cannot go online (%s); recording offline instead", why)
                break
            log.warning("W&B refuses the id %s (%s); recording as %s", self._memory["id"], why, new)
            self._remember(id=new)
        return self._init(run, place, "offline")

    def _init(self, run: RunInfo, place: Path, mode: Literal["online", "offline"]) -> wandb.Run:
        import wandb

        names = [str(run.config.get(key, {}).get("name", "")) for key in ("data", "model", "objective")]
        # The run of an agent has all three; wandb ignores others, and says so.
        where = {} if SWEEP in os.environ else {key: self._memory[key] for key in ("id", "project", "entity")}
        begun = wandb.init(
            mode=mode,
            dir=str(place),
            **where,
            group=self.group or run.group,
            job_type=os.environ.get("WANDB_JOB_TYPE", "train"),
            tags=list(dict.fromkeys([*self.tags, *(name for name in names if 0 < len(name) <= 64)])),
            name=self.name or run.identity[-128:],  # the longest that W&B takes; what tells runs apart is at the end
            notes=os.environ.get("WANDB_NOTES") or " ".join(run.overrides) or None,
            config=dict(run.config),
            # Apart from any other run in this process: neither returned for it nor finished by it.
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                git_commit=run.config.get("commit"),
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
        for key, node in run.config.items():
            # An agent that varies a group has put the name of its choice in place of the node.
            if isinstance(node, Mapping) and not isinstance(begun.config[key], Mapping):
                begun.config.update({f"{key}.{name}": value for name, value in node.items()})
        return begun


def left_to_upload(run_folder: Path, evaluation: str) -> dict[str, str]:
    """Return a line of a table, by its label, about the newest record of a run folder; empty if that is uploaded.

    ``upload`` is ``wandb sync`` with the record; ``not uploaded`` says that it holds another evaluation.
    """
    known = _memory(run_folder)
    if not known or known["uploaded"] or not known["folder"]:
        return {}
    folder = (run_folder / known["folder"]).resolve()
    if not folder.is_dir():
        return {}
    # Records of earlier versions, and those that wandb did not finish, do not say what they hold.
    held = known.get("holds")
    if held and held != evaluation:
        return {"not uploaded": f"the W&B record holds {held}; logger=offline records this evaluation"}
    return {"upload": f"{SYNC}{shlex.quote(shown(folder))}"}


def _memory(run_folder: Path) -> dict[str, Any]:
    """Return the content of ``wandb.json``, of a run of an earlier version what its newest record says; or nothing."""
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError, KeyError):
        read = json.loads((run_folder / MEMORY).read_text())
        known = read | {key: str(read[key]) for key in ("id", "folder")} | {"uploaded": read["uploaded"] is True}
    # By their time of day, which follows "run-".
    records = sorted(run_folder.glob("wandb/*run-*-*"), key=lambda path: path.name.partition("run-")[2])
    if records and not known:
        name = records[-1].name
        known = {"id": name.rpartition("-")[2], "folder": f"wandb/{name}", "uploaded": name.startswith("run-")}
    if known and any((run_folder / known["folder"]).glob("*.wandb.synced")):
        known["uploaded"] = True
    return known


def _from_agent() -> dict[str, str]:
    """Return the id that ``wandb agent``, or a person, gives to the next run, if one does."""
    return {"id": agents} if (agents := os.environ.get("WANDB_RUN_ID")) else {}
