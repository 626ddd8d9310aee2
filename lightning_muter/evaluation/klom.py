"""KLoM: how far the margins of unlearned models are distributed from those of Retrains.

Source: Georgiev et al., Attribute-to-delete: machine unlearning via datamodel matching, 2024; with
Gaussians in the place of their histograms.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_muter.errors import ConfigurationError

__all__ = ["KLoM", "klom"]

_SPREAD = 1e-3


def klom(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """KL(retrained ‖ unlearned) of Gaussians fitted to each point's margins (n,), in nats.

    Retrains of other seeds against Retrains give what a perfect unlearner has: not 0, but
    what so few models leave, about 2 / models.

    Args:
        unlearned: margins (k, n) under k unlearned models.
        retrained: margins (j, n) under j Retrains.

    Raises:
        ConfigurationError: fewer than two models.

    Example:
        >>> import torch
        >>> one, other = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])
        >>> klom(other, one)  # of one spread, half a squared distance in its units
        tensor([0.2500], dtype=torch.float64)
    """
    if min(len(unlearned), len(retrained)) < 2:
        raise ConfigurationError(
            f"margins of {len(unlearned)} unlearned models and {len(retrained)} Retrains: a "
            "distribution needs two at the least"
        )
    a, b = retrained.double(), unlearned.double()
    # a point whose margin never moves would make every difference infinite
    floor = _SPREAD * (1 + a.mean(dim=0).abs())
    s, t = a.std(dim=0).clamp(min=floor), b.std(dim=0).clamp(min=floor)
    apart = (a.mean(dim=0) - b.mean(dim=0)).square()
    return (t / s).log() + (s.square() + apart) / (2 * t.square()) - 0.5


class KLoM(Metric):
    """Mean of `klom` over points; a model at a time.

    Example:
        >>> import torch
        >>> metric = KLoM()
        >>> for value in (0.0, 2.0):
        ...     metric.update(torch.tensor([value]), retrained=True)
        ...     metric.update(torch.tensor([value + 1.0]), retrained=False)
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    full_state_update = False
    retrained: list[Tensor]
    unlearned: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("retrained", [], dist_reduce_fx=None)
        self.add_state("unlearned", [], dist_reduce_fx=None)

    def update(self, margins: Tensor, retrained: bool) -> None:
        """Margins (n,) of the points under one more model."""
        (self.retrained if retrained else self.unlearned).append(margins.detach())

    def compute(self) -> Tensor:
        """The mean over points, in nats."""
        return klom(torch.stack(self.unlearned), torch.stack(self.retrained)).mean()
