"""What a memory's folder gives away of a forgotten digit, before and after a rebase.

A model is trained with a memory in a folder (MNIST 1 vs 7, 14 × 14 pixels). For each of some points
a copy of the folder serves the request, and is then rebased on the data set without the row. An
attacker reads every vector of ω's length out of all files, by the formats alone, and adds the
differences of any two of them and the products of those with the stored curvature: the best guess
counts. The control is a point that was never forgotten, in the same folder: how often so many
guesses name a point by chance.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import safetensors.torch
import torch
from audits import THREAT, data
from common import QUIET, Logistic, arguments
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import MUterCallback, RemovalDataModule, Trainer
from lightning_muter.evaluation.reconstruction import identified, similarity


def tensors(folder: Path) -> list[Tensor]:
    """Every tensor in a folder: of its safetensors files, its database and its checkpoint."""
    blobs = [path.read_bytes() for path in folder.glob("*.safetensors")]
    with sqlite3.connect(folder / "memory.sqlite") as database:
        names = [
            row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type='table'")
        ]
        for name in names:
            for row in database.execute(f"SELECT * FROM {name}"):
                blobs += [value for value in row if isinstance(value, bytes)]
    found = []
    for blob in blobs:
        try:
            found += list(safetensors.torch.load(blob).values())
        except SafetensorError:
            continue
    state = torch.load(folder / "model.ckpt", weights_only=False)["state_dict"]
    return found + list(state.values())


def guesses(folder: Path, p: int) -> list[Tensor]:
    """Vectors (p,) that may point along a forgotten input."""
    found = [one.double() for one in tensors(folder) if one.is_floating_point()]
    vectors: list[Tensor] = []
    for one in found:
        if one.numel() == p and not any(torch.equal(one.reshape(-1), other) for other in vectors):
            vectors.append(one.reshape(-1))
    apart = [a - b for a, b in itertools.combinations(vectors, 2)]
    curved = [one @ way for one in found if one.shape == (p, p) for way in apart + vectors]
    decayed = [a - 1e-3 * b for a, b in itertools.permutations(vectors, 2)]  # G - λω*
    return [one for one in vectors + apart + curved + decayed if float(one.norm()) > 0]


def main() -> None:
    """Print one JSON line a folder's state."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--forgotten", type=int, default=31)
    given = parser.parse_args()
    x, y, _, _ = data(given.data)
    x, y = x[: given.points], y[: given.points]
    pl.seed_everything(0, verbose=False)
    rows: dict[str, list[tuple[float, bool]]] = {}
    with tempfile.TemporaryDirectory() as place:
        home = Path(place) / "memory"
        muter = MUterCallback(
            THREAT, head="head", loss="logistic", newton_steps=12, memory_dir=str(home)
        )
        trainer = Trainer(max_epochs=1, callbacks=[muter], precision="64-true", **QUIET)
        model = Logistic(features=x.shape[1])
        trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True))
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for i in range(0, len(x), len(x) // (given.forgotten - 1)):
            folder, other = Path(place) / "one", (i + len(x) // 2 + 1) % len(x)
            shutil.copytree(home, folder)
            model.load_state_dict(state)
            served = Trainer(precision="64-true", **QUIET)
            served.unlearn(
                RemovalDataModule(TensorDataset(x, y), [i]), model=model, memory=str(folder)
            )
            look(rows, "the folder", folder, x, i, other)
            keep = torch.arange(len(x)) != i
            served.rebase(TensorDataset(x[keep], y[keep]), model=model, memory=str(folder))
            look(rows, "the folder, after a rebase", folder, x, i, other)
            shutil.rmtree(folder)
    for name, values in rows.items():
        line = {"attack": name, "cosine": round(sum(v[0] for v in values) / len(values), 4)}
        line["identified"] = round(sum(v[1] for v in values) / len(values), 3)
        print(json.dumps({**line, "points": len(values)}), flush=True)


def look(
    rows: dict[str, list[tuple[float, bool]]],
    name: str,
    folder: Path,
    x: Tensor,
    gone: int,
    other: int,
) -> None:
    """The best guess at the forgotten point, and at one that is still there."""
    found = guesses(folder, x.shape[1])
    for what, i in ((name, gone), (f"{name}: a point that was not forgotten", other)):
        best = max(similarity(guess, x[i]) for guess in found)
        rows.setdefault(what, []).append((best, any(identified(g, x, i) for g in found)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
