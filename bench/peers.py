# SPDX-License-Identifier: Apache-2.0
"""DeepSparse and ONNX Runtime as contenders: one worker process each, in the environment that `make peers` builds.

DeepSparse 1.8.0, the last release with kernels of its own for sparse weights, needs Python <= 3.11 and numpy < 2,
which this library's environment does not want; a process of its own also keeps its threads and its crashes to itself.
A worker answers "time n calls" while everything else waits, so its samples interleave with ours round by round, and
the clock runs inside the worker: the pipe is not timed.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from bench.machine import ROOT
from bench.timing import Contender
from tests.problems import LinearProblem, Problem

DEFAULT_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
ENGINES = {
    "deepsparse": "DeepSparse, sparse kernels",
    "onnxruntime": "ONNX Runtime, dense kernels on the same weights",
}
_WORKER = Path(__file__).with_name("peers_worker.py")


class PeerError(RuntimeError):
    """A peer engine is missing, failed, or did not answer; `engine` names it."""

    def __init__(self, engine: str, reason: object) -> None:
        super().__init__(str(reason))
        self.engine = engine


class Worker:
    """One engine's process."""

    def __init__(self, engine: str, python: Path, threads: int, timeout: float = 300.0) -> None:
        self._engine = engine
        self._timeout = timeout
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), NM_DISABLE_ANALYTICS="1")
        environment.pop("PYTHONPATH", None)  # its packages are its own
        self._process = subprocess.Popen(
            [str(python), "-u", str(_WORKER), engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # a buffered answer would hide from select
            env=environment,
        )

    def ask(self, **request: object) -> dict[str, object]:
        """Send one request and wait for its answer; PeerError where that is an error, or none comes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.poll() is not None:
            raise PeerError(self._engine, f"its process ended with code {self._process.returncode}")
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError as error:
            raise PeerError(self._engine, f"its process ended with code {self._process.wait()}") from error
        if not select.select([self._process.stdout], [], [], self._timeout)[0]:
            self.close()
            raise PeerError(self._engine, f"no answer within {self._timeout:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(self._engine, f"its process ended with code {self._process.wait()}")
        answer: dict[str, object] = json.loads(line)
        if "error" in answer:
            raise PeerError(self._engine, answer["error"])
        return answer

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Peers:
    """The engines found in `python`'s environment; a context manager that ends their processes.

    `missing` says why an engine is not there; `versions` what was found.
    """

    def __init__(self, python: Path = DEFAULT_PYTHON, threads: int = 1) -> None:
        self.versions: dict[str, str | None] = {}
        self.about: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self._workers: dict[str, Worker] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="bench-peers-")
        self._problem: Problem | None = None
        self._threads = threads
        self._python = python
        for engine in ENGINES:
            self._start(engine)

    def _start(self, engine: str) -> None:
        if not self._python.exists():
            self.missing[engine] = "no environment for it: run `make peers`"
            return
        worker = Worker(engine, self._python, self._threads)
        try:
            hello = worker.ask(do="hello")
        except PeerError as error:
            self.missing[engine] = str(error)
            worker.close()
            return
        self._workers[engine] = worker
        self.versions.update(hello["versions"])  # type: ignore[call-overload]
        self.about[engine] = str(hello["about"])

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self._folder.cleanup()

    def builders(self, problem: Problem, threads: int) -> list[tuple[str, Callable[[], Contender]]]:
        """Name and builder of every engine; a missing engine's builder raises the reason."""
        return [(engine, functools.partial(self._contender, engine, problem, threads)) for engine in ENGINES]

    def _contender(self, engine: str, problem: Problem, threads: int) -> Contender:
        if engine not in self._workers:
            raise PeerError(engine, self.missing[engine])
        if problem.dtype != torch.float32:
            raise NotImplementedError("compared in float32 only")
        if threads != self._threads:
            raise ValueError(f"threads: expected {self._threads}, as the workers were started with, got {threads}")
        worker = self._workers[engine]
        worker.ask(do="load", problem=self._write(problem), threads=threads)
        output = Path(self._folder.name) / f"{engine}.npy"

        def result() -> torch.Tensor:
            worker.ask(do="run", to=str(output))
            return torch.from_numpy(np.load(output, allow_pickle=False))

        def sample(calls: int) -> float:
            return float(worker.ask(do="sample", calls=calls)["seconds"])  # type: ignore[arg-type]

        return Contender(engine, "peer", ENGINES[engine], result, sample)

    def _write(self, problem: Problem) -> str:
        path = Path(self._folder.name) / "problem.npz"
        if problem != self._problem:
            arrays = {"x": problem.input(), "weight": problem.weight(), "bias": problem.bias()}
            content: dict[str, object] = {name: tensor.numpy() for name, tensor in arrays.items()}
            if isinstance(problem, LinearProblem):
                content["kind"] = "linear"
            else:
                content["kind"] = "conv"
                for name in ("padding", "stride", "dilation", "groups", "output_size"):
                    content[name] = np.asarray(getattr(problem, name))
            np.savez(path, **content)  # type: ignore[arg-type]
            self._problem = problem
        return str(path)

    def unload(self) -> None:
        """Free what the engines hold for the last problem."""
        for engine, worker in list(self._workers.items()):
            try:
                worker.ask(do="unload")
            except PeerError:  # it died on this problem; the next one gets a new process
                worker.close()
                del self._workers[engine]
                self._start(engine)


def main() -> int:
    """Print what of the peers works here; exit code 1 where none does."""
    with Peers() as peers:
        for engine, reason in peers.missing.items():
            print(f"{engine}: not available ({reason})")
        for engine, about in peers.about.items():
            print(f"{engine} {peers.versions[engine]}: {about}")
        return 0 if peers.about else 1


if __name__ == "__main__":
    raise SystemExit(main())
