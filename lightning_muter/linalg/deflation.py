"""What earlier solves with a matrix, or with one near it, leave for the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Deflation", "Steps"]


@dataclass(frozen=True)
class Deflation:
    """Directions W (k, p) in which A x = b is solved at once.

    Conjugate gradients start with x = Wᵀ (W A Wᵀ)⁻¹ W b and move A-orthogonally to W: an eigenvalue
    that took an earlier solve some iterations takes none again. Source: Saad, Yeung, Erhel and
    Guyomarc'h, "A deflated version of the conjugate gradient algorithm" (2000).

    Attributes:
        directions: W (k, p).
        images: W A (k, p).
        inverse: (W A Wᵀ)⁻¹ (k, k).

    Example:
        >>> a = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
        >>> found = Deflation.of([torch.tensor([0.0, 2.0, 0.0])], [torch.tensor([0.0, 8.0, 0.0])])
        >>> found.start(torch.tensor([1.0, 1.0, 1.0]))
        (tensor([0.0000, 0.2500, 0.0000]), tensor([1., 0., 1.]))
    """

    directions: Tensor
    images: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, directions: Sequence[Tensor], images: Sequence[Tensor]) -> Deflation | None:
        """From directions and A times them (p,); None without any, or where A is not definite."""
        if not directions:
            return None
        w, aw = torch.stack(list(directions)), torch.stack(list(images))
        factor, info = torch.linalg.cholesky_ex(w @ aw.T)
        if int(info) != 0:
            return None
        return cls(w, aw, torch.cholesky_inverse(factor))

    def start(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """The part of x in the span of W, and b - A x (p,), which is orthogonal to W."""
        part = self.inverse @ (self.directions @ rhs)
        return self.directions.T @ part, torch.addmv(rhs, self.images.T, part, alpha=-1)

    def left_out(self, v: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """v (p,) without what is not A-orthogonal to W, and A times it, from A v (p,)."""
        part = self.inverse @ (self.images @ v)
        return (
            torch.addmv(v, self.directions.T, part, alpha=-1),
            torch.addmv(image, self.images.T, part, alpha=-1),
        )


class Steps:
    """The directions (p,) of the newest solves with A, and A times them.

    Args:
        limit: how many are kept at the most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: deque[tuple[Tensor, Tensor]] = deque(maxlen=limit)

    def keep(self, direction: Tensor, image: Tensor) -> None:
        """Add a direction (p,) and A times it (p,)."""
        self._kept.append((direction, image))

    def of(self, image: Callable[[Tensor, Tensor], Tensor]) -> Steps:
        """The same for another matrix, whose products follow from direction and image (p,)."""
        found = Steps(self.limit)
        for direction, before in self._kept:
            found.keep(direction, image(before, direction))
        return found

    def to(self, device: torch.device | str) -> Steps:
        """The same on another device."""
        found = Steps(self.limit)
        for direction, image in self._kept:
            found.keep(direction.to(device), image.to(device))
        return found

    def deflation(self) -> Deflation | None:
        """What a solve can leave out for them."""
        return Deflation.of(*zip(*self._kept, strict=True)) if self._kept else None
