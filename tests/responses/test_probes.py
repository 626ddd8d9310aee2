"""Sketched inner responses: exact with all directions, unbiased, and removed as they were added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import (
    L2Ball,
    LinfBall,
    MUterCallback,
    RemovalDataModule,
    Threat,
    Trainer,
    total_hessian,
)
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.errors import ConfigurationError
from lightning_muter.linalg.lanczos import inverse_square_root
from lightning_muter.models import view_of
from lightning_muter.responses import Constrained, Unconstrained, constrained, unconstrained
from lightning_muter.responses.probes import seeded_probes
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import unweighted

N, D, C = 6, 10, 3
THREATS = [
    L2Ball(0.4),
    L2Ball(0.4, data_range=(0, 1)),
    LinfBall(0.1, bandwidth=0.05),
    LinfBall(0.1, bandwidth=0.05, data_range=(0, 1)),
]


def problem() -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, C)).double()
    return net, (torch.rand(N, D).double(), torch.randint(0, C, (N,)))


def all_directions(points: Tensor, count: int) -> Tensor:
    """D probes whose outer products sum to D times the identity, and no two of them axes."""
    generator = torch.Generator().manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))
    return D**0.5 * basis.expand(len(points), D, D)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("response", ["constrained", "unconstrained"])
def test_as_many_orthogonal_probes_as_inputs_are_exact(
    threat: Threat, response: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, batch = problem()
    exact = total_hessian(net, batch, threat, head="2", response=response)
    for part in (constrained, unconstrained):
        monkeypatch.setattr(part, "seeded_probes", all_directions)
    kinds = {"constrained": Constrained(1e-10, rank=D), "unconstrained": Unconstrained(rank=D)}
    sketched = total_hessian(
        net,
        batch,
        threat,
        head="2",
        response=kinds[response],  # type: ignore[arg-type]
    )
    torch.testing.assert_close(sketched, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("response", ["constrained", "unconstrained"])
def test_a_sketch_is_unbiased_and_its_error_falls_with_its_probes(response: str) -> None:
    net, batch = problem()

    def found(sketch: int) -> Tensor:
        return total_hessian(
            net, batch, THREATS[0], head="2", response=response, sketch=sketch, weight_decay=0.1
        )

    exact, few, many = found(0), found(4), found(1024)
    direct = total_hessian(net, batch, L2Ball(1e-9), head="2", weight_decay=0.1)
    indirect = float((exact - direct).norm())
    assert float((many - exact).norm()) < 0.1 * indirect
    assert float((many - exact).norm()) < 0.2 * float((few - exact).norm())


def test_constrained_sketches_only_add_curvature() -> None:
    net, (x, y) = problem()
    delta = torch.zeros_like(x)
    delta[:, 0] = 0.4
    kwargs = {"head": "2", "delta": delta}
    sketched = total_hessian(net, (x, y), THREATS[0], sketch=1, **kwargs)  # type: ignore[arg-type]
    outputs = net(x + delta).detach()
    q, h = outputs.softmax(dim=1), torch.cat([net[:2](x + delta).detach(), torch.ones(N, 1)], dim=1)
    s = torch.diag_embed(q) - q.unsqueeze(2) * q.unsqueeze(1)
    blocks = torch.einsum("nab,ni,nj->aibj", s, h, h)
    order = [a * 8 + i for a in range(C) for i in range(7)] + [a * 8 + 7 for a in range(C)]
    direct = blocks.reshape(8 * C, 8 * C)[order][:, order]
    assert float(torch.linalg.eigvalsh(sketched - direct).min()) > -1e-9


def test_probes_belong_to_the_point() -> None:
    _, (x, _) = problem()
    probes = seeded_probes(x, 4)
    torch.testing.assert_close(seeded_probes(x.flip(0), 4), probes.flip(0), rtol=0, atol=0)
    assert len({float(row[0, 0]) for row in probes}) == N


def test_inverse_square_root_is_each_points_own_whatever_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(N, D, D, generator=generator, dtype=torch.float64)
    k = a @ a.mT / D + torch.diag_embed(torch.logspace(0, 2, N, dtype=torch.float64)[:, None])
    b = torch.randn(N, 2, D, generator=generator, dtype=torch.float64)
    b[0, 1] = 0
    found, usable = inverse_square_root(lambda v: v @ k, b, tol=1e-12)
    values, vectors = torch.linalg.eigh(k)
    root = (vectors * values.rsqrt().unsqueeze(1)) @ vectors.mT
    torch.testing.assert_close(found, b @ root, rtol=1e-8, atol=1e-10)
    assert bool(usable.all())
    rough, _ = inverse_square_root(lambda v: v @ k, b, tol=1e-2)
    alone, _ = inverse_square_root(lambda v: v @ k[2:3], b[2:3], tol=1e-2)
    torch.testing.assert_close(rough[2:3], alone, rtol=1e-12, atol=1e-14)


def test_indefinite_systems_are_noticed() -> None:
    k = torch.diag_embed(torch.tensor([[1.0, 2, 3], [1, 2, -3]], dtype=torch.float64))
    b = torch.ones(2, 1, 3, dtype=torch.float64)
    _, usable = inverse_square_root(lambda v: v @ k, b)
    assert usable.tolist() == [True, False]


def test_forgetting_removes_exactly_what_the_sketch_added() -> None:
    import pytorch_lightning as pl

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            net, _ = problem()
            self.body, self.head = net[:2], net[2]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1, weight_decay=0.1)

    _, (x, y) = problem()
    muter = MUterCallback(L2Ball(0.4), head="head", sketch=40, newton_steps=6)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1, callbacks=[muter], precision="64-true", enable_checkpointing=False, **quiet
    )
    model = Net()
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=3))
    before = muter.memory
    assert before is not None
    trainer.unlearn(RemovalDataModule(TensorDataset(x, y), [1, 4]), model)
    after = muter.memory
    keep = [0, 2, 3, 5]
    assert after is not None and isinstance(model, pl.LightningModule)
    with before.settings.view(model).at(before.omega_star):
        rest = total_hessian(
            model, (x[keep], y[keep]), L2Ball(0.4), head="head", weight_decay=0.1, sketch=40
        )
    torch.testing.assert_close(after.curvature.matrix, rest, rtol=1e-6, atol=1e-7)


def test_what_a_sketch_cannot_do() -> None:
    with pytest.raises(ConfigurationError, match="sketch=-1"):
        MUterCallback(L2Ball(0.4), head="head", sketch=-1)
    with pytest.raises(ConfigurationError, match="linear head"):
        MUterCallback(L2Ball(0.4), parameters=["0.weight"], sketch=1)
    with pytest.raises(ConfigurationError, match="exact inverse"):
        MUterCallback(L2Ball(0.4), head="head", sketch=1, response="unconstrained", inverse="exact")


def test_an_indefinite_point_keeps_a_single_precision_sketch_finite() -> None:
    """Far from a maximum K is indefinite: such a point has no response, and infects no other."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, C))
    with torch.no_grad():
        net[0].weight.mul_(4)
    x, y = torch.rand(40, D), torch.randint(0, C, (40,))
    threat = LinfBall(2.0, bandwidth=1e-2)
    delta = torch.zeros_like(x)  # no maximum

    def sketched(some: slice) -> Tensor:
        batch = (x[some], y[some])
        return total_hessian(net, batch, threat, head="2", delta=delta[some], sketch=2)

    each = [sketched(slice(i, i + 1)) for i in range(40)]
    derivatives = view_of(net, "cross_entropy", "2")
    asked = PointProblem("muter", threat, Constrained(rank=2))
    points = unweighted(x, y)
    inner = asked.given(derivatives, points, delta)
    usable = asked.accumulate(
        derivatives, points, DenseCurvature.zeros(derivatives.p, "cpu"), inner
    ).usable
    assert 0 < int(usable) < 40
    assert all(bool(torch.isfinite(matrix).all()) for matrix in each)
    assert torch.allclose(sketched(slice(None)), torch.stack(each).sum(dim=0), rtol=1e-3, atol=1e-2)
