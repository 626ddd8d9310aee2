"""The package's own errors: each says the value, the expectation and the way out."""

from __future__ import annotations

__all__ = [
    "ConfigurationError",
    "MemoryFormatError",
    "MuterError",
    "RemovalError",
    "SolverError",
    "StateError",
]


class MuterError(Exception):
    """Base of every error that lightning-muter raises on purpose."""


class ConfigurationError(MuterError, ValueError):
    """An argument, a head, a loss or a data set that the mathematics cannot serve."""


class RemovalError(MuterError, ValueError):
    """A request names points that cannot be forgotten."""


class StateError(MuterError, RuntimeError):
    """A call came at the wrong time, or on a model that is not the memory's."""


class MemoryFormatError(MuterError, RuntimeError):
    """A memory on disk is missing, truncated, altered or of another format version."""


class SolverError(MuterError, RuntimeError):
    """A system could not be solved, or a bound not reached, to a number worth returning."""
