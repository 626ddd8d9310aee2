"""Trainings that people ask for by name and that no sum over points describes."""

from __future__ import annotations

__all__ = ["way_out_of"]

_TRADES = "it is an objective: give objective=TRADES(beta=6.0), and leave loss= to the clean point"
_NAMED = {
    "trades": _TRADES,
    "kl_div": _TRADES,
    "mart": (
        "its adversary maximises the cross-entropy, while training minimises another function of "
        "the same perturbation: how the maximiser moves is then no second derivative of one "
        "objective; use objective=TRADES(beta=...), or adversarial training"
    ),
    "awp": (
        "it perturbs the weights, by all points of a batch together: no point has a share of the "
        "objective to take out; train without it"
    ),
    "free": (
        "its perturbation of a point is left over from the steps before: it is no function of the "
        "point and the weights; use the threat's own ascent (attack=None)"
    ),
    "mixup": (
        "a mixed point is no point of the data set, and belongs to two: train on the points "
        "themselves, with CrossEntropyLoss(label_smoothing=...) for softer targets"
    ),
}
_NAMED["cutmix"] = _NAMED["mixup"]


def way_out_of(name: str) -> str:
    """What to write instead of a training that has no memory; empty for other names.

    Example:
        >>> way_out_of("TRADES")[:15]
        'it is an object'
        >>> way_out_of("cross_entropy")
        ''
    """
    words = name.lower().replace("-", "_").removesuffix("_loss").removesuffix("loss")
    return _NAMED.get(words.removesuffix("_adversarial_training").removesuffix("_at"), "")
