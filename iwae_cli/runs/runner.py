"""One process working on one run: training from where the run stands, its record, its evaluation, its pictures."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

import iwae_cli
from iwae_cli.core import progress, signals
from iwae_cli.core.device import compiler, oom_as_run_failed
from iwae_cli.core.errors import Interrupted, RunFailed, UserError, one_line
from iwae_cli.core.files import RunLock, as_user_error, atomic_path, shown, trouble, write_json
from iwae_cli.core.noise import GeneratorNoise, KeyedNoise, generator
from iwae_cli.core.signals import Signals
from iwae_cli.data.base import Data, Split
from iwae_cli.evaluation.estimator import EstimatorInput, array_name
from iwae_cli.evaluation.likelihood import forecast, log_likelihood, work
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.record import summary
from iwae_cli.record.folder import RunFolder, drawable
from iwae_cli.record.identity import changed, evaluation_name, sources
from iwae_cli.record.jsonl import JsonlLogger, read_history
from iwae_cli.record.loggers import FanOut, Logger, RunInfo, Status
from iwae_cli.record.wandb import left_to_upload
from iwae_cli.runs.evaluate import SOURCE, evaluate, git_state, not_drawn
from iwae_cli.runs.experiment import Experiment
from iwae_cli.runs.extend import extend
from iwae_cli.training import checkpoint
from iwae_cli.training.diagnostics import kl_of_units
from iwae_cli.training.minibatches import Minibatches
from iwae_cli.training.settings import EXACT_EMA
from iwae_cli.training.steps.choose import choose_step
from iwae_cli.training.trainer import Trainer

VALIDATION_SEED = 0
"""Noise and binarization of the validation during training: fixed, so that all objectives are compared on the same."""

VALIDATION_ROWS = 2000
"""Fixed too: the shape of a product may change its last bits, and so which weights are the best."""

FORECAST_SECONDS = 10.0
"""Training before the evaluation is forecast, which takes a second or two."""

RETRAIN = "restart=true retrains, and keeps the old folder under another name"

log = logging.getLogger("iwae_cli")


class Runner:
    """One process working on one run; the hooks of the trainer.

    Args:
        experiment, data, folder: the run, its data, and where it is recorded.
        signals: stop the run between two steps.
    """

    def __init__(self, experiment: Experiment, data: Data, folder: RunFolder, signals: Signals) -> None:
        self.experiment = experiment
        self.data = data
        self.folder = folder
        self.signals = signals
        self.device, dtype = experiment.device.resolve(), experiment.device.dtype
        self.logger: Logger = FanOut([])
        self.progress: progress.Progress | None = None
        self._began: float | None = None
        self._validation: Split | None = None
        self.model = experiment.model.build(
            data.image_shape,
            data.mean(),
            generator("cpu", experiment.seed, "weights"),
            data.levels,
            std=data.std() if data.levels is None else 1.0,
        ).to(device=self.device, dtype=dtype)
        initial = experiment.initial
        if initial is not None:
            self.model.load_state_dict(initial.weights)
        if experiment.train == "inference":
            self.model.generative.requires_grad_(False)
        self.trainer = Trainer(
            model=self.model,
            objective=experiment.objective,
            optimizer=experiment.optimizer([p for p in self.model.parameters() if p.requires_grad]),
            schedule=experiment.schedule,
            minibatches=Minibatches(data, experiment.batch_size, experiment.seed, self.device, dtype),
            validate=self._validate,
            validation_every=experiment.validation.every,
            state=checkpoint.State(
                identity=folder.identity,
                names=experiment.names,
                data_sha256=data.sha256(),
                image_shape=data.image_shape,
                levels=data.levels,
                plan=_plan(experiment),
                draws=0,
            ),
            hooks=self,
            settings=experiment.training,
        )
        if initial is not None and experiment.with_optimizer:
            # Only its state: learning rate and other settings are those of this run.
            settings = self.trainer.optimizer.state_dict()
            self.trainer.optimizer.load_state_dict({**settings, "state": initial.optimizer["state"]})

    @property
    def state(self) -> checkpoint.State:
        """The state of the training."""
        return self.trainer.state

    def run(self) -> dict[str, Any]:
        """Train what is left, evaluate, record; ``status.json`` is right at every moment.

        Raises:
            RunFailed: training diverged, the folder can no longer be written to.
            Interrupted: by a signal; the state has been saved.
        """
        experiment, folder = self.experiment, self.folder
        if checkpoint.exists(folder.checkpoint):
            self._resume()
        for caveat in experiment.objective.caveats:
            log.warning(caveat)
        if (experiment.training.ema or 0) > EXACT_EMA:
            log.warning(
                "training.ema=%s averages so slowly that float32 loses much of it; up to %s it is exact enough",
                *(experiment.training.ema, EXACT_EMA),
            )
        warmup, passes = experiment.training.kl_warmup, experiment.schedule.passes
        if warmup > passes:
            log.warning(
                "the KL term never has its whole weight: training.kl_warmup=%d is longer than schedule.passes=%d",
                *(warmup, passes),
            )
        # A finished run that is evaluated in another way stays what it is until the new result is there.
        finished_before = self.state.step == self.trainer.total_steps and folder.result() is not None
        if not finished_before:
            self._begin()
        asked = shlex.join(experiment.overrides) or "nothing beyond the defaults"
        log.info("begin at step %d of %d; asked for: %s", self.state.step, self.trainer.total_steps, asked)
        try:
            self.open()
            kept = folder.evaluation(evaluation_name(experiment.config)) / "result.json"
            if not (self.trainer.is_done and kept.is_file()):
                progress.announce(f"{shown(folder.path)}: {self.plan()}")
            if not self.trainer.is_done:
                self._train()
            self.signals.check()
            self.model.eval()
            subject = EstimatorInput(self.model, self.data, experiment.evaluation)
            result = evaluate(folder, subject, experiment.device, experiment.config, self.state, self.signals.check)
            if finished_before:
                self._begin()
                finished_before = False
            self._publish(result)
            self.logger.close("finished")
            checkpoint.drop_previous(folder.checkpoint)
            # Last of all: until it says so, the same command does again what may be missing.
            folder.set_status("finished", self.state.step)
            return result
        except BaseException as error:
            failure = self.ended(error, finished_before)
            if failure is not error:
                raise failure from error
            raise

    def plan(self) -> str:
        """Return in one line how much is left to do, and on what."""
        data, evaluation, threads = self.data, self.experiment.evaluation, self.experiment.device.threads
        images, refined = work(self.model, data, evaluation)
        scored = f"{images:,} images x {evaluation.k:,} samples" + f", {refined:,} images refined" * bool(refined)
        if not self.trainer.is_done:
            parameters = sum(p.numel() for p in self.model.parameters())
            size = f"{len(data.train):,} images, {parameters:,} parameters, {self.trainer.total_steps:,} steps"
            scored = f"{size}, then {scored}"
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{scored}; {name}, {threads} thread{'s' * (threads > 1)}"

    def begin(self) -> None:
        """Prepare for training alone, with the local record; the process that evaluates opens the other loggers."""
        if checkpoint.exists(self.folder.checkpoint):
            self._resume()
        self._begin()
        self.open(local=True)

    def _begin(self) -> None:
        self.folder.begin(self.experiment.config, self.experiment.overrides)
        self.folder.set_status("running", self.state.step)

    def _resume(self) -> None:
        now, found = self.state.plan, self.state.data_sha256
        self.trainer.state = checkpoint.load(self.folder.checkpoint, self.folder.identity)
        checkpoint.require_data(self.state.identity, self.state.data_sha256, found, self.data.name)
        code = sources(self.experiment.config)
        if what := changed(self.state.sources, code):
            log.warning("%s since this run, which uses the code as it is now; %s", what, RETRAIN)
            if not self.trainer.is_done:  # a finished training keeps the code that made it
                self.state.update_plan(**code)
        for key, value in self.state.plan.items():
            if key == "threads":
                torch.set_num_threads(value)
            elif key not in code and key in now and now[key] != value and not self.trainer.is_done:
                log.warning("resuming is not exact: %s was %s and is %s", key, value, now[key])
        self.model.load_state_dict(self.state.model)
        kept, per_pass = {step for step, _ in read_history(self.folder.path)}, self.trainer.steps_per_pass
        done = self.state.step // per_pass - self.trainer.is_validation_pending
        lost = [number for number in range(1, done + 1) if number * per_pass not in kept]
        if lost:
            log.warning(
                "metrics.jsonl has no row of %d of the %d passes that are done, the first of them pass %d: "
                "the curve of this run has a gap, its weights have not",
                *(len(lost), done, lost[0]),
            )

    def open(self, local: bool = False) -> None:
        """Open all loggers, or the ``local`` one, with the rows so far."""
        self.logger = FanOut([JsonlLogger()] if local else [JsonlLogger(), *self.experiment.loggers])
        parameters = sum(p.numel() for p in self.model.parameters())
        commit = (git_state(Path.cwd()) or git_state(SOURCE) or {}).get("commit")
        info = _run_info(self.experiment, self.folder, parameters, commit, iwae_cli.__version__)
        self.logger.open(info, read_history(self.folder.path, self.state.step))

    def _train(self) -> None:
        experiment, trainer = self.experiment, self.trainer
        if self.state.step:
            progress.announce(f"resumes from step {self.state.step:,} of {trainer.total_steps:,}")
        with progress.Progress(
            "training",
            total=experiment.schedule.passes,
            images_per_unit=len(self.data.train),
            start=self.state.step / trainer.steps_per_pass,
        ) as self.progress:
            started = self._began = time.monotonic()
            step = choose_step(
                trainer.model,
                experiment.objective,
                trainer.optimizer,
                experiment.training,
                experiment.device,
                trainer.total_steps,
                trainer.minibatches.shape,
                self.state.compiled,
                self.signals.check,
            )
            seconds = time.monotonic() - started
            self.state.seconds += seconds
            log.info("the step is %s, made in %.1f s", step.name, seconds)
            self.record_plan(step.name, runs_at_once=1)
            trainer.run(step)
        self.progress = None

    def record_plan(self, step: str, runs_at_once: int) -> None:
        """Record how this process trains; warn where that differs from the processes before."""
        plan = {"step": step, "compiler": compiler() if "compiled" in step else None, "runs_at_once": runs_at_once}
        if "processes" in self.state.plan:
            # Version 0.2.0 could share a training over several processes.
            plan["processes"] = 1
        changes = self.state.update_plan(**plan)
        if changes:
            log.warning("resuming is not exact: %s", "; ".join(changes))

    def _validate(self) -> float:
        """Return the bound of the validation split, nats."""
        if self._validation is None:
            self._validation = self.data.evaluation_split("validation", VALIDATION_SEED)
        likelihood = log_likelihood(
            self.trainer.evaluated,
            self._validation,
            k=self.experiment.validation.k,
            seed=VALIDATION_SEED,
            rows=VALIDATION_ROWS,
            workers=self.experiment.evaluation.workers,
            stream="validation during training",
            check=self.signals.check,
            plain=True,  # few samples gain little, and the bits of a run stay what they are
        )
        return float(likelihood.log_px.mean())

    def on_step(self, step: int) -> None:
        """Update the progress line."""
        if self.progress is not None:
            self.progress.update(step / self.trainer.steps_per_pass)

    def on_best(self, state: checkpoint.State) -> None:
        """Keep the best weights."""
        checkpoint.save_best(state, self.trainer.evaluated.state_dict(), self.folder.best)

    def on_pass(self, step: int, metrics: dict[str, float | None]) -> None:
        """Record one pass."""
        self.logger.log(step, metrics)
        if self.progress is not None:
            self.progress.update(metrics["pass"] or 0, bound=metrics["train/bound"] if _is_bound(metrics) else None)
            self._forecast(self.progress)

    def _forecast(self, shown: progress.Progress) -> None:
        """Measure once how long the evaluation will take, in a training that is long enough for that."""
        if self._began is None or time.monotonic() - self._began < FORECAST_SECONDS or self.trainer.is_done:
            return
        self._began, started = None, time.monotonic()
        self.trainer.evaluated.eval()
        # An error that stays will be that of the evaluation.
        with suppress(Exception):
            shown.evaluation = forecast(self.trainer.evaluated, self.data, self.experiment.evaluation)
        self.trainer.model.train()
        self.trainer.leave_out(time.monotonic() - started)

    def on_save(self, state: checkpoint.State) -> None:
        """Keep the state."""
        checkpoint.save(state, self.folder.checkpoint)
        self.folder.set_status("running", state.step)
        log.info("saved step %d after %.1f s of training", state.step, state.seconds)

    def interrupted(self) -> bool:
        """Return whether a signal has arrived."""
        return self.signals.number is not None

    def _publish(self, result: dict[str, Any]) -> None:
        """Make a kept evaluation the result of the run."""
        folder = self.folder
        # Without a result in between, a kill cannot leave the arrays of one evaluation beside the result of another.
        (folder.path / "result.json").unlink(missing_ok=True)
        with atomic_path(folder.path / "log_likelihood.npz") as temporary:
            shutil.copyfile(folder.evaluation(result["evaluation"]["name"]) / "log_likelihood.npz", temporary)
        write_json(folder.path / "result.json", result)
        log.info("result: %s", json.dumps({split: result[split]["nll"] for split in summary.SPLITS if split in result}))
        again = "they are drawn again by the same command once result.json is removed"
        if (why := not_drawn(partial(self._draw, result), "figures are", again)) is not None:
            # Otherwise the same command would try again and again.
            result["reasons"] = {**(result.get("reasons") or {}), "figures": why}
            with suppress(OSError):
                write_json(folder.path / "result.json", result)
        _log_result(self.logger, folder, result)

    def _draw(self, result: Mapping[str, Any]) -> None:
        """Draw the figures of the run folder."""
        # Imported here: matplotlib takes half a second, which would come before the first step.
        from iwae_cli.record.figures import plot_run

        experiment = self.experiment
        history, per_pass = read_history(self.folder.path), self.trainer.steps_per_pass
        training = f"training, {experiment.names['objective']} k = {experiment.objective.num_samples}"
        shown = (
            (training, "train/bound", [(step, row) for step, row in history if _is_bound(row)]),
            (f"validation, $L_{{{experiment.validation.k}}}$", "validation/bound", history),
        )
        curves = {
            name: [(step / per_pass, bound) for step, row in rows if (bound := row.get(key)) is not None]
            for name, key, rows in shown
        }
        results = {split: result[split] for split in summary.SPLITS if split in result}
        with np.load(self.folder.path / "log_likelihood.npz") as arrays:
            ess = {split: arrays[array_name(split, "ess")] for split in results}
        test = self.data.evaluation_split("test", experiment.evaluation.binarization_seed).x[:50]
        test = test.to(device=self.device, dtype=experiment.device.dtype)
        images, units, spread = pictures(self.model, self.data, test)
        plot_run(self.folder.figures, curves, results, ess, units, **images)
        self.logger.histogram(self.state.step, "log_w minus its mean", spread.flatten().tolist())

    def ended(self, error: BaseException, finished_before: bool = False) -> BaseException:
        """Record what ended the run; return ``error``, or in one line what happened to the folder.

        Args:
            error: what was raised.
            finished_before: whether the run stays the finished one that it was.
        """
        status: Status = "interrupted" if isinstance(error, Interrupted) else "failed"
        same = "the same command" + " without restart=true" * self.experiment.restart
        if status == "interrupted":
            log.warning("%s at step %d; %s resumes from there", error, self.state.step, same)
        else:
            log.info("failed at step %d", self.state.step, exc_info=error)
        folder, failure = self.folder, error
        words = trouble(error, folder.path) if isinstance(error, OSError) else None
        if words is not None and folder.path.is_dir():
            failure = RunFailed(
                f"{folder.path} cannot be written to ({words}); when it can, {same} resumes from the last "
                "saved step; or choose another folder with output_dir=..."
            )
        elif words is not None:
            failure = RunFailed(
                f"{folder.path} is gone: it was renamed or removed while this run wrote to it; "
                f"under its old name {same} resumes from the last saved step"
            )
        # An error here has the cause of the one that was raised.
        if not finished_before:
            with suppress(OSError):
                named = "" if status == "interrupted" else f"{type(failure).__name__}: "
                folder.set_status(status, self.state.step, f"{named}{failure}")
        with suppress(OSError):
            self.logger.close(status)
        return failure


def _is_bound(metrics: Mapping[str, float | None]) -> bool:
    """Return whether ``train/bound`` of a pass is a bound: with a smaller weight of the KL term it is none."""
    return metrics.get("train/kl_weight", 1) == 1


def _run_info(
    experiment: Experiment, folder: RunFolder, parameters: int | None, commit: str | None, version: str | None
) -> RunInfo:
    """Return what a logger is given first; its configuration has the name of every choice too."""
    config, names = dict(experiment.config), experiment.names
    config |= {key: {"name": name, **config[key]} for key, name in names.items() if key != "logger"}
    config |= {"parameters": parameters, "commit": commit, "version": version}
    evaluation = evaluation_name(experiment.config)
    return RunInfo(folder.path, folder.identity, config, experiment.group, experiment.overrides, evaluation)


def _log_result(logger: Logger, folder: RunFolder, result: Mapping[str, Any]) -> None:
    """Give the result of a finished run, and its figures, to a logger."""
    splits, step = [split for split in summary.SPLITS if split in result], result["steps"]
    logger.summary({key: result[key] for key in (*splits, "active_units", "seconds") if key in result})
    bounds = [(split, int(k), bound) for split in splits for k, bound in result[split].get("bounds", {}).items()]
    logger.table(step, "bounds", ["split", "k", "bound"], bounds)
    for path in [] if "figures" in (result.get("reasons") or {}) else sorted(folder.figures.glob("*.png")):
        logger.image(step, f"figures/{path.stem}", path)


def _plan(experiment: Experiment) -> dict[str, Any]:
    """Return what may change the bits of a training."""
    device = experiment.device.resolve()
    return {
        "device": device.type,
        "threads": experiment.device.threads,
        "torch": str(torch.__version__),  # a plain string is what weights_only reads back
        "iwae-cli": iwae_cli.__version__,
        "numpy": np.__version__,
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        **sources(experiment.config),
    }


@torch.no_grad()
def pictures(
    model: LatentVariableModel, data: Data, x: Float[Tensor, "batch pixels"]
) -> tuple[dict[str, Shaped[np.ndarray, "n *image"]], list[Shaped[np.ndarray, " _units"]], Float[Tensor, "k batch"]]:
    """Return images (none unless ``drawable``) and units of ``plot_run``, and log w minus its mean, nats."""
    drawn = model.draw(x, 50, KeyedNoise(VALIDATION_SEED, "pictures", range(len(x)), 0, x.dtype, x.device))
    images = {}
    if drawable(data.image_shape):
        p, noise = model.generative, GeneratorNoise(generator(x.device, VALIDATION_SEED, "pictures"), x.dtype)
        images["samples"] = p.mean(p.sample(100, noise)[0])[0]
        images["originals"] = x[:20]
        images["reconstructions"] = p.mean(tuple(h[:1, :20] for h in drawn.latents))[0]
    arrays = {name: data.pictured(values) for name, values in images.items()}
    return arrays, kl_of_units(model, x, drawn.latents), drawn.log_w - drawn.log_w.mean(0)


@oom_as_run_failed()
def run(experiment: Experiment) -> dict[str, Any]:
    """Train, resume or skip what is done; evaluate; write, print and return the result.

    A finished run answers from its folder without a lock; where the data are there, they are compared.

    Returns:
        The content of ``result.json``.

    Raises:
        UserError: wrong input, found before anything is written, or an ``output_dir`` that cannot be written to.
        RunLocked: another process works on this run.
        RunFailed: training diverged, or ``output_dir`` could no longer be written to.
        Interrupted: by a signal; the state is saved and the same command resumes.
    """
    experiment.check()
    folder = experiment.folder()
    since = None
    if folder.status() == "finished" and folder.checkpoint.exists():
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.checkpoint.stat().st_mtime))
    with as_user_error(folder.path, "mend that, or choose another folder with output_dir=..."):
        result = None if experiment.restart else _finished(experiment, folder)
        if result is not None:
            _compare(experiment, folder, result)
        lacking = _lacking(folder, result)
        try:
            if result is None or lacking:
                result = _work(experiment, folder, lacking)
            else:
                _record(experiment, folder, result)
        except (UserError, OSError) as error:
            if result is None:
                raise
            progress.announce(f"not {'regenerated' if lacking else 'recorded'}: {error}")
    if experiment.group is None:  # a sweep has a table of its own
        upload = left_to_upload(folder.path, result["evaluation"]["name"])
        summary.result_table(result, folder=shown(folder.path), upload=upload, since=since)
    return result


def _work(experiment: Experiment, folder: RunFolder, lacking: list[str]) -> dict[str, Any]:
    """Return the result, after training what is left."""
    experiment.device.setup()
    data = experiment.load()
    if experiment.restart and folder.path.exists():
        with RunLock(folder.path):
            aside = folder.set_aside()
        log.warning("restart: the old run is kept as %s", aside.name)
    folder.path.mkdir(parents=True, exist_ok=True)
    with RunLock(folder.path), logging_to(folder), signals.caught() as caught:
        if lacking:
            log.warning("regenerated, since it was gone or damaged: %s", ", ".join(lacking))
        if not experiment.restart:
            extend(experiment, data, folder)
        return Runner(experiment, data, folder, caught).run()


def _record(experiment: Experiment, folder: RunFolder, result: dict[str, Any]) -> None:
    """Give a finished run to the loggers that lack it."""
    commit = (result.get("code") or result.get("git") or {}).get("commit")
    info = _run_info(experiment, folder, result.get("parameters"), commit, result.get("versions", {}).get("iwae-cli"))
    lacking = [logger for logger in experiment.loggers if not logger.recorded(info)]
    if lacking:
        progress.announce("this run is finished; it is now recorded as logger=... asks")
        with RunLock(folder.path), logging_to(folder):
            loggers = FanOut(lacking)
            loggers.open(info, read_history(folder.path))
            _log_result(loggers, folder, result)
            loggers.close("finished")


def _finished(experiment: Experiment, folder: RunFolder) -> dict[str, Any] | None:
    """Return the result if the run is finished and was evaluated as asked for.

    Raises:
        UserError: it is finished and another evaluation is asked for, without a checkpoint.
    """
    result, finished = folder.result(), folder.status() == "finished"
    if result is not None and finished and result["evaluation"]["name"] == evaluation_name(experiment.config):
        return result
    if (result is not None or finished) and not folder.checkpoint.exists():
        raise UserError(
            f"{folder.path} is finished, and for another evaluation it needs its checkpoint.pt, which is gone; "
            "restart=true retrains and keeps the old folder under another name"
        )
    return None


def _compare(experiment: Experiment, folder: RunFolder, result: Mapping[str, Any]) -> None:
    """Say what has changed since a run was finished whose result answers.

    Raises:
        UserError: the data have changed.
    """
    try:
        # Only results since 0.5 hold it.
        trained_on = result.get("data_sha256") or checkpoint.load(folder.checkpoint).data_sha256
        if what := changed(result.get("sources", {}), sources(experiment.config)):
            progress.announce(f"{what} since this run, whose result is that of the code as it was; {RETRAIN}")
        found = experiment.data_sha256()
    except Exception as error:  # a user's own data set may raise anything, and the result is there
        progress.announce(f"the data could not be compared with those of this run: {one_line(error)[:230]}")
    else:
        checkpoint.require_data(folder.identity, trained_on, found, experiment.data.name)


def _lacking(folder: RunFolder, result: dict[str, Any] | None) -> list[str]:
    """Return the files of a finished run that are to be regenerated."""
    lacking = [] if result is None else folder.lacks()
    if lacking and not folder.checkpoint.exists():
        progress.announce(
            f"gone or damaged: {', '.join(lacking)}; only checkpoint.pt regenerates them, which is gone too "
            "(restart=true retrains)"
        )
        return []
    return lacking


@contextmanager
def logging_to(folder: RunFolder) -> Iterator[None]:
    """Send log messages to ``train.log`` with the time of day, and warnings to the terminal too."""
    file = logging.FileHandler(folder.log)
    # Where there is no room for a line of the log, the run itself fails and says so.
    file.handleError = lambda record: None  # type: ignore[method-assign]
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(logging.Formatter(f"{progress.label().replace('%', '%%')}%(message)s"))
    level = log.level
    log.setLevel(logging.INFO)
    for handler in (file, terminal):
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        for handler in (file, terminal):
            log.removeHandler(handler)
            with suppress(OSError):
                handler.close()
