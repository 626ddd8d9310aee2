"""One picture a claim of docs/results.md, docs/audits.md and docs/certificates.md, from their CSVs.

    python benchmarks/pictures.py            # all of them
    python benchmarks/pictures.py paper linf # these

A line is the mean over the seeds and its shade their range; "six baselines" is the span of the
means of newton, fisher, influence and the same with adversarial points (``_delta``).
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable
from pathlib import Path

from drawing import (
    LENGTH,
    RELATIVE,
    RESULTS,
    curves,
    distances,
    dumbbells,
    legend,
    panels,
    plain,
    style,
    table,
)
from matplotlib import pyplot, ticker
from matplotlib.figure import Figure
from PIL import Image

from lightning_muter.evaluation import Table

# --- distance to Retrain ------------------------------------------------------------------------

MUTER = ("none", "muter_unconstrained", "muter")


def paper() -> Figure:
    records = [
        ("paper_mnist_b_logistic_fgsm", "MNIST, logistic"),
        ("paper_covtype_logistic_fgsm", "Covtype, logistic"),
    ]
    return distances(records, ("none", "muter_unconstrained", "muter", "muter_horizon"))


def robustness() -> Figure:
    records = [
        ("paper_mnist_b_logistic_fgsm", "L∞, stopped early"),
        ("mnist_b_logistic_linf", "L∞, at the optimum"),
        ("mnist_b_logistic_l2", "L2, at the optimum"),
    ]
    figure, axes = panels(3)
    for axis, (name, title) in zip(axes, records, strict=True):
        curves(axis, table(name), ("none", "muter", "muter_horizon", "retrain"), "robust_test")
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(f"MNIST, {title}", fontsize=8)
    axes[0].set_ylabel("robust test accuracy", fontsize=8)
    legend(figure, 5)
    return figure


def horizon() -> Figure:
    rows = [
        ("paper_mnist_b_logistic_fgsm", "MNIST, logistic, L∞", 650),
        ("paper_mnist_b_ridge_fgsm", "MNIST, ridge, L∞", 650),
        ("paper_covtype_logistic_fgsm", "Covtype, logistic, L∞", 400),
        ("paper_covtype_ridge_fgsm", "Covtype, ridge, L∞", 400),
        ("cifar10_wrn_linf", "WideResNet's head, L∞ (8%)", 24),
        ("mnist_b_early", "MNIST, logistic, L2", 650),
    ]
    methods = ("muter_horizon", "muter", "newton_delta_horizon", "newton_delta")
    return dumbbells(rows, methods, "distance to Retrain at 5% removed (1 = none, unchanged)")


def stationary() -> Figure:
    records = [
        ("mnist_b_logistic_l2", "MNIST, logistic"),
        ("covtype_logistic_l2", "Covtype, logistic"),
        ("mnist_b_ridge_l2", "MNIST, ridge"),
        ("covtype_ridge_l2", "Covtype, ridge"),
    ]
    return distances(records, MUTER, 4)


def response() -> Figure:
    rows = [
        ("mnist_b_logistic_l2", "MNIST, logistic, L2", 130),
        ("covtype_logistic_l2", "Covtype, logistic, L2", 80),
        ("mnist_b_ridge_l2", "MNIST, ridge, L2", 130),
        ("covtype_ridge_l2", "Covtype, ridge, L2", 80),
        ("mnist_b_logistic_linf", "MNIST, logistic, L∞", 130),
        ("covtype_logistic_linf", "Covtype, logistic, L∞", 80),
        ("mnist_b_ridge_linf", "MNIST, ridge, L∞", 20),
        ("covtype_ridge_linf", "Covtype, ridge, L∞", 80),
        ("cifar10_wrn", "WideResNet's head, L2", 10),
    ]
    methods = ("muter", "muter_unconstrained", "muter_features")
    return dumbbells(rows, methods, "distance to Retrain at 1% removed (1 = none, unchanged)", 4)


def linf() -> Figure:
    records = [
        ("mnist_b_logistic_linf", "MNIST, logistic"),
        ("covtype_logistic_linf", "Covtype, logistic"),
        ("mnist_b_ridge_linf", "MNIST, ridge"),
        ("covtype_ridge_linf", "Covtype, ridge"),
    ]
    return distances(records, MUTER, 4)


def bandwidth() -> Figure:
    """Unlearning at another bandwidth than training's, given as a share."""
    figure, axes = panels(2, width=2.9)
    colours = ("#000000", "#0072B2", "#56B4E9", "#009E73")
    records = (("mnist_b_bandwidth", "MNIST"), ("covtype_bandwidth", "Covtype"))
    for axis, (name, title) in zip(axes, records, strict=True):
        source = table(name)
        shares = [float(m.split("_")[1]) for m in source.methods() if m.startswith("smoothing_")]
        for removed, colour, marker in zip(source.removals(), colours, "osD^", strict=False):
            found = [source.summary(f"smoothing_{s:g}", removed, RELATIVE) for s in shares]
            means = [one.mean for one in found if one is not None]
            axis.plot(shares, means, marker + "-", color=colour, ms=4, label=f"{removed:,} removed")
        axis.axvline(0.02, color="#D55E00", ls="--", lw=1)
        axis.text(0.021, 0.97, "default", fontsize=7, color="#D55E00", va="top",
                  transform=axis.get_xaxis_transform())  # fmt: skip
        axis.set(xscale="log", yscale="log", title=title)
        axis.title.set_fontsize(8)
        plain(axis.yaxis, (0.05, 0.1, 0.2, 0.5))
        axis.set_xlabel("bandwidth (share of the gradient's\nroot mean square)", fontsize=8)
        axis.legend(fontsize=6, frameon=False)
    axes[0].set_ylabel(LENGTH, fontsize=8)
    return figure


def networks() -> Figure:
    records = [
        ("network", "small CNN, L2, at the optimum"),
        ("cifar10_wrn", "WideResNet, L2, at the optimum"),
        ("cifar10_wrn_linf", "WideResNet, L∞, stopped early"),
    ]
    return distances(records, (*MUTER, "muter_horizon"), 5)


def trades() -> Figure:
    methods = ("none", "newton_delta", "adversarial_Hessian", "adversarial_training", "muter")
    return distances([("trades_cifar10", "CIFAR-10, TRADES")], methods, 2)


def losses() -> Figure:
    records = [
        ("label_smoothing", "label smoothing"),
        ("several_labels", "several labels"),
        ("several_outputs", "several outputs"),
    ]
    return distances(records, ("none", "newton_delta", "muter"))


def hundred() -> Figure:
    return distances(
        [("hundred_classes", "MNIST, 100 classes, by rows")], ("none", "muter", "muter_corrected_1")
    )


def hard() -> Figure:
    records = [
        ("mnist_b_highest_loss", "highest loss"),
        ("mnist_b_mislabelled", "wrong labels"),
        ("mnist_b_class", "one class"),
    ]
    return distances(records, ("none", "muter", "muter_corrected_1", "muter_corrected_3"), 5)


def noise() -> Figure:
    source = table("mnist_b_noise")
    figure, (axis,) = panels(1)
    sigmas = [m for m in source.methods() if m.startswith("sigma_")]
    rows = [list(source.values(m, 130, RELATIVE).values()) for m in sigmas]
    x = [float(m.split("_")[1]) for m in sigmas]
    means = [sum(v) / len(v) for v in rows]
    low, high = ([pick(v) for v in rows] for pick in (min, max))
    axis.fill_between(x, low, high, color="#000000", alpha=0.15, lw=0)
    axis.plot(x, means, **style("muter"))
    axis.axhline(1.0, color="#777777", ls=":", label="none")
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("standard deviation σ of the noise\n(same units as the parameters)", fontsize=8)
    axis.set_ylabel(LENGTH, fontsize=8)
    axis.legend(fontsize=7, frameon=False)
    return figure


# --- what a request costs -----------------------------------------------------------------------


def seconds() -> Figure:
    records = [
        ("requests_mnist_b_logistic", "MNIST, logistic (p = 784)"),
        ("requests_covtype_logistic", "Covtype, logistic (p = 54)"),
    ]
    methods = ("retrain", "fisher_delta_successive", "muter_successive", "muter")
    figure, axes = panels(2, width=2.9)
    for axis, (name, title) in zip(axes, records, strict=True):
        source = table(name)
        for method in methods:
            found = [source.summary(method, m, "seconds") for m in source.removals()]
            means = [one.mean for one in found if one is not None]
            axis.plot(source.removals(), means, **style(method))
        axis.set(yscale="log", title=title, xticks=source.removals())
        axis.title.set_fontsize(8)
        axis.set_xlabel("points removed", fontsize=8)
    axes[0].set_ylabel("seconds", fontsize=8)
    legend(figure, 2)
    return figure


def growth() -> Figure:
    """Seconds above bytes, one column for each thing that grows."""
    with (RESULTS / "growth" / "growth.csv").open() as file:
        rows = list(csv.DictReader(file))
    scales = {"seconds": (1.0, "processor seconds"), "bytes": (1e6, "MB kept")}
    figure, axes = pyplot.subplots(2, 3, figsize=(7.2, 4.6), layout="constrained")
    for column, grows in enumerate(("points", "classes", "parameters")):
        for axis, (quantity, (unit, label)) in zip(axes[:, column], scales.items(), strict=True):
            for kept in ("dense", "rows", "retrain"):
                own = [one for one in rows if (one["grows"], one["kept"]) == (grows, kept)]
                sizes = [float(one[grows]) for one in own]
                axis.plot(sizes, [float(one[quantity]) / unit for one in own], **style(kept))
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_ylabel(label if column == 0 else "", fontsize=8)
        axes[1, column].set_xlabel({"parameters": "parameters p"}.get(grows, grows), fontsize=8)
    legend(figure)
    return figure


def representations() -> Figure:
    """Bytes of a memory against the distance that it leaves."""
    source = table("representations")
    figure, axes = panels(2, width=3.1)
    names = {
        "matrix": ("matrix", "#000000", "o"),
        "rows_probes_1": ("rows, 1 probe", "#0072B2", "D"),
        "rows_probes_4": ("rows, 4 probes", "#0072B2", "s"),
        "rows_probes_16": ("rows, 16 probes", "#0072B2", "^"),
        "nystroem_bytes_of_rows": ("Nyström, as large as 1 probe", "#D55E00", "v"),
        "nystroem_rank_100": ("Nyström, rank 100", "#D55E00", "X"),
        "ek_fac": ("EK-FAC", "#009E73", "P"),
    }
    for axis, removed in zip(axes, source.removals(), strict=True):
        for method, (label, colour, marker) in names.items():
            values = list(source.values(method, removed, RELATIVE).values())
            size = max(source.values(method, removed, "bytes").values()) / 1e6
            axis.plot([size, size], [min(values), max(values)], color=colour, lw=1.2)
            axis.plot(size, sum(values) / len(values), marker, color=colour, ms=5, label=label)
        axis.axhline(1.0, color="#777777", ls=":", lw=1.2, label="none")
        share = next(c.share for c in source.cells if c.removed == removed)
        axis.set(xscale="log", yscale="log", title=f"{100 * share:.2g}% removed")
        axis.title.set_fontsize(8)
        axis.set_xlabel("memory (MB)", fontsize=8)
    axes[0].set_ylabel(LENGTH, fontsize=8)
    legend(figure, 4)
    return figure


# --- evidence -----------------------------------------------------------------------------------


def certificates() -> Figure:
    """Every certified request's true distance and bound, under the radius that was promised."""
    source = Table(RESULTS / "certificate" / "covtype.csv")
    figure, (axis,) = panels(1, 2.6, 4.2)
    removals = source.removals()
    shown = (("distance", "#000000", "o", -1), ("bound", "#0072B2", "D", 1))
    for metric, colour, marker, side in shown:
        for at, removed in enumerate(removals):
            values = sorted(source.values("logistic", removed, metric).values())
            spread = [at + side * (0.08 + 0.25 * k / len(values)) for k in range(len(values))]
            names = {"distance": "true distance to the optimum", "bound": "proved bound"}
            axis.plot(spread, values, marker, color=colour, ms=2.5, label=names[metric])
    axis.axhline(1e-6, color="#D55E00", ls="--", lw=1.2, label="radius that was promised")
    axis.set_yscale("log")
    share = {c.removed: 100 * c.share for c in source.cells}
    axis.set_xticks(range(len(removals)), [f"{m:,} ({share[m]:.2g}%)" for m in removals])
    axis.set_xlabel("points removed by the request", fontsize=8)
    axis.set_ylabel("distance between parameters", fontsize=8)
    legend(figure, 2)
    return figure


def membership() -> Figure:
    """How far a likelihood-ratio attack's AUC is from that against the same seed's Retrain."""
    source = table("mnist_b_membership")
    figure, axes = panels(2, width=2.9)
    methods = [m for m in source.methods() if m != "retrain"]
    for axis, removed in zip(axes, source.removals(), strict=True):
        for at, method in enumerate(methods):
            values = list(source.values(method, removed, "gap_lira_auc").values())
            axis.plot(values, [at] * len(values), "|", color="#0072B2", ms=7)
            axis.plot(sum(values) / len(values), at, "o", color="#000000", ms=4)
        axis.axvline(0.0, color="#009E73", lw=1.2)
        axis.set_title(f"{removed} removed", fontsize=8)
        axis.set_xlabel("AUC − AUC of Retrain", fontsize=8)
        axis.xaxis.set_major_locator(ticker.MultipleLocator(0.05))
        axis.set_yticks(range(len(methods)), methods if axis is axes[0] else [], fontsize=7)
        axis.invert_yaxis()
    return figure


def audits() -> Figure:
    """KLoM of the forgotten points under attack, by method; the shade is what Retrain gets."""
    random, hard = (Table(RESULTS / "audits" / f"{name}.csv") for name in ("random", "hard"))
    methods = [*hard.methods(), *(m for m in random.methods() if m not in hard.methods())]
    names = {"retrain": "Retrain of other seeds"}
    shown = [(random, m, "random") for m in random.removals()]
    shown += [(hard, m, "hard") for m in hard.removals()]
    figure, axes = panels(len(shown), 2.8, 7.2 / len(shown))
    for axis, (source, removed, kind) in zip(axes, shown, strict=True):
        metric = "klom_robust_forgotten"
        floor = source.values("retrain", removed, metric).values()
        axis.axvspan(min(floor), max(floor), color="#009E73", alpha=0.25, lw=0)
        for at, method in enumerate(methods):
            values = list(source.values(method, removed, metric).values())
            if values:
                axis.plot([min(values), max(values)], [at, at], color="#000000", lw=1.2)
                axis.plot(sum(values) / len(values), at, "o", color="#000000", ms=4)
        share = next(c.share for c in source.cells if c.removed == removed)
        axis.set_title(f"{100 * share:.2g}% of the points, {kind}", fontsize=8)
        axis.set_xscale("log")
        far = axis.get_xlim()[1] > 10
        plain(axis.xaxis, (0.02, 0.1, 1, 10, 100) if far else (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2))
        axis.set_xlabel("KLoM of robust margins (nats)", fontsize=8)
        labels = [names.get(m, m) for m in methods] if axis is axes[0] else []
        axis.set_yticks(range(len(methods)), labels, fontsize=7)
        axis.set_ylim(len(methods) - 0.5, -0.5)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    make.__name__: make
    for make in (
        paper, robustness, horizon, stationary, response, linf, bandwidth, networks, trades, losses,
        hundred, hard, noise, seconds, growth, representations, certificates, membership, audits,
    )
}  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """A PNG of 64 colours."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=160)
    pyplot.close(figure)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def main() -> None:
    """Draw the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], help="all, if none is named")
    parser.add_argument("--output", type=Path, default=RESULTS / "pictures")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for name in given.names or PICTURES:
        save(PICTURES[name](), given.output / f"{name}.png")
        print(given.output / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
