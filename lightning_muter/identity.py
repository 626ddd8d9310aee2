"""What a class, a function or an object is: its import path, and a fingerprint of what it does.

Nothing here imports or runs anything: only objects in hand are looked at.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint_of", "identify", "import_path"]

#: what Python and dataclasses write into a class, which says nothing of what it does
_IGNORED = frozenset(
    {
        *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__slots__"),
        *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
        *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__classcell__"),
        *("__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__"),
        *("__parameters__", "__orig_bases__"),
    }
)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))
_BY_NAME = (types.BuiltinFunctionType, torch.dtype, torch.device)
_CODE = (types.FunctionType, types.MethodType, types.ModuleType, functools.partial, type)
#: what is described whole where a function reads it from its module
_DATA = (*_PLAIN, *_BY_NAME, *_CODE, Tensor, tuple, list, set, frozenset, Mapping, enum.Enum)
#: whose insides are theirs, even where a memory's loss is one of them
_NEVER = frozenset({"builtins", "torch", "lightning_muter"})


def import_path(value: Any) -> str:
    """Where a class or function lives, or an object's class: "module:qualified.name".

    Example:
        >>> import_path(torch.nn.Linear)
        'torch.nn.modules.linear:Linear'
    """
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', None)}:{named.__qualname__}"


def fingerprint_of(value: Any) -> str:
    """A digest of what a function, class or object does.

    Of a function: its code, defaults, closure, and the globals that it reads, with the functions
    and classes of the user's own among them, and of other objects the attributes that it names;
    of a class: its methods, attributes and bases; of an object: its class and its state. Line
    numbers, file names and docstrings are no part of it, and what an installed library brings is
    named by its path alone. Byte code differs between Python versions, so that a fingerprint is of
    one of them.
    """
    description = _Description(_package(value)).of(value)
    return hashlib.blake2b(json.dumps(description).encode(), digest_size=16).hexdigest()


def identify(value: Any) -> dict[str, str]:
    """Path, fingerprint, and the Python version that the fingerprint is of."""
    return {
        "path": import_path(value.func if isinstance(value, functools.partial) else value),
        "fingerprint": fingerprint_of(value),
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
    }


def _package(value: Any) -> str:
    if isinstance(value, functools.partial):
        return _package(value.func)
    named = value if hasattr(value, "__qualname__") else type(value)
    return str(getattr(named, "__module__", None)).split(".")[0]


def _is_library(package: str) -> bool:
    """Whether a package was installed, rather than written beside the training."""
    if package in sys.stdlib_module_names or package == "lightning_muter":
        return package != "__main__"
    module = sys.modules.get(package)
    places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", [])]
    return any("site-packages" in place or "dist-packages" in place for place in places)


class _Description:
    """Nested lists of strings that say what a value does.

    Functions, classes and objects are described once and then named by their number; containers
    and code, which Python may share or copy as it likes, each time.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []  # an address is one object's only while that object lives

    def of(self, value: Any) -> Any:
        """The description of any value, with its state."""
        if isinstance(value, enum.Enum):
            return ["enum", import_path(value), value.name]
        if isinstance(value, _PLAIN):
            return [type(value).__name__, repr(value)]
        if isinstance(value, types.CodeType):
            return self._code(value, None)
        if isinstance(value, _BY_NAME):
            return [type(value).__name__, str(getattr(value, "__qualname__", value))]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if isinstance(value, (tuple, frozenset)):
            parts = [self.of(one) for one in value]
            ordered = parts if isinstance(value, tuple) else sorted(map(json.dumps, parts))
            return [type(value).__name__, ordered]
        if id(value) in self.numbers:
            return ["again", self.numbers[id(value)]]
        self.numbers[id(value)] = len(self.numbers)
        self.kept.append(value)
        return self._once(value)

    def _once(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return ["tensor", str(value.dtype), list(value.shape), _bits(value)]
        if isinstance(value, list):
            return ["list", [self.of(one) for one in value]]
        if isinstance(value, set):
            return ["set", sorted(json.dumps(self.of(one)) for one in value)]
        if isinstance(value, Mapping):
            return ["mapping", [[self.of(k), self.of(v)] for k, v in value.items()]]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return ["method", self.of(value.__func__), self._owner(value.__self__)]
        if isinstance(value, functools.partial):
            return ["partial", *(self.of(p) for p in (value.func, value.args, value.keywords))]
        if isinstance(value, (staticmethod, classmethod)):
            return [type(value).__name__, self.of(value.__func__)]
        if isinstance(value, property):
            return ["property", *(self.of(f) for f in (value.fget, value.fset, value.fdel))]
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, nn.Module):
            return self._network(value)
        return self._object(value)

    def _is_near(self, value: Any) -> bool:
        package = _package(value)
        if package in _NEVER:
            return False
        return package == self.package or not _is_library(package)

    def _function(self, function: types.FunctionType) -> Any:
        if not self._is_near(function):
            return ["function", import_path(function)]
        cells = [_content(cell) for cell in function.__closure__ or ()]
        read = _names(function.__code__)
        return [
            "function",
            self._code(function.__code__, function.__doc__),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            [self.of(cell) for cell in cells],
            self._read(function.__globals__, read),
        ]

    def _code(self, code: types.CodeType, doc: str | None) -> Any:
        constants = list(code.co_consts)
        if doc is not None and constants[:1] == [doc]:
            constants[0] = None  # what stands there without a docstring
        return [
            "code",
            code.co_code.hex(),
            list(code.co_names),
            [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags],
            [self.of(one) for one in constants],
        ]

    def _class(self, kind: type) -> Any:
        if not self._is_near(kind):
            return ["class", import_path(kind)]
        members = {k: v for k, v in vars(kind).items() if k not in _IGNORED}
        return [
            "class",
            import_path(kind),
            [self.of(base) for base in kind.__bases__],
            [[name, self.of(members[name])] for name in sorted(members)],
        ]

    def _read(self, names: Mapping[str, Any], read: set[str], within: tuple[int, ...] = ()) -> Any:
        """What a function reads of these names: data, code, and of objects what it names."""
        return [
            [name, self._global(names[name], read, within)] for name in sorted(read & names.keys())
        ]

    def _global(self, value: Any, read: set[str], within: tuple[int, ...]) -> Any:
        if isinstance(value, _DATA) or _is_array(value):
            return self.of(value)
        if id(value) in within:
            return ["again", within.index(id(value))]
        inner = self._read(_attributes(value), read, (*within, id(value)))
        return ["global", import_path(type(value)), inner]

    def _owner(self, value: Any) -> Any:
        """What a bound method is bound to; of a network, whose weights move, its plain settings."""
        if not isinstance(value, nn.Module):
            return self.of(value)
        plain = {k: v for k, v in vars(value).items() if isinstance(v, _PLAIN)}
        return ["owner", self.of(type(value)), self.of(_settings(plain))]

    def _network(self, module: nn.Module) -> Any:
        parts = (_settings(vars(module)), dict(module.state_dict()), dict(module.named_children()))
        return ["network", self.of(type(module)), *(self.of(part) for part in parts)]

    def _object(self, value: Any) -> Any:
        if _is_array(value):
            data = hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
            return ["array", str(value.dtype), str(getattr(value, "shape", ())), data]
        state = _attributes(value)
        return ["object", self.of(type(value)), self.of(dict(sorted(state.items())))]


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """An nn.Module's attributes of its own, without PyTorch's and without the mode."""
    usual = vars(nn.Module()).keys()
    return {k: v for k, v in sorted(state.items()) if k not in usual}


def _is_array(value: Any) -> bool:
    """Whether it is one of NumPy's arrays and numbers."""
    return hasattr(value, "dtype") and hasattr(value, "tobytes")


def _attributes(value: Any) -> dict[str, Any]:
    """An object's own attributes, those of its slots among them; torch keeps its to itself."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    state = {k: getattr(value, k) for k in slots if hasattr(value, k)}
    if _package(value) != "torch":
        state.update(getattr(value, "__dict__", {}))
    return state


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _bits(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def _names(code: types.CodeType) -> set[str]:
    """The names that a function and those nested in it read."""
    nested = [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return set(code.co_names).union(*(_names(one) for one in nested))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None
