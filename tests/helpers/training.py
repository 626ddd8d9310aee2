"""Short trainings with a MUterCallback, for what it accepts and refuses."""

from __future__ import annotations

import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from cases import QUIET, Data, Net
from torch.utils.data import DataLoader

from lightning_muter import L2Ball, MUterCallback, Trainer


def train(
    model: pl.LightningModule | None = None,
    loader: DataLoader[Any] | pl.LightningDataModule | None = None,
    before: list[pl.Callback] | None = None,
    after: list[pl.Callback] | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> MUterCallback:
    """Fit for an epoch, or as ``trainer`` says; the callback comes back."""
    pl.seed_everything(0, verbose=False)
    options = {"head": "classifier", "attack_steps": 2, "method": "none", **options}
    callback = MUterCallback(L2Ball(0.1), **options)
    callbacks = [*(before or []), callback, *(after or [])]
    settings = {"max_epochs": 1, **QUIET, "callbacks": callbacks, **(trainer or {})}
    model = Net() if model is None else model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*log_every_n_steps.*|.*many workers.*")
        Trainer(**settings).fit(model, Data() if loader is None else loader)
    return callback


def zero_head(model: pl.LightningModule) -> pl.LightningModule:
    """The module with a fresh head of zeros, where all losses have one value."""
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.zero_()
    return model
