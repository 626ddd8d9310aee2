"""Every source × response × model × solver against a brute-force loop that shares no code.

A new threat, response, model view, source or solver is a row of a table here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muter import TRADES, L2Ball, LinfBall, Threat
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.kept import Materialised
from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.curvature.sharded import ShardedDense
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import measuring
from lightning_muter.spec import Settings
from lightning_muter.unlearning.points import unweighted
from lightning_muter.unlearning.request import forget, forget_rows
from lightning_muter.unlearning.stage_one import build_memories

N, D, C, LAM, DAMPING, BETA = 9, 6, 3, 0.3, 0.05, 4.0
GONE = [1, 4]
LOSS = partial(F.cross_entropy, reduction="none")

ReferenceResponse = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Model:
    """A module, its trained parameters, and how the settings name them."""

    make: Callable[[], nn.Module]
    names: list[str]
    where: dict[str, object]


def _relu() -> nn.Module:
    """Four units that are on and one that is off, whatever the perturbation: no kink is met."""
    first = nn.Linear(D, 5)
    with torch.no_grad():
        first.bias.copy_(torch.tensor([2.0, 2.5, 2.0, -2.5, 2.0]))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(5, C))


def _tanh() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C, bias=False))


def _deep() -> nn.Module:
    return nn.Sequential(
        nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, C)
    )


LAYERS = ["2.weight", "2.bias", "4.weight", "4.bias"]
MODELS = {
    "linear": Model(lambda: nn.Sequential(nn.Linear(D, C)), ["0.weight", "0.bias"], {"head": "0"}),
    "relu head": Model(_relu, ["2.weight", "2.bias"], {"head": "2"}),
    "smooth head": Model(_tanh, ["2.weight"], {"head": "2"}),
    "two layers": Model(_deep, LAYERS, {"parameters": tuple(LAYERS)}),
}


def _box(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    return low - x, high - x


@dataclass(frozen=True)
class Response:
    """A threat, how the settings name its response, and the same response written out."""

    threat: Threat
    options: dict[str, object]
    written_out: ReferenceResponse


def _plain(function: Callable[..., Tensor], **known: float) -> ReferenceResponse:
    return lambda x, delta, grad, h: function(delta, grad, h, **known)


def _boxed(function: Callable[..., Tensor], **known: float) -> ReferenceResponse:
    def response(x: Tensor, delta: Tensor, grad: Tensor, h: Tensor) -> Tensor:
        low, high = _box(x, -1.0, 1.0)
        return function(delta, grad, h, low=low, high=high, **known)

    return response


NEUMANN = {"response": "unconstrained", "inverse": "neumann", "neumann_order": 3}
RESPONSES = {
    "l2": Response(L2Ball(0.2), {}, _plain(reference.sphere_response, eps=0.2)),
    "l2 range": Response(
        L2Ball(0.2, data_range=(-1, 1)), {}, _boxed(reference.boxed_sphere_response, eps=0.2)
    ),
    "linf": Response(
        LinfBall(0.1, bandwidth=0.05),
        {},
        _plain(reference.smoothed_sign_response, eps=0.1, tau=0.05),
    ),
    "linf range": Response(
        LinfBall(0.1, bandwidth=0.05, data_range=(-1, 1)),
        {},
        _boxed(reference.boxed_sign_response, eps=0.1, tau=0.05),
    ),
    "neumann": Response(L2Ball(0.2), NEUMANN, _plain(reference.neumann_response, order=3)),
    "exact": Response(
        L2Ball(0.2),
        {"response": "unconstrained", "inverse": "exact"},
        _plain(reference.exact_response),
    ),
    "features": Response(
        L2Ball(0.2), {**NEUMANN, "space": "features"}, _plain(reference.neumann_response, order=3)
    ),
    "trades": Response(
        L2Ball(0.2),
        {"objective": TRADES(beta=BETA)},
        _plain(reference.sphere_response, eps=0.2),
    ),
    "trades linf range": Response(
        LinfBall(0.1, bandwidth=0.005, data_range=(-1, 1)),
        {"objective": TRADES(beta=BETA)},
        _boxed(reference.boxed_sign_response, eps=0.1, tau=0.005),
    ),
    "trades neumann": Response(
        L2Ball(0.2),
        {**NEUMANN, "objective": TRADES(beta=BETA)},
        _plain(reference.neumann_response, order=3),
    ),
}
METHODS = {"total": "muter", "hessian": "newton_delta", "fisher": "fisher_delta"}
SOLVERS = ["direct", "schur"]
CASES = [
    (source, response, model)
    for source in METHODS
    for response in RESPONSES
    for model in MODELS
    if (source == "total" or response in ("l2", "linf range", "trades"))  # others have no response
    and not (response == "features" and model == "two layers")  # needs a head
]


@dataclass(frozen=True)
class Problem:
    """A trained-looking module, its points, and the memory that the package builds of it."""

    module: nn.Module
    names: list[str]
    settings: Settings
    x: Tensor
    y: Tensor
    memory: UnlearningMemory
    perturbed: Tensor
    expected: list[Tensor]  # D_i of every point, without λI
    gradients: Tensor


@cache
def problem(source: str, response: str, model: str) -> Problem:
    torch.manual_seed(7)
    row, case = MODELS[model], RESPONSES[response]
    module = row.make().double().eval()
    x = (0.8 * torch.randn(N, D, dtype=torch.float64)).clamp(-0.98, 0.98)
    y = torch.randint(0, C, (N,))
    settings = Settings(
        **{  # type: ignore[arg-type]
            "method": METHODS[source],
            "threat": case.threat,
            "damping": DAMPING,
            "solver": "direct",
            "weight_decay": LAM,
            **row.where,
            **case.options,
        }
    )
    digests = torch.zeros(N, 16, dtype=torch.uint8)
    (memory,) = build_memories(module, [settings], [unweighted(x, y)], digests, bytes(16))
    with measuring(module):
        inner = settings.problem().perturb(settings.view(module), unweighted(x, y))
    assert bool(inner.stationary.all())
    delta = inner.delta
    expected = [
        _expected(source, case, module, row.names, x[i : i + 1], y[i : i + 1], delta[i : i + 1])
        for i in range(N)
    ]
    rows = []
    for i in range(N):
        whole = _objective(case, module, row.names, x[[i]])
        rows.append(reference.point_gradients(*whole, (x + delta)[[i]], y[[i]]))
    gradients = torch.cat(rows)
    return Problem(module, row.names, settings, x, y, memory, x + delta, expected, gradients)


class Both(nn.Module):
    """The outputs at the clean point, then those at the input."""

    def __init__(self, net: nn.Module, clean: Tensor) -> None:
        super().__init__()
        self.net, self.clean = net, clean

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(self.clean), self.net(x)], dim=1)


def _trades(outputs: Tensor, y: Tensor) -> Tensor:
    clean, perturbed = outputs.split(C, dim=1)
    log_p, log_q = clean.log_softmax(dim=1), perturbed.log_softmax(dim=1)
    return LOSS(clean, y) + BETA * (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _objective(
    case: Response, module: nn.Module, names: list[str], x: Tensor
) -> tuple[nn.Module, list[str], Callable[[Tensor, Tensor], Tensor]]:
    """A module, its parameters and a loss that are one point's objective of the perturbed input."""
    if "objective" not in case.options:
        return module, names, LOSS
    return Both(module, x), [f"net.{name}" for name in names], _trades


def _expected(
    source: str,
    case: Response,
    module: nn.Module,
    names: list[str],
    x: Tensor,
    y: Tensor,
    delta: Tensor,
) -> Tensor:
    """One point's D, by one dense Hessian of the joint function of ω and δ."""
    module, names, loss = _objective(case, module, names, x)
    if source == "fisher":
        g = reference.point_gradients(module, names, loss, x + delta, y)[0]
        return torch.outer(g, g)
    if source == "hessian":
        still = reference.no_response
        return reference.brute_force_total_hessian(module, names, loss, x, y, delta, still)
    if case.options.get("space") == "features":  # a linear model of the head's input
        body, head = module[:-1], nn.Sequential(module[-1])  # type: ignore[index]
        h = body(x + delta).detach()
        names = [f"0.{name.split('.')[1]}" for name in names]
        x, delta, module = h, torch.zeros_like(h), head
    return reference.brute_force_total_hessian(
        module,
        names,
        loss,
        x,
        y,
        delta,
        lambda d, g, k: case.written_out(x[0], d, g, k),
    )


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("source", "response", "model"), CASES)
def test_the_sum_is_the_brute_force_one(source: str, response: str, model: str) -> None:
    known = problem(source, response, model)
    assert known.memory.curvature is not None
    p = known.memory.p
    expected = sum(known.expected) + N * LAM * torch.eye(p, dtype=torch.float64)
    assert isinstance(known.memory.curvature, DenseCurvature)
    assert relative(known.memory.curvature.matrix, expected) <= 1e-8


#: what has rows: S, r and h̃ of a head, and a response that is a few vectors a point
ROWS = [
    (source, response, model)
    for source, response, model in CASES
    if model != "two layers" and (source != "total" or model == "linear" or response == "features")
    if source != "fisher" or "objective" not in RESPONSES[response].options
]


def in_rows(known: Problem, **options: object) -> UnlearningMemory:
    settings = replace(
        known.settings,
        representation="rows",
        solver_tol=1e-12,
        **options,  # type: ignore[arg-type]
    )
    digests = torch.zeros(N, 16, dtype=torch.uint8)
    batches = [unweighted(known.x[some], known.y[some]) for some in (slice(4), slice(4, N))]
    (memory,) = build_memories(known.module, [settings], batches, digests, bytes(16))
    return memory


@pytest.mark.parametrize(("source", "response", "model"), ROWS)
def test_rows_are_the_brute_force_sum(source: str, response: str, model: str) -> None:
    known = problem(source, response, model)
    memory = in_rows(known)
    assert isinstance(memory.curvature, RowsCurvature)
    eye = torch.eye(memory.p, dtype=torch.float64)
    expected = sum(known.expected) + N * LAM * eye
    columns = torch.stack([memory.curvature.matvec(v) for v in eye], dim=1)
    assert relative(columns, expected) <= 1e-8
    assert relative(memory.curvature.base_diagonal(), expected.diagonal()) <= 1e-8
    low, high = memory.curvature.extremes()
    values = torch.linalg.eigvalsh(expected)
    assert low == pytest.approx(float(values[0]), rel=1e-6)
    assert high == pytest.approx(float(values[-1]), rel=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("source", "response", "model"), ROWS)
def test_a_request_by_rows_moves_by_the_brute_force_step(
    source: str, response: str, model: str, solver: str
) -> None:
    known = problem(source, response, model)
    memory = in_rows(known, solver=solver)
    if solver == "direct":
        outcome = forget_rows(memory, GONE)
    else:
        view = memory.settings.view(known.module)
        outcome = forget(memory, view, GONE, known.x[GONE], known.y[GONE])
    omega, eye = memory.omega_star, torch.eye(memory.p, dtype=torch.float64)
    kept = sum(known.expected[i] for i in range(N) if i not in GONE)
    matrix = kept + ((N - len(GONE)) * LAM + DAMPING) * eye
    rhs = known.gradients[GONE].sum(dim=0) + len(GONE) * LAM * omega
    assert relative(outcome.memory.omega - omega, torch.linalg.solve(matrix, rhs)) <= 1e-8
    assert outcome.memory.curvature is not None
    columns = torch.stack([outcome.memory.curvature.matvec(v) for v in eye], dim=1)
    assert relative(columns, matrix - DAMPING * eye) <= 1e-8
    assert outcome.solution.residual <= 1e-8


def removed_from(matrix: torch.Tensor, removed: RemovedPoints) -> torch.Tensor:
    rest = matrix.clone()
    removed.subtract_from(rest)
    return rest


@pytest.mark.parametrize(("source", "response", "model"), CASES)
def test_products_and_blocks_are_those_of_the_sum(source: str, response: str, model: str) -> None:
    """matvec and the parts of Theorem 2's system describe the same D as `add_to`."""
    known = problem(source, response, model)
    view, asked = known.settings.view(known.module), known.settings.problem()
    with measuring(known.module):
        batch = unweighted(known.x[GONE], known.y[GONE])
        for part, _ in asked.measure(view, batch):
            total = DenseCurvature.zeros(view.p, "cpu")
            total.add(part)
            eye = torch.eye(view.p, dtype=torch.float64)
            columns = torch.stack([part.matvec(v) for v in eye], dim=1)
            assert relative(columns, sum(known.expected[i] for i in GONE)) <= 1e-8
            assert relative(columns, total.matrix) <= 1e-10
            kept = RemovedPoints.of(part.kept(), 0.25)
            again = RemovedPoints.restore(kept.facts(), kept.tensors(), view.get())
            whole = Materialised.of(again.parts, view.p, torch.device("cpu"))
            for removed in (kept, again, RemovedPoints((whole,), again.shift)):
                products = (
                    eye - torch.stack([removed.subtracted(v, v) for v in eye], dim=1) - 0.25 * eye
                )
                assert relative(products, columns) <= 1e-12
                less = -removed_from(total.matrix, removed) + total.matrix - 0.25 * eye
                assert relative(less, columns) <= 1e-12
            unit = torch.eye(part.inner_size, dtype=torch.float64)
            if part.inner_size:
                response_matrix = torch.stack([part.respond(a) for a in unit], dim=1)
                diagonal = part.response_diagonal()
                assert torch.allclose(diagonal, response_matrix.diagonal(), atol=1e-12)
                coupled = torch.stack([part.couple(v) for v in eye], dim=1)
                spread = torch.stack([part.spread(a) for a in unit], dim=1)
                assert torch.allclose(coupled, spread.T, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("source", "response", "model"), CASES)
def test_a_request_moves_by_the_brute_force_step(
    source: str, response: str, model: str, solver: str
) -> None:
    known = problem(source, response, model)
    memory = replace(known.memory, settings=replace(known.settings, solver=solver))
    view = memory.settings.view(known.module)
    outcome = forget(memory, view, GONE, known.x[GONE], known.y[GONE])
    omega, eye = memory.omega_star, torch.eye(memory.p, dtype=torch.float64)
    kept = sum(known.expected[i] for i in range(N) if i not in GONE)
    matrix = kept + ((N - len(GONE)) * LAM + DAMPING) * eye
    rhs = known.gradients[GONE].sum(dim=0) + len(GONE) * LAM * omega
    step = torch.linalg.solve(matrix, rhs)
    assert relative(outcome.memory.omega - omega, step) <= 1e-8
    assert isinstance(outcome.memory.curvature, DenseCurvature)
    assert relative(outcome.memory.curvature.matrix, matrix - DAMPING * eye) <= 1e-8
    assert outcome.solution.residual <= 1e-8


@pytest.mark.parametrize(("source", "response", "model"), CASES)
def test_a_sharded_sum_and_its_request_are_the_brute_force_ones(
    source: str, response: str, model: str
) -> None:
    known = problem(source, response, model)
    settings = replace(known.settings, representation="sharded")
    digests = torch.zeros(N, 16, dtype=torch.uint8)
    batches = [unweighted(known.x[some], known.y[some]) for some in (slice(4), slice(4, N))]
    (memory,) = build_memories(known.module, [settings], batches, digests, bytes(16))
    assert isinstance(memory.curvature, ShardedDense)
    eye = torch.eye(memory.p, dtype=torch.float64)
    assert relative(memory.curvature.rows, sum(known.expected) + N * LAM * eye) <= 1e-8
    view = settings.view(known.module)
    outcome = forget(memory, view, GONE, known.x[GONE], known.y[GONE])
    kept = sum(known.expected[i] for i in range(N) if i not in GONE)
    matrix = kept + ((N - len(GONE)) * LAM + DAMPING) * eye
    rhs = known.gradients[GONE].sum(dim=0) + len(GONE) * LAM * memory.omega_star
    step = torch.linalg.solve(matrix, rhs)
    assert relative(outcome.memory.omega - memory.omega_star, step) <= 1e-8
    assert outcome.memory.curvature is not None
    columns = torch.stack([outcome.memory.curvature.matvec(v) for v in eye], dim=1)
    assert relative(columns, matrix - DAMPING * eye) <= 1e-8
    assert outcome.solution.residual <= 1e-8
