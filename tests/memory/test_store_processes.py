"""Several processes in one folder, and processes that are killed in it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import store_cases as cases

from lightning_muter.errors import StateError
from lightning_muter.memory.folder import MemoryStore

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests fork")
PROCESSES, COMMITS, READS, KILLS = 8, 5, 200, 60


def together(targets: list[Any]) -> list[Any]:
    """What functions return that run in a process each, at once."""
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()

    def run(target: Any) -> None:
        try:
            answers.put(target())
        except BaseException as error:
            answers.put(error)

    processes = [context.Process(target=run, args=(target,)) for target in targets]
    for one in processes:
        one.start()
    found = [answers.get(timeout=120) for _ in targets]
    for one in processes:
        one.join()
    errors = [one for one in found if isinstance(one, BaseException)]
    assert not errors, errors
    return found


def commit_some(folder: Path, count: int) -> list[int]:
    """Commits that begin anew where another process was faster; the generations that they made."""
    store, made = MemoryStore(folder), []
    while len(made) < count:
        generation = store.read(cases.BASE, cases.CURRENT).generation + 1
        try:
            request = cases.request(generation)
            made.append(store.commit(generation - 1, cases.current(generation), [request]))
        except StateError as error:
            assert "load the memory again" in str(error)
    return made


def test_no_commit_of_many_writers_is_lost(tmp_path: Path) -> None:
    MemoryStore(tmp_path).create(cases.content())
    reports = together([lambda: commit_some(tmp_path, COMMITS)] * PROCESSES)
    assert sorted(sum(reports, [])) == list(range(1, PROCESSES * COMMITS + 1))
    found = cases.read(tmp_path)
    cases.check_whole(found)
    assert found.generation == PROCESSES * COMMITS


def test_readers_see_whole_states_while_a_writer_is_at_work(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    store.create(cases.content())

    def read() -> int:
        seen = []
        for _ in range(READS):
            found = cases.read(tmp_path)
            cases.check_whole(found)
            seen.append(found.generation)
        assert seen == sorted(seen)
        return len(set(seen))

    def write() -> int:
        for g in range(1, 51):
            if g % 5:
                store.commit(g - 1, cases.current(g), [cases.request(g)])
            else:
                store.replace(g - 1, cases.content(g))
        return 2

    assert min(together([read, write])) >= 2
    assert cases.read(tmp_path).generation == 50


def test_a_second_writer_is_told_who_is_writing(tmp_path: Path) -> None:
    MemoryStore(tmp_path).create(cases.content())

    def wait() -> str:
        try:
            with MemoryStore(tmp_path).writing(timeout=0.1):
                return "not refused"
        except StateError as error:
            return str(error)

    with MemoryStore(tmp_path).writing():
        (said,) = together([wait])
    assert f"process {os.getpid()} " in said and socket.gethostname() in said
    with MemoryStore(tmp_path).writing(timeout=0):
        pass


def test_a_dead_writer_holds_nothing(tmp_path: Path) -> None:
    MemoryStore(tmp_path).create(cases.content())
    store = MemoryStore(tmp_path)
    read_end, write_end = os.pipe()
    holder = os.fork()
    if holder == 0:
        with store.writing():
            os.write(write_end, b"held")
            time.sleep(60)
    os.read(read_end, 4)
    with pytest.raises(StateError, match=f"process {holder} "), store.writing(timeout=0):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with store.writing(timeout=0):
        pass


def test_a_forked_child_keeps_no_lock(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    store.create(cases.content())
    with store.writing():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with store.writing(timeout=0):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_dead_writers_child_keeps_no_lock(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    store.create(cases.content())
    read_end, write_end = os.pipe()
    holder = os.fork()
    if holder == 0:
        with store.writing():
            child = os.fork()
            if child == 0:
                time.sleep(60)
            os.write(write_end, str(child).encode())
            os._exit(0)
    os.waitpid(holder, 0)
    try:
        with store.writing(timeout=5):
            pass
    finally:
        os.kill(int(os.read(read_end, 20)), signal.SIGKILL)


def work(folder: Path, pipe: int) -> None:
    """Commits, replaces and model files without an end; each generation is told when it is made."""
    store = MemoryStore(folder)
    generation = store.read(cases.BASE, cases.CURRENT).generation
    while True:
        generation += 1
        if generation % 4:
            store.commit(generation - 1, cases.current(generation), [cases.request(generation)])
        else:
            store.replace(generation - 1, cases.content(generation))
        os.write(pipe, f"{generation}\n".encode())
        store.write_model(generation, cases.model(generation))


def test_a_writer_that_is_killed_leaves_a_state_before_or_after(tmp_path: Path) -> None:
    draw, store = random.Random(11), MemoryStore(tmp_path)
    store.create(cases.content(), cases.model(0))
    for k in range(KILLS):
        before = cases.read(tmp_path).generation
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                work(tmp_path, write_end)
            finally:
                os._exit(1)
        os.close(write_end)
        # every third child has committed once before, however slow the machine is
        first = os.read(read_end, 64) if k % 3 == 0 else b""
        time.sleep(draw.uniform(0.0, 0.08))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        with os.fdopen(read_end) as pipe:
            told = [int(line) for line in (first.decode() + pipe.read()).split()]
        found = cases.read(tmp_path)
        cases.check_whole(found)
        assert found.generation - max([before, *told]) in (0, 1)
        store.repair_model({"head.weight": found.current["omega"]})
        assert store.model_generation() == found.generation
    assert cases.read(tmp_path).generation > 5
    with store.writing():
        left = {path.name for path in tmp_path.iterdir()}
    assert not [name for name in left if "new" in name or name.startswith("model-")]
    assert len([name for name in left if name.startswith("base-")]) == 1
