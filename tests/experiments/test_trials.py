# SPDX-License-Identifier: Apache-2.0
"""Trials: the same records whoever runs them; kept, resumed, begun again when a worker is lost."""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slimtorch.data import Digits, Split
from slimtorch.experiments import trials
from slimtorch.experiments.catalogue import Settings
from slimtorch.experiments.loop import Diverged, batches, evaluate, fit
from slimtorch.experiments.store import Record
from slimtorch.experiments.trials import Trial, TrialError, run_all

ONE = Settings(jobs=1)
WAYS = [
    pytest.param(Settings(jobs=2), id="processes"),
    pytest.param(
        Settings(jobs=2, ray="local"),
        id="ray",
        marks=pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
    ),
]


def split(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    return Split(torch.randn(count, 1, 4, 4, generator=generator), torch.randint(10, (count,), generator=generator))


@pytest.fixture(scope="module")
def data() -> Digits:
    return Digits(split(40, 0), split(20, 1), split(20, 2))


def silent(stage: str, done: int, total: int) -> None:
    pass


def train(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """A few steps of a small network, from the weights of what it needs."""
    torch.manual_seed(config["seed"])
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    if needed:
        model.load_state_dict({key: torch.from_numpy(value) for key, value in needed[0].arrays.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=config["rate"])
    curve = fit(model, data, optimizer, steps=6, batch_size=8, seed=config["seed"], every=2)
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    return Record({"loss": curve.loss, "needed": len(needed)}, arrays)


def die(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    """Its process is killed while files are missing; what it leaves counts how often it was begun."""
    folder = Path(config["folder"])
    begun = len(list(folder.iterdir()))
    (folder / str(begun)).touch()
    if begun < config["deaths"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return Record({"begun": begun + 1})


def fail(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
    if config["error"] == "ValueError":
        raise ValueError("such a value")
    raise KeyError("no such key")


def chain(seeds: int = 3, **changes: Any) -> list[Trial]:
    """Every seed trains a network and goes on from it; only the last are asked for."""
    found = []
    for seed in range(seeds):
        config = {"seed": seed, "rate": 0.1, **changes}
        first = Trial(f"first-{seed}", train, config)
        found.append(Trial(f"second-{seed}", train, {**config, "rate": 0.05}, (first,)))
    return found


@pytest.mark.parametrize("settings", WAYS)
def test_whoever_runs_them_the_records_are_the_same(
    settings: Settings, data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes and Ray: one worker is killed, its trial is run again; the last trial fails, the others are kept."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where Ray's workers find this module
    expected = run_all(chain(), data, tmp_path / "expected", ONE, silent)
    (tmp_path / "begun").mkdir()
    every = [*chain(), Trial("mortal", die, {"folder": str(tmp_path / "begun"), "deaths": 1})]
    wrong = Trial("wrong", fail, {"error": "ValueError"}, tuple(every))
    seen: list[tuple[str, int, int]] = []
    with pytest.raises(TrialError, match="trial 'wrong': such a value; finished trials are kept in") as caught:
        run_all([wrong], data, tmp_path, settings, lambda *step: seen.append(step), "stage")
    assert type(caught.value.__cause__) is ValueError
    assert seen == [("stage", done, 8) for done in range(8)]
    found = run_all(every, data, tmp_path, ONE, lambda *step: seen.append(step))
    assert seen[-1] == ("train", 4, 4)
    assert found["mortal"].result["begun"] == 2
    assert len(expected) == 3
    for name, record in expected.items():
        assert record.result["needed"] == 1
        assert found[name].result == record.result
        assert all(np.array_equal(found[name].arrays[key], value) for key, value in record.arrays.items())


def test_what_is_stored_is_not_run_again(data: Digits, tmp_path: Path) -> None:
    found = run_all(chain(), data, tmp_path, ONE, silent)
    for path in (tmp_path / "trials").glob("first-*"):
        path.unlink()  # nothing needs them any more
    seen: list[tuple[str, int, int]] = []
    again = run_all(chain(), data, tmp_path, ONE, lambda *step: seen.append(step))
    assert seen == [("train", 3, 3)]
    assert [again[name].result for name in again] == [found[name].result for name in found]


def test_another_configuration_or_other_data_are_other_trials(data: Digits, tmp_path: Path) -> None:
    def count(trials: list[Trial], data: Digits) -> int:
        run_all(trials, data, tmp_path, ONE, silent)
        return len(list((tmp_path / "trials").iterdir()))

    assert count(chain(1), data) == 2
    assert count(chain(2), data) == 4
    changed = chain(1, rate=0.2)  # the first trial's rate; the second differs by what it needs
    assert count(changed, data) == 6
    assert count(chain(1), replace(data, validation=split(20, 3))) == 8
    assert count(chain(2), data) == 8
    renamed = replace(chain(1)[0], run=fail, config={"error": "ValueError"})
    with pytest.raises(TrialError, match="trial 'second-0': such a value; finished trials are kept in"):
        count([renamed], data)


def test_a_trial_that_loses_every_worker_is_given_up(
    data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "ATTEMPTS", 1)
    (tmp_path / "begun").mkdir()
    mortal = [Trial(name, die, {"folder": str(tmp_path / "begun"), "deaths": 99}) for name in "ab"]
    with pytest.raises(TrialError, match=r"trial '[ab]': its worker was lost 1 times"):
        run_all(mortal, data, tmp_path, Settings(jobs=2), silent)


def test_an_error_of_the_program_is_no_mistake_of_the_user(data: Digits, tmp_path: Path) -> None:
    every = [*chain(1), Trial("wrong", fail, {"error": "KeyError"}), *chain(3)[1:]]
    with pytest.raises(RuntimeError, match="trial 'wrong': 'no such key'; finished trials are kept in") as caught:
        run_all(every, data, tmp_path, ONE, silent)
    assert type(caught.value.__cause__) is KeyError
    kept = {path.name.rsplit("-", 1)[0] for path in (tmp_path / "trials").iterdir()}
    assert kept == {"first-0", "second-0"}


def test_a_loss_that_is_not_finite_names_step_and_trial(data: Digits, tmp_path: Path) -> None:
    broken = Trial("broken", train, {"seed": 0, "rate": 1e38})  # the first step leaves weights of 1e37
    with pytest.raises(TrialError, match="trial 'broken': training diverged: the loss of step 1 is") as caught:
        run_all([broken], data, tmp_path, ONE, silent)
    assert isinstance(caught.value.__cause__, Diverged)
    sent = pickle.loads(pickle.dumps(caught.value.__cause__))  # from a process
    assert sent.step == 1
    assert str(sent) == str(caught.value.__cause__)


def test_an_interrupt_keeps_what_is_done(data: Digits, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(chain(), data, tmp_path, ONE, interrupt)
    assert len(list((tmp_path / "trials").iterdir())) == 3
    assert len(run_all(chain(), data, tmp_path, ONE, silent)) == 3


def test_an_interrupt_waits_for_what_is_under_way(tmp_path: Path) -> None:
    gate = threading.Event()

    def slow(config: Mapping[str, Any], data: Digits, needed: Sequence[Record]) -> Record:
        if config["slow"]:
            gate.wait()
        return Record({})

    class Threads:
        size = 2
        lost = ()

        def submit(self, trial: Trial, needed: Sequence[Record]) -> Future[Record]:
            return executor.submit(trial.run, trial.config, None, needed)

    done: list[str] = []

    def keep(trial: Trial, record: Record) -> None:
        done.append(trial.name)
        if trial.name == "quick":
            gate.set()
            raise KeyboardInterrupt

    every = [Trial(name, slow, {"slow": name != "quick"}) for name in ("slow", "quick", "never")]
    with ThreadPoolExecutor(2) as executor, pytest.raises(KeyboardInterrupt):
        trials._run_missing(every, {}, Threads(), tmp_path, keep)
    assert done == ["quick", "slow"]


def test_bad_trials(data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected names of their own, got 'first-0' twice"):
        run_all([*chain(1), Trial("first-0", train, {})], data, tmp_path, ONE, silent)
    monkeypatch.setitem(trials.__dict__["__builtins__"], "__import__", _without_ray)
    with pytest.raises(ImportError, match=r"pip install slimtorch\[ray\]"):
        run_all(chain(1), data, tmp_path, Settings(ray="local"), silent)


_import = __import__


def _without_ray(name: str, *rest: Any) -> Any:
    if name == "ray":
        raise ImportError(name)
    return _import(name, *rest)


def test_batches_depend_on_the_seed_alone() -> None:
    data = split(10, 0)
    first = [next_ for next_, _ in zip(batches(data, 4, 7), range(5), strict=False)]
    again = [next_ for next_, _ in zip(batches(data, 4, 7, start=2), range(3), strict=False)]
    for (images, labels), (images_again, labels_again) in zip(first[2:], again, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)
    other = next(batches(data, 4, 8))
    assert not torch.equal(first[0][0], other[0])
    epoch = torch.cat([images for images, _ in first[:2]]).flatten(1)
    assert len(epoch.unique(dim=0)) == 8  # no image twice in an epoch


def test_fit_stops_and_goes_on_as_if_it_had_not(data: Digits) -> None:
    def run(*parts: tuple[int, int]) -> tuple[nn.Module, list[float]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(16, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses: list[float] = []
        for start, steps in parts:
            curve = fit(model, data, optimizer, steps=steps, batch_size=8, seed=1, start=start, every=3)
            assert curve.steps == [*range(start, steps, 3), steps]
            losses += curve.loss[:-1]
        assert model.training
        return model, losses

    (whole, losses), (parts, losses_again) = run((0, 12)), run((0, 6), (6, 12))
    assert losses == losses_again
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    loss, accuracy = evaluate(whole, data.validation)
    logits = whole(data.validation.images).detach()
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, data.validation.labels)), rel=1e-5)
    assert accuracy == float((logits.argmax(1) == data.validation.labels).float().mean().double().round(decimals=6))
