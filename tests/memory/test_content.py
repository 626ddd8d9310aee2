"""A memory's fields as its folder holds them: what goes in comes back."""

from __future__ import annotations

from dataclasses import replace

import torch
from small_memories import forgotten, same, small_memory

from lightning_muter import UnlearningMemory
from lightning_muter.memory.content import content_of, fields_of, new_requests
from lightning_muter.memory.rebase_policy import RebasePolicy


def back(memory: UnlearningMemory) -> UnlearningMemory:
    return UnlearningMemory(**fields_of(content_of(vars(memory)), None))


def test_every_field_comes_back() -> None:
    keyed = replace(
        small_memory(),
        ids=torch.arange(96, dtype=torch.uint8).reshape(6, 16).flip(0),
        ids_key=b"i" * 16,
        blocks=torch.full((1, 16), 7, dtype=torch.uint8),
        rebase_policy=RebasePolicy(5, 30.0),
        generation=4,
    )
    found = back(keyed)
    assert same(found, keyed)
    for name in ("ids", "blocks"):
        assert torch.equal(getattr(found, name), getattr(keyed, name))
    assert (found.ids_key, found.rebase_policy) == (keyed.ids_key, keyed.rebase_policy)


def test_what_is_not_there_takes_no_tensor() -> None:
    bare = replace(small_memory(), curvature=None, start=None)
    content = content_of(vars(bare))
    assert sorted(content.base) == ["digests", "omega_star", "residual_gradient", "weights"]
    assert content.facts["flow"] is None
    found = back(bare)
    assert found.curvature is None and found.start is None
    assert found.ids is None and found.blocks is None and found.private is None


def test_removed_points_are_those_of_the_ledger_and_gone_from_the_matrix() -> None:
    memory = forgotten(forgotten(small_memory(), [1]), [4, 2])
    found = back(memory)
    assert found.remaining == [0, 3, 5]
    assert memory.curvature is not None and found.curvature is not None
    assert found.curvature.removed.empty  # a new base needs no factors of what it lacks
    torch.testing.assert_close(found.curvature.matrix, memory.curvature.matrix)


def test_new_requests_are_the_ledger_s_last_with_what_they_took_out() -> None:
    memory = forgotten(replace(forgotten(small_memory(), [1]), pending=()), [4, 2])
    (request,) = new_requests(memory.ledger, memory.pending, None)
    assert request.entry is memory.ledger[-1]
    assert request.facts == [memory.pending[0].facts()]
    assert new_requests(memory.ledger, (), None) == []


def test_a_private_model_lies_with_the_last_request() -> None:
    two = forgotten(forgotten(small_memory(), [1]), [2])
    private = two.omega
    published = two.published(private + 1)
    first, last = new_requests(published.ledger, published.pending, published.private)
    assert "private_omega" not in first.tensors
    assert torch.equal(last.tensors["private_omega"], private)
    found = back(published)
    assert found.private is not None and torch.equal(found.private, private)
    assert torch.equal(found.omega, private + 1)
