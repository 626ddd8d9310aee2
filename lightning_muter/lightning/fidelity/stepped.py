"""Whether a step takes the gradients that backward left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.fidelity.after_step import AfterStep
from lightning_muter.lightning.fidelity.backward import BackwardSum
from lightning_muter.lightning.fidelity.difference import Comparison
from lightning_muter.lightning.flavour import pl

__all__ = ["StepGradients"]


class StepGradients:
    """Compares the gradients of a step with what the backward passes before it left.

    Clipping and noise lead to the same optimum by another path; a penalty, and gradients that are
    set to zero, to another optimum. They are looked at before the step and, since hooks of the
    module come later than this look, after it.

    Args:
        trainer: that is about to train.
        module: its module.
        parameters: the trained ones.
        heard: what backward left in them.
        reduce: sums a tensor over processes.
        slack: the difference that rounding may make, as a share.
        horizon: whether each step has to follow a gradient flow.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        parameters: list[nn.Parameter],
        heard: BackwardSum,
        reduce: Callable[[Tensor], Tensor],
        slack: float,
        horizon: bool,
    ) -> None:
        self._trainer, self._module, self._parameters = trainer, module, parameters
        self._heard, self._reduce, self._slack, self._horizon = heard, reduce, slack, horizon
        self._after = AfterStep()
        self._taken: list[Comparison] = []
        self._decay = 0.0

    def before_step(self, optimizer: Optimizer) -> None:
        """The gradients of a step are there.

        Raises:
            ConfigurationError: something between backward and this moment changed them.
        """
        pairs = self._pairs()
        self._taken, self._decay = [], _decay_of(optimizer, self._parameters)
        if getattr(self._trainer.precision_plugin, "scaler", None) is None:
            self._after.arm(optimizer, lambda: self._taken.extend(self._with_found(pairs)))
        if _changed(pairs) and self._horizon:
            raise ConfigurationError(
                "horizon='training', but the gradients were changed between backward and the step "
                f"(ratio of lengths {pairs[0].ratio:.4g}, cosine {pairs[0].cosine:.4f}), as by "
                "clipping in a hook of the module: leave it out, or give newton_steps=..., or a "
                "number for horizon="
            )
        self._check(pairs)

    def settle(self) -> None:
        """The batch of the step is over.

        Raises:
            ConfigurationError: the step took gradients with a penalty, or with parts set to zero.
        """
        pairs, self._taken = self._taken, []
        self._check(pairs)

    def close(self) -> None:
        """Leave the optimizer as it was."""
        self._after.disarm()

    def _pairs(self) -> list[Comparison]:
        """The gradients of the parameters as they are, beside all that backward left."""
        sums = [self._heard.since_step]
        if not self._module.automatic_optimization:
            sums.append(self._heard.batch)  # the module may have dropped what came before
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        shares = self._trainer.world_size * (scaler.get_scale() if scaler else 1.0)
        omega = tuple(p.detach().reshape(-1).double().clone() for p in self._parameters)
        found = self._found()
        return [
            Comparison(found, self._reduce(s) / shares, omega, 1, self._slack, 0.0) for s in sums
        ]

    def _with_found(self, pairs: list[Comparison]) -> list[Comparison]:
        found = self._found()
        return [replace(one, found=found) for one in pairs]

    def _found(self) -> Tensor:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        return torch.cat([part.detach().reshape(-1).double() for part in parts])

    def _check(self, pairs: list[Comparison]) -> None:
        if not _changed(pairs):
            return
        penalty, silenced = pairs[0].penalty, pairs[0].silenced
        if penalty is not None and abs(penalty - self._decay) > 1e-3 * self._decay:
            raise ConfigurationError(
                f"{penalty:.4g} times the weights is added to their gradients between "
                "backward and the step: leave it to the optimizer's weight_decay"
            )
        if silenced:
            raise ConfigurationError(
                f"{silenced} of {len(pairs[0].found)} gradients of the trained parameters are set "
                "to zero between backward and the step: those weights stay where they are, while "
                "the memory's objective has them at its optimum; leave that out, or train whole "
                "parameters and name them by parameters=[...]"
            )


def _changed(pairs: list[Comparison]) -> bool:
    finite = all(bool(torch.isfinite(c.found + c.own).all()) for c in pairs)
    return bool(pairs) and finite and not any(c.agrees() for c in pairs)


def _decay_of(optimizer: Optimizer, parameters: list[nn.Parameter]) -> float:
    """The weight decay of a group with trained parameters, which some optimizers add in place."""
    own = {id(p) for p in parameters}
    found = [g for g in optimizer.param_groups if any(id(p) in own for p in g["params"])]
    return max((float(g.get("weight_decay", 0.0)) for g in found), default=0.0)
