"""Attacks of the torchattacks library, on the module's own scale."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muter.errors import ConfigurationError
from lightning_muter.threats.pixels import Scaling, Values

__all__ = ["Attack"]

#: a float32 cross-entropy keeps a true gradient up to here: σ(-10) is 400 times its rounding
_SURE = 10.0


class _Outputs(nn.Module):
    """The module as torchattacks sees it: images in [0, 1] in, logits out.

    An attack's own cross-entropy has no gradient where the module is very sure: the largest logit
    is lowered there by a constant of the point, which changes neither the class nor the direction
    of the gradient.
    """

    def __init__(self, module: nn.Module, mean: Tensor | None, std: Tensor | None) -> None:
        super().__init__()
        self.module, self.mean, self.std = module, mean, std

    def forward(self, images: Tensor) -> Any:
        if self.mean is not None and self.std is not None:
            images = (images - self.mean.to(images)) / self.std.to(images)
        return _less_sure(self.module(images))


def _less_sure(logits: Tensor) -> Tensor:
    """Logits (n, C) with the largest at most 10 above the log-sum-exp of the others."""
    top = F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits)
    others = logits.masked_fill(top.bool(), -torch.inf).logsumexp(dim=1)
    gap = (logits * top).sum(dim=1) - others
    return logits - top * (gap - _SURE).clamp(min=0.0).detach().unsqueeze(1)


def _channels(values: Values) -> tuple[float, ...]:
    return values if isinstance(values, tuple) else (values,)


class Attack:
    """A torchattacks attack by class path, for image classifiers.

    Args:
        class_path: for example "torchattacks.PGDL2", "torchattacks.PGD", "torchattacks.FGSM".
        mean: per-channel mean that the module's inputs were normalised by, if they were; a threat
            in pixels hands its own on.
        std: per-channel standard deviation, likewise.
        init_args: arguments of the attack's constructor, on the [0, 1] scale.

    Raises:
        ConfigurationError: the class cannot be imported; torchattacks comes with the extra
            ``attacks``.

    Example:
        >>> Attack("torchattacks.FGSM", init_args={"eps": 0.1}).class_path
        'torchattacks.FGSM'
    """

    def __init__(
        self,
        class_path: str,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        init_args: dict[str, Any] | None = None,
    ) -> None:
        module_name, _, name = class_path.rpartition(".")
        try:
            self._class = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError, ValueError) as error:
            library = module_name.partition(".")[0]
            if library == "torchattacks" and find_spec(library) is None:
                raise ConfigurationError(
                    f"attack {class_path!r} needs torchattacks, which is not installed: pip "
                    "install 'lightning-muter[attacks]', or leave attack= out for the threat's own "
                    "ascent"
                ) from error
            raise ConfigurationError(
                f"attack {class_path!r} cannot be imported ({error}); expected a class path such "
                "as 'torchattacks.PGDL2'"
            ) from error
        if (mean is None) != (std is None):
            raise ConfigurationError("mean and std of the normalisation go together: give both")
        self.class_path = class_path
        self.init_args = dict(init_args or {})
        self._mean = None if mean is None else torch.tensor(mean).reshape(1, -1, 1, 1)
        self._std = None if std is None else torch.tensor(std).reshape(1, -1, 1, 1)

    def scaled(self, scaling: Scaling) -> Attack:
        """The attack for a threat in pixels: its mean and std, where it has none of its own.

        Raises:
            ConfigurationError: it has others.
        """
        if scaling.mean is None or scaling.std is None:
            return self
        mean, std = (_channels(v) for v in (scaling.mean, scaling.std))
        if self._mean is None or self._std is None:
            return Attack(self.class_path, mean, std, self.init_args)
        own = [one.flatten().tolist() for one in (self._mean, self._std)]
        given = [torch.tensor(one).tolist() for one in (mean, std)]
        if own != given:
            raise ConfigurationError(
                f"the attack normalises by mean={own[0]}, std={own[1]}, the threat by "
                f"mean={given[0]}, std={given[1]}: give them to the threat alone"
            )
        return self

    def __call__(self, module: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        """Adversarial inputs on the module's own scale.

        Args:
            module: maps x to logits (n, classes).
            x: inputs (n, C, H, W), on the scale that the module receives.
            targets: classes (n,).

        Returns:
            As x, of its dtype and on its device.

        Raises:
            ConfigurationError: inputs that are no images, or not in [0, 1] by ``mean`` and ``std``;
                ``init_args`` that the attack does not take.
        """
        if x.ndim != 4:
            raise ConfigurationError(
                f"{self.class_path} needs images (n, C, H, W), got {tuple(x.shape)}; use the "
                "threat's own ascent (attack=None)"
            )
        images = x
        if self._mean is not None and self._std is not None:
            images = x * self._std.to(x) + self._mean.to(x)
        if float(images.min()) < -1e-4 or float(images.max()) > 1 + 1e-4:
            raise ConfigurationError(
                f"{self.class_path} needs pixels in [0, 1], got [{float(images.min()):.3g}, "
                f"{float(images.max()):.3g}]; say mean= and std= if they are normalised"
            )
        seen = _Outputs(module, self._mean, self._std).eval()
        try:
            attack = self._class(seen, **self.init_args)
        except TypeError as error:
            raise ConfigurationError(
                f"{self.class_path} cannot be made with init_args={self.init_args}: {error}"
            ) from error
        adversarial = attack(images.clamp(0, 1), targets)
        if self._mean is not None and self._std is not None:
            adversarial = (adversarial - self._mean.to(x)) / self._std.to(x)
        result: Tensor = adversarial.detach().to(x)
        return result
