# SPDX-License-Identifier: Apache-2.0
"""Independent pieces of an experiment, run by one process, by several, or by a Ray cluster, each kept when it is done.

    trials ──▶ stored already? ──▶ this process │ processes of this machine │ Ray tasks ──▶ store ──▶ records
                                        └── a lost worker's trial is run again ──┘

A trial is a function and a configuration. It gets the data and the records of the trials that it needs,
runs with one torch thread and seeds itself, so that its record depends neither on who ran it nor on what ran beside it:
every way of spreading trials gives the same table. Only the process that was started writes into the folder, so that
the machines of a cluster need no common file system; they need this package.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from slimtorch.data import Digits, Split, fingerprint
from slimtorch.experiments import machine
from slimtorch.experiments.catalogue import Progress, Settings
from slimtorch.experiments.store import Record, Store, digest
from slimtorch.measure import threads_of_torch

ATTEMPTS = 3  # how often a trial is begun whose workers are lost

Run = Callable[[Mapping[str, Any], Digits, Sequence[Record]], Record]
"""``run(config, data, needed)``: a function, or an object of a class, of a module's top level: processes get it."""


class TrialError(ValueError):
    """A trial could not be done. What others have done is kept."""


@dataclass(frozen=True)
class Trial:
    """One piece of work.

    Attributes:
        name: of its file; no two trials of an experiment have the same.
        run: does it.
        config: JSON-ready, all that the result depends on beside the data and ``needs``: a version of the code too.
        needs: trials whose records ``run`` is given, in this order.
    """

    name: str
    run: Run
    config: Mapping[str, Any]
    needs: tuple[Trial, ...] = ()


def run_all(
    trials: Sequence[Trial], data: Digits, out: Path, settings: Settings, progress: Progress, stage: str = "train"
) -> dict[str, Record]:
    """The records of all trials by name; what ``out`` holds of them already is not run again.

    A trial of another configuration, of another torch or on other data is another trial: its record in the same folder
    is neither used nor overwritten.

    Args:
        trials: any order; what they need is run too, first.
        data: given to every trial.
        out: finished trials are kept in its folder ``trials``.
        settings: ``jobs`` processes (None: one per core), or a cluster, ``ray``.
        progress: told (stage, trials done, trials in all).
        stage: what ``progress`` calls it.

    Raises:
        TrialError: a trial raised a ValueError, or was begun `ATTEMPTS` times and its worker lost each time.
        RuntimeError: a trial raised another error, which is the cause.
        ImportError: ``settings.ray`` without Ray.
        ValueError: two trials of the same name, or one that needs itself.
    """
    keys = _keys(trials, data)
    store = Store(out / "trials")
    found: dict[str, Record] = {}
    missing = _missing(trials, keys, store, found)
    total = len(found) + len(missing)

    def done(trial: Trial, record: Record) -> None:
        store.save(trial.name, keys[trial.name], record)
        found[trial.name] = record
        progress(stage, len(found), total)

    progress(stage, len(found), total)
    if missing:
        with _pool(settings, data, min(settings.jobs or machine.cores(), len(missing))) as pool:
            _run_missing(missing, found, pool, store.folder, done)
    return {trial.name: found[trial.name] for trial in trials}


def _keys(trials: Sequence[Trial], data: Digits) -> dict[str, dict[str, Any]]:
    """Name -> what the record is stored under, of all trials and of those they need."""
    basis = {"torch": torch.__version__, "data": fingerprint(data)}
    keys: dict[str, dict[str, Any]] = {}
    known: dict[str, Trial] = {}

    def visit(trial: Trial, above: tuple[str, ...]) -> None:
        if trial.name in above:
            raise ValueError(f"trials: {trial.name!r} needs itself")
        if trial.name in known:
            if known[trial.name] != trial:
                raise ValueError(f"trials: expected names of their own, got {trial.name!r} twice")
            return
        for need in trial.needs:
            visit(need, (*above, trial.name))
        known[trial.name] = trial
        kind: Any = trial.run if hasattr(trial.run, "__qualname__") else type(trial.run)
        function = f"{kind.__module__}:{kind.__qualname__}"
        needs = [digest(keys[need.name]) for need in trial.needs]
        keys[trial.name] = {**basis, "run": function, "config": dict(trial.config), "needs": needs}

    for trial in trials:
        visit(trial, ())
    return keys


def _missing(
    trials: Sequence[Trial], keys: Mapping[str, dict[str, Any]], store: Store, found: dict[str, Record]
) -> list[Trial]:
    """Trials to run, each after what it needs; ``found`` receives those that are stored."""
    missing: list[Trial] = []

    def visit(trial: Trial) -> None:
        if trial.name in found or any(other.name == trial.name for other in missing):
            return
        record = store.load(trial.name, keys[trial.name])
        if record is not None:
            found[trial.name] = record
            return
        for need in trial.needs:
            visit(need)
        missing.append(trial)

    for trial in trials:
        visit(trial)
    return missing


# --- who runs them ----------------------------------------------------------------------------------------------------


class _Pool(Protocol):
    """Who runs trials: ``size`` of them at a time; a future fails with one of ``lost`` where its worker is gone."""

    size: int
    lost: tuple[type[BaseException], ...]

    def submit(self, trial: Trial, needed: Sequence[Record]) -> Future[Record]: ...


def _run_missing(
    missing: list[Trial], found: Mapping[str, Record], pool: _Pool, folder: Path, done: Callable[[Trial, Record], None]
) -> None:
    """Runs trials as soon as what they need is found; ``done`` keeps each and adds it to ``found``."""
    waiting = list(missing)
    running: dict[Future[Record], Trial] = {}
    begun = dict.fromkeys((trial.name for trial in missing), 0)
    failure: Exception | None = None
    try:
        while running or (waiting and failure is None):
            ready = [trial for trial in waiting if all(need.name in found for need in trial.needs)]
            for trial in ready[: pool.size - len(running)] if failure is None else []:
                waiting.remove(trial)  # no more than can run: an interrupt waits for no queue
                begun[trial.name] += 1
                running[pool.submit(trial, [found[need.name] for need in trial.needs])] = trial
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                trial = running.pop(future)
                try:
                    record = future.result()
                except pool.lost as error:
                    if begun[trial.name] < ATTEMPTS:
                        waiting.insert(0, trial)
                        continue
                    text = f"its worker was lost {ATTEMPTS} times (killed, or out of memory?)"
                    failure = failure or _failure(trial, TrialError(text), folder, error)
                except Exception as error:
                    failure = failure or _failure(trial, error, folder, error)
                else:
                    done(trial, record)
    except KeyboardInterrupt:
        # What is under way is worth waiting for; a second interrupt drops it.
        for future, trial in running.items():
            with suppress(Exception):
                done(trial, future.result())
        raise
    if failure is not None:
        raise failure


def _failure(trial: Trial, error: Exception, folder: Path, cause: BaseException) -> Exception:
    text = f"trial {trial.name!r}: {error}; finished trials are kept in {str(folder)!r}"
    failure = TrialError(text) if isinstance(error, ValueError) else RuntimeError(text)
    failure.__cause__ = cause
    return failure


@contextmanager
def _pool(settings: Settings, data: Digits, jobs: int) -> Iterator[_Pool]:
    if settings.ray is not None:
        with _ray(settings.ray, settings.jobs, data) as cluster:
            yield cluster
    elif jobs == 1:
        with threads_of_torch(1):
            yield _Here(data)
    else:
        processes = _Processes(data, jobs)
        try:
            yield processes
        except BaseException:
            processes.stop()
            raise
        processes.close()


class _Here:
    """This process, one trial at a time."""

    size = 1
    lost: tuple[type[BaseException], ...] = ()

    def __init__(self, data: Digits) -> None:
        self._data = data

    def submit(self, trial: Trial, needed: Sequence[Record]) -> Future[Record]:
        future: Future[Record] = Future()
        try:
            future.set_result(trial.run(trial.config, self._data, needed))
        except Exception as error:
            future.set_exception(error)
        return future


class _Processes:
    """Processes of this machine. When one dies, all are replaced: the executor cannot say which one it was."""

    lost: tuple[type[BaseException], ...] = (BrokenProcessPool,)

    def __init__(self, data: Digits, jobs: int) -> None:
        self.size = jobs
        self._parts = _arrays(data)
        self._executor = self._start()

    def _start(self) -> ProcessPoolExecutor:
        context = get_context("spawn")  # a fork of torch's threads may hang
        return ProcessPoolExecutor(self.size, context, initializer=_start_worker, initargs=(self._parts,))

    def submit(self, trial: Trial, needed: Sequence[Record]) -> Future[Record]:
        try:
            return self._executor.submit(_work, trial, needed)
        except BrokenProcessPool:
            self._executor = self._start()
            return self._executor.submit(_work, trial, needed)

    def stop(self) -> None:
        """At once, whatever they are at."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()

    def close(self) -> None:
        self._executor.shutdown()


_worker_data: Digits | None = None


def _start_worker(parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    global _worker_data
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    parent = parent_process()
    if parent is not None:  # a killed parent must not leave workers behind

        def follow() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)
    _worker_data = _digits(parts)


def _work(trial: Trial, needed: Sequence[Record]) -> Record:
    assert _worker_data is not None
    return trial.run(trial.config, _worker_data, needed)


def _arrays(data: Digits) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(split.images.numpy(), split.labels.numpy()) for split in (data.train, data.validation, data.test)]


def _digits(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Digits:
    # Ray's arrays cannot be written to, which torch warns about
    splits = [Split(torch.from_numpy(np.array(i)), torch.from_numpy(np.array(y))) for i, y in parts]
    return Digits(*splits)


@contextmanager
def _ray(address: str, jobs: int | None, data: Digits) -> Iterator[_Pool]:
    try:
        import ray
        from ray import exceptions
    except ImportError as error:
        raise ImportError("--ray needs the package ray: install the extra with `pip install slimtorch[ray]`") from error
    quiet: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False, "logging_level": "error"}
    if address == "local":
        ray.init("local", num_cpus=jobs or machine.cores(), **quiet)
    else:
        try:
            ray.init(address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError) as error:
            raise ValueError(f"ray: expected 'local' or the address of a cluster, got {address!r}: {error}") from error
    try:
        parts = ray.put(_arrays(data))

        # Ray would run a lost task again by itself, and forever an unlucky one; here as everywhere: ATTEMPTS times.
        @ray.remote(num_cpus=1, max_retries=0)
        def work(trial: Trial, parts: Sequence[tuple[np.ndarray, np.ndarray]], needed: Sequence[Record]) -> Record:
            torch.set_num_threads(1)
            return trial.run(trial.config, _digits(parts), needed)

        class Cluster:
            size = max(1, jobs or int(ray.cluster_resources().get("CPU", 1)))
            lost: tuple[type[BaseException], ...] = (
                exceptions.WorkerCrashedError,
                exceptions.NodeDiedError,
                exceptions.ObjectLostError,
                exceptions.OutOfMemoryError,
            )

            def submit(self, trial: Trial, needed: Sequence[Record]) -> Future[Record]:
                return _unwrapped(work.remote(trial, parts, list(needed)).future(), exceptions.RayTaskError)

        yield Cluster()
    finally:
        ray.shutdown()


def _unwrapped(future: Future[Record], wrapper: type[BaseException]) -> Future[Record]:
    """Ray hides what a task raised inside an error of its own; given out is the trial's."""
    result: Future[Record] = Future()

    def done(inner: Future[Record]) -> None:
        error = inner.exception()
        if error is None:
            result.set_result(inner.result())
        elif isinstance(error, wrapper) and isinstance(getattr(error, "cause", None), Exception):
            result.set_exception(error.cause)  # type: ignore[attr-defined]
        else:
            result.set_exception(error)

    future.add_done_callback(done)
    return result
