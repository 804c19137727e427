# SPDX-License-Identifier: Apache-2.0
"""distillation on a hundred digits: whole, resumed, and its parts against plain computations."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from slimtorch.data import Digits, Split, digits
from slimtorch.experiments import catalogue, distillation, distillation_report
from slimtorch.experiments.distillation import Plan, network, parameters, restore, shallow, shifted, trials
from slimtorch.experiments.loop import draw, order_of

DATA = digits(100, 50, 100)
SMALL = Plan(
    seeds=2, teacher=(24, 24), student=(12, 12), deep=(12, 12), units=(4,), temperatures=(1.0, 4.0), teacher_epochs=4,
    epochs=3, few_epochs=2, jitter_epochs=2, batch_size=20,
)  # fmt: skip
SETTINGS = catalogue.Settings(quick=True, seeds=2, jobs=1)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("distillation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "load", lambda name, quick: (DATA, "a hundred digits"))
        patch.setattr(distillation, "plan", lambda settings: SMALL)
        first = catalogue.find("distillation").run(SETTINGS, out, lambda *_: None)

        def refuse(*args: object) -> None:
            raise AssertionError("done again")

        patch.setattr(distillation, "network", refuse)
        again = catalogue.find("distillation").run(SETTINGS, out, lambda *_: None)
    return first, again


def test_runs_and_resumes(ran: Any) -> None:
    first, again = ran
    assert again.data == first.data
    text = json.dumps(first.data)
    assert len(text) < 20_000
    stored = json.loads(text)  # tables and figures need nothing but the file
    assert [str(table) for table in distillation.tables(stored)] == [str(table) for table in first.tables]
    assert [name for name, _, _ in distillation.figures(stored)] == ["distillation"]
    assert all(len(line) <= 100 for table in first.tables for line in str(table).splitlines())
    for name, row in stored["rows"].items():
        assert len(row["test"]) == 2, name
        assert all(0 <= errors <= 100 for errors in row["test"])
    for name in ("soft without 3", "alone without 3"):
        row = stored["rows"][name]
        assert row["count"] == [10, 10]
        for seed in range(2):  # a miss is an error in all as well
            assert row["omitted"][seed] <= row["test"][seed]
            assert row["raised_omitted"][seed] <= row["omitted"][seed] or row["raise"][seed] < 0


def test_temperatures_are_chosen_on_validation() -> None:
    rows = {"soft 1": {"validation": [5, 4], "test": [1, 1]}, "soft 4": {"validation": [4, 4], "test": [9, 9]}}
    assert distillation_report.chosen({"rows": rows}, {1.0: "soft 1", 4.0: "soft 4"}) == 4.0
    rows["soft 1"]["validation"] = [4, 4]
    assert distillation_report.chosen({"rows": rows}, {1.0: "soft 1", 4.0: "soft 4"}) == 1.0


def test_shifted_images() -> None:
    images = torch.randn(40, 1, 28, 28).clamp(min=-1)
    moved = shifted(images, torch.Generator().manual_seed(0))
    down, right = torch.randint(5, (2, 40), generator=torch.Generator().manual_seed(0))
    assert {int(v) for v in down} == set(range(5))
    for image, out, y, x in zip(images, moved, down, right, strict=True):
        expected = F.pad(image, (2, 2, 2, 2), value=-1.0)[:, y : y + 28, x : x + 28]
        assert torch.equal(out, expected)


def test_sizes() -> None:
    model = network((20, 30), 0.5)
    assert parameters((20, 30)) == sum(p.numel() for p in model.parameters()) == 785 * 20 + 21 * 30 + 31 * 10
    wide = shallow((300, 300, 300))
    assert abs(parameters(wide) - parameters((300, 300, 300))) <= 795 / 2
    distillation.bound_(model, 0.1)
    lengths = [layer.weight.detach().norm(dim=1) for layer in model if isinstance(layer, torch.nn.Linear)]
    assert float(torch.cat(lengths[:-1]).max()) <= 0.1 + 1e-6
    assert float(lengths[-1].max()) > 0.2


@pytest.mark.parametrize("name", ["soft 4", "soft without 3", "mimic"])
def test_students_learn_from_the_teacher_of_their_seed(name: str) -> None:
    made = trials(SMALL)
    trial = made[name, 1]
    (need,) = trial.needs
    teacher = need.run(need.config, DATA, [])
    assert need.config["seed"] == 1
    told = restore(need.config["hidden"], teacher)
    found = trial.run({**trial.config, "keep": True}, DATA, [teacher])

    chosen = DATA.train.labels != 3 if "3" in name else torch.ones(100, dtype=torch.bool)
    split = Split(DATA.train.images[chosen], DATA.train.labels[chosen])
    torch.manual_seed(1001)
    model = network(trial.config["hidden"])
    optimizer = torch.optim.Adam(model.parameters(), lr=SMALL.rate)
    steps = round(SMALL.epochs * len(split) / 20)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for (images, labels), _ in zip(draw(split, 20, order_of(1)), range(steps), strict=False):
        logits, target = model(images), told(images).detach()
        if name == "mimic":
            loss = 0.5 * (logits - target).square().sum(1).mean()
        else:
            p, log_q = (target / 4).softmax(1), (logits / 4).log_softmax(1)
            loss = 16 * (p * (p.log() - log_q)).sum(1).mean() + 0.1 * F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(torch.from_numpy(found.arrays[f"state:{key}"]), value, rtol=1e-3, atol=1e-4)


def test_shifted_transfer_sets_ask_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trials(SMALL)
    trial = made["soft 4 shifted", 0]
    (need,) = trial.needs
    teacher = need.run({**need.config, "epochs": 1}, DATA, [])
    asked: list[torch.Tensor] = []

    def remember(hidden: Any, record: Any) -> torch.nn.Module:
        model = restore(hidden, record)
        model.register_forward_hook(lambda module, args, output: asked.append(args[0]))
        return model

    monkeypatch.setattr(distillation, "restore", remember)
    trial.run(trial.config, DATA, [teacher])
    assert len(asked) == round(SMALL.jitter_epochs * 100 / 20)
    untouched = sum(bool((image == DATA.train.images).flatten(1).all(1).any()) for batch in asked for image in batch)
    assert untouched < 40  # of 200; one shift in 25 is none


def test_raising_a_bias() -> None:
    """A model that is right about all, but says of 3s that they are the digit after, by a margin of 2."""

    class Oracle(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            labels = images[:, 0, 0, 0].long()
            logits = 5.0 * F.one_hot(labels, 10)
            three = labels == 3
            logits[three] = 5.0 * F.one_hot(labels[three] + 1, 10) + 3.0 * F.one_hot(labels[three], 10)
            return logits

    labels = torch.arange(10).repeat(3)
    split = Split(labels.float()[:, None, None, None].expand(-1, 1, 28, 28), labels)
    found = distillation.recovered(Oracle(), Digits(split, split, split), (3,))
    assert (found["omitted"], found["count"], found["raised"], found["raised_omitted"]) == (3, 3, 0, 0)
    assert 2 < found["raise"] < 5


def test_in_the_catalogue() -> None:
    experiment = catalogue.find("distillation")
    assert experiment.name == "distillation"
    assert experiment.config(catalogue.Settings())["seeds"] == 5
    assert experiment.config(catalogue.Settings(quick=True, seeds=3))["seeds"] == 3
