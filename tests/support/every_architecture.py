"""Every architecture of the package from one place."""

from iwae_cli.models.architectures.categorical import Categorical as Categorical
from iwae_cli.models.architectures.conv import GaussianConvolutional as GaussianConvolutional
from iwae_cli.models.architectures.discrete import SigmoidBeliefNetwork as SigmoidBeliefNetwork
from iwae_cli.models.architectures.linear_gaussian import LinearGaussianModel as LinearGaussianModel
from iwae_cli.models.architectures.mlp import GaussianMLP as GaussianMLP
