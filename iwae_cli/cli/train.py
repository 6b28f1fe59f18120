"""The command ``iwae-train``. Everything is composed and checked first, so that wrong input leaves nothing behind."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING

from iwae_cli.cli.command import Parser, answer
from iwae_cli.cli.help import group_help, own_folders, train_help
from iwae_cli.core.errors import UserError, hide_nothing, one_line, without_hidden
from iwae_cli.core.files import here

if TYPE_CHECKING:
    from iwae_cli.runs.experiment import Experiment
    from iwae_cli.runs.opened import Run
    from iwae_cli.sweeps.jobs import Plan


def train(argv: Sequence[str] | None = None) -> int:
    """``iwae-train``; returns the exit code (0 done, 1 failed, 2 wrong input, 3 locked, 128 + signal)."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from iwae_cli.evaluation import distributed

        if distributed.are_several():
            distributed.leave(answer("iwae-train", _train_with_others, argv))
    return answer("iwae-train", _train, argv)


def train_run(*overrides: str, config_dir: str | None = None) -> Run:
    """Train, resume or find a run, and open it: ``iwae_cli.train("data=mnist", "objective=dreg")``.

    Composes, checks and prints as ``iwae-train`` with these overrides and ``--config-dir`` does.

    Raises:
        UserError: where the command would end with an exit code: its message.
        Interrupted: by a signal; the state is saved and the same call resumes.
    """
    from iwae_cli.cli.compose import plan
    from iwae_cli.runs.opened import open_run

    hide_nothing()
    try:
        here()
        planned = plan(overrides, False, config_dir, in_python=True)
        if planned.multirun:
            raise UserError("hydra.mode asks for a sweep: type iwae-train -m ..., or train one run at a time")
        return open_run(_run_one(planned).folder().path)
    except UserError as error:
        # As printed: one line, without values from the environment.
        error.args = (one_line(error),)
        raise error from None


def _train_with_others(argv: list[str]) -> bool:
    """As one of several processes: the first does everything, the others help it."""
    from iwae_cli.core.device import oom_as_run_failed
    from iwae_cli.evaluation import workers
    from iwae_cli.evaluation.distributed import Ranks

    ranks = Ranks(workers.map_here)
    if ranks.rank > 0:
        with oom_as_run_failed():
            ranks.serve()
        return True
    workers.share_with(ranks)
    wrote = _train(argv)
    # Not after an error, which may come in the middle of shared work: the others see that this process ends.
    ranks.release()
    return wrote


def _train(argv: list[str]) -> bool:
    """Return whether anything but standard output was written."""
    if asked := _parser().help_asked(argv):
        own = own_folders(asked.config_dir)
        groups = [text for text in asked.overrides if "=" not in text]
        print("\n".join(group_help(group, own) for group in groups) or train_help(own), end="")
        return False
    asked = _parser().parse_intermixed_args(argv)
    if asked.shell_completion and not re.fullmatch(r"((un)?install|query)=(bash|zsh|fish)", " ".join(asked.overrides)):
        raise UserError("-sc wants install=SHELL or uninstall=SHELL, SHELL one of bash, zsh, fish")
    from iwae_cli.cli import compose, launch

    if asked.shell_completion:
        launch.run_hydra(["--shell-completion", *asked.overrides])
    elif asked.hydra_help:
        launch.run_hydra(["--hydra-help"])
    elif asked.cfg or asked.info:
        options = {"--cfg": asked.cfg, "--package": asked.package, "--info": asked.info}
        flags = [part for option, value in options.items() if value for part in (option, value)]
        flags += ["--resolve"] * asked.resolve
        with redirect_stdout(StringIO()) as printed:
            launch.run_hydra([*flags, "--", *compose.checked(asked.overrides, asked.config_dir)])
        print(without_hidden(printed.getvalue()), end="")
    else:
        plan = compose.plan(asked.overrides, asked.multirun, asked.config_dir)
        _run(plan, argv)
        return True
    return False


def _run(plan: Plan, argv: list[str]) -> None:
    if plan.multirun:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise UserError("torchrun is for one run; the launchers of a sweep are hydra/launcher=joblib, ray, ...")
        nodes = [node for job in plan.jobs for node in (job.config.get("logger") or {}).values()]
        modes = {str(node.get("mode")) for node in nodes if isinstance(node, dict)}
        if os.environ.get("WANDB_RUN_ID") and modes & {"online", "offline"}:
            raise UserError("WANDB_RUN_ID names one W&B run, -m asks for several: leave out -m, or unset WANDB_RUN_ID")
        from iwae_cli.cli.launch import engine
        from iwae_cli.sweeps.jobs import run_sweep

        run_sweep(plan, shlex.join(["iwae-train", *argv]), engine)
        return
    _run_one(plan)


def _run_one(plan: Plan) -> Experiment:
    """Run the only job of a plan, and return it."""
    from iwae_cli.runs.runner import run
    from iwae_cli.sweeps.jobs import say_unused

    experiment = plan.jobs[0].experiment()
    experiment.check()  # so that what is refused is one line
    say_unused(plan)
    run(experiment)
    return experiment


class _TrainParser(Parser):
    def overrides_like(self, key: str, value: str) -> list[str]:
        """Return overrides of keys and choices that exist."""
        from iwae_cli.cli.compose import overrides_like

        return overrides_like(key, value)


def _parser() -> Parser:
    # Hydra's options but those that run another config (--config-name, --config-path) or a pickle.
    parser = _TrainParser("iwae-train")
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
