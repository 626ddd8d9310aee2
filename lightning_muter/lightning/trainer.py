"""`Trainer`: Lightning's, with the verbs ``unlearn``, ``rebase`` and ``build_memory``."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

from torch.utils.data import DataLoader, Dataset

from lightning_muter.lightning.build import build_memory
from lightning_muter.lightning.flavour import pl, refuse_other
from lightning_muter.lightning.rebase import rebase
from lightning_muter.lightning.unlearn import unlearn
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.unlearning.certificate import Certificate
from lightning_muter.unlearning.result import RebaseResult, UnlearningResult

__all__ = ["Trainer"]

P = ParamSpec("P")
R = TypeVar("R")


def _of_one_package(verb: Callable[P, R]) -> Callable[P, R]:
    """A verb of Lightning's trainer that refuses what is of the other one of its packages."""

    @functools.wraps(verb)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        trainer: Any = args[0]
        for one in (*args, *kwargs.values(), *trainer.callbacks):
            refuse_other(object=one)
        return verb(*args, **kwargs)

    return checked


class Trainer(pl.Trainer):
    """Lightning's ``Trainer`` that can also forget training points.

    Raises:
        ConfigurationError: a callback, model or datamodule is of the other one of Lightning's
            packages.
    """

    fit = _of_one_package(pl.Trainer.fit)

    def unlearn(
        self,
        removals: pl.LightningDataModule | DataLoader[Any] | Sequence[int],
        model: pl.LightningModule | None = None,
        memory: UnlearningMemory | str | os.PathLike[str] | None = None,
        noise_std: float = 0.0,
        corrector_steps: int = 0,
        bound: bool = False,
        already: Literal["error", "skip"] = "error",
        note: str = "",
        certificate: Certificate | None = None,
        inner_gap: float | None = None,
    ) -> UnlearningResult:
        """Forget the points of ``removals``; the model carries ω^u afterwards.

        The request runs on this trainer's device and processes, but not through its loops: its
        limits, callbacks, precision and state have no part in it and stay as they are. The call is
        all or nothing: the requests of all its batches and the corrector are committed together,
        and a call that fails leaves model, memory, files and random state as they were.

        Args:
            removals: a `RemovalDataModule`, or any datamodule or loader whose batches are
                (input, target[, index]); without an index points are found by their content. Where
                the memory keeps rows, a plain list of training indices: no data is needed.
            model: the trained module; the one of the last fit by default.
            memory: an `UnlearningMemory` or its folder; the callback's by default.
            noise_std: σ of Gaussian noise added to ω^u, after the corrector.
            corrector_steps: Newton steps on the remaining data afterwards (a pass each).
            bound: report ‖∇F_{-S}(ω^u)‖ / (λ(n-m)), which bounds the distance to a Retrain at
                its optimum for a linear head, λ > 0 and the exact inner maximum (a pass).
            already: "skip" passes over points that an earlier call forgot, and where none is left
                puts the model at the memory's ω^u: a request that is repeated.
            note: who or what asked, for the ledger and its report.
            certificate: bring ω^u within a radius of the remaining points' optimum, prove it, and
                publish it with noise that makes it (ε, δ)-indistinguishable from a Retrain's, for
                a linear model (docs/certificates.md); the model carries the noise, the memory
                keeps ω^u apart.
            inner_gap: with ``bound``: η, proved to be at least what the perturbations fall short
                of their maxima by, summed over the remaining points.

        Returns:
            The numbers of the requests.

        Raises:
            StateError: before fit, or a model that is not the memory's.
            ConfigurationError: an argument that is no number it can be, or does not fit the method;
                a certificate where a condition of its theorem fails, which is named.
            SolverError: the certificate's radius was not reached; nothing was changed.
            RemovalError: points that cannot be forgotten, or remaining points that are not what
                the memory was built on where corrector or bound read them; nothing was changed.
        """
        return unlearn(
            self,
            removals,
            model,
            memory,
            noise_std,
            corrector_steps,
            bound,
            already,
            note,
            certificate,
            inner_gap,
        )

    def build_memory(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | Dataset[Any],
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> UnlearningMemory:
        """Stage I for a model that is trained already, or for a checkpoint.

        The trainer's `MUterCallback` says what the model was trained with. The points' range, their
        targets and the outputs are checked as in fit, the gradient of its ``training_step`` is
        compared where that runs without a trainer, and how far the model is from the optimum of its
        robust objective is measured; what only training itself could show is named in the memory's
        warnings. The callback keeps the memory, so that `unlearn` serves from it.

        Args:
            model: the module; a checkpoint's weights are loaded into it. Newton's steps of the
                callback, where it has any, move its trained parameters.
            datamodule: the points that it was trained on.
            ckpt_path: "best" of this trainer's last fit, or a path; None for the weights as they
                are.

        Raises:
            ConfigurationError: no `MUterCallback`, a checkpoint that is not the model's, a weight
                decay or horizon that nothing says, points or outputs that are not what the
                callback says; the model is as it was.
        """
        return build_memory(self, model, datamodule, ckpt_path)

    def rebase(
        self,
        datamodule: pl.LightningDataModule | Dataset[Any],
        model: pl.LightningModule | None = None,
        memory: str | os.PathLike[str] | None = None,
        newton_steps: int = 10,
    ) -> RebaseResult:
        """Make ω^u the new expansion point, and erase what the memory knew of forgotten points.

        A pass over the remaining points builds their memory anew, under a new key; afterwards
        nothing in the folder depends on a forgotten point but through ω^u itself. The ledger keeps
        commitments in the place of indices. Points are then known by their places among the
        remaining ones. Source: ours (docs/theory.md).

        Args:
            datamodule: the training data; forgotten points in it are not used.
            model: the trained module; the one of the last fit by default.
            memory: its folder; the callback's memory by default.
            newton_steps: the most that are taken until ‖∇F‖ of the remaining points is at the
                level that training left; none with a horizon.

        Raises:
            StateError: before fit, or a model that is not the memory's.
            ConfigurationError: a memory without a folder or a callback, or of a method that keeps
                no curvature.
            RemovalError: remaining points that are missing or not what they were; nothing was
                changed.
        """
        return rebase(self, datamodule, model, memory, newton_steps)
