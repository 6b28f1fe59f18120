"""What a person probably meant: the one table of other names, else the nearest name that exists, else nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from iwae_cli.core.errors import clip

_OTHERS = {
    "data": "dataset datasets", "model": "network net architecture arch", "objective": "loss bound criterion",
    "optimizer": "optim", "schedule": "scheduler lrschedule", "logger": "wandb tracker",
    "device": "gpu cuda usegpu usecuda accelerator", "cuda": "gpu nvidia", "mps": "metal apple",
    "disabled": "none off false no null csv", "offline": "wandb", "online": "on true",
    "mnist_fixed": "binarizedmnist mnistbinarized staticmnist mniststatic fixedmnist binarymnist larochelle",
    "fashion_mnist": "fmnist", "kmnist": "kuzushiji", "omniglot": "chardata",
    "one_layer": "vae mlp gaussian", "conv": "cnn convolutional", "sbn_200_200_200": "sbn",
    "elbo": "vae", "iwae": "iw iwelbo", "dreg": "iwaedreg dregiwae doublyreparameterized", "stl": "iwaestl",
    "vr": "renyi", "rws": "wakesleep", "jvi": "jackknife", "tvo": "thermodynamic",
    "lr": "learningrate stepsize eta", "weight_decay": "wd", "betas": "beta1 beta2", "precision": "dtype",
    "passes": "epochs epoch nepochs numepochs maxepochs", "stages": "epochs epoch nepochs numepochs maxepochs",
    "k": "samples nsamples numsamples particles nparticles importancesamples", "batch_size": "bs minibatch",
    "latent_sizes": "latent latents latentdim latentdims latentsize nlatent nlatents zdim",
    "hidden_sizes": "hidden hiddendim hiddendims hiddensize hiddenunits nhidden hdim",
    "seed": "randomseed rngseed manualseed", "restart": "overwrite force", "output_dir": "out outdir output logdir",
    "data_dir": "root dataroot datapath datafolder", "workers": "numworkers nworkers", "threads": "numthreads",
    "init_from": "pretrained checkpoint ckpt restore", "patience": "earlystopping earlystop",
    "kl_warmup": "warmup annealing anneal klanneal klannealing", "ema": "emadecay averaging",
    "clip": "gradclip gradientclip clipgrad clipnorm maxnorm clipgradnorm gradclipnorm",
    "train": "training trn", "validation": "val valid dev", "test": "testing",
}  # fmt: skip
"""Our name -> what people write elsewhere, in small letters without ``_`` and ``-``."""


def closest(value: Any, known: Iterable[Any]) -> str | None:
    """Return the one of ``known`` that ``value`` probably means, or None: a wrong guess is worse than none."""
    typed, plain = _plain(str(value))[:100], {_plain(str(name)): str(name) for name in known}
    meant = [name for name in map(_plain, _meant(typed)) if name in plain]
    close = [typed] if typed in plain else meant or difflib.get_close_matches(typed, plain, n=1, cutoff=0.66)
    return plain[close[0]] if close else None


def nearest(value: Any, known: Iterable[Any], prefix: str = "") -> str:
    """Return ``; did you mean ...?`` or nothing."""
    name = closest(value, known)
    return "" if name is None else question([f"{prefix}{name}"])


def unknown_key(key: str, path: str, known: Iterable[str], tree: Mapping[str, Any] | None = None) -> str:
    """Return the message for a key that is not one of ``known`` under ``path``; ``tree`` holds all there are."""
    known = list(known)
    last = key.rpartition(".")[2]
    close = question(keys_like(last, path, tree)) if tree else ""
    close = close or nearest(last, known, f"{path}." if path else "")
    there = clip(", ".join(known) or "no keys", 200)
    return f"{clip(key)} is unknown{close} ({f'{path} has' if path else 'there are'} {there})"


def keys_like(name: str, path: str, tree: Mapping[str, Any]) -> list[str]:
    """Return the keys of ``tree`` that end in what ``name`` probably means, those below ``path`` or the shortest."""
    wanted = {_plain(name), *map(_plain, _meant(_plain(name)))}
    # Who writes a key of one group does not mean another group.
    found = [key for key in keys_in(tree, leaves=bool(path)) if _plain(key.rpartition(".")[2]) in wanted]
    found = [key for key in found if key.startswith(f"{path}.")] or found
    found = [key for key in found if "." not in key] or found
    # Few want another k for the bound during training.
    found = [key for key in found if not key.startswith("validation.")] or found
    return found if len(found) <= 2 else []


def keys_in(node: Mapping[str, Any], path: str = "", leaves: bool = False) -> list[str]:
    """Return the dotted keys of a config, those of nodes too unless only its ``leaves`` are asked for."""
    found = []
    for name, value in node.items():
        if name not in ("_target_", "hydra"):
            inner = keys_in(value, f"{path}{name}.", leaves) if isinstance(value, Mapping) else []
            found += [*([] if leaves and inner else [f"{path}{name}"]), *inner]
    return found


def question(names: Iterable[str]) -> str:
    """Return ``; did you mean ... or ...?``, nothing without names."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _meant(name: str) -> list[str]:
    return [ours for ours, others in _OTHERS.items() if _plain(name) in others.split()]
