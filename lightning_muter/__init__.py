"""lightning-muter: make adversarially trained Lightning models forget training points."""

from typing import TYPE_CHECKING

from lightning_muter.adversary.attack_library import Attack
from lightning_muter.errors import (
    ConfigurationError,
    MemoryFormatError,
    MuterError,
    RemovalError,
    SolverError,
    StateError,
)
from lightning_muter.lightning.adversarial_training import AdversarialTraining
from lightning_muter.lightning.callback import MUterCallback
from lightning_muter.lightning.data import RemovalDataModule
from lightning_muter.lightning.module import UnlearningModule
from lightning_muter.lightning.trainer import Trainer
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.objectives.trades import TRADES
from lightning_muter.options import (
    Ascent,
    BlockSolver,
    ConstrainedResponse,
    DirectSolver,
    Rows,
    UnconstrainedResponse,
)
from lightning_muter.threats import L2Ball, LinfBall, Threat
from lightning_muter.unlearning.certificate import Certificate
from lightning_muter.unlearning.hessian import total_hessian
from lightning_muter.unlearning.influence import (
    TopInfluences,
    adversarial_influence,
    influence_on_losses,
    top_influences,
)
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.result import RebaseResult, UnlearningResult

if TYPE_CHECKING:
    from lightning_muter.lightning.cli import MUterCLI

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "TRADES",
    "AdversarialTraining",
    "Ascent",
    "Attack",
    "BlockSolver",
    "Certificate",
    "ConstrainedResponse",
    "ConfigurationError",
    "DirectSolver",
    "L2Ball",
    "LinfBall",
    "MUterCLI",
    "MUterCallback",
    "MemoryFormatError",
    "MuterError",
    "RebaseResult",
    "RemovalDataModule",
    "RemovalError",
    "Rows",
    "SolverError",
    "StateError",
    "Threat",
    "TopInfluences",
    "Trainer",
    "UnconstrainedResponse",
    "UnlearningMemory",
    "UnlearningModule",
    "UnlearningResult",
    "adversarial_influence",
    "influence_on_losses",
    "top_influences",
    "total_hessian",
]


def __getattr__(name: str) -> object:
    """The command line, loaded when it is asked for: it brings in the evaluation."""
    if name == "MUterCLI":
        from lightning_muter.lightning.cli import MUterCLI

        return MUterCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
