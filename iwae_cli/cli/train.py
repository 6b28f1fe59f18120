"""The commands ``iwae-train`` and ``iwae-eval``; with its neighbours ``cli_*`` all that knows Hydra.

Everything is composed and constructed first, so that wrong input ends in one line and leaves nothing behind. A sweep is
then Hydra's, which by itself would make its folder first and exit 1 with a traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from iwae_cli import __version__
from iwae_cli.cli.help import conf_folder, evaluate_help, own_folder, train_help
from iwae_cli.cli.stdio import exit_code, forgiving
from iwae_cli.config.build import BASES, call, check_arguments, construct, convert, nearest, one_line
from iwae_cli.core.errors import Interrupted, RunLocked, UserError
from iwae_cli.core.signals import preemption
from iwae_cli.sweeps.sweep import Attempt, Planned, Stopped, Sweep, SweepFolder

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from iwae_cli.cli.compose import Job, Plan
    from iwae_cli.runs.experiment import Experiment


BATCHED = "batched"
"""The launcher that trains jobs together and then has them one after the other, as the basic one does."""

LOCKED_SECONDS = 2.0
"""How often a sweep looks whether a run that another process has is free."""


def train(argv: Sequence[str] | None = None) -> int:
    """``iwae-train``; returns the exit code (0 done, 1 failed, 2 wrong input, 3 locked, 128 + signal)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from iwae_cli.evaluation import distributed as ranks

        if ranks.are_several():
            ranks.leave(_answered("iwae-train", lambda: _train_with_others(arguments)))
    return _answered("iwae-train", lambda: _train(arguments))


def evaluate(argv: Sequence[str] | None = None) -> int:
    """``iwae-eval``; exit codes as ``train``."""
    return _answered("iwae-eval", lambda: _evaluate(list(sys.argv[1:] if argv is None else argv)))


def _answered(program: str, work: Callable[[], bool]) -> int:
    """Exit code of ``work``, which returns whether it has made something: what is printed is then beside it."""
    with forgiving() as out:
        try:
            made = work()
        except (UserError, Interrupted) as error:
            print(f"{program}: {one_line(error)}", file=sys.stderr)
            return error.exit_code
        except Stopped as stop:
            return stop.exit_code
        except KeyboardInterrupt:
            return 130
        return exit_code(program, out, needed=not made)


def _train_with_others(argv: list[str]) -> bool:
    """This process is one of several: the first does everything, the others help it."""
    from iwae_cli.core.device import oom_as_run_failed
    from iwae_cli.evaluation import workers
    from iwae_cli.evaluation.distributed import Ranks

    ranks = Ranks(workers.map_here)
    if ranks.rank > 0:
        with oom_as_run_failed():
            ranks.serve()
        return True
    workers.share_with(ranks)
    made = _train(argv)
    # Not after an error, which may have come in the middle of common work: they see that this process ends.
    ranks.release()
    return made


def _train(argv: list[str]) -> bool:
    if {"-h", "--help"} & set(argv):
        asked, _ = _train_parser().parse_known_args([a for a in argv if a not in ("-h", "--help")])
        print(train_help([own_folder(asked.config_dir, "--config-dir")] if asked.config_dir else []), end="")
        return False
    arguments = _train_parser().parse_intermixed_args(argv)
    if arguments.shell_completion:
        if not re.fullmatch(r"(install|uninstall|query)=(bash|zsh|fish)", " ".join(arguments.overrides)):
            raise UserError("-sc wants install=SHELL or uninstall=SHELL, SHELL one of bash, zsh, fish")
        _hand_over(_never, ["--shell-completion", *arguments.overrides])
        return False
    from iwae_cli.cli import compose as cli_compose

    shown = _display_options(arguments)
    if shown:
        overrides = cli_compose.check_display(arguments.overrides, arguments.config_dir, arguments.resolve)
        if arguments.multirun:
            raise UserError("-m runs, --cfg and --info only show: write one of them")
        try:
            _hand_over(_never, [*shown, *overrides])
        except SystemExit:
            # Hydra has said what it does not find, such as --package.
            raise SystemExit(UserError.exit_code) from None
        return False
    plan = cli_compose.plan(arguments.overrides, arguments.multirun, arguments.config_dir)
    if plan.multirun:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise UserError("torchrun is for one run; the launchers of a sweep are hydra/launcher=joblib, ray, ...")
        _run_sweep(plan, argv)
        return True
    (job,) = plan.jobs
    experiment = _experiment(job, None)
    experiment.check()
    from iwae_cli.runs.runner import run

    run(experiment)
    return True


_sweep: Sweep | None = None
"""The sweep that this process looks after; its jobs may be in other processes, which look after none."""


def _run_sweep(plan: Plan, argv: list[str]) -> None:
    """Everything is checked before the first job begins."""
    global _sweep
    from iwae_cli.cli import compose as cli_compose
    from iwae_cli.evaluation.workers import available_cores
    from iwae_cli.record.identity import evaluation_name

    group = _sweep_name(plan)
    launcher = plan.base.hydra.runtime.choices["hydra/launcher"]
    planned, experiments = [], []
    for job in plan.jobs:
        experiment = _experiment(job, group)
        experiment.check()
        if launcher == BATCHED:
            experiments.append(experiment)
        planned.append(
            Planned(job.overrides, experiment.folder().path, evaluation_name(job.config), experiment.restart)
        )
    if not plan.is_grid and "validation" not in experiment.evaluation.splits:
        raise UserError("a search minimizes the NLL of the validation split: evaluation.splits must hold validation")
    path = experiment.output_dir / "sweeps" / group
    hydra = cli_compose.hydra_node(plan, path)
    if launcher == BATCHED and not plan.is_grid:
        raise UserError(f"a search decides its jobs as it goes, hydra/launcher={BATCHED} needs to know them before")
    arguments = ["--multirun", f"hydra.sweep.dir={cli_compose.quoted(str(path))}", *plan.arguments]
    facts = {
        "command": shlex.join(["iwae-train", *argv]),
        "group": group,
        "launcher": launcher,
        "sweeper": hydra["choices"]["hydra/sweeper"],
        "workers": cli_compose.workers_each(hydra, len(planned) if plan.is_grid else None, available_cores()),
    }

    def work() -> None:
        if not plan.is_grid:
            cli_compose.save(plan.base, path / "multirun.yaml")
            arguments.extend(_search(hydra, path))
        if launcher == BATCHED:
            _train_together(experiments, SweepFolder(path), plan.stop_on_error)
        _hand_over(_sweep_job, arguments)

    if launcher == "ray":
        _start_ray(hydra["launcher"]["ray"]["init"])
    _sweep = Sweep(path, planned if plan.is_grid else None, facts, plan.stop_on_error)
    try:
        _sweep.run(work)
    finally:
        _sweep = None


def _train_together(experiments: Sequence[Experiment], folder: SweepFolder, stop_on_error: bool) -> None:
    """Train those jobs that can be one program; what is left to do, each does when it has its turn."""
    from iwae_cli.record.identity import evaluation_name
    from iwae_cli.sweeps.ensemble import batches, train_together

    numbers = {id(experiment): number for number, experiment in enumerate(experiments)}
    attempts: dict[int, Attempt] = {}

    def begins(experiment: Experiment) -> None:
        number = numbers[id(experiment)]
        attempts[number] = Attempt(folder, number, experiment.overrides)
        attempts[number].is_run(experiment.folder().path, evaluation_name(experiment.config))

    def failed(experiment: Experiment, error: BaseException) -> None:
        attempt = attempts.pop(numbers[id(experiment)])
        attempt.ends("failed", error, with_trace=not isinstance(error, UserError))

    for batch in batches(experiments):
        try:
            any_failed = train_together(batch, begins, failed, stop_on_error)
            for attempt in attempts.values():
                attempt.ends("interrupted" if any_failed and stop_on_error else "pending")
        except BaseException as error:
            for attempt in attempts.values():
                attempt.ends("interrupted", error if isinstance(error, Interrupted) else None)
            if isinstance(error, Interrupted):
                raise Stopped(error.exit_code) from None
            raise
        attempts.clear()
        if any_failed and _sweep is not None:
            _sweep.failed_here()


def _start_ray(init: dict[str, Any]) -> None:
    """What the launcher would do later, but Ray puts a handler of its own on SIGTERM, which must not be the last."""
    import ray

    if "address" not in init and "RAY_ADDRESS" not in os.environ:
        # Hardly anything goes through its memory, of which it would take a third of the machine's.
        init = {"object_store_memory": 78_643_200, **init}
    ray.init(**init)


def _search(hydra: dict[str, Any], folder: Path) -> list[str]:
    """What is left of a search."""
    if not hydra["sweeper"]["_target_"].endswith(".OptunaSweeper"):
        return []
    from iwae_cli.sweeps.optuna import remaining

    return remaining(hydra["sweeper"], folder)


def _sweep_job(cfg: DictConfig) -> float | None:
    """One run of a sweep, perhaps in another process; what becomes of it is in its record, and is no exception.

    Returns:
        What a search minimizes: the NLL of the validation split, nats; None if there is none.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    folder = SweepFolder(Path(hydra.sweep.dir))
    if folder.stop.exists():
        return None
    job = _job(cfg)
    attempt = Attempt(folder, hydra.job.num, job.overrides)
    # It has failed while it trained with the others, and that was told then.
    if attempt.before == "failed" and hydra.runtime.choices["hydra/launcher"] == BATCHED:
        return None
    attempt.begins()
    try:
        # Perhaps in a process of its own, which has come in by no other way.
        with forgiving():
            result = _run_job(job, attempt, folder, hydra.job.num)
    except (Interrupted, KeyboardInterrupt) as error:
        number = error.exit_code - 128 if isinstance(error, Interrupted) else signal.SIGINT
        attempt.ends("interrupted", error)
        if _sweep is not None:
            raise Stopped(128 + number) from None
        if number == preemption():
            # The state is saved: now submitit may put the job into the queue again.
            signal.raise_signal(number)
        return None
    except Exception as error:
        attempt.ends("failed", error, with_trace=not isinstance(error, UserError))
        if _sweep is not None:
            _sweep.failed_here()
        return None
    except BaseException as error:
        attempt.ends("interrupted", error)
        raise
    attempt.ends("finished")
    nll: float | None = result.get("validation", {}).get("nll")
    return nll


def _run_job(job: Job, attempt: Attempt, folder: SweepFolder, number: int) -> dict[str, Any]:
    from iwae_cli.record.identity import evaluation_name
    from iwae_cli.runs.runner import run

    experiment = _experiment(job, folder.path.name)
    # What this very command has begun is gone on with.
    experiment.restart &= attempt.before not in ("running", "pending")
    if _sweep is None:
        # Side by side with others.
        experiment.device.assign_gpu(number)
    if experiment.evaluation.workers is None:
        experiment.evaluation.workers = folder.read().get("workers")
    attempt.is_run(experiment.folder().path, evaluation_name(job.config))
    told = False
    while True:
        try:
            return run(experiment)
        except RunLocked as error:
            # Another sweep that shares this run, or a job that has survived the one who started it.
            if not told:
                print(f"iwae-train: waiting: {one_line(error)}", file=sys.stderr, flush=True)
            told = True
            time.sleep(LOCKED_SECONDS)


def _job(cfg: DictConfig) -> Job:
    from hydra.core.hydra_config import HydraConfig

    from iwae_cli.cli import compose as cli_compose

    hydra = HydraConfig.get()
    return cli_compose.job(cfg, hydra.runtime.choices, list(hydra.overrides.task))


def _experiment(job: Job, group: str | None) -> Experiment:
    """Everything that the config names, constructed."""
    from iwae_cli.runs.experiment import Experiment

    values = {key: value for key, value in job.config.items() if key not in BASES}
    record = {"config": job.config, "names": job.names, "overrides": job.overrides, "group": group}
    scalars = check_arguments(Experiment, values, "", given={*BASES, *record})
    experiment: Experiment = call(Experiment, {**construct(job.config), **scalars, **record}, "")
    return experiment


def _sweep_name(plan: Plan) -> str:
    """The same for the same sweep asked for again: what is varied, and a hash of all its runs."""
    runs = [[o for o in job.overrides if not o.startswith("restart=")] for job in plan.jobs]
    readable = re.sub(r"[^\w.+-]", "_", "+".join(plan.varied))[:60] or "sweep"
    digest = hashlib.sha256(json.dumps([runs, plan.searched]).encode()).hexdigest()[:8]
    return f"{readable}-{digest}"


def _never(cfg: DictConfig) -> NoReturn:
    raise AssertionError("nothing runs here")


def _hand_over(task: Callable[[DictConfig], Any], arguments: list[str]) -> None:
    """Hydra's own main with ``arguments``; exceptions come through as they are."""
    import hydra

    main = hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")(task)
    with _set_for_hydra(arguments):
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise


@contextmanager
def _set_for_hydra(arguments: list[str]) -> Iterator[None]:
    saved_argv, saved_variable = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["iwae-train", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = saved_argv
        if saved_variable is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved_variable


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message)
        if unknown:
            options = [o for o in self._option_string_actions if o.startswith("--")]
            hint = nearest(unknown[1], options)
            if "=" in unknown[1] and not hint:
                hint = f"; did you mean {unknown[1].lstrip('-')}?"
            raise UserError(f"unknown option {unknown[1]}{hint}")
        raise UserError(message)


def _parser(program: str) -> _Parser:
    parser = _Parser(program, add_help=False, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    return parser


def _train_parser() -> _Parser:
    # Hydra's options but those that run another config (--config-name, --config-path) or a pickle.
    parser = _parser("iwae-train")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=["job", "hydra", "all"])
    parser.add_argument("-p", "--package")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-cd", "--config-dir")
    what = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
    parser.add_argument("-i", "--info", nargs="?", const="all", choices=what)
    parser.add_argument("-sc", "--shell-completion", action="store_true")
    parser.add_argument("--hydra-help", action="store_true")
    return parser


def _display_options(arguments: argparse.Namespace) -> list[str]:
    """What Hydra is to show instead of running."""
    if arguments.hydra_help:
        return ["--hydra-help"]
    if arguments.info:
        return ["--info", arguments.info, "--"]
    if arguments.cfg:
        package = ["--package", arguments.package] if arguments.package else []
        return ["--cfg", arguments.cfg, *package, *(["--resolve"] if arguments.resolve else [])]
    if arguments.package or arguments.resolve:
        raise UserError("--package and --resolve go with --cfg job")
    return []


def _evaluate(argv: list[str]) -> bool:
    if {"-h", "--help"} & set(argv):
        print(evaluate_help(), end="")
        return False
    parser = _parser("iwae-eval")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(argv)
    folder = _run_folder(arguments.folder)

    from iwae_cli.cli import compose as cli_compose

    config = cli_compose.evaluation_config(folder / "config.yaml", arguments.overrides)
    convert(config["data_dir"], str, "data_dir")

    from iwae_cli.runs.evaluate import evaluate_run

    evaluate_run(folder, config)
    return True


def _run_folder(name: str | None) -> Path:
    if name is None:
        raise UserError("which run? Write iwae-eval RUN_FOLDER")
    folder = Path(name)
    if not (folder / "config.yaml").is_file():
        what = "is no run folder (it holds no config.yaml)" if folder.is_dir() else "is not there"
        raise UserError(f"{name} {what}; run folders are in output_dir (default: outputs)")
    return folder
