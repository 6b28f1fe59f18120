"""The commands ``iwae-train`` and ``iwae-eval``; with its neighbours ``cli_*`` all that knows Hydra.

Everything is composed and constructed first, so that wrong input ends in one line and leaves nothing behind;
then Hydra takes over, which by itself would make its folder first and exit 1 with a traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from iwae_cli import __version__
from iwae_cli.cli_help import conf_folder, evaluate_help, train_help
from iwae_cli.construct import BASES, call, check_arguments, construct, convert, nearest, one_line
from iwae_cli.errors import Interrupted, RunFailed, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from iwae_cli.cli_compose import Job, Plan
    from iwae_cli.experiment import Experiment


def train(argv: Sequence[str] | None = None) -> int:
    """``iwae-train``; returns the exit code (0 done, 1 failed, 2 wrong input, 3 locked, 128 + signal)."""
    return _answered("iwae-train", lambda: _train(list(sys.argv[1:] if argv is None else argv)))


def evaluate(argv: Sequence[str] | None = None) -> int:
    """``iwae-eval``; exit codes as ``train``."""
    return _answered("iwae-eval", lambda: _evaluate(list(sys.argv[1:] if argv is None else argv)))


class JobFailed(RunFailed):
    """A run of a sweep failed and has said so; the others go on."""


class _Stop(BaseException):
    """Ends a sweep from inside one of its runs: Hydra would go on with the next after any Exception."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def _answered(program: str, work: Callable[[], None]) -> int:
    try:
        work()
        sys.stdout.flush()
    except JobFailed as error:
        return error.exit_code
    except (UserError, Interrupted) as error:
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except _Stop as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has what it wanted; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _train(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(train_help(), end="")
        return
    arguments = _train_parser().parse_intermixed_args(argv)
    if arguments.shell_completion:
        _hand_over(_never, ["--shell-completion", *arguments.overrides])
        return
    from iwae_cli import cli_compose

    shown = _display_options(arguments)
    if shown:
        overrides = cli_compose.check_display(arguments.overrides, arguments.config_dir)
        if arguments.multirun:
            raise UserError("-m runs, --cfg and --info only show: write one of them")
        # Hydra shows through logging, which would complain at length of a reader (head, less) that has left.
        logging.raiseExceptions = False
        try:
            _hand_over(_never, [*shown, *overrides])
        except SystemExit:
            # Hydra has said what it does not find, such as --package.
            raise SystemExit(UserError.exit_code) from None
        return
    plan = cli_compose.plan(arguments.overrides, arguments.multirun, arguments.config_dir)
    group = _sweep_name(plan) if plan.multirun else None
    for job in plan.jobs:
        _experiment(job, group).check()
    if plan.multirun:
        folder = Path(plan.jobs[0].config["output_dir"]).absolute() / "sweeps" / str(group)
        _hand_over(_sweep_job, ["--multirun", f"hydra.sweep.dir={cli_compose.quoted(str(folder))}", *plan.arguments])
    else:
        _run_one(plan.arguments)


def _run_one(arguments: list[str]) -> None:
    failure: list[Exception] = []

    def run(cfg: DictConfig) -> None:
        try:
            _experiment(_job(cfg), None).run()
        except Exception as error:
            # Raised again below: Hydra would print a line of its own before it.
            failure.append(error)

    _hand_over(run, arguments)
    if failure:
        raise failure[0]


def _sweep_job(cfg: DictConfig) -> Any:
    """One run of a sweep, perhaps in another process; its failure is told at once and ends no other run."""
    from hydra.core.hydra_config import HydraConfig

    hydra, job = HydraConfig.get(), _job(cfg)
    line = f"job {hydra.job.num} ({' '.join(job.overrides)})"
    try:
        return _experiment(job, Path(hydra.sweep.dir).name).run()
    except Interrupted as error:
        print(f"iwae-train: {line} {error}", file=sys.stderr, flush=True)
        raise _Stop(error.exit_code) from None
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        message = one_line(error) or type(error).__name__
        print(f"iwae-train: {line} failed: {message}", file=sys.stderr, flush=True)
        raise JobFailed(message) from None


def _job(cfg: DictConfig) -> Job:
    from hydra.core.hydra_config import HydraConfig

    from iwae_cli import cli_compose

    hydra = HydraConfig.get()
    return cli_compose.job(cfg, hydra.runtime.choices, list(hydra.overrides.task))


def _experiment(job: Job, group: str | None) -> Experiment:
    """Everything that the config names, constructed."""
    from iwae_cli.experiment import Experiment

    values = {key: value for key, value in job.config.items() if key not in BASES}
    record = {"config": job.config, "names": job.names, "overrides": job.overrides, "group": group}
    scalars = check_arguments(Experiment, values, "", given={*BASES, *record})
    experiment: Experiment = call(Experiment, {**construct(job.config), **scalars, **record}, "")
    return experiment


def _sweep_name(plan: Plan) -> str:
    """The same for the same sweep asked for again: what is varied, and a hash of all its runs."""
    runs = [job.overrides for job in plan.jobs]
    varied = [o.partition("=")[0] for o in runs[0] if any(o not in other for other in runs)]
    readable = re.sub(r"[^\w.+-]", "_", "+".join(varied))[:60] or "sweep"
    digest = hashlib.sha256(json.dumps([runs, plan.arguments]).encode()).hexdigest()[:8]
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
    parser.add_argument("-i", "--info", nargs="?", const="all")
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


def _evaluate(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(evaluate_help(), end="")
        return
    parser = _parser("iwae-eval")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(argv)
    folder = _run_folder(arguments.folder)

    from iwae_cli import cli_compose

    config = cli_compose.evaluation_config(folder / "config.yaml", arguments.overrides)
    convert(config["data_dir"], str, "data_dir")

    from iwae_cli.experiment import evaluate_run

    evaluate_run(folder, config)


def _run_folder(name: str | None) -> Path:
    if name is None:
        raise UserError("which run? Write iwae-eval RUN_FOLDER")
    folder = Path(name)
    if not (folder / "config.yaml").is_file():
        what = "is no run folder (it holds no config.yaml)" if folder.is_dir() else "is not there"
        raise UserError(f"{name} {what}; run folders are in output_dir (default: outputs)")
    return folder
