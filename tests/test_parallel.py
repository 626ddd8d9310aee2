"""Several processes are one: shares, agreement, and failing together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_muter import StateError
from lightning_muter.parallel import Group


def test_every_item_belongs_to_one_process() -> None:
    shares = [Group(rank=rank, size=3).share(range(10)) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(10))
    assert Group().share([1, 2]) == [1, 2] and Group().first


def test_one_process_agrees_with_itself_and_keeps_its_errors() -> None:
    assert Group().agrees([1, 2])
    with pytest.raises(KeyError), Group().together():
        raise KeyError("own")


def test_an_error_elsewhere_is_an_error_here() -> None:
    def other_failed(flag: Tensor) -> Tensor:
        return flag + 1

    here = Group(rank=0, size=2, sum=other_failed)
    with pytest.raises(StateError, match="another process"), here.together():
        pass
    assert not here.agrees([1])
    with pytest.raises(ValueError, match="own"), here.together():
        raise ValueError("own")


def test_other_values_do_not_agree() -> None:
    group = Group(rank=1, size=2, sum=lambda t: t, broadcast=lambda value: [7])
    assert group.agrees([7]) and not group.agrees([8])
    assert torch.equal(Group().sum(torch.ones(2)), torch.ones(2))
