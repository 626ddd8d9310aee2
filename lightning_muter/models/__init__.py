"""Views of a module's trained parameters: the linear head's closed forms, and autodiff."""

from lightning_muter.models.autodiff import Autodiff
from lightning_muter.models.base import Derivatives
from lightning_muter.models.linear_head import LinearHead

__all__ = ["Autodiff", "Derivatives", "LinearHead"]
