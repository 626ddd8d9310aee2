"""Threats: the geometry of the set that the adversary may choose from."""

from lightning_muter.threats.base import Geometry, Threat, unconstrained_geometry
from lightning_muter.threats.l2 import L2Ball
from lightning_muter.threats.linf import LinfBall

__all__ = ["Geometry", "L2Ball", "LinfBall", "Threat", "unconstrained_geometry"]
