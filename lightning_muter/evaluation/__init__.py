"""The evaluation of unlearning: declared experiments, metrics against Retrain, plots, tables."""

from lightning_muter.evaluation.experiment import ROWS, Experiment, Row
from lightning_muter.evaluation.metrics import (
    LikelihoodRatioAUC,
    LossThresholdAUC,
    OutputDivergence,
    auc,
    likelihood_ratio_scores,
    output_divergence,
)
from lightning_muter.evaluation.results_table import Cell, Summary, Table
from lightning_muter.evaluation.runner import run

__all__ = [
    "ROWS",
    "Cell",
    "Experiment",
    "LikelihoodRatioAUC",
    "LossThresholdAUC",
    "OutputDivergence",
    "Row",
    "Summary",
    "Table",
    "auc",
    "likelihood_ratio_scores",
    "output_divergence",
    "run",
]
