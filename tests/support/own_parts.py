"""A user's own part inside a model of this package, and an objective."""

from __future__ import annotations

from iwae_cli.models.conditionals import Conditional
from iwae_cli.models.priors import Prior, StandardNormal
from iwae_cli.objectives.iwae import IWAE


class OwnStandardNormal(StandardNormal):
    """N(0, I) of a user's own class."""


class OwnPrior(Prior):
    """Settings of it."""

    def build(self, size: int) -> Conditional:
        return OwnStandardNormal(size)


class OwnIWAE(IWAE):
    """The IWAE's bound in a user's own class."""
