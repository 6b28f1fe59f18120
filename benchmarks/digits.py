"""Images of 784 pixels where there is no MNIST: the digits of scikit-learn, enlarged."""

from __future__ import annotations

import dataclasses
from typing import final

import torch

from iwae_cli.data.base import Data, GreyDataset
from iwae_cli.data.digits import Digits


@final
class EnlargedDigits(GreyDataset):
    """``data=digits`` at 28x28, every pixel repeated three or four times in both directions."""

    name = "enlarged_digits"
    levels = 17

    def load(self) -> Data:
        """See the base class."""
        small = Digits(self.binarization).load()
        nearest = torch.arange(28) * 8 // 28

        def enlarged(images: torch.Tensor) -> torch.Tensor:
            return images.view(-1, 8, 8)[:, nearest[:, None], nearest].reshape(-1, 784)

        protocol = small.protocol.replace("8x8", "28x28, enlarged from 8x8,")
        return dataclasses.replace(
            small,
            name=self.name,
            protocol=protocol,
            train=enlarged(small.train),
            validation=enlarged(small.validation),
            test=enlarged(small.test),
            image_shape=(28, 28),
        )
