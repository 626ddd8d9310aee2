"""How logits are made of a module and its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

from torch import Tensor, nn

from lightning_muter.errors import ConfigurationError
from lightning_muter.models.beside import NOTHING, Beside
from lightning_muter.models.names import suggest

__all__ = ["CALLED", "Forward", "Logits", "LogitsForm", "Output", "described"]

#: what a user can give as ``forward=`` and ``output=``; in YAML an import path comes before a name
Forward = Union[Callable[..., Any], str]  # noqa: UP007 - read by jsonargparse
Output = Union[Callable[[Any], Any], int, str]  # noqa: UP007


@dataclass(frozen=True)
class LogitsForm:
    """What is called for an output, and where in it the logits are.

    An output is a tensor, a tuple whose first tensor is the logits, a dictionary or an object with
    ``logits``, or a dictionary of one tensor.

    Attributes:
        forward: a method's name, or a function (module, x, ...) -> output; None for the module
            itself.
        output: a key, an attribute or a position in the output, or a function output -> logits;
            None to find them.
    """

    forward: Forward | None = None
    output: Output | None = None

    def __post_init__(self) -> None:
        called = self.forward
        if called is not None and not (isinstance(called, str) or callable(called)):
            raise ConfigurationError(
                f"forward={called!r} must be a method's name, or a function (module, x) -> logits"
            )
        given = self.output
        if given is not None and not (isinstance(given, (str, int)) or callable(given)):
            raise ConfigurationError(
                f"output={given!r} must be a key, an attribute or a position in what the module "
                "returns, or a function of it"
            )

    def __call__(self, module: nn.Module, x: Tensor, beside: Beside = NOTHING) -> Any:
        """The logits (n, C) of inputs x (n, ...) and what lies beside them, as the module gives.

        Raises:
            ConfigurationError: the output holds no logits where they are looked for.
        """
        output = self._called(module, x, beside)
        if self.output is None:
            return _found(output)
        return self.output(output) if callable(self.output) else _picked(output, self.output)

    def _called(self, module: nn.Module, x: Tensor, beside: Beside) -> Any:
        if self.forward is None:
            return beside.call(module, x)
        if not isinstance(self.forward, str):
            return beside.call(self.forward, module, x)
        return beside.call(self._method(module, self.forward), x)

    def takes(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the arguments after x of what is called."""
        if self.forward is None:
            function, before = module.forward, 1
        elif isinstance(self.forward, str):
            function, before = self._method(module, self.forward), 1
        else:
            function, before = self.forward, 2
        try:
            arguments = list(inspect.signature(function).parameters.values())[before:]
        except (TypeError, ValueError):  # a built-in function says nothing of its arguments
            return ()
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return tuple(one.name for one in arguments if one.kind in by_name)

    def _method(self, module: nn.Module, name: str) -> Callable[..., Any]:
        method = getattr(module, name, None)
        if not callable(method):
            names = [n for n in dir(type(module)) if not n.startswith("_")]
            raise ConfigurationError(
                f"forward={name!r} is no method of {type(module).__name__}{suggest([name], names)}"
            )
        found: Callable[..., Any] = method
        return found

    @property
    def name(self) -> str:
        """What a message calls it."""
        if self.forward is None:
            return "forward"
        if isinstance(self.forward, str):
            return self.forward
        return getattr(self.forward, "__name__", "forward")

    def of(self, module: nn.Module, beside: Beside = NOTHING) -> Logits:
        """The module as it is differentiated, on points with this beside them."""
        return Logits(module, self, beside)


class Logits(nn.Module):
    """A module as it is attacked and differentiated: x (n, ...) -> logits (n, C).

    ``beside`` is what the points have beside x, of a batch of its own for each call.
    """

    def __init__(self, module: nn.Module, form: LogitsForm, beside: Beside = NOTHING) -> None:
        super().__init__()
        self.module = module
        self.form = form
        self.beside = beside

    def forward(self, x: Tensor, beside: Beside | None = None) -> Any:
        """The logits of x."""
        return self.form(self.module, x, self.beside if beside is None else beside)


#: the module itself, its logits found
CALLED = LogitsForm()


def _found(output: Any) -> Any:
    """The logits in an output, where there is one way."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        if "logits" in output:
            return output["logits"]
        tensors = _tensors(output)
        if len(tensors) == 1:
            return output[tensors[0]]
    elif hasattr(output, "logits"):
        return output.logits
    elif isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ConfigurationError(
        f"forward returns {described(output)}, where the logits (n, C) are is not clear: say it "
        "by output= (a key, a position, an attribute, or a function of what it returns), or give "
        "forward= a method's name or a function (module, x) -> logits"
    )


def _picked(output: Any, name: str | int) -> Any:
    if isinstance(output, Mapping) and name in output:
        return output[name]
    if isinstance(name, int) and isinstance(output, Sequence):
        if -len(output) <= name < len(output):
            return output[name]
    elif isinstance(name, str) and hasattr(output, name):
        return getattr(output, name)
    raise ConfigurationError(
        f"output={name!r}, but forward returns {described(output)}: give output= one of its keys, "
        "positions or attributes"
    )


def _tensors(output: Mapping[Any, Any]) -> list[Any]:
    return [k for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()]


def described(value: Any) -> str:
    """What an output is, for a message."""
    if value is None:
        return "None"
    name = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {name} with the keys {[str(key) for key in value]}"
    if isinstance(value, (tuple, list)):
        return f"a {name} of {[type(item).__name__ for item in value]}"
    own = getattr(value, "__dict__", {})
    tensors = [key for key, item in own.items() if isinstance(item, Tensor)]
    return f"a {name} with the tensors {tensors}" if tensors else f"a {name}"
