"""NoProp (arXiv 2503.24322) with its blocks spread over ranks: no gradient ever crosses."""

import os

# before torch loads OpenMP: ranks that spin while they wait take cores from those that work
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from noprop_dist.config import Card, UserError
from noprop_dist.launcher import TrainResult, train
from noprop_dist.model import NoPropModel

__all__ = ["Card", "NoPropModel", "TrainResult", "UserError", "train"]
