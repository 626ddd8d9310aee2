"""What two training points must do: give logits, gradients, second derivatives, known targets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from lightning_muter.errors import ConfigurationError, MuterError
from lightning_muter.models import Logits, ModelView
from lightning_muter.models.logits import described
from lightning_muter.objectives.losses import PointLoss
from lightning_muter.objectives.targets import check_targets as check_values

__all__ = [
    "CURVATURE",
    "check_double_backward",
    "check_forward",
    "check_gradient",
    "check_outputs",
    "check_targets",
    "step",
]

_SAME = 1e-2  # outputs of a point differ by rounding alone, whatever is in its batch

#: what helps where a derivative is missing
CURVATURE = (
    "the loss must be twice differentiable in the trained parameters and in the input: replace the "
    "layer that is not (a fused kernel, a custom backward), or train a smaller part of the module"
)
_FORWARD = (
    "forward(x) must make logits (n, C) of a batch's input, and of those other entries that it "
    "names as its arguments: define it so, or say by forward= the name of the method that does, or "
    "a function (module, x) -> logits, as where training_step flattens or normalises its inputs "
    'itself; batch=("x", "y", "mask") hands a further entry on, and output= says where in the '
    "result the logits are"
)
_ALONE = (
    "a point alone, in eval mode, where two together gave outputs: take out what mixes the points "
    "(batch statistics, a normalisation over the batch), or what drops a dimension of one"
)
_OUT_OF_MEMORY = (
    "take a smaller head, sketch=1 for a wide network's head, a smaller batch_size, or a machine "
    "with more memory"
)


@contextmanager
def step(name: str, way_out: str) -> Iterator[None]:
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
    alone = logits.form.of(logits.module, logits.beside.part(slice(1)))
    outputs, again = (check_outputs(logits, x) for _ in range(2))
    single = check_outputs(alone, x[:1], _ALONE)
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


def check_outputs(logits: Logits, x: Tensor, way_out: str = "") -> Tensor:
    """The outputs (n, C), one row of a tensor for each of the points x (n, ...).

    Raises:
        ConfigurationError: another type or shape, or outputs that are not finite.
    """
    with torch.no_grad(), step(f"{logits.form.name}(x)", way_out or _FORWARD):
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
        found = [loss(outputs, target)]  # first of all: it says what does not fit
        if loss.closed_form is not None:
            r, s = loss.derivatives(outputs.reshape(1, -1), target)
            found += [r, s.dense()]
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
    with step(
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


def check_double_backward(view: ModelView, x: Tensor, targets: Tensor) -> None:
    """∂δδ l and ∂ωδ l through every node of the graph.

    ``autograd.grad`` visits only nodes that lead to what it is asked for, and takes a layer whose
    backward is no graph (``once_differentiable``) for a constant; ``backward`` meets its error.
    """
    inputs = x.detach().clone().requires_grad_(True)
    omega = {
        f"module.{name}": parameter.detach().clone().requires_grad_(True)
        for name, parameter in zip(view.names, view.parameters, strict=True)
    }
    with step("the second derivative of the loss, by double backward,", CURVATURE):
        losses = view.loss(functional_call(view.logits, omega, (inputs,)), targets)
        (gradient,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
        if gradient.requires_grad:
            torch.autograd.backward(gradient.sum())  # into the .grad of the copies above
