"""Every objective of the package from one place."""

from iwae_cli.objectives.ciwae import CIWAE as CIWAE
from iwae_cli.objectives.elbo import ELBO as ELBO
from iwae_cli.objectives.iwae import IWAE as IWAE
from iwae_cli.objectives.jvi import JVI as JVI
from iwae_cli.objectives.miwae import MIWAE as MIWAE
from iwae_cli.objectives.piwae import PIWAE as PIWAE
from iwae_cli.objectives.reinforce import REINFORCE as REINFORCE
from iwae_cli.objectives.rws import RWS as RWS
from iwae_cli.objectives.tvo import TVO as TVO
from iwae_cli.objectives.umiwae import UMIWAE as UMIWAE
from iwae_cli.objectives.vimco import VIMCO as VIMCO
from iwae_cli.objectives.vr import VR as VR
