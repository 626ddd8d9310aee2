"""Before training is paid for: two training points go through all that comes after it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_muter.errors import ConfigurationError, MuterError
from lightning_muter.lightning.kept_state import untouched
from lightning_muter.models import Logits, ModelView, measuring
from lightning_muter.models.logits import described
from lightning_muter.objectives.losses import PointLoss
from lightning_muter.objectives.targets import check_targets as check_values
from lightning_muter.parallel import Group
from lightning_muter.spec import Settings
from lightning_muter.unlearning.cost import Cost, product_seconds, solve_seconds
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import Batch, Chunk
from lightning_muter.unlearning.representation import Representation

__all__ = [
    "Preflight",
    "check_forward",
    "check_gradient",
    "check_outputs",
    "check_targets",
    "rehearse",
    "time_pass",
]

_FEW, _USUAL = 8, 30  # passes of the maximiser: enough to see that it runs, and what it takes
_CHEAP = 0.1  # seconds of two points: with less more of them are timed, for better numbers
_TIMED = 16
#: passes of which the fastest counts, as long as they are cheap
_REPEATS = 4
_TIMING_SECONDS = 0.5
_SAME = 1e-2  # outputs of a point differ by rounding alone, whatever is in its batch
_PIECE_SECONDS = 2.0
_PIECE = 256.0  # points that a piece has at the least: a batch has costs of its own
_PRODUCTS = 80.0  # of a solve with rows, about
_EIGENVALUES = 10.0  # the extreme eigenvalues of a memory take about so many factorisations

_CURVATURE = (
    "the loss must be twice differentiable in the trained parameters and in the input: replace the "
    "layer that is not (a fused kernel, a custom backward), or train a smaller part of the module"
)
_FORWARD = (
    "forward(x) must make logits (n, C) of a batch of inputs alone: define it so, or say by "
    "forward= the name of the method that does, or a function (module, x) -> logits, as where "
    "training_step flattens or normalises its inputs itself; output= says where in its result the "
    "logits are"
)
_OUT_OF_MEMORY = (
    "take a smaller head, sketch=1 for a wide network's head, a smaller batch_size, or a machine "
    "with more memory"
)


@dataclass(frozen=True)
class Preflight:
    """What two points showed: seconds of a pass, and of its ascent alone, as a + c · points.

    Attributes:
        fixed: seconds of a pass whatever its points.
        per_point: seconds more a point.
        ascent: the maximiser's share of both.
        dear: whether two points alone took long, so that a pass goes in pieces.
    """

    fixed: float
    per_point: float
    ascent: float
    dear: bool = False

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
    ) -> Cost:
        """Seconds and bytes of Stage I after at most ``newton_steps``, and of a request."""
        if kept.settings.representation == "rows" and kept.footprint is not None:
            rows = kept.footprint
            dtype = kept.settings.rows_options(device).dtype
            solve = _PRODUCTS * product_seconds(
                points, rows.width, rows.classes, rows.factors, dtype
            )
            after = solve
        else:
            solve = solve_seconds(p, device)
            after = _EIGENVALUES * solve
        one_pass = math.ceil(points / batch_size) * self.fixed + points * self.per_point
        newton = newton_steps * ((1 + 2 * self.ascent) * one_pass + solve)
        return Cost(
            points=points,
            p=p,
            newton_steps=newton_steps,
            stage_one_seconds=one_pass + newton + after,
            request_seconds=self.fixed + self.per_point + solve,
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
        view = settings[-1].view(module)
        outputs = check_forward(view.logits, x)
        check_targets(view.loss, targets, outputs)
        if known_targets is not None:
            check_targets(view.loss, known_targets.to(targets), outputs)
        check_gradient(view.logits, view.loss, x, targets)
        if any(METHODS[one.method].curvature in ("total", "hessian") for one in settings):
            _check_double_backward(view, x, targets)
        for one in settings:
            with _step(f"the curvature of method {one.method!r}", _CURVATURE):
                seconds, share = _once(one, one.view(module), batch, _FEW)
        alone = seconds
        if seconds > _CHEAP:  # is it the points that are dear, or a pass whatever its points?
            last = settings[-1]
            alone, _ = _once(last, last.view(module), batch.part(slice(1)), _FEW)
            seconds, share = _once(last, last.view(module), batch, _FEW)
    per_point = max(0.0, seconds - alone)
    if 2 * per_point <= _CHEAP:
        return Preflight(0.0, 0.0, share)
    ascent = per_point * share * _USUAL / _FEW
    rest = per_point * (1 - share)
    fixed = max(0.0, seconds - 2 * per_point)
    return Preflight(fixed, ascent + rest, ascent / (ascent + rest), dear=True)


def time_pass(
    module: nn.Module, settings: Settings, read: Callable[[int], Batch], rough: Preflight
) -> Preflight:
    """The time of a pass from more than two points, where those are cheap.

    Args:
        module: as in `rehearse`.
        settings: what Stage I will use.
        read: as in `rehearse`.
        rough: what it returned.
    """
    if rough.per_point > 0:
        return rough
    with untouched(module), measuring(module):
        view, batch = settings.view(module), read(_TIMED)
        passes = settings.problem().max_iter
        two, _ = _fastest(settings, view, batch.part(slice(2)), passes)
        many, share = _fastest(settings, view, batch, passes)
    per_point = max(0.0, many - two) / max(len(batch) - 2, 1)
    return Preflight(max(0.0, two - 2 * per_point), per_point, share)


def _fastest(settings: Settings, view: ModelView, batch: Batch, passes: int) -> tuple[float, float]:
    """The fastest of some passes: a difference of two is small beside what disturbs one."""
    found = [_once(settings, view, batch, passes)]
    while len(found) < _REPEATS and sum(seconds for seconds, _ in found) < _TIMING_SECONDS:
        found.append(_once(settings, view, batch, passes))
    return min(found)


@contextmanager
def _step(name: str, way_out: str) -> Iterator[None]:
    """Say which step of the rehearsal an error of torch's or of the module's own is from."""
    try:
        yield
    except MuterError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())[:600]
        full = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        full = full or "can't allocate memory" in message
        raise ConfigurationError(
            f"before training, two training points go through what comes after it, and {name} "
            f"failed with {type(error).__name__}: {message}; "
            f"{_OUT_OF_MEMORY if full else way_out}"
        ) from error


def check_forward(logits: Logits, x: Tensor) -> Tensor:
    """The outputs (2, C) of a forward that gives one row of a tensor for each of two points.

    Raises:
        ConfigurationError: another type or shape, outputs that are not finite, change from call to
            call, or depend on the other points of the batch.
    """
    outputs, again, single = (check_outputs(logits, part) for part in (x, x, x[:1]))
    if single.shape[1:] != outputs.shape[1:]:
        raise ConfigurationError(
            f"forward returns shape {tuple(single.shape)} for one point and {tuple(outputs.shape)} "
            "for two: it must return (n, C) for any n"
        )
    size = _SAME * max(float(outputs.abs().max()), 1e-300)
    if float((again - outputs).abs().max()) > size:
        raise ConfigurationError(
            "forward gives other outputs when it is called again on the same inputs in eval mode: "
            "no derivative of it is that of the trained model; use nn.Dropout, which eval mode "
            "switches off, or F.dropout(..., training=self.training)"
        )
    if float((single - outputs[:1]).abs().max()) > size:
        raise ConfigurationError(
            "forward gives a point other outputs when another point is in the batch, in eval mode: "
            "a point to forget would be in every other point's loss; take out what mixes the "
            "points (batch statistics, a normalisation over the batch)"
        )
    return outputs


def check_outputs(logits: Logits, x: Tensor) -> Tensor:
    """The outputs (n, C), one row of a tensor for each of the points x (n, ...).

    Raises:
        ConfigurationError: another type or shape, or outputs that are not finite.
    """
    with torch.no_grad(), _step(f"{logits.form.name}(x)", _FORWARD):
        outputs, n = logits(x.clone()), len(x)
    if not isinstance(outputs, Tensor):
        raise ConfigurationError(
            f"the logits are {described(outputs)}, one tensor (n, C) is expected: say by output= "
            "where it is in what forward returns, or by forward= what makes it"
        )
    if outputs.ndim == 0 or len(outputs) != n or not outputs.is_floating_point():
        raise ConfigurationError(
            f"forward returns shape {tuple(outputs.shape)} of {outputs.dtype} for {n} point"
            f"{'s' * (n > 1)}, floating-point outputs ({n}, C) are expected; squeeze() drops the "
            "dimension of a batch of one: use squeeze(1), or none"
        )
    if not bool(torch.isfinite(outputs).all()):
        raise ConfigurationError(
            "forward returns NaN or infinite outputs on two training points before training: mend "
            "the inputs or the model's initial weights"
        )
    return outputs


def check_targets(loss: PointLoss, targets: Tensor, outputs: Tensor) -> None:
    """Refuse targets that are not finite, or that the loss cannot take.

    Args:
        loss: the loss a point.
        targets: of some points (n, ...); each value of integer ones is looked at once.
        outputs: of at least one point (n, C).

    Raises:
        ConfigurationError: with the targets.
    """
    check_values(loss, targets, outputs[0].numel())
    integers = targets.ndim == 1 and not targets.is_floating_point()
    distinct: Any = torch.unique  # its stub has no types
    values: Tensor = distinct(targets) if integers else targets[:2]
    bad = [value.tolist() for value in values if not _takes(loss, outputs[:1], value[None])]
    if bad:
        raise ConfigurationError(
            f"loss {loss.name!r} with outputs {tuple(outputs.shape[1:])} a point cannot take the "
            f"targets {bad[:5]}: mend the labels, leave points without a label (-100 and the like) "
            "out of the training data set, or give the head as many outputs as there are classes"
        )


def _takes(loss: PointLoss, outputs: Tensor, target: Tensor) -> bool:
    """Whether the loss and its view are finite numbers at one point's target."""
    try:
        if loss.closed_form is not None:  # on the CPU: a wrong class would end a GPU's process
            outputs, target = outputs.double().cpu(), target.cpu()
            r, s = loss.derivatives(outputs.reshape(1, -1), target)
            found = [loss(outputs, target), r, s.dense()]
        else:
            found = [loss(outputs, target)]
    except MuterError:
        raise
    except (RuntimeError, IndexError, ValueError):
        return False
    return all(bool(torch.isfinite(values).all()) for values in found)


def check_gradient(logits: Logits, loss: PointLoss, x: Tensor, targets: Tensor) -> None:
    """Refuse a module from whose loss no finite gradient reaches the input.

    Raises:
        ConfigurationError: with the way out.
    """
    inputs = x.detach().clone().requires_grad_(True)
    with _step(
        "∂l/∂x, which the attack ascends",
        "forward must be differentiable in its input: without torch.no_grad(), "
        "torch.inference_mode() or changes in place; or say by forward= a function (module, x) -> "
        "logits that is",
    ):
        losses = loss(logits(inputs), targets)
        gradient = None
        if losses.requires_grad:
            (gradient,) = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
    if gradient is None:
        raise ConfigurationError(
            "no gradient of the loss reaches the input, so that nothing can be attacked: forward "
            "runs a part under torch.no_grad() or detaches it; take that out (MUterCallback "
            "freezes the part by itself), or say by forward= a method or a function (module, x) -> "
            "logits that runs it without"
        )
    if not bool(torch.isfinite(losses).all()) or not bool(torch.isfinite(gradient).all()):
        raise ConfigurationError(
            "the loss of two training points, or its gradient in the input, is NaN or infinite "
            "before training: mend the inputs, the targets or the model's initial weights"
        )


def _check_double_backward(view: ModelView, x: Tensor, targets: Tensor) -> None:
    """∂δδ l and ∂ωδ l through every node of the graph.

    ``autograd.grad`` visits only nodes that lead to what it is asked for, and takes a layer whose
    backward is no graph (``once_differentiable``) for a constant; ``backward`` meets its error.
    """
    inputs = x.detach().clone().requires_grad_(True)
    omega = {
        f"module.{name}": parameter.detach().clone().requires_grad_(True)
        for name, parameter in zip(view.names, view.parameters, strict=True)
    }
    with _step("the second derivative of the loss, by double backward,", _CURVATURE):
        losses = view.loss(functional_call(view.logits, omega, (inputs,)), targets)
        (gradient,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
        if gradient.requires_grad:
            torch.autograd.backward(gradient.sum())  # into the .grad of the copies above


def _once(settings: Settings, view: ModelView, batch: Batch, passes: int) -> tuple[float, float]:
    """Seconds of a pass over these points, and the maximiser's share; all values are finite."""
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
    return seconds, (middle - start) / seconds


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
