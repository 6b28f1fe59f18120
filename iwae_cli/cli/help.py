"""The texts of ``--help``, and the choices of every group. Reads the folder ``conf``; imports nothing heavy."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from itertools import takewhile
from pathlib import Path

import yaml

from iwae_cli.config.guesses import nearest
from iwae_cli.core.errors import UserError, clip
from iwae_cli.core.files import absolute


def conf_folder() -> Path:
    """Return ``conf`` inside the installed package, else beside the package (a checkout)."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def own_folders(config_dir: str | None) -> list[Path]:
    """Return the absolute path of the folder that ``--config-dir`` names, if any.

    A choice with the name of one of ours is refused: Hydra would take ours instead.
    """
    if config_dir is None:
        return []
    folder = Path(absolute(config_dir, "--config-dir"))
    if not config_dir or not folder.is_dir():
        raise UserError(f"--config-dir must be a folder that exists, got {clip(config_dir) or 'nothing'}")
    for file in config_files(folder):
        ours = conf_folder() / file.relative_to(folder)
        if ours.is_file() and ours.read_bytes() != file.read_bytes():
            raise UserError(f"{file} has the name of a choice that comes with iwae-cli: give it another")
    return [folder]


def config_files(folder: Path) -> list[Path]:
    """Return the yaml files of our groups in a config folder; other files are ignored."""
    groups = [path.name for path in conf_folder().iterdir() if path.is_dir() and path.name != "hydra"]
    return [path for group in groups for path in sorted((folder / group).rglob("*.yaml")) if path.is_file()]


def choices(folders: list[Path]) -> dict[str, list[str]]:
    """Return group -> its choices, from the yaml files of config folders; names may hold a folder (``burda/...``)."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in config_files(folder):
            group, *name = path.relative_to(folder).with_suffix("").parts
            found.setdefault(group, set()).add("/".join(name))
    return {group: sorted(names) for group, names in sorted(found.items())}


def summary(names: list[str]) -> list[str]:
    """Return ``names`` with those inside folders counted instead of listed."""
    inside = Counter(name.partition("/")[0] for name in names if "/" in name)
    return [name for name in names if "/" not in name] + [f"{folder}/... ({n})" for folder, n in inside.items()]


def group_help(group: str, own: list[Path]) -> str:
    """Return the text of ``iwae-train --help GROUP``: each choice with the first comment of its yaml, and its keys."""
    folders = [*reversed(own), conf_folder()]
    found = choices(folders)
    if group not in found:
        homes = [name for name, names in found.items() if group in names]
        hint = f"; it is a choice: --help {homes[0]}" if homes else nearest(group, found)
        raise UserError(f"--help {clip(group)}: there is no such group, they are {', '.join(found)}{hint}")
    width = max(map(len, found[group])) + 2
    lines = []
    for name in found[group]:
        path = next(path for folder in folders if (path := folder / group / f"{name}.yaml").is_file())
        written = path.read_text(encoding="utf-8", errors="replace").splitlines()
        top = list(takewhile(lambda line: line.startswith("#"), written))
        # The line of a package is for Hydra; those of commands, which are indented, stay as they are.
        words = " ".join(line[1:].strip() for line in top if not line.startswith(("# @package", "#   ")))
        lines += textwrap.wrap(f"{name:{width}}{words}", 120, subsequent_indent=" " * width, break_on_hyphens=False)
        lines += [f"{'':{width}}  {line[1:].strip()}" for line in top if line.startswith("#   ")]
        for line in written[len(top) :] if group != "experiment" else []:
            if base := re.match(r"  - (?!_self_)(\w+)", line):  # of its defaults
                line = f"the keys of {base[1]}, with"
            if line not in ("{}", "defaults:", "  - _self_") and "_target_" not in line:
                lines += textwrap.wrap(f"    {line}", 120, subsequent_indent=" " * 8, break_on_hyphens=False)
    if group != "experiment":
        name = ".NAME" if group == "logger" else ""
        lines += ["", f"a key is typed as {group}{name}.KEY=VALUE; here are the values by default"]
    return "".join(f"{line}\n" for line in lines)


def train_help(own: list[Path]) -> str:
    """Return the text of ``iwae-train --help``, with the choices in the folders ``own``."""
    conf = conf_folder()
    config = yaml.safe_load((conf / "config.yaml").read_text())
    found = choices([conf, *own])
    lines = []
    for default in config["defaults"]:
        group, chosen = next(iter(default.items())) if isinstance(default, dict) else (default, None)
        if group in found:
            names = [f"[{name}]" if name == chosen else name for name in summary(found[group])]
            lines.append(textwrap.fill(f"{group}=", 12).ljust(14) + " ".join(names))
    groups = textwrap.indent("\n".join(lines), "  ")
    estimators = " or ".join(found["estimator"])
    return f"""\
iwae-train: train an importance weighted autoencoder, estimate its log-likelihood, keep the record.

usage: iwae-train [GROUP=CHOICE ...] [KEY=VALUE ...] [-m] [--config-dir DIR]

Trains, evaluates the negative log-likelihood with k = 5000 samples, writes a run folder under output_dir and an
offline Weights & Biases record into it. The same command again resumes an interrupted run, and prints the result
of a finished one.

groups (the default in brackets):
{groups}

keys:
  seed=0  batch_size=20  restart=false  data_dir=$IWAE_DATA_DIR or data  output_dir=$IWAE_OUTPUT_DIR or outputs
  init_from=RUN_FOLDER (begin from its weights)  with_optimizer=false  train=all or inference
  training.backward=all or roulette (backpropagate few of the draws that have little weight)  training.tau=0.01
  training.kl_warmup=0 (passes)  training.clip=null (norm of the gradient)  training.ema=null (averaged weights)
  on_error=continue or stop (of a sweep)
  and those of every choice, such as objective.k=50: --help GROUP lists them

examples:
  iwae-train
  iwae-train data=mnist objective=iwae objective.k=50 model=two_layer seed=3
  iwae-train experiment=burda data=mnist objective=elbo objective.k=5 schedule.stages=3
  iwae-train -m objective=elbo,iwae objective.k=5,50 seed=0,1,2
  iwae-train model=two_layer 'model.latent_sizes=[100,20]' 'output_dir="runs/a=b"'
  iwae-train data=linear_gaussian model=linear_gaussian evaluation.k=500 logger=disabled

options:
  -m, --multirun         one run for every combination of comma-separated values, and of 'seed=range(3)';
                         outputs/sweeps/NAME lists them; hydra/launcher=joblib, submitit_local or ray runs them in
                         parallel, batched trains them as one program; the same command continues a sweep
  -c, --cfg job          print the composed config and do nothing (also hydra, all; --resolve, --package KEY)
  --config-dir DIR       a folder with further groups and choices, such as DIR/objective/mine.yaml
  --info [WHAT]          Hydra's information: config, defaults, defaults-tree, plugins, searchpath
  --shell-completion, -sc install=bash   completion (also zsh, fish; uninstall=bash)
  --hydra-help           Hydra's own options
  --help GROUP           the choices of a group, with their keys
  --version, --help, -h

torchrun --nproc-per-node=2 -m iwae_cli ...   shares one run over processes
iwae-eval RUN_FOLDER      evaluates again, or otherwise: estimator={estimators}
iwae-report outputs       finished runs in a table, as a page, or compared image by image

exit codes: 0 done, 1 the run failed, 2 wrong input, 3 another process has the run, 128+n ended by signal n
"""


def evaluate_help(own: list[Path]) -> str:
    """Return the text of ``iwae-eval --help``, with the choices in the folders ``own``."""
    found = choices([conf_folder(), *own])
    return f"""\
iwae-eval: evaluate the model of a run folder again; the result is kept under its evaluations/.

usage: iwae-eval RUN_FOLDER [evaluation.KEY=VALUE ...] [estimator=CHOICE] [device=CHOICE] [data_dir=DIR]
                 [data.path=FILE] [--config-dir DIR]

What is not overridden is as the run had it. Without an estimator it is L_k, the importance weighted one.
Keys of an estimator are typed as estimator.KEY=VALUE; iwae-train --help estimator lists them.
  estimator={" ".join(found["estimator"])}
    ais: annealed importance sampling, an estimate of log p(x) that does not rest on q, and a sandwich that checks it
    gaps: approximation and amortization gap: what the ELBO by q loses to the family of q, and to its network
    grid: log p(x) of models with one or two latents by quadrature, and a picture of their posteriors beside q
    gradient_snr: signal-to-noise ratio of the gradients over k, of the run's objective or of objective=CHOICE
    sandwich: bounds on log p(x) from both sides, on data that the model draws
    thermodynamic: left and right sum of thermodynamic integration, with L_k of the same draws between them
  evaluation={" ".join(found["evaluation"])}
  device={" ".join(found["device"])}

examples:
  iwae-eval outputs/RUN evaluation.k=500
  iwae-eval outputs/RUN 'evaluation.splits=[train,test]' evaluation.weights=best device=cpu
  iwae-eval outputs/RUN estimator=ais 'evaluation.splits=[test]' estimator.images=50
  iwae-eval outputs/RUN estimator=grid
  iwae-eval outputs/RUN estimator=gradient_snr objective=iwae objective.gradient=dreg

options:
  --config-dir DIR       a folder with further choices, such as DIR/estimator/mine.yaml
  --version, --help, -h

exit codes: as iwae-train
"""
