"""Pythae: its IWAE, its BaseTrainer with its DataLoader, its get_nll.

Its models have one stochastic layer. The networks are given to it, as it lets users do. Left out of what its own users
pay: scoring the decoder of every epoch for checkpoints, gradients during get_nll (run under ``no_grad``), and a batch
size of 100 there (the best of several is taken).
"""

from __future__ import annotations

import tempfile
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from pythae.data.datasets import BaseDataset
from pythae.models import IWAE, IWAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from torch import Tensor

from benchmarks.cases import BETAS, CHECK_STEPS, EPS, LEARNING_RATE, SIZES, Job
from benchmarks.peers.torch_networks import PIXELS, Conditional, Logits
from benchmarks.worker import Tick, by_parts, serve

BATCH_SIZES = (100, 500, 1000)
"""Samples at once in get_nll, to choose from; they divide k."""


class Encoder(BaseEncoder):  # type: ignore[misc]
    """q(h|x)."""

    def __init__(self, network: Conditional) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> ModelOutput:
        """As Pythae wants it: the logarithm of the variance."""
        loc, log_scale = self.network(x)
        return ModelOutput(embedding=loc, log_covariance=2 * log_scale)


class Decoder(BaseDecoder):  # type: ignore[misc]
    """p(x|h)."""

    def __init__(self, network: Logits) -> None:
        super().__init__()
        self.network = network

    def forward(self, h: Tensor) -> ModelOutput:
        """As Pythae wants it: probabilities."""
        return ModelOutput(reconstruction=torch.sigmoid(self.network(h)))


class Binarizing(IWAE):  # type: ignore[misc]
    """IWAE on pixels that are redrawn for every batch, and optionally with given noise."""

    given: Tensor | None = None

    def forward(self, inputs: Any, **kwargs: Any) -> ModelOutput:
        """See ``IWAE``."""
        if self.given is None:
            inputs = {"data": torch.bernoulli(inputs["data"])}
        return super().forward(inputs, **kwargs)

    def _sample_gauss(self, mu: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(std) if self.given is None else self.given
        return mu + noise * std, noise


class _Stop(Exception):
    pass


class _Steps(TrainingCallback):  # type: ignore[misc]
    def __init__(self, tick: Tick) -> None:
        self._tick = tick

    def on_train_step_end(self, training_config: Any, **kwargs: Any) -> None:
        if not self._tick(1):
            raise _Stop


class Pythae:
    """See the module."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.case.cores)
        self.job = job
        self.settings = f"pythae {version('pythae')}"
        self._batch_size = 0
        (latent,), (hidden,) = SIZES[job.case.model]
        k = job.case.k if job.case.kind == "train" else 5
        config = IWAEConfig(input_dim=(PIXELS,), latent_dim=latent, reconstruction_loss="bce", number_samples=k)
        encoder, decoder = Conditional(PIXELS, hidden, latent), Logits(latent, hidden[::-1])
        # Pythae copies what it is given.
        self.model = Binarizing(config, encoder=Encoder(encoder), decoder=Decoder(decoder))
        self._load_weights()
        grey = torch.from_numpy(job.data("train")).float() / float(job.data("white"))
        self.split = BaseDataset(grey, torch.zeros(len(grey)))

    def train(self, tick: Tick) -> None:
        """``BaseTrainer.train``; a callback holds it between two steps."""
        self._load_weights()
        try:
            self._trainer(tick).train()
        except _Stop:
            return

    def check(self) -> tuple[None, dict[str, np.ndarray]]:
        """The trainer's step; its loss is no bound, but has the bound's gradient."""
        self._load_weights()
        trainer = self._trainer(lambda _: True)
        trainer.prepare_training()
        for step in range(CHECK_STEPS):
            x, draws = self.job.check_batch(step)
            self.model.given = torch.from_numpy(draws[0]).transpose(0, 1)
            trainer._optimizers_step(self.model({"data": torch.from_numpy(x)}))
        self.model.given = None
        named = zip(self._names(), self.model.state_dict().values(), strict=True)
        return None, {name: value.numpy().copy() for name, value in named}

    def evaluate(self, images: np.ndarray, tick: Tick) -> None:
        by_parts(self, images, self.job.case, tick)

    def nll(self, images: np.ndarray, k: int) -> float:
        """``get_nll``, which returns the mean of L_k."""
        x = torch.from_numpy(images).float()
        with torch.no_grad():
            if not self._batch_size:
                self._batch_size = min(BATCH_SIZES, key=lambda size: self._seconds(x[:2], k, size))
                self.settings += f", batch_size={self._batch_size}"
            return -float(self.model.get_nll(x, n_samples=k, batch_size=min(k, self._batch_size)))

    def log_px(self, images: np.ndarray, effort: int, seed: int) -> np.ndarray:
        """``get_nll`` of one image at a time: it computes them so, but returns their mean."""
        torch.manual_seed(seed)
        return np.array([-self.nll(image[None], effort) for image in images])

    def _seconds(self, x: Tensor, k: int, size: int) -> float:
        before = time.perf_counter()
        self.model.get_nll(x, n_samples=min(k, 5000), batch_size=min(k, size))
        return time.perf_counter() - before

    def _trainer(self, tick: Tick) -> BaseTrainer:
        config = BaseTrainerConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=self.job.case.batch,
            num_epochs=1000,
            optimizer_cls="Adam",
            optimizer_params={"betas": BETAS, "eps": EPS},
            learning_rate=LEARNING_RATE,
            no_cuda=True,
        )
        return BaseTrainer(self.model, self.split, training_config=config, callbacks=[_Steps(tick)])

    def _names(self) -> list[str]:
        """Of our weights, in the order of Pythae's."""
        ours = {"encoder.network": "inference.layers.0", "decoder.network": "generative.observation"}
        names = []
        for name in self.model.state_dict():
            (prefix,) = [prefix for prefix in ours if name.startswith(prefix)]
            names.append(ours[prefix] + name.removeprefix(prefix))
        return names

    def _load_weights(self) -> None:
        weights = self.job.weights()
        named = zip(self.model.state_dict(), self._names(), strict=True)
        self.model.load_state_dict({theirs: torch.from_numpy(weights[ours]) for theirs, ours in named})


if __name__ == "__main__":
    serve(Pythae)
