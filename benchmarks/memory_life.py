"""Many requests, one after the other and at once: drift, seconds, bytes, and what is refused."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import QUIET, Logistic, Points
from torch import Tensor

from lightning_muter import (
    L2Ball,
    MUterCallback,
    MuterError,
    RemovalDataModule,
    Trainer,
    UnlearningMemory,
)
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.known_points import KnownPoints
from lightning_muter.memory.points import check_free, digests_of
from lightning_muter.models import measuring
from lightning_muter.unlearning.objective import RobustObjective
from lightning_muter.unlearning.points import unweighted

DIMENSIONS = 200


def problem(n: int) -> tuple[Tensor, Tensor]:
    """Points of two overlapping classes (n, 200), float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, DIMENSIONS, generator=generator, dtype=torch.float64)
    way = torch.randn(DIMENSIONS, generator=generator, dtype=torch.float64)
    noise = 8 * torch.randn(n, generator=generator, dtype=torch.float64)
    return x, (x @ way + noise > 0).to(torch.float64)


def size(folder: str) -> int:
    """Bytes of a folder's files, the model's own left aside."""
    return sum(p.stat().st_size for p in Path(folder).iterdir() if p.suffix != ".ckpt")


def successive(requests: int, n: int) -> dict[str, Any]:
    """Requests of one point each in a folder, against one request of all and a rebuilt sum."""
    x, y = problem(n)
    data, model = Points(x, y), Logistic(features=DIMENSIONS).double()
    seconds, sizes = [], []
    with tempfile.TemporaryDirectory() as folder:
        muter = MUterCallback(
            L2Ball(0.5), head="head", loss="logistic", newton_steps=15, memory_dir=folder + "/m"
        )
        trainer = Trainer(max_epochs=1, callbacks=[muter], **QUIET)
        trainer.fit(model, data)
        whole, trained = muter.memory, {k: v.clone() for k, v in model.state_dict().items()}
        assert whole is not None
        for i in range(requests):
            start = time.perf_counter()
            trainer.unlearn(RemovalDataModule(data, [i]))
            seconds.append(time.perf_counter() - start)
            if (i + 1) % (requests // 10) == 0:
                sizes.append(size(folder + "/m"))
        memory, read = muter.memory, UnlearningMemory.load(folder + "/m")
    assert memory is not None and memory.curvature is not None and read.curvature is not None
    model.load_state_dict(trained)
    view = memory.settings.view(model)
    rest = RobustObjective(
        view, memory.settings.problem(), lambda: [unweighted(x[requests:], y[requests:])]
    )
    with measuring(model):
        _, rebuilt = rest.curvature()
    own = Trainer(**QUIET)
    own.unlearn(RemovalDataModule(data, list(range(requests))), model=model, memory=whole)
    at_once = view.get()
    block = requests // 10
    medians = [statistics.median(seconds[i : i + block]) for i in range(0, requests, block)]
    drift = torch.linalg.matrix_norm(memory.curvature.matrix - rebuilt.matrix)
    return {
        "requests": requests,
        "drift_of_m": float(drift / torch.linalg.matrix_norm(rebuilt.matrix)),
        "drift_of_omega": float((memory.omega - at_once).norm() / at_once.norm()),
        "read_back_equal": torch.equal(read.omega, memory.omega),
        "median_ms_of_each_tenth": [round(1e3 * one, 2) for one in medians],
        "bytes_after_each_tenth": sizes,
    }


def lookups() -> dict[str, float]:
    """Seconds of the checks of 100,000 indices, and of 50,000 equal points by content."""
    n, asked = 200_000, 100_000
    removed, weights = torch.zeros(n, dtype=torch.bool), torch.ones(n, dtype=torch.float64)
    start = time.perf_counter()
    check_free(list(range(asked)), removed, weights)
    checked = time.perf_counter() - start
    key, found = b"k" * 16, {}
    for equal in (25_000, 50_000):
        x, y = torch.zeros(equal, 8), torch.zeros(equal)
        rows = digests_of(key, x, y)
        digests = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).reshape(-1, 16)
        known = KnownPoints(digests, removed[:equal], weights[:equal])
        start = time.perf_counter()
        known.named(rows)
        found[f"seconds_{equal}_equal_points"] = time.perf_counter() - start
    return {"seconds_100000_indices": checked, **found}


def tiny(n: int) -> UnlearningMemory:
    """A memory of three parameters and n points, for what is about its folder alone."""
    vector, flags = torch.zeros(3, dtype=torch.float64), torch.zeros(n, dtype=torch.bool)
    muter = MUterCallback(L2Ball(0.5), head="head")
    return UnlearningMemory(
        settings=muter.settings,
        omega_star=vector,
        omega=vector,
        curvature=DenseCurvature(torch.eye(3, dtype=torch.float64)),
        gradient=vector,
        residual_gradient=vector,
        digests=torch.zeros(n, 16, dtype=torch.uint8),
        removed=flags,
        weights=torch.ones(n, dtype=torch.float64),
        key=b"k" * 16,
        fingerprint="",
    )


def one_writer(folder: str, own: list[int], together: Any, served: Any) -> None:
    """Requests of the points ``own``, each begun at the same time as the other process's."""
    names = []
    for index in own:
        together.wait()
        store = MemoryStore(folder)
        try:
            with store.writing():
                memory = UnlearningMemory.read(store)
                assert memory.curvature is not None
                step = memory.omega + 1.0
                nothing, entry = RemovedPoints(), {"m": 1, "status": "converged"}
                after = memory.forget(
                    [index], memory.curvature, nothing, memory.gradient, step, entry
                )
                after.commit(store)
        except MuterError as error:
            names.append(str(error))
        else:
            names.append(index)
    served.put(names)


def one_reader(folder: str, times: int, failures: Any) -> None:
    """Reads of a folder that is being written; each must be one state and no other."""
    bad = []
    for _ in range(times):
        try:
            memory = UnlearningMemory.load(folder)
            if float(memory.omega[0]) != len(memory.ledger):
                bad.append("two states at once")
        except MuterError as error:
            bad.append(str(error))
    failures.put(bad)


def at_once(writers: int, requests: int, reads: int) -> dict[str, Any]:
    """Processes that serve requests in one folder at the same moments, while another one reads."""
    spawn = multiprocessing.get_context("spawn")
    served, failures, together = spawn.Queue(), spawn.Queue(), spawn.Barrier(writers)
    with tempfile.TemporaryDirectory() as home:
        folder = home + "/m"
        tiny(writers * requests).save(folder)
        shares = [list(range(k, writers * requests, writers)) for k in range(writers)]
        processes = [
            spawn.Process(target=one_writer, args=(folder, own, together, served)) for own in shares
        ]
        processes.append(spawn.Process(target=one_reader, args=(folder, reads, failures)))
        for process in processes:
            process.start()
        answers = [answer for _ in range(writers) for answer in served.get()]
        bad = failures.get()
        for process in processes:
            process.join()
        ledger = UnlearningMemory.load(folder).ledger
    known = sorted(index for entry in ledger for index in entry["indices"])
    refused = [answer for answer in answers if isinstance(answer, str)]
    return {
        "writers": writers,
        "requests_each": requests,
        "served": len(answers) - len(refused),
        "refused": len(refused),
        "refused_without_the_holder": sum(not re.search(r"process \d+", one) for one in refused),
        "forgotten_is_served": known == sorted(a for a in answers if isinstance(a, int)),
        "reads": reads,
        "reads_failed": len(bad),
    }


def main() -> None:
    """Print one JSON line a section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--successive", type=int, default=1000)
    parser.add_argument("--points", type=int, default=3000)
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--reads", type=int, default=1000)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print(json.dumps(lookups()))
    print(json.dumps(at_once(2, given.pairs, given.reads)))
    print(json.dumps(at_once(8, 5, 50)))
    print(json.dumps(successive(given.successive, given.points)))


if __name__ == "__main__":
    main()
