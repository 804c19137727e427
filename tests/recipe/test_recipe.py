# SPDX-License-Identifier: Apache-2.0
"""Recipes: phases do what the verbs do, a killed run ends as an uninterrupted one, and the report is true."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimtorch as slim
from slimtorch import recipe
from slimtorch.data import Digits, Split
from slimtorch.experiments.loop import evaluate
from slimtorch.measure import count_macs
from slimtorch.recipe.checkpoints import dump, restore
from slimtorch.recipe.training import batch
from tests.recipe import worker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data() -> Digits:
    return worker.few()


@pytest.fixture(scope="module")
def whole(data: Digits) -> recipe.RecipeResult:
    return worker.full().run(worker.network, data)


def states(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = states(one), states(other)
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def facts(report: recipe.RecipeReport) -> list[dict[str, Any]]:
    """All but the clock."""
    return [{**phase, "seconds": 0} for phase in report.to_dict()["phases"]]


# --- what phases do ---------------------------------------------------------------------------------------------------


def test_training_is_the_plain_loop(data: Digits) -> None:
    phase = recipe.Train(epochs=1.5, batch_size=40, rate=0.01)
    found = recipe.Recipe([phase], seed=5, batches=()).run(slim.models.LeNet300, data).model
    torch.manual_seed(5)
    model = slim.models.LeNet300()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    steps = 8  # 1.5 epochs of 5 batches, rounded to even
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        chosen = batch(data.train, 40, 5 * 1_009 + 1, step)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train.images[chosen]), data.train.labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    for key, value in states(model).items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_batches_are_epochs_in_orders_of_their_own() -> None:
    split = Split(torch.zeros(7, 1), torch.zeros(7, dtype=torch.int64))
    drawn = [batch(split, 3, seed=1, step=step) for step in range(4)]
    for first, second in (drawn[:2], drawn[2:]):
        assert len(set(first.tolist()) | set(second.tolist())) == 6
    assert not torch.equal(torch.cat(drawn[:2]), torch.cat(drawn[2:]))
    assert torch.equal(drawn[3], batch(split, 3, seed=1, step=3))
    assert len(batch(split, 100, seed=1, step=2)) == 7


def test_phases_are_the_verbs(data: Digits) -> None:
    phases = [
        recipe.Prune(config=slim.prune.Magnitude(0.8)),
        recipe.Cluster(config={"fc1": slim.quantize.KMeans(bits=2)}),
    ]
    torch.manual_seed(1)
    model = slim.models.LeNet300()
    before = {key: value.clone() for key, value in states(model).items()}
    result = recipe.Recipe(phases, batches=()).run(model, data)
    assert all(torch.equal(value, before[key]) for key, value in states(model).items())  # the caller's is not changed
    slim.prune_(model, slim.prune.Magnitude(0.8))
    slim.cluster_(model, {"fc1": slim.quantize.KMeans(bits=2)})
    assert same(result.model, model)
    assert (model.fc2.weight == 0).float().mean() == pytest.approx(0.8, abs=0.01)


def test_separated_layers_are_fitted_to_training_images(data: Digits) -> None:
    torch.manual_seed(2)
    model = slim.models.LeNet5((3, 4, 8))
    phase = recipe.Separate(config={"conv2": slim.design.Separable(multiplier=2)}, objective=None, samples=100)
    fitted = recipe.Recipe([phase], batches=()).run(model, data)
    trained = recipe.Recipe([phase, recipe.Train(epochs=0.5)], batches=()).run(model, data)
    images = list(data.train.images[:100].split(64))
    slim.separate_(model, {"conv2": slim.design.Separable(multiplier=2)}, images[0], images, objective=None)
    assert fitted.report.phases[1].note == "separated: conv2"
    assert same(fitted.model, model)
    assert list(states(trained.model)) == list(states(model))
    assert not same(trained.model, model)


def test_factorized_layers_are_fitted_to_training_images(data: Digits) -> None:
    torch.manual_seed(2)
    model = slim.models.LeNet300((20, 10))
    config = {"*": slim.design.LowRank(ratio=0.4)}
    phase = recipe.Factorize(config=config, objective="size", samples=100, batch=64)
    made = recipe.Recipe([phase], batches=()).run(model, data)
    images = list(data.train.images[:100].split(64))
    report = slim.factorize_(model, config, images[0], images, objective="size")
    names = ", ".join(layer.name for layer in report.replaced)
    assert names
    assert made.report.phases[1].note == f"factorized: {names}"
    assert same(made.model, model)


def test_masks_hold_in_later_training_and_are_gone_after_packing(data: Digits) -> None:
    phases = [
        recipe.Prune(config=slim.prune.Magnitude(0.9)),
        recipe.Train(epochs=1, optimizer="sgd", rate=0.1),
        recipe.Pack(batch=4, time_budget=0.1, formats=["sparse"]),
    ]
    result = recipe.Recipe(phases, batches=()).run(slim.models.LeNet300, data)
    assert not slim.prune.masks(result.model)
    for name in ("fc1", "fc2", "fc3"):
        weight = result.model.get_submodule(name).weight
        assert (weight == 0).float().mean() == pytest.approx(0.9, abs=0.01)  # type: ignore[operator, union-attr]
    assert result.report.phases[-1].note.startswith("packed:")


def test_the_teacher_is_the_network_before_it_was_made_smaller(data: Digits) -> None:
    seen: list[nn.Module] = []
    phases = [
        recipe.Train(epochs=0.5), recipe.Prune(config=slim.prune.Neurons(ratio=0.5)), recipe.Distill(epochs=0.25),
    ]  # fmt: skip
    made = recipe.Recipe(phases, batches=())
    original = slim.distill.Distiller.__init__

    def spy(self: Any, student: nn.Module, teacher: nn.Module, *args: Any, **kwargs: Any) -> None:
        seen.append(teacher)
        original(self, student, teacher, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slim.distill.Distiller, "__init__", spy)
        made.run(slim.models.LeNet300, data)
    trained = recipe.Recipe(phases[:1], batches=()).run(slim.models.LeNet300, data).model
    assert same(seen[0], trained)


@pytest.mark.parametrize("model", [slim.models.LeNet300, worker.network], ids=["modules in order", "sequential"])
def test_exits_have_heads_and_leave_the_answer(data: Digits, model: Any) -> None:
    point = "relu1"
    result = recipe.Recipe([recipe.Exits(exits={point: 7})], batches=()).run(model, data)
    torch.manual_seed(0)
    plain = model().eval()
    x = data.test.images[:5]
    outputs = result.model.all_exits(x)  # type: ignore[operator, union-attr]
    assert [output.shape for output in outputs] == [(5, 10), (5, 10)]
    torch.testing.assert_close(outputs[-1], plain(x))
    widths = [m.out_features for m in result.model.heads.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    assert widths == [7, 10]


@pytest.mark.parametrize(("pool", "inputs"), [(4, 48), (2, 12), (20, 432), (None, 432)])
def test_heads_see_a_map_of_the_size_asked_for(data: Digits, pool: int | None, inputs: int) -> None:
    phase = recipe.Exits(exits={"pool1": None}, pool=pool)
    result = recipe.Recipe([phase], batches=()).run({"function": "slimtorch.models:LeNet5", "hidden": [3, 4, 8]}, data)
    (head,) = (m for m in result.model.heads.modules() if isinstance(m, nn.Linear))  # type: ignore[union-attr]
    assert head.in_features == inputs  # of the 3 x 12 x 12 after the pooling
    assert head.out_features == 10


def test_exits_need_modules_in_order(data: Digits) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.fc, self.out = nn.Flatten(), nn.Linear(784, 784), nn.Linear(784, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.flat(x)
            return self.out(x + self.fc(x))

    work = recipe.Work(data, 0, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"modules one after the other; a Skips does something else"):
        recipe.Exits(exits={"fc": None}).apply(Skips(), work)


# --- killed and resumed -----------------------------------------------------------------------------------------------


KILLS = [("dense", 0), ("dense", 5), ("2-prune", 0), ("3-early_exit", 0), ("4-distill", 2), ("5-prune", 0),
         ("6-train", 3), ("7-cluster", 0), ("8-distill", 1), ("9-binarize", 0), ("10-train", 2), ("11-apply", 0),
         ("12-calibrate", 0)]  # fmt: skip


def test_killed_in_each_phase_and_resumed_gives_the_same(
    whole: recipe.RecipeResult, data: Digits, tmp_path: Path
) -> None:
    """One folder, killed again and again, each time a phase further; a process of its own each time would take long,
    so that most kills are an exception that nothing expects; the first of them is the signal."""
    command = [sys.executable, "-c", "from tests.recipe import worker; worker.main()", str(tmp_path), "dense", "4"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "progress.pt").exists()
    assert not (tmp_path / "1.pt").exists()

    class Killed(BaseException):
        pass

    for stage, at in KILLS[1:]:
        seen: list[tuple[str, int]] = []

        def show(told: str, done: int, total: int, stage: str = stage, at: int = at, seen: Any = seen) -> None:
            seen.append((told, done))
            if told == stage and done >= at:
                raise Killed

        torch.manual_seed(len(seen))  # what the caller's generator holds does not matter
        with pytest.raises(Killed):
            worker.full().run(worker.network, data, tmp_path, every=0.0, show=show)
        training = [done for told, done in seen if told == stage]
        assert training[0] == (at - 1 if (stage, at) == ("dense", 5) else 0)  # it went on where it was killed
    result = worker.full().run(worker.network, data, tmp_path)
    assert same(result.model, whole.model)
    assert facts(result.report) == facts(whole.report)
    x = data.test.images
    assert torch.equal(result.model(x), whole.model(x))


def test_a_finished_run_does_nothing_again(data: Digits, tmp_path: Path) -> None:
    made = recipe.Recipe([recipe.Train(epochs=1)], batches=(1, 3))
    first = made.run(slim.models.LeNet300, data, tmp_path, samples=2)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = made.run(slim.models.LeNet300, data, tmp_path, samples=2)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert again.report == first.report
    assert str(again.report) == str(first.report)


def test_a_damaged_network_is_made_anew(data: Digits, tmp_path: Path) -> None:
    made = recipe.Recipe([recipe.Train(epochs=1), recipe.Prune(config=slim.prune.Magnitude(0.5))], batches=())
    first = made.run(slim.models.LeNet300, data, tmp_path)
    file = tmp_path / "1.pt"
    file.write_bytes(file.read_bytes()[:1000])
    (tmp_path / "progress.pt").write_bytes(b"nothing")
    again = made.run(slim.models.LeNet300, data, tmp_path)
    assert same(first.model, again.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: recipe.Recipe([recipe.Train(epochs=2)], batches=()), "phase 1: expected .*: 1.*got .*: 2"),
        (lambda r: recipe.Recipe([*r.phases, recipe.Pack()], batches=()), "phases: expected 1, got 2"),
        (lambda r: recipe.Recipe(r.phases, seed=1, batches=()), "expected .*, got"),
    ],
)
def test_another_recipe_does_not_go_on(data: Digits, tmp_path: Path, change: Any, message: str) -> None:
    made = recipe.Recipe([recipe.Train(epochs=1)], batches=())
    made.run(slim.models.LeNet300, data, tmp_path)
    with pytest.raises(ValueError, match=f"folder: .* holds the run of something else .*{message}"):
        change(made).run(slim.models.LeNet300, data, tmp_path)


def test_another_model_or_other_data_do_not_go_on(data: Digits, tmp_path: Path) -> None:
    made = recipe.Recipe([recipe.Train(epochs=0.1)], batches=())
    made.run(slim.models.LeNet300, data, tmp_path)
    with pytest.raises(ValueError, match=r"model: expected .*LeNet300"):
        made.run(slim.models.LeNet5, data, tmp_path)
    other = Digits(data.train, data.validation, Split(data.test.images + 1, data.test.labels))
    with pytest.raises(ValueError, match="data: expected"):
        made.run(slim.models.LeNet300, other, tmp_path)


def test_masks_survive_with_what_lies_below_them() -> None:
    model = slim.models.LeNet300()
    slim.prune_(model, slim.prune.Magnitude(0.7))
    with torch.no_grad():
        model.fc1.parametrizations.weight.original.fill_(2.0)  # type: ignore[union-attr, operator]
    again = restore(dump(model))
    assert same(again, model)
    assert set(slim.prune.masks(again)) == {"fc1", "fc2", "fc3"}
    assert torch.equal(again.fc1.parametrizations.weight.original, torch.full((300, 784), 2.0))  # type: ignore[union-attr]


# --- the report -------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_networks_are(whole: recipe.RecipeResult, data: Digits, tmp_path: Path) -> None:
    report, model = whole.report, whole.model
    last = report.phases[-1]
    assert not model.training
    assert last.test == evaluate(model, data.test)[1]
    assert last.validation == evaluate(model, data.validation)[1]
    images = data.validation.images
    assert last.macs == count_macs(model, images)[1] / len(images)
    assert last.bytes_file == slim.save(model, tmp_path / "model.slim")
    assert [phase.name for phase in report.phases][:3] == ["0-start", "dense", "2-prune"]
    assert report.reference.name == "dense"
    assert last.macs < report.phases[-2].macs  # calibrated: samples leave
    pruned, clustered = report.phases[5], report.phases[7]
    assert pruned.nonzero < report.phases[4].nonzero
    assert clustered.nonzero <= pruned.nonzero + 24  # tables do not hide the weights; biases are counted too
    assert clustered.parameters < pruned.parameters


def test_tables_json_and_html(data: Digits, tmp_path: Path) -> None:
    result = recipe.Recipe([recipe.Train(epochs=0.5), recipe.Cluster(config=slim.quantize.KMeans(bits=4))],
                           batches=(1, 5)).run(slim.models.LeNet300, data, tmp_path, samples=3)  # fmt: skip
    report = result.report
    assert all(len(line) <= 100 for line in str(report).splitlines())
    assert "2-cluster" in str(result)
    found = json.loads(json.dumps(report.to_dict()))
    assert recipe.RecipeReport.from_dict(found) == report
    page = report.to_html()
    assert page.startswith("<!doctype html>")
    assert page.count("<figure>") == 1
    (name, _, figure), *_ = report.figures()
    assert name == "phases"
    accuracy, size, latency = figure.axes
    assert [t.get_text() for t in accuracy.get_xticklabels()] == ["1-train", "2-cluster"]  # from the trained one on
    assert accuracy.lines[0].get_ydata() == pytest.approx([100 * phase.test for phase in report.phases[1:]])
    assert size.lines[0].get_ydata() == pytest.approx([phase.bytes_file / 1024 for phase in report.phases[1:]])
    ratio = report.phases[2].latency[5].median / report.phases[1].latency[5].median
    assert latency.lines[1].get_ydata() == pytest.approx([1, ratio])
    for phase in report.phases:
        assert set(phase.latency) == {1, 5}
        assert phase.latency[1].samples == 3
        assert phase.latency[1].calls % 64 == 0  # single images, by sixty-four


def test_batch_1_runs_different_images(data: Digits) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            return x

    model = Counts()
    recipe.run.measure_by_turns({"a": model}, data.test, (1, 150), samples=1)
    singles = [x for x in model.seen if len(x) == 1]
    assert len(singles) % 64 == 0
    assert torch.equal(torch.cat(singles[:64]), data.test.images[:64])
    many = next(x for x in model.seen if len(x) == 150)
    assert torch.equal(many[100:], data.test.images[:50])  # from the beginning again


# --- bad input --------------------------------------------------------------------------------------------------------


def identity(model: nn.Module) -> str:
    return "no module"


T = recipe.Train(epochs=1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: recipe.Recipe([]), ValueError, "phases: expected at least one"),
        (lambda: recipe.Recipe(["train"]), TypeError, "phases: expected phases such as"),  # type: ignore[list-item]
        (lambda: recipe.Recipe([T], seed=-1), ValueError, "seed: expected at least 0"),
        (lambda: recipe.Recipe([T], batches=(0,)), ValueError, "batches: expected at least 1"),
        (lambda: recipe.Recipe([T], threads=0), ValueError, "threads: expected at least 1"),
        (lambda: recipe.Recipe([T, recipe.Train(epochs=1, name="1-train")]), ValueError, "'1-train' twice"),
        (lambda: recipe.Recipe([T, recipe.Distill(epochs=1)]), ValueError, "no phase that makes the network smaller"),
        (lambda: recipe.Recipe([T, recipe.Distill(epochs=1, teacher="1-trian")]), ValueError, "closest: '1-train'"),
        (lambda: recipe.Recipe([recipe.Distill(epochs=1, teacher="1-distill")]), ValueError, "a phase before"),
        (lambda: recipe.Train(epochs=0), ValueError, "epochs: expected a finite number above 0, got 0"),
        (lambda: recipe.Train(epochs="x"), TypeError, "epochs: expected a number"),  # type: ignore[arg-type]
        (lambda: recipe.Train(epochs=1, rate=float("nan")), ValueError, "rate: expected a finite number"),
        (lambda: recipe.Train(epochs=1, batch_size=0), ValueError, "batch_size: expected at least 1"),
        (lambda: recipe.Train(epochs=1, optimizer="adma"), ValueError, "closest: 'adam'"),  # type: ignore[arg-type]
        (lambda: recipe.Train(epochs=1, loss="hinge"), ValueError, "loss: expected one of"),
        (lambda: recipe.Train(epochs=1, name=3), TypeError, "name: expected a text"),  # type: ignore[arg-type]
        (lambda: recipe.Distill(epochs=1, terms=()), ValueError, "terms: expected at least one"),
        (lambda: recipe.Distill(epochs=1, terms=(3,)), TypeError, "terms: expected terms"),  # type: ignore[arg-type]
        (lambda: recipe.Distill(epochs=1, teacher=3), TypeError, "teacher: expected the name"),  # type: ignore[arg-type]
        (lambda: recipe.Prune(config=3), TypeError, "config: expected Magnitude or Neurons"),  # type: ignore[arg-type]
        (lambda: recipe.Cluster(config={}), ValueError, "config: expected at least one glob"),
        (lambda: recipe.Pack(formats="spars"), ValueError, "closest: 'sparse'"),
        (lambda: recipe.Exits(exits={}), TypeError, "exits: expected a mapping"),
        (lambda: recipe.Exits(exits={"a": 0}), ValueError, "exits: expected at least 1"),
        (lambda: recipe.Exits(exits={"a": None}, pool=0), ValueError, "pool: expected at least 1"),
        (lambda: recipe.Factorize(config=3), TypeError, "config: expected LowRank"),  # type: ignore[arg-type]
        (lambda: recipe.Separate(config=3), TypeError, "config: expected Separable"),  # type: ignore[arg-type]
        (lambda: recipe.Separate(objective="sise"), ValueError, "closest: 'size'"),  # type: ignore[arg-type]
        (lambda: recipe.Separate(samples=-1), ValueError, "samples: expected at least 0"),
        (lambda: recipe.Calibrate(), ValueError, "exactly one of accuracy, within and macs, got 0"),
        (lambda: recipe.Calibrate(accuracy=2), ValueError, r"accuracy: expected a number in \[0, 1\]"),
        (lambda: recipe.Apply(function=3), TypeError, "function: expected a function"),  # type: ignore[arg-type]
        (lambda: recipe.Apply(function=lambda m: m).to_dict(), TypeError, "functions of a top level"),
    ],
)
def test_bad_recipes(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("model", "data_of", "error", "message"),
    [
        (None, None, ValueError, "model: expected a module, a function or package.module:function, got none"),
        (3, None, TypeError, "model: expected a module"),
        ("slimtorch.models", None, ValueError, "model: expected package.module:function"),
        ("slimtorch.model:LeNet5", None, ImportError, "model: there is no module 'slimtorch.model'"),
        ("slimtorch.models:LeNet6", None, ValueError, "no 'LeNet6'; closest: 'LeNet5'"),
        ("slimtorch.models:VGG16", None, ValueError, "expected a function"),
        ({"function": "slimtorch.models:LeNet300", "hiden": [3, 3]}, None, TypeError, "model: .*hiden"),
        ({"hidden": [3, 3]}, None, ValueError, "model: expected function: package.module:function"),
        ("builtins:dict", None, TypeError, "model: expected a module from"),
        (slim.models.LeNet300, 3, TypeError, "data: expected slimtorch.data.Digits or a name"),
        (slim.models.LeNet300, "builtins:dict", TypeError, "data: expected slimtorch.data.Digits from"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 10)), None, ValueError, r"model: does not take images \[1, 28, 28\]"),
    ],
)
def test_bad_models_and_data(data: Digits, model: Any, data_of: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        recipe.Recipe([T], batches=()).run(model, data if data_of is None else data_of)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (recipe.Prune(config={"fc9": slim.prune.Magnitude(0.5)}), "phase 1-prune: .*'fc9' matches no"),
        (recipe.Calibrate(within=0.1), "phase 1-calibrate: expected a network with exits"),
        (recipe.Train(epochs=1, rate=1e30), "phase 1-train: training diverged"),
        (recipe.Apply(function=identity), "phase 1-apply: function: expected a module or None from it, got str"),
        (recipe.Apply(function="tests.recipe.worker:half"), "phase 1-apply: .*closest: 'halve'"),
    ],
)
def test_a_phase_that_fails_says_so_and_keeps_the_others(
    data: Digits, tmp_path: Path, phase: recipe.Phase, message: str
) -> None:
    made = recipe.Recipe([phase], batches=())
    with pytest.raises(recipe.PhaseError, match=message) as caught:
        made.run(slim.models.LeNet300, data, tmp_path)
    assert caught.value.phase == 1
    assert (tmp_path / "0.pt").exists()
    assert not (tmp_path / "1.pt").exists()


def test_nothing_left_to_train(data: Digits) -> None:
    model = nn.Sequential(OrderedDict(flat=nn.Flatten(), fc=nn.Linear(784, 10))).requires_grad_(False)
    with pytest.raises(ValueError, match="expected parameters to train"):
        recipe.Recipe([T], batches=()).run(model, data)


def test_the_callers_random_numbers_are_as_before(data: Digits) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    recipe.Recipe([recipe.Train(epochs=0.1)], batches=()).run(slim.models.LeNet300, data)
    assert torch.equal(torch.rand(1), expected)
