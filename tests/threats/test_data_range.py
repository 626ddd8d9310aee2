"""Inputs that the threat's data range does not hold."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cases import QUIET, Data, Net
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, ConfigurationError, L2Ball, LinfBall, MUterCallback
from lightning_muter.errors import MuterError


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 3, 5, 5, generator=generator).to(dtype)


def normalised() -> Tensor:
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.2, 0.1])
    return (images() - mean[:, None, None]) / std[:, None, None]


def test_normalised_images_are_refused_with_the_numbers_of_each_channel() -> None:
    x = normalised()
    with pytest.raises(ConfigurationError) as error:
        L2Ball(0.5, (0, 1)).check_inputs(x)
    message = str(error.value)
    share = float(((x < 0) | (x > 1)).double().mean())
    for part in ("channel 2", "data_range=(0, 1)", "normalised", "data_range=None"):
        assert part in message
    assert f"{share:.2%}" in message and f"{float(x.min()):.4g}" in message
    low, high = float(f"{float(x.min()):.4g}"), float(f"{float(x.max()):.4g}")
    L2Ball(0.5, (low, high)).check_inputs(x)  # what the message says fits does fit


def test_unscaled_pixels_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"rescale.*data_range"):
        LinfBall(8 / 255, (0, 1)).check_inputs(255 * images())
    with pytest.raises(ConfigurationError, match="outside"):
        LinfBall(8 / 255, (0, 1)).check_inputs((255 * images()).to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_is_inside_and_so_is_everything_without_a_range(dtype: torch.dtype) -> None:
    x = (images(torch.float64) - 0.4914) / 0.2023
    L2Ball(0.5, (-0.4914 / 0.2023, 0.5086 / 0.2023)).check_inputs(x.to(dtype))
    L2Ball(0.5, (-2.4291, 2.5141)).check_inputs(x.clamp(-2.42909, 2.51409).to(dtype))
    L2Ball(0.5).check_inputs(100 * x)
    L2Ball(1e6, (-3, 3)).check_inputs(x.to(dtype))  # a large radius is the caller's affair
    x[0, 0, 0, 0] = 2.7
    with pytest.raises(ConfigurationError):
        L2Ball(0.5, (-2.4291, 2.5141)).check_inputs(x.to(dtype))


def test_tables_are_described_without_channels() -> None:
    with pytest.raises(ConfigurationError) as error:
        L2Ball(0.5, (0, 1)).check_inputs(torch.tensor([[0.5, -2.0], [0.1, 0.2]]))
    assert "25.00%" in str(error.value) and "channel 0" not in str(error.value)


@pytest.mark.parametrize("make", [AdversarialTraining, lambda t: MUterCallback(t, "classifier")])
def test_training_is_refused_before_a_weight_moves(make: Any) -> None:
    model, data = Net(), Data()
    before = [p.detach().clone() for p in model.parameters()]
    callback = make(L2Ball(0.5, (0, 1)))
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    with pytest.raises(ConfigurationError, match="outside data_range"):
        trainer.fit(model, data)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*")
def test_a_later_batch_is_looked_at_too_and_so_is_a_test_set() -> None:
    x, y = torch.rand(40, 8).double(), torch.arange(40) % 3
    x[-1, 0] = 3.0
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    callback = AdversarialTraining(L2Ball(0.5, (0, 1)))
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(ConfigurationError, match="outside data_range"):
            trainer.fit(Net(), loader)
    with pytest.raises(ConfigurationError, match="outside data_range"):
        trainer.test(Net(), loader, verbose=False)


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*")
def test_a_subclass_may_let_it_pass_and_hears_of_it_once() -> None:
    heard: list[MuterError] = []

    class Lenient(AdversarialTraining):
        def _refuse(self, error: MuterError) -> None:
            heard.append(error)

    trainer = pl.Trainer(max_epochs=2, callbacks=[Lenient(L2Ball(0.5, (0, 1)))], **QUIET)
    trainer.fit(Net(), Data())
    assert len(heard) == 1
