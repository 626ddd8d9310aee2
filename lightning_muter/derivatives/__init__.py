"""Derivatives of per-point losses: one protocol, one provider a file."""

from lightning_muter.derivatives.autodiff import Autodiff
from lightning_muter.derivatives.base import Derivatives
from lightning_muter.derivatives.linear_head import LinearHead

__all__ = ["Autodiff", "Derivatives", "LinearHead"]
