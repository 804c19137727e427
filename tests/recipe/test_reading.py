# SPDX-License-Identifier: Apache-2.0
"""Recipes as YAML: every key arrives, every mistake is told by line and key."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F

from slimtorch import design, distill, prune, quantize, recipe
from slimtorch.data import digits
from slimtorch.recipe.reading import KINDS, parse

ROOT = Path(__file__).parents[2]

ALL = """\
model: {function: "slimtorch.models:LeNet5", hidden: [4, 5, 6]}
data: mnist
seed: 3
measure: {batches: [2, 7], threads: 2}
phases:
  - train: {epochs: 0.5, rate: 2e-3, optimizer: sgd, momentum: 0.5, weight_decay: 1e-4, schedule: constant,
            batch_size: 7, loss: squared_hinge, name: dense}
  - prune: {sparsity: 0.9, scope: global}
  - prune: {method: neurons, ratio: 0.5, importance: taylor, loss_fn: "torch.nn.functional:cross_entropy"}
  - prune:
      layers:
        "fc*": {sparsity: 0.5, granularity: [4, 5]}
        conv1:
  - early_exit: {exits: {pool1: null, pool2: 32}, criterion: patience}
  - distill: {epochs: 1, temperature: 8, teacher: dense, hard_weight: 0.5}
  - distill:
      epochs: 1
      terms:
        - soft_targets: {temperature: 2, weight: 0.3}
        - hint: {student: stages.0.pool1, teacher: pool1}
  - separate: {layers: {"conv*": {multiplier: 2}}, objective: null, samples: 0}
  - cluster: {bits: 3, init: density}
  - cluster: {name: grid, layers: {fc1: {method: uniform, bits: 5}}}
  - binarize: {method: xnor_net, first: binary}
  - apply: {function: "tests.recipe.worker:halve"}
  - calibrate: {macs: 1e5}
  - pack
  - pack: {batch: 3, objective: size, formats: [sparse, codebook], name: small}
"""


def test_every_key_arrives() -> None:
    read = parse(ALL)
    expected: list[recipe.Phase] = [
        recipe.Train(epochs=0.5, rate=2e-3, optimizer="sgd", momentum=0.5, weight_decay=1e-4, schedule="constant",
                     batch_size=7, loss="squared_hinge", name="dense"),
        recipe.Prune(config=prune.Magnitude(0.9, scope="global")),
        recipe.Prune(config=prune.Neurons(ratio=0.5, importance="taylor", loss_fn=F.cross_entropy)),
        recipe.Prune(config={"fc*": prune.Magnitude(0.5, granularity=(4, 5)), "conv1": None}),
        recipe.Exits(exits={"pool1": None, "pool2": 32}, criterion="patience"),
        recipe.Distill(epochs=1, terms=(distill.SoftTargets(temperature=8, weight=0.9),), teacher="dense",
                       hard_weight=0.5),
        recipe.Distill(epochs=1, terms=(distill.SoftTargets(temperature=2, weight=0.3),
                                        distill.Hint("stages.0.pool1", "pool1"))),
        recipe.Separate(config={"conv*": design.Separable(multiplier=2)}, objective=None, samples=0),
        recipe.Cluster(config=quantize.KMeans(bits=3, init="density")),
        recipe.Cluster(config={"fc1": quantize.Uniform(bits=5)}, name="grid"),
        recipe.Binarize(config=quantize.XnorNet(first="binary")),
        recipe.Apply(function="tests.recipe.worker:halve"),
        recipe.Calibrate(macs=1e5),
        recipe.Pack(),
        recipe.Pack(batch=3, objective="size", formats=("sparse", "codebook"), name="small"),
    ]  # fmt: skip
    assert list(read.recipe.phases) == expected
    assert {phase.kind for phase in expected} == set(KINDS)
    made = read.recipe
    assert (made.seed, made.batches, made.threads, made.data) == (3, (2, 7), 2, "mnist")
    assert made.model == {"function": "slimtorch.models:LeNet5", "hidden": [4, 5, 6]}
    assert read.lines[:5] == (6, 8, 9, 10, 14)
    assert [phase.to_dict() for phase in made.phases] == [phase.to_dict() for phase in expected]


def test_defaults() -> None:
    made = parse("phases: [train: {epochs: 1}]").recipe
    assert made == recipe.Recipe([recipe.Train(epochs=1)])


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "expected a recipe, got an empty file"),
        ("- a", 1, r"expected a mapping \(key: value\), got \['a'\]"),
        ("phases: [train: {epochs: 1}]\n  x: 3", 2, "no valid YAML"),
        ("a: b\0", 1, "no valid YAML"),
        ("seed: 1", 1, "phases: expected a list of phases, got none"),
        ("seed: 1\nphases: 3", 2, "phases: expected a list of at least one"),
        ("seed: 1\nfases: []", 2, "fases: unknown key; closest: 'phases'"),
        ("seed: 1\nseed: 2\nphases: []", 2, "seed: the key is there twice"),
        ("phases:\n  - train: {epochs: 1}\nseed: x", 3, "seed: expected a whole number, got 'x'"),
        ("phases:\n  - train: {epochs: 1}\nmodel: 3", 3, "model: expected package.module:function, got 3"),
        ("phases:\n  - train: {epochs: 1}\ndata: [3]", 3, "data: expected a name"),
        ("phases:\n  - train: {epochs: 1}\nmeasure:\n  batches: 3", 4, "measure.batches: expected a list, got 3"),
        ("phases:\n  - train: {epochs: 1}\nmeasure: {batches: [0]}", 3, "batches: expected at least 1"),
        ("phases:\n  - train: {epochs: 1}\n  - prun: {}", 3, r"phases\[1\].prun: unknown key; closest: 'prune'"),
        ("phases:\n  - trian", 2, r"phases\[0\]: unknown phase 'trian'; closest: 'train'"),
        ("phases:\n  - train: {epochs: 1}\n    pack: {}", 2, r"phases\[0\]: expected one kind of phase, got 2"),
        ("phases:\n  - train: 3", 2, r"phases\[0\].train: expected a mapping .*got 3"),
        ("phases:\n  - train:\n      rate: 1", 3, r"phases\[0\].train: expected the key 'epochs'"),
        ("phases:\n  - train:\n      epochs: 1\n      rat: 1", 4, r"phases\[0\].train.rat: unknown key; .*'rate'"),
        ("phases:\n  - train:\n      epochs: 1\n      rate: -1", 4, r"train.rate: expected a finite number above 0"),
        ("phases:\n  - train:\n      epochs: 1\n      rate: 1_e", 4, r"train.rate: expected a number"),
        ("phases:\n  - prune:\n      sparsity: 1.5", 3, r"prune.sparsity: expected a number in \[0, 1\), got 1.5"),
        ("phases:\n  - prune:\n      method: magnitud", 3, r"prune.method: expected one of .*closest: 'magnitude'"),
        ("phases:\n  - prune:\n      layers: {}", 3, "prune.layers: expected at least one glob"),
        ("phases:\n  - prune:\n      sparsity: 0.1\n      layers: {a: {}}", 3, "prune.sparsity: expected no other key"),
        ("phases:\n  - prune:\n      layers:\n        a: {sparsity: 2}", 4, r"prune.layers.a.sparsity: expected"),
        ("phases:\n  - prune: {sparsity: 0.5, loss_fn: 'torch:nothing'}", 2, "loss_fn: .*has no 'nothing'"),
        ("phases:\n  - cluster:\n      bits: 9", 3, "cluster.bits: expected"),
        ("phases:\n  - calibrate: {}", 2, r"calibrate: expected exactly one of accuracy, within and macs, got 0"),
        ("phases:\n  - pack\n  - distill:\n      epochs: 1\n      temperature: 0", 5, "distill.temperature: expected"),
        ("phases:\n  - pack\n  - distill:\n      epochs: 1\n      terms: 3", 5, "terms: expected a list of terms"),
        ("phases:\n  - pack\n  - distill:\n      epochs: 1\n      terms:\n        - hnt: {}", 6, "closest: 'hint'"),
        ("phases:\n  - pack\n  - distill:\n      weight: 1\n      epochs: 1\n      terms: []", 4, "beside 'terms'"),
        ("phases:\n  - pack\n  - distill:\n      epochs: 1\n      teacher: 1-pak", 3, "closest: '1-pack'"),
        ("phases:\n  - train: {epochs: 1}\n  - distill: {epochs: 1}", 3, "no phase that makes the network smaller"),
        ("phases:\n  - early_exit: {exits: 3}", 2, "early_exit.exits: expected a mapping"),
        ("phases: &a\n  - train: *a", 1, "refers to itself"),
        ("phases:\n  - train: {epochs: 2020-99-99}", 2, "train.epochs: no plain value"),
    ],
)
def test_mistakes(text: str, line: int, message: str) -> None:
    with pytest.raises(recipe.RecipeError, match=message) as caught:
        parse(text, "my.yaml")
    assert caught.value.line == line, str(caught.value)
    assert str(caught.value).startswith(f"my.yaml, line {line}: ")


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(recipe.RecipeError, match="expected a text in UTF-8"):
        recipe.Recipe.from_yaml(file)
    with pytest.raises(FileNotFoundError):
        recipe.Recipe.from_yaml(tmp_path / "b.yaml")


EXAMPLES = sorted((ROOT / "docs/recipes").glob("*.yaml"))


def shortened(phase: recipe.Phase) -> recipe.Phase:
    if isinstance(phase, recipe.Train):
        return replace(phase, epochs=0.3)
    return replace(phase, time_budget=0.05) if isinstance(phase, recipe.Pack) else phase


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_examples_run(file: Path) -> None:
    made = recipe.Recipe.from_yaml(file)
    short = replace(made, phases=[shortened(phase) for phase in made.phases], batches=(2,))
    result = short.run(data=digits(200, 100, 100), samples=1)
    rows = result.report.phases
    assert [row.kind for row in rows[1:]] == [phase.kind for phase in made.phases]
    assert rows[-1].bytes_file is not None
    assert rows[-1].bytes_file < 0.05 * (rows[1].bytes_file or 0)
    assert all(set(row.latency) == {2} for row in rows)


def test_the_readme_has_the_example() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    shown, whole = parse(block).recipe, recipe.Recipe.from_yaml(ROOT / "docs/recipes/digits.yaml")
    assert shown.model == whole.model
    assert shown.phases[:-1] == whole.phases[:-1]
    assert shown.phases[-1].kind == whole.phases[-1].kind == "pack"


def test_an_error_of_a_phase_is_told_with_its_line() -> None:
    read = parse("phases:\n  - pack\n  - train: {epochs: 1}", "my.yaml")
    told: Any = read.error(recipe.PhaseError(2, "no"))
    assert (told.line, told.key) == (3, "phases[1]")
