"""Before training is paid for: two training points go through all that comes after it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_muter.curvature.dense import EIGEN_LIMIT, FACTOR_LIMIT
from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.kept_state import untouched
from lightning_muter.lightning.two_points import (
    CURVATURE,
    check_double_backward,
    check_forward,
    check_gradient,
    check_targets,
    step,
)
from lightning_muter.models import ModelView, measuring
from lightning_muter.parallel import Group
from lightning_muter.spec import Settings
from lightning_muter.unlearning.cost import (
    Cost,
    matrix_product_seconds,
    product_seconds,
    solve_seconds,
)
from lightning_muter.unlearning.diagnosis import STATIONARY_LIMIT
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import Batch, Chunk
from lightning_muter.unlearning.representation import Representation

__all__ = ["Preflight", "rehearse", "time_pass"]

_FEW = 8  # passes of the maximiser: enough to see that it runs
_CHEAP = 0.1  # seconds of two points: with less more of them are timed, for better numbers
_TIMED = 16
_AFFORDED, _MORE = 5.0, 4  # seconds that dear points are timed for, and how many tell more than two
#: passes of which the fastest counts, as long as they are cheap
_REPEATS = 4
_TIMING_SECONDS = 0.5
_PIECE_SECONDS = 2.0
_PIECE = 256.0  # points that a piece has at the least: a batch has costs of its own
_PRODUCTS = 80.0  # of a solve with rows, about
#: of a solve with rows, that the noise of probes takes more: at a request, with a horizon, and of a
#: memory; and products with a matrix of more than `FACTOR_LIMIT` rows, of a memory
_NOISE_OF_STEP, _NOISE_OF_FLOW, _NOISE_OF_MEMORY = 0.3, 2.5, 0.7
_NOISE_PRODUCTS = 50.0
_STALLS = 4  # Newton's steps until they end where perturbations are no maximisers, about
_EIGENVALUES = 10.0  # the extreme eigenvalues of a memory take about so many factorisations
_LANCZOS = 60.0  # products beside one factorisation, for them and all else, of a large matrix


class _Solves(NamedTuple):
    """Seconds of one system, of all that a request solves, and of what Stage I solves at its end.

    The noise of probes is a part of both.
    """

    one: float
    request: float
    stage_one: float

    @classmethod
    def of(
        cls, points: int, p: int, kept: Representation, device: torch.device, flows: bool
    ) -> _Solves:
        settings, rows = kept.settings, kept.footprint
        sketched = settings.sketched
        if settings.representation != "rows" or rows is None:
            one = solve_seconds(p, device)
            return cls(one, one, _matrix_seconds(p, one, sketched, device))
        dtype = settings.rows_options(device).dtype
        product = product_seconds(points, rows.width, rows.classes, rows.factors, dtype)
        one = _PRODUCTS * product
        noise = _NOISE_OF_FLOW if flows else _NOISE_OF_STEP
        more = (1 + noise, 1 + _NOISE_OF_MEMORY) if sketched else (1.0, 1.0)
        return cls(one, more[0] * one, more[1] * one)


def _matrix_seconds(p: int, one: float, sketched: bool, device: torch.device) -> float:
    """What Stage I solves at its end with a matrix whose factorisation takes ``one`` second."""
    if p <= EIGEN_LIMIT:
        return _EIGENVALUES * one
    product = matrix_product_seconds(p, device)
    if p <= FACTOR_LIMIT:
        return one + _LANCZOS * product
    return _EIGENVALUES * one + sketched * _NOISE_PRODUCTS * product


@dataclass(frozen=True)
class Preflight:
    """What two points showed: seconds of a pass, and of its ascent alone, as a + c · points.

    Attributes:
        fixed: seconds of a pass whatever its points.
        per_point: seconds more a point.
        ascent: the maximiser's share of both.
        dear: whether two points alone took long, so that a pass goes in pieces.
        stationary: the share of the points' perturbations that were maximisers.
    """

    fixed: float
    per_point: float
    ascent: float
    dear: bool = False
    stationary: float = 1.0

    def piece(self, batch_size: int) -> int:
        """Points to go through at once, so that a pass can say where it is and be stopped.

        A power of two, so that a rerun has the same batches.
        """
        if not self.dear or self.per_point * batch_size <= _PIECE_SECONDS:
            return batch_size
        affordable = max(_PIECE, _PIECE_SECONDS / self.per_point)
        return int(min(batch_size, 2 ** int(math.log2(affordable))))

    def cost(
        self,
        points: int,
        p: int,
        batch_size: int,
        newton_steps: int,
        kept: Representation,
        device: torch.device,
        flows: bool = False,
    ) -> Cost:
        """Seconds and bytes of Stage I after at most ``newton_steps``, and of a request.

        ``flows`` is whether a request goes as far as training did, in the place of a solve.
        """
        solves = _Solves.of(points, p, kept, device, flows)
        one_pass = math.ceil(points / batch_size) * self.fixed + points * self.per_point
        steps = newton_steps
        if self.stationary < STATIONARY_LIMIT:
            steps = min(newton_steps, _STALLS)
        newton = steps * ((1 + 2 * self.ascent) * one_pass + solves.one)
        return Cost(
            points=points,
            p=p,
            newton_steps=newton_steps,
            stage_one_seconds=one_pass + newton + solves.stage_one,
            request_seconds=self.fixed + self.per_point + solves.request,
            memory=kept.memory,
            working=kept.working,
        )


def rehearse(
    module: nn.Module,
    settings: Sequence[Settings],
    read: Callable[[int], Batch],
    known_targets: Tensor | None = None,
) -> Preflight:
    """Take two training points through forward, ascent and curvature of every setting.

    The module is bit by bit as it was afterwards, and so are all random numbers.

    Args:
        module: the module, on its device and in its dtype.
        settings: what Newton's steps and Stage I will use; the last one's time is what counts.
        read: a number of training points, in the dtype and on the device of training.
        known_targets: those of all training points, where they need not be read one by one.

    Returns:
        The time of a pass, rough where two points take next to none: see `time_pass`.

    Raises:
        ConfigurationError: a step fails or gives values that are not finite; which one, and the
            way out.
    """
    with untouched(module), measuring(module):
        batch = read(2)
        x, targets = batch.x, batch.targets
        view = settings[-1].view(module).beside(batch.beside)
        outputs = check_forward(view.logits, x)
        view.check(x)
        check_targets(view.loss, targets, outputs)
        if known_targets is not None:
            check_targets(view.loss, known_targets.to(targets), outputs)
        check_gradient(view.logits, view.loss, x, targets)
        if any(METHODS[one.method].curvature in ("total", "hessian") for one in settings):
            check_double_backward(view, x, targets)
        for one in settings:
            with step(f"the curvature of method {one.method!r}", CURVATURE):
                few = _once(one, one.view(module), batch, _FEW)
        alone = few
        if few.seconds > _CHEAP:  # is it the points that are dear, or a pass whatever its points?
            last, view = settings[-1], settings[-1].view(module)
            alone = _once(last, view, batch.part(slice(1)), _FEW)
            few = _once(last, view, batch, _FEW)
        per_point = max(0.0, few.seconds - alone.seconds)
        if 2 * per_point <= _CHEAP:
            return Preflight(0.0, 0.0, few.ascent)
        full = _once(last, view, batch, last.problem().max_iter)
    longer = full.ascent * full.seconds / max(few.ascent * few.seconds, 1e-9)
    ascent = per_point * few.ascent * max(longer, 1.0)
    rest = per_point * (1 - few.ascent)
    fixed = max(0.0, few.seconds - 2 * per_point)
    share = ascent / (ascent + rest)
    return Preflight(fixed, ascent + rest, share, dear=True, stationary=full.stationary)


def time_pass(
    module: nn.Module, settings: Settings, read: Callable[[int], Batch], rough: Preflight
) -> Preflight:
    """The time of a pass from more than two points, as many as take a few seconds.

    Args:
        module: as in `rehearse`.
        settings: what Stage I will use.
        read: as in `rehearse`.
        rough: what it returned.
    """
    count = _TIMED
    if rough.dear:
        count = min(_TIMED, int(_AFFORDED / rough.per_point))
    if count < _MORE:
        return rough
    with untouched(module), measuring(module):
        view, batch = settings.view(module), read(count)
        passes = settings.problem().max_iter
        two = _fastest(settings, view, batch.part(slice(2)), passes).seconds
        many = _fastest(settings, view, batch, passes)
    per_point = max(0.0, many.seconds - two) / max(len(batch) - 2, 1)
    fixed = max(0.0, two - 2 * per_point)
    return Preflight(fixed, per_point, many.ascent, rough.dear, many.stationary)


class _Timing(NamedTuple):
    """Seconds of a pass, the maximiser's share of them, and of points that it found stationary."""

    seconds: float
    ascent: float
    stationary: float


def _fastest(settings: Settings, view: ModelView, batch: Batch, passes: int) -> _Timing:
    """The fastest of some passes: a difference of two is small beside what disturbs one."""
    found = [_once(settings, view, batch, passes)]
    while len(found) < _REPEATS and sum(one.seconds for one in found) < _TIMING_SECONDS:
        found.append(_once(settings, view, batch, passes))
    return min(found)


def _once(settings: Settings, view: ModelView, batch: Batch, passes: int) -> _Timing:
    """What a pass over these points takes and finds; all values are finite."""
    method, problem = METHODS[settings.method], replace(settings.problem(), max_iter=passes)
    start = time.perf_counter()
    inner = None if method.points == "clean" else problem.perturb(view, batch)
    middle = time.perf_counter()
    found = []
    for chunk in problem.chunks(view, batch, inner):
        if method.has_memory:
            found += _curvature_of(settings, problem, view, chunk)
        found.append(chunk.linearisation.gradient_sum())
    finite = torch.stack([torch.isfinite(one).all() for one in found]).all()
    if not bool(finite):  # waits for an accelerator
        raise ConfigurationError(
            f"the gradient or the curvature of method {settings.method!r} at two training points "
            "is NaN or infinite before training: a layer has no second derivative there (a square "
            "root or a norm of zero), or the inputs are too large for the module's precision; "
            "scale the inputs, or replace the layer"
        )
    seconds = time.perf_counter() - start
    stationary = 1.0 if inner is None else float(inner.stationary.double().mean())
    return _Timing(seconds, (middle - start) / seconds, stationary)


def _curvature_of(
    settings: Settings, problem: PointProblem, view: ModelView, chunk: Chunk
) -> list[Tensor]:
    """What a memory would keep of some points."""
    part = problem.curvature(chunk)
    if settings.representation == "rows":
        rows = settings.empty_sum(view)
        rows.add(part)
        return list(rows.finished(Group(), 0.0, 0.0).kept().values())
    found: list[Tensor] = []
    part.add_to(lambda i, j, block: found.append(torch.isfinite(block).all()))
    return [torch.where(one, 0.0, torch.nan) for one in found]
