# SPDX-License-Identifier: Apache-2.0
"""The command line: help, files written, one clear line for every mistake."""

import json
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import slimtorch as slim
from slimtorch.cli import app
from slimtorch.experiments import compare, layers
from slimtorch.experiments.training import Recipe
from slimtorch.models import LayerShape


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def tiny(monkeypatch):
    recipe = Recipe(train=50, validation=20, test=50, epochs=0.2)
    settings = compare.Settings(sparsities=(0.9,), seeds=1, batches=(1, 2), samples=1, pack_seconds=0.02, recipe=recipe)
    monkeypatch.setattr(compare, "quick", lambda: settings)


def test_help_names_every_command_and_option():
    for arguments in ([], ["--help"]):
        text = run(*arguments).output
        assert "info" in text
        assert "compare" in text
    text = run("compare", "--help").output
    for option in ("--network", "--out", "--json", "--quick", "--seeds", "--jobs", "--weights", "--batch", "--threads"):
        assert option in text
    assert "vgg16" in text


def test_info():
    result = run("info", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.output)
    assert facts["torch"] == torch.__version__
    assert facts["isa"] in ("scalar", "avx2", "avx512")
    assert set(facts["cpu_features"].values()) <= {True, False}
    table = run("info").output
    for value in (facts["slimtorch"], facts["torch"], facts["isa"]):
        assert value in table


def test_compare_writes_report_json_and_plots(tiny, tmp_path):
    out, extra = tmp_path / "out", tmp_path / "results.json"
    result = run("compare", "--quick", "--network", "lenet300", "--out", out, "--jobs", 1, "--json", extra)
    assert result.exit_code == 0, result.output
    assert "LeNet-300-100" in result.output
    assert "As accurate as dense" in result.output
    assert json.loads(extra.read_text())["schema"] == "slimtorch.compare/1"
    assert json.loads((out / "results.json").read_text()) == json.loads(extra.read_text())
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert len(list(out.glob("*.png"))) == 2
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_compare_of_layers(monkeypatch, tmp_path):
    monkeypatch.setitem(layers.SHAPES, "vgg16", (LayerShape("conv", 8, 4, 3, padding=1, height=6),))
    result = run("compare", "--network", "vgg16", "--quick", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "random masks" in result.output
    assert json.loads((tmp_path / "results.json").read_text())["schema"] == "slimtorch.layers/1"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--network", "lenet7"], "--network: expected digits"),
        (["--network", "vgg16", "--seeds", "2"], "--seeds: does not apply to --network vgg16"),
        (["--batch", "4"], "--batch: does not apply to --network digits"),
        (["--network", "vgg16", "--weights", "x"], "--weights: does not apply to --network vgg16"),
        (["--network", "alexnet", "--weights", "/nowhere/alexnet_l1.npz"], "no such file: /nowhere/"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, text, tmp_path):
    result = run("compare", "--out", tmp_path, *arguments)
    assert result.exit_code == 2
    lines = [line for line in result.output.splitlines() if line.strip() and "━" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("slimtorch: ")
    assert text in lines[0]


def test_a_folder_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("compare", "--quick", "--network", "lenet300", "--jobs", 1, "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "slimtorch: Not a directory" in result.output or "slimtorch: File exists" in result.output


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--threads", "x"], ["--no-such-option"]])
def test_typers_own_errors(arguments):
    assert run("compare", *arguments).exit_code == 2


def test_an_interrupt_says_how_to_go_on(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run", interrupted)
    result = run("compare", "--out", tmp_path)
    assert result.exit_code == 130
    assert "the same command goes on" in result.output


RECIPE = """\
model: mine:network
data: mine:data
measure: {batches: [1, 3], threads: 1}
phases:
  - train: {epochs: 1, batch_size: 20}
  - prune: {sparsity: 0.5}
  - pack: {time_budget: 0.05, batch: 4}
"""
MINE = """\
from torch import nn
from slimtorch.data import digits
def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
def data():
    return digits(50, 20, 50)
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path / "small.yaml"


def test_compress_writes_report_json_and_model(recipe, tmp_path):
    result = run("compress", "--recipe", recipe, "--json", tmp_path / "all.json", "--every", 0)
    assert result.exit_code == 0, result.output
    for text in ("1-train", "2-prune", "3-pack", "After each phase", "Measured latency", "report.html"):
        assert text in result.output
    out = tmp_path / "slimtorch-small"
    found = json.loads((out / "results.json").read_text())
    assert json.loads((tmp_path / "all.json").read_text()) == found
    assert [phase["kind"] for phase in found["phases"]] == ["start", "train", "prune", "pack"]
    page = (out / "report.html").read_text()
    assert "2-prune" in page
    assert page.count("<figure>") == 1
    assert (out / "phases.png").read_bytes().startswith(b"\x89PNG")
    fresh = slim.load(out / "model.slim", nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    weight = fresh[1].weight
    assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    again = run("compress", "--recipe", recipe)
    assert again.exit_code == 0, again.output
    assert json.loads((out / "results.json").read_text()) == found  # nothing was done, or timed, again


def test_compress_without_matplotlib_says_so_and_writes_the_rest(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("compress", "--recipe", recipe)
    assert result.exit_code == 0, result.output
    assert "plots need the package matplotlib" in result.output
    out = recipe.parent / "slimtorch-small"
    assert "<figure>" not in (out / "report.html").read_text()
    assert (out / "model.slim").exists()
    assert not (out / "phases.png").exists()


def test_compress_that_is_interrupted_says_how_to_go_on(recipe, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("slimtorch.recipe.phases.prune_", interrupt)
    result = run("compress", "--recipe", recipe)
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.output
    monkeypatch.undo()
    monkeypatch.chdir(recipe.parent)
    assert run("compress", "--recipe", recipe).exit_code == 0


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("epochs: 1,", "epochs: 0,", "line 5: phases[0].train.epochs: expected a finite number above 0, got 0"),
        ("sparsity", "sparsty", "line 6: phases[1].prune.sparsty: unknown key; closest: 'sparsity'"),
        ("mine:network", "mine:netwrk", "model: the module 'mine' has no 'netwrk'; closest: 'network'"),
        ("mine:network", "nowhere:network", "model: there is no module 'nowhere'"),
        ("mine:data", "mine:dta", "data: the module 'mine' has no 'dta'; closest: 'data'"),
        ("{sparsity: 0.5}", "{layers: {fc: {sparsity: 0.5}}}", "line 6: phases[1]: phase 2-prune: config: the glob"),
    ],
)
def test_compress_tells_mistakes_in_one_line(recipe, old, new, text):
    recipe.write_text(RECIPE.replace(old, new))
    result = run("compress", "--recipe", recipe)
    assert result.exit_code == 2
    error = [line for line in result.output.splitlines() if line.startswith("slimtorch: ")]
    assert len(error) == 1
    assert text in error[0]


def test_compress_goes_on_with_the_same_recipe_only(recipe):
    assert run("compress", "--recipe", recipe).exit_code == 0
    recipe.write_text(RECIPE.replace("sparsity: 0.5", "sparsity: 0.6"))
    result = run("compress", "--recipe", recipe)
    assert result.exit_code == 2
    assert "holds the run of something else (phase 2" in result.output
    assert run("compress", "--recipe", "nowhere.yaml").exit_code == 2
