"""Views of a module's trained parameters: the linear head's closed forms, and autodiff."""

from lightning_muter.models.autodiff import Autodiff
from lightning_muter.models.base import Linearisation, ModelView, evaluating, measuring
from lightning_muter.models.batches import BatchForm
from lightning_muter.models.beside import NOTHING, Beside
from lightning_muter.models.linear_head import FeatureHead, LinearHead
from lightning_muter.models.logits import Logits, LogitsForm
from lightning_muter.models.precision import computing
from lightning_muter.models.view import view_of

__all__ = [
    "NOTHING",
    "Autodiff",
    "BatchForm",
    "Beside",
    "FeatureHead",
    "LinearHead",
    "Linearisation",
    "Logits",
    "LogitsForm",
    "ModelView",
    "computing",
    "evaluating",
    "measuring",
    "view_of",
]
