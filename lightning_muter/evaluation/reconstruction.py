"""Reconstruction: what two published heads, or a memory's folder, give away of a forgotten point.

Source: Bertran et al., Reconstruction attacks on machine unlearning, NeurIPS 2024 (two heads);
ours for the folder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.memory.memory import UnlearningMemory

__all__ = ["from_folder", "from_heads", "identified", "similarity"]


def from_heads(
    before: Tensor,
    after: Tensor,
    product: Callable[[Tensor], Tensor],
    outputs: int,
    weight_decay: float = 0.0,
) -> Tensor:
    """The direction (F,) of the one input that was forgotten between two published heads.

    At an optimum M (ω_after - ω_before) = r ⊗ h̃ + λω to first order, for the forgotten point.

    Args:
        before: ω (p,) of the earlier head, weights (C, F) first.
        after: ω (p,) of the later one.
        product: M v (p,) of the curvature, or an attacker's estimate of it from data of their own.
        outputs: C.
        weight_decay: λ.
    """
    moved = product(after - before) - weight_decay * before
    return _leading(moved, outputs)


def from_folder(memory: UnlearningMemory, outputs: int, biased: bool) -> Tensor:
    """The direction (F,) of the one input that a memory has forgotten, from G and λω* alone.

    Raises:
        ConfigurationError: the memory has forgotten no point, or more than one, since its last
            rebase.
    """
    gone = memory.removed
    if int(gone.sum()) != 1:
        raise ConfigurationError(
            f"the memory has forgotten {int(gone.sum())} points since it was built: one is read "
            "off its gradient"
        )
    decay = memory.settings.weight_decay * float(memory.weights[gone].sum())
    gradient = memory.gradient - decay * memory.omega_star
    return _leading(gradient[:-outputs] if biased else gradient, outputs)


def _leading(gradient: Tensor, outputs: int) -> Tensor:
    """The input's direction in r ⊗ h (C · F,)."""
    width = len(gradient) // outputs
    matrix = gradient[: outputs * width].reshape(outputs, width)
    right: Tensor = torch.linalg.svd(matrix, full_matrices=False).Vh
    return right[0]


def similarity(guess: Tensor, truth: Tensor) -> float:
    """|cos| of a guess (F,) and the truth (F,); 1 is the input itself up to a factor.

    Example:
        >>> import torch
        >>> similarity(torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 0.0]))
        1.0
    """
    return float(torch.nn.functional.cosine_similarity(guess, truth, dim=0).abs())


def identified(guess: Tensor, candidates: Tensor, truth: int) -> bool:
    """Whether the truth is the candidate (n, F) that is most like the guess.

    Candidates and guess are compared without the candidates' mean direction, which all share.
    """
    mean = candidates.mean(dim=0)
    unit = mean / mean.norm().clamp(min=1e-300)
    rows = candidates - (candidates @ unit).unsqueeze(1) * unit
    left = guess - (guess @ unit) * unit
    scores = torch.nn.functional.cosine_similarity(rows, left.unsqueeze(0), dim=1).abs()
    return int(scores.argmax()) == truth
