"""Which points training sees, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler, WeightedRandomSampler

from lightning_muter.errors import ConfigurationError

__all__ = ["PointCount", "Sampling", "sampling_of"]


@dataclass(frozen=True)
class Sampling:
    """What a loader says of how often it draws each point.

    ``weights`` (n,) sum to n over points that are drawn alike; ``chance`` says that an epoch's
    counts differ by chance.
    """

    weights: Tensor
    chance: bool


def sampling_of(loader: DataLoader[Any], n: int) -> Sampling:
    """Weights of n points under the loader's sampler.

    Raises:
        ConfigurationError: a weighted sampler without replacement, whose weights change with
            every draw.
    """
    sampler: Any = getattr(loader.batch_sampler, "sampler", None) or loader.sampler
    # Lightning's wrapper for several processes has no public way to the sampler inside
    inner = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    sampler = inner if isinstance(inner, Sampler) else sampler
    even = torch.ones(n, dtype=torch.float64)
    draws = type(sampler).__iter__  # a subclass that draws by its own rule is none of these
    if draws is WeightedRandomSampler.__iter__:
        if not sampler.replacement:
            raise ConfigurationError(
                "WeightedRandomSampler(replacement=False) gives points weights that change with "
                "each draw: no objective has them; use replacement=True, or no weights"
            )
        weights = torch.zeros(n, dtype=torch.float64)
        weights[: len(sampler.weights)] = sampler.weights.double()
        return Sampling(n * weights / weights.sum(), chance=True)
    if draws is RandomSampler.__iter__:
        return Sampling(even, chance=sampler.replacement or sampler.num_samples > n)
    return Sampling(even, chance=False)


class PointCount:
    """Counts training's points by content against those of the data set.

    Every epoch is counted: a digest costs little beside the attack on its point. Points of equal
    content cannot be told apart and are counted together.

    Args:
        digests: of the data set's points (n,), as the module receives them.
        sampling: what the loader says of their frequencies.
        world: the number of processes; a distributed sampler repeats less than one point each.
        reduce: sums a tensor over processes.
    """

    def __init__(
        self,
        digests: list[bytes],
        sampling: Sampling,
        world: int,
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        self._sampling, self._padding, self._reduce = sampling, world - 1, reduce
        self._group_of: dict[bytes, int] = {}
        groups: list[int] = []
        copies: list[int] = []
        sizes: list[int] = []
        for one in digests:
            group = self._group_of.setdefault(one, len(self._group_of))
            if group == len(sizes):
                sizes.append(0)
            groups.append(group)
            copies.append(sizes[group])
            sizes[group] += 1
        self._groups, self._copies = torch.tensor(groups), torch.tensor(copies)
        self._sizes = torch.tensor(sizes)
        self._counts = torch.zeros_like(self._sizes)
        self._seen = torch.zeros_like(self._sizes)
        self._often = torch.zeros_like(self._sizes)
        self._pending: list[int] = []
        self._epochs, self._spread = 0, 0.0
        self._unknown = False

    def see(self, digests: list[bytes]) -> None:
        """Take a batch's points, to be counted once they are trained on.

        Raises:
            ConfigurationError: a point that the data set does not hold.
        """
        found = [self._group_of.get(one) for one in digests]
        unknown = found.count(None)
        self._pending = [group for group in found if group is not None]
        if unknown and not self._unknown:
            self._unknown = True
            raise ConfigurationError(
                f"{unknown} of {len(digests)} points of a training batch are not what the data set "
                "holds: a transform that Stage I would not see changes them "
                "(on_after_batch_transfer, collate_fn, another callback, augmentation, mixup); do "
                "it once in the data set, so that reading an index twice gives the same tensors"
            )

    def trained(self) -> None:
        """Count the points of the last batch: its loss had a backward pass."""
        for group in self._pending:
            self._counts[group] += 1
        self._pending = []

    def end_epoch(self) -> None:
        """Take an epoch's counts, over all processes, and judge them.

        Raises:
            ConfigurationError: some points are trained on more often than others.
        """
        self._pending = []
        device_counts = self._reduce(self._counts.float())
        counts = device_counts.cpu().round().long()
        self._counts = torch.zeros_like(self._sizes)
        self._seen = torch.maximum(self._seen, torch.minimum(counts, self._sizes))
        self._add(torch.minimum(counts, self._sizes))
        if not self._unknown and not self._even(counts):
            raise ConfigurationError(
                f"training sees its points unequally often in an epoch: {self._shown(counts)}; the "
                "memory's objective gives each point one weight: use torch.utils.data's "
                "WeightedRandomSampler (its weights are known), or see every point equally often"
            )
        if not self._unknown and not self._even_over_epochs():
            raise ConfigurationError(
                f"training sees its points unequally often over {self._epochs} epochs: in "
                f"{int(self._often.min())} to {int(self._often.max())} of them, more apart than a "
                "random choice in each would make it; the memory's objective gives each point one "
                "weight: use torch.utils.data's WeightedRandomSampler (its weights are known), or "
                "see every point equally often"
            )

    def _add(self, present: Tensor) -> None:
        """An epoch's presence to those before."""
        share = float(present.sum()) / len(self._groups)
        self._epochs += 1
        self._often += present
        self._spread += share * (1 - share)

    def _even_over_epochs(self) -> bool:
        """Whether epochs that leave points out leave out others each time, as far as one can tell.

        Points in random shares f of each epoch are in a number of epochs of variance Σ f(1 - f).
        """
        often = (self._often / self._sizes)[self._seen > 0].double()
        if self._sampling.chance or len(often) < 3 or float(often.max() - often.min()) <= 1:
            return True
        if float(self._seen.sum()) < len(self._groups):  # the rest is never seen, or not yet
            return True
        allowed = self._spread * (1 + 8 * (2 / (len(often) - 1)) ** 0.5)
        return bool(often.var() <= allowed)

    def _even(self, counts: Tensor) -> bool:
        if self._sampling.chance:
            return True
        if int((counts - self._sizes).clamp(min=0).sum()) <= self._padding:
            return True
        times = int((counts / self._sizes).max().ceil())
        whole = counts % times == 0
        return bool((whole & (counts <= times * self._sizes)).all())

    def _shown(self, counts: Tensor) -> str:
        times: Counter[int] = Counter()
        for count, size in zip(counts.tolist(), self._sizes.tolist(), strict=True):
            times[count // size] += size
        parts = [f"{points} points {k} times" for k, points in sorted(times.items())]
        return ", ".join(parts[:6]) + (", ..." if len(parts) > 6 else "")

    def weights(self) -> Tensor:
        """How much each point weighs in training's objective (n,): 0 if it was never seen."""
        weights = self._sampling.weights.clone()
        if not self._unknown:
            weights[self._copies >= self._seen[self._groups]] = 0.0
        return weights

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know of the epochs before."""
        return {
            "seen": self._seen,
            "often": self._often,
            "epochs": self._epochs,
            "spread": self._spread,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same data set; of another one, from nothing."""
        if state["seen"].shape == self._seen.shape:
            self._seen, self._often = state["seen"].clone(), state["often"].clone()
            self._epochs, self._spread = state["epochs"], state["spread"]
