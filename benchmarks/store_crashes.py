"""Crashes, power cuts and damage of a memory's folder: how many were tried, how many were bad."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
import store_cases as cases

from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.records import Request

WRITES = ["pwrite64", "write", "fsync", "fdatasync", "ftruncate", "openat", "rename", "unlink"]
WRITES += ["mkdir", "rmdir", "unlinkat", "renameat", "chmod", "flock", "close"]
FOLDER_FSYNC = "folder"


# --- the writer that is killed ------------------------------------------------------------------


Task = Callable[[Path, int], None]
Check = Callable[[Path, bytes, int], object]
OTHER = "07" * 8  # a memory that takes another one's place


def work(folder: Path, pipe: int, last: int) -> None:
    """Commits, a replacement and model files up to a generation, each told when it is made."""
    store = MemoryStore(folder)
    generation = store.read(cases.BASE, cases.CURRENT).generation
    while generation < last:
        generation += 1
        if generation % 3:
            store.commit(generation - 1, cases.current(generation), [cases.request(generation)])
        else:
            store.replace(generation - 1, cases.content(generation))
        os.write(pipe, f"made {generation}\n".encode())
        store.write_model(generation, cases.model(generation))


def create(folder: Path, pipe: int) -> None:
    """A new memory, in the place of another one where there is one."""
    content = replace(cases.content(3, 3), memory_id=OTHER)
    MemoryStore(folder).create(content, cases.model(3), overwrite=True)
    os.write(pipe, b"made 3\n")


def forked(folder: Path, task: Task) -> tuple[int, int, int]:
    """A child that works once a byte comes; its process, where to write that, where it tells."""
    start_read, start_write = os.pipe()
    told_read, told_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(start_write)
            os.read(start_read, 1)
            task(folder, told_write)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(start_read)
    os.close(told_write)
    return child, start_write, told_read


def traced(child: int, *options: str) -> subprocess.Popen[str]:
    """Strace, attached to a child."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(child), *options], stderr=subprocess.PIPE, text=True
    )
    assert tracer.stderr is not None
    assert "attached" in tracer.stderr.readline()
    return tracer


def check_after(folder: Path, told: bytes, before: int) -> int:
    """The state before or the state after, and a model that is brought up; its generation."""
    made = max([before, *(int(one) for one in re.findall(rb"made (\d+)\n", told))])
    found = cases.read(folder)
    cases.check_whole(found)
    assert found.generation in (made, made + 1), (found.generation, made)
    store = MemoryStore(folder)
    store.repair_model({"head.weight": found.current["omega"]})
    checkpoint = torch.load(folder / "model.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["head.weight"].tolist() == [found.generation] * 3
    assert checkpoint["lightning_muter"]["generation"] == found.generation
    with store.writing():
        pass
    assert len(list(folder.glob("base-*"))) == 1
    left = {path.name for path in folder.iterdir() if not path.name.startswith("base-")}
    assert left <= {"memory.sqlite", "memory.lock", "model.ckpt", "memory.sqlite-shm"} | (
        {"memory.sqlite-wal"} if (folder / "memory.sqlite-wal").exists() else set()
    ), left
    return found.generation


def check_created(folder: Path, told: bytes, before: int) -> None:
    """The memory before (none, or the old one) or the new one, with its model; then it is made."""
    store = MemoryStore(folder)
    ids = {cases.ID, OTHER} if before >= 0 else {OTHER, None}
    found = cases.read(folder) if store.exists() else None
    now = None if found is None else found.memory_id
    assert now in ({OTHER} if told else ids), now
    if found is not None:
        cases.check_whole(found)
        with store.writing():
            checkpoint = torch.load(folder / "model.ckpt", weights_only=True)
        stamp = {"memory": found.memory_id, "generation": found.generation}
        assert checkpoint["lightning_muter"] == stamp
    create(folder, os.open(os.devnull, os.O_WRONLY))
    assert cases.read(folder).memory_id == OTHER and len(list(folder.glob("base-*"))) == 1
    assert not list(folder.glob("*.new*")) and not list(folder.glob("model-*"))


def empty(parent: Path) -> Path:
    folder = parent / "memory"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def fresh(parent: Path) -> Path:
    folder = parent / "memory"
    shutil.rmtree(folder, ignore_errors=True)
    MemoryStore(folder).create(cases.content(), cases.model(0))
    return folder


def random_kills(parent: Path, kills: int, seed: int) -> Counter[str]:
    """Kill a writer at random instants, again and again in one folder."""
    draw, folder, bad = random.Random(seed), fresh(parent), 0
    for _ in range(kills):
        before = cases.read(folder).generation
        child, start, told = forked(folder, partial(work, last=10**9))
        os.write(start, b"x")
        time.sleep(draw.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        bad += failed(lambda f=folder, t=told, b=before: check_after(f, drained(t), b))
        os.close(start)
    return Counter(tried=kills, bad=bad, generation=cases.read(folder).generation)


def kills_at_every_call(
    parent: Path, prepare: Callable[[Path], Path], task: Task, check: Check, before: int
) -> Counter[str]:
    """Kill a writer as it enters the N-th call of each kind, for every N until it ends itself."""
    count: Counter[str] = Counter(tried=0, bad=0)
    for name in WRITES:
        number, ended = 0, False
        while not ended:
            number += 1
            folder = prepare(parent)
            child, start, told = forked(folder, task)
            with traced(child, "-o", os.devnull, f"-einject={name}:signal=KILL:when={number}"):
                os.write(start, b"x")
                _, status = os.waitpid(child, 0)
            ended = os.WIFEXITED(status)
            count["bad"] += failed(lambda f=folder, t=told: check(f, drained(t), before))
            os.close(start)
            count["tried"] += 1
            count[name] += not ended
    return count


def drained(pipe: int) -> bytes:
    with os.fdopen(pipe, "rb") as file:
        return file.read()


def failed(check: Callable[[], object]) -> bool:
    try:
        check()
    except Exception as error:
        print(f"bad: {type(error).__name__}: {error}", file=sys.stderr)
        return True
    return False


# --- power cuts ---------------------------------------------------------------------------------


@dataclass
class File:
    """A file as a disk has it: what was synced, and what was written since."""

    durable: bytearray
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def write(self, offset: int, data: bytes | None) -> None:
        self.pending.append((offset, data))

    def sync(self) -> None:
        self.durable = self.content(lambda: True)
        self.pending = []

    def content(self, keep: Callable[[], bool]) -> bytearray:
        data = bytearray(self.durable)
        for offset, more in self.pending:
            if not keep():
                continue
            if more is None:
                data = data[:offset] + bytes(max(0, offset - len(data)))
            else:
                data += bytes(max(0, offset - len(data)))
                data[offset : offset + len(more)] = more
        return data


@dataclass(frozen=True)
class Call:
    """A file operation of the trace: its name, the path, and what it did there."""

    name: str
    path: str
    offset: int = 0
    data: bytes = b""
    other: str = ""


def unquoted(text: str) -> bytes:
    return bytes(int(one, 16) for one in re.findall(r"\\x([0-9a-f]{2})", text))


def calls(log: str, folder: Path) -> Iterator[Call]:
    """The operations of a trace in the folder, and those that tell of a generation."""
    position: dict[str, int] = {}
    for line in log.splitlines():
        match = re.match(r"\d+ +(\w+)\((.*)\) += (\d+)", line)
        if match is None:
            assert "unfinished" not in line or "write" not in line, line
            continue
        name, rest, result = match[1], match[2], int(match[3])
        strings = [unquoted(one).decode("latin-1") for one in re.findall(r'"([^"]*)"', rest)]
        fd = re.match(r"(\w+)<([^>]*)>", rest)
        place = "" if fd is None else unquoted(fd[2]).decode() or fd[2]
        if name == "write" and strings and strings[0].startswith("made "):
            yield Call("told", "", data=strings[0].encode())
            continue
        if name in ("rename", "renameat", "mkdir", "rmdir", "unlink", "unlinkat", "openat"):
            path = str(Path(place if name.endswith("at") else "/", strings[0]))
        else:
            path = place
        if not path.startswith(str(folder)) or path.endswith(("-shm", "memory.lock")):
            continue
        short = os.path.relpath(path, folder)
        if name == "openat":
            position[short] = 0
            if "O_CREAT" in rest or "O_TRUNC" in rest:
                yield Call("create", short, offset="O_TRUNC" in rest)
        elif name == "write":
            yield Call("write", short, position.get(short, 0), strings[0].encode("latin-1"))
            position[short] = position.get(short, 0) + result
        elif name == "pwrite64":
            offset = int(rest.rsplit(",", 1)[1])
            yield Call("write", short, offset, strings[0].encode("latin-1"))
        elif name == "ftruncate":
            yield Call("truncate", short, int(rest.rsplit(",", 1)[1]))
        elif name in ("fsync", "fdatasync"):
            yield Call("fsync", FOLDER_FSYNC if short == "." else short)
        elif name.startswith("rename"):
            yield Call("rename", short, other=os.path.relpath(strings[1], folder))
        elif name.startswith("unlink"):
            yield Call("unlink", short)


class Disk:
    """A folder's files by their names; names are durable up to the last sync of the folder."""

    def __init__(self, folder: Path) -> None:
        self.names = {p.name: File(bytearray(p.read_bytes())) for p in folder.iterdir()}
        self.history = [dict(self.names)]

    def apply(self, call: Call) -> None:
        file = self.names.get(call.path)
        if call.name == "create":
            if file is None:
                self.names[call.path] = File(bytearray())
                self.history.append(dict(self.names))
            elif call.offset:
                file.write(0, None)
        elif call.name == "write" and file is not None:
            file.write(call.offset, call.data)
        elif call.name == "truncate" and file is not None:
            file.write(call.offset, None)
        elif call.name == "fsync" and call.path == FOLDER_FSYNC:
            self.history = [dict(self.names)]
        elif call.name == "fsync" and file is not None:
            file.sync()
        elif call.name == "rename":
            self.names[call.other] = self.names.pop(call.path)
            self.history.append(dict(self.names))
        elif call.name == "unlink":
            self.names.pop(call.path, None)
            self.history.append(dict(self.names))

    def lay(self, folder: Path, names: dict[str, File], keep: Callable[[], bool]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, file in names.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(file.content(keep))


def power_cuts(
    parent: Path,
    prepare: Callable[[Path], Path],
    task: Task,
    check: Check,
    before: int,
    seed: int,
) -> Counter[str]:
    """Cut the power after every operation of a writer, with and without what was not synced."""
    draw, folder = random.Random(seed), prepare(parent)
    disk, log, image = Disk(folder), parent / "log", parent / "image"
    child, start, told = forked(folder, task)
    traced_calls = [one for one in WRITES if one not in ("flock", "close", "chmod")]
    options = ["-y", "-xx", "-s", "100000000", "-o", str(log), f"-etrace={','.join(traced_calls)}"]
    with traced(child, *options):
        os.write(start, b"x")
        os.waitpid(child, 0)
    os.close(told)
    count: Counter[str] = Counter(tried=0, bad=0)
    made = b""
    for call in calls(log.read_text(), folder):
        count["operations"] += 1
        made = call.data if call.name == "told" else made
        disk.apply(call)
        cuts = [
            (disk.names, lambda: True),
            (disk.names, lambda: False),
            (disk.history[0], lambda: False),
            (disk.history[0], lambda: True),
            *((draw.choice(disk.history), lambda: draw.random() < 0.5) for _ in range(3)),
        ]
        for names, keep in cuts:
            disk.lay(image, names, keep)
            count["bad"] += failed(lambda m=made: check(image, m, before))
            count["tried"] += 1
    disk.lay(image, disk.names, lambda: True)
    for path in folder.iterdir():
        if not path.name.endswith(("-shm", ".lock")):
            assert path.read_bytes() == (image / path.name).read_bytes(), path.name
    return count


# --- damage and cost ----------------------------------------------------------------------------


def mutations(parent: Path, number: int, seed: int) -> Counter[str]:
    """Alter the database or the base; refused, or the same content."""
    folder = parent / "memory"
    shutil.rmtree(folder, ignore_errors=True)
    content = cases.content(8, 8)
    MemoryStore(folder).create(content)
    damage = cases.Damage(folder, seed)
    count: Counter[str] = Counter(tried=number, bad=0, refused=0)
    for k in range(number):
        damage.rows() if k % 3 == 0 else damage.bytes()
        try:
            count["refused"] += cases.refused_or_same(folder, content)
        except Exception as error:
            print(f"bad: {type(error).__name__}: {error}", file=sys.stderr)
            count["bad"] += 1
        damage.restore()
    return count


def cost(parent: Path, p: int, commits: int) -> dict[str, float]:
    """Seconds of a commit with a factor of 12 kB, and of writing the p x p matrix instead."""
    folder = parent / "wide"
    content = cases.content(p=p)
    store = MemoryStore(folder)
    store.create(replace(content, base={"matrix": torch.zeros(2, 2)}))
    factor, seconds = torch.zeros(12_000, dtype=torch.uint8), []
    for g in range(commits):
        entry, facts = {"request": g + 1, "indices": [g]}, [{"rank": 1}]
        start = time.perf_counter()
        store.commit(g, cases.current(g + 1, p), [Request(entry, facts, {"rows": factor})])
        seconds.append(time.perf_counter() - start)
    matrix = torch.ones(p, p, dtype=torch.float64)
    start = time.perf_counter()
    save_file({"matrix": matrix}, parent / "matrix.safetensors")
    with (parent / "matrix.safetensors").open("rb+") as file:
        os.fsync(file.fileno())
    whole = time.perf_counter() - start
    found = sorted(seconds)
    return {"median": found[commits // 2], "slowest": found[-1], "matrix": whole}


def main() -> None:
    """Print one JSON line for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at random instants")
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--commits", type=int, default=50, help="of which the cost is taken")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where a sync costs nothing
    with (
        tempfile.TemporaryDirectory() as place,
        tempfile.TemporaryDirectory(dir=memory) as quick_place,
    ):
        parent, quick = Path(place).resolve(), Path(quick_place).resolve()
        parts: dict[str, Callable[[], object]] = {
            "cost at p = 6,410": lambda: cost(parent, 6410, given.commits),
            "random kills": lambda: random_kills(parent, given.kills, given.seed),
        }
        tasks: dict[str, tuple[Callable[[Path], Path], Task, Check, int]] = {
            "requests": (fresh, partial(work, last=4), check_after, 0),
            "a first memory": (empty, create, check_created, -1),
            "a memory in another's place": (fresh, create, check_created, 0),
        }
        for name, task in tasks.items() if shutil.which("strace") else ():
            parts[f"power cuts, {name}"] = partial(power_cuts, quick, *task, given.seed)
            parts[f"kills at every call, {name}"] = partial(kills_at_every_call, quick, *task)
        parts["mutations"] = lambda: mutations(quick, given.mutations, given.seed)
        for name, part in parts.items():
            start = time.perf_counter()
            found = part()
            print(json.dumps({name: found, "seconds": round(time.perf_counter() - start)}))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
