"""What a result says of itself: one line, a short repr, a card for notebooks."""

from __future__ import annotations

from dataclasses import replace

from lightning_muter import RebaseResult, UnlearningResult
from lightning_muter.linalg.solution import Status

RESULT = UnlearningResult(
    method="muter",
    indices=(3, 17),
    requests=1,
    update_norm=0.123456,
    residual=1e-15,
    iterations=0,
    status=Status.CONVERGED,
    stationary=1.0,
    active=1.0,
    seconds={"maximise_and_solve": 0.01, "write": 0.02, "total": 0.034},
)


def test_one_line() -> None:
    assert str(RESULT) == (
        "forgot 2 points (muter): converged; the weights moved by 0.123; no certificate; 0.034 s"
    )
    assert repr(RESULT) == f"<UnlearningResult: {RESULT}>"
    assert str(replace(RESULT, method="none")).startswith("kept the model for 2 points (none)")
    more = replace(
        RESULT,
        indices=(3,),
        bound=0.5,
        certificate="strong convexity",
        already=(17,),
        warnings=("a", "b"),
        rebase_due="a rebase is due",
        status=Status.DOUBTFUL,
    )
    assert str(more) == (
        "forgot 1 point (muter): doubtful; the weights moved by 0.123; at most 0.5 from a Retrain, "
        "on the conditions of .certificate; 0.034 s; passed over [17], forgotten already; "
        "2 warnings; a rebase is due"
    )


def test_a_card_for_notebooks() -> None:
    card = replace(RESULT, warnings=("<script>",))._repr_html_()
    assert "Forgotten: 2 points" in card and "0.1235" in card and "&lt;script&gt;" in card
    assert "<script>" not in card and "certificate" in card and "rebase_due" not in card


def test_a_rebase_in_one_line() -> None:
    result = RebaseResult(39, 2.5, 1e-9, 1e-8, 3, 0.25, ())
    assert str(result) == (
        "rebased to 39 points; the gradient of their objective went from 2.5 to 1e-09 (training "
        "had left 1e-08); 0.25 s"
    )
    assert repr(result) == f"<RebaseResult: {result}>"
