# SPDX-License-Identifier: Apache-2.0
"""The comparison as a whole, at a size that takes seconds."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from slimtorch.experiments import compare, html, plots, training
from slimtorch.experiments.training import PRUNED, Method
from slimtorch.measure import Latency


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    return compare.run(tiny, out, jobs=1), out


def _files(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "trials").iterdir()}


def test_every_variant_has_every_figure(finished, tiny):
    result, _ = finished
    variants = result.networks["lenet300"]
    assert [variant.method for variant in variants] == [Method.DENSE, *(m for m in PRUNED for _ in tiny.sparsities)]
    for variant in variants:
        assert len(variant.test) == len(variant.validation) == tiny.seeds
        assert set(variant.latency) == set(tiny.batches)
        assert variant.bytes_disk > 0
        assert 0 < variant.macs <= 266_200
        for batch in tiny.batches:
            assert "torch" in variant.latency[batch]
            assert ("packed" in variant.latency[batch]) == (variant.method is not Method.DENSE)
            assert variant.seconds(batch) > 0


def test_json(finished, tiny):
    result, _ = finished
    back = json.loads(json.dumps(result.to_dict()))
    assert back["schema"] == "slimtorch.compare/1"
    assert set(back["machine"]) >= {"cpu", "threads", "isa", "torch", "slimtorch", "dtype"}
    assert back["settings"]["sparsities"] == list(tiny.sparsities)
    for variant in back["networks"]["lenet300"]["variants"]:
        assert set(variant) == {
            "method", "sparsity", "test_accuracy", "validation_accuracy", "parameters", "bytes_memory", "bytes_disk",
            "macs", "latency_seconds", "formats",
        }  # fmt: skip
        assert set(variant["test_accuracy"]) == {"mean", "std", "values"}
        for runners in variant["latency_seconds"].values():
            for latency in runners.values():
                assert set(latency) == {"median", "p10", "p90", "samples", "calls"}


def test_tables_fit_a_terminal(finished):
    for table in finished[0].tables():
        assert max(map(len, str(table).splitlines())) <= 100


def test_plots_and_report(finished, tmp_path):
    result, _ = finished
    figures = plots.comparison_figures(result)
    assert [name for name, _, _ in figures] == ["lenet300-accuracy-latency", "lenet300-speedup-sparsity"]
    drawings = []
    for name, caption, figure in figures:
        plots.save_png(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        drawings.append((caption, plots.svg(figure)))
    page = html.page("t", "lead", result.tables(), drawings, [("Where it does not win", result.losses())])
    assert page.count("data:image/svg+xml;base64,") == 2
    for needle in ('src="http', "href=", "<script", "@import", "url("):
        assert needle not in page


def test_a_finished_run_trains_and_times_nothing_again(finished, tiny):
    result, out = finished
    before = _files(out)
    stages = []
    again = compare.run(tiny, out, jobs=1, progress=lambda *step: stages.append(step))
    assert _files(out) == before
    assert again.networks == result.networks
    assert stages[0] == ("training", 11, 11)


def test_a_changed_configuration_is_trained_anew(finished, tiny, monkeypatch):
    _, out = finished
    started = []
    monkeypatch.setattr(training, "train_unit", lambda unit, *_: started.append(unit) or _stop())
    changed = replace(tiny, recipe=replace(tiny.recipe, learning_rate=1e-3))
    with pytest.raises(KeyboardInterrupt):
        compare.run(changed, out, jobs=1)
    assert started[0].method is Method.DENSE


def _stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_run_goes_on(finished, tiny, tmp_path, after):
    def interrupt(stage, done, total):
        if stage == "training" and done == after:
            _stop()

    with pytest.raises(KeyboardInterrupt):
        compare.run(tiny, tmp_path, jobs=1, progress=interrupt)
    kept = _files(tmp_path)
    assert len(kept) == after
    result = compare.run(tiny, tmp_path, jobs=1)
    assert _files(tmp_path).items() >= kept.items()
    accuracies = [[variant.test for variant in run.networks["lenet300"]] for run in (result, finished[0])]
    assert accuracies[0] == accuracies[1]


def test_a_damaged_unit_is_trained_again(finished, tiny, tmp_path):
    compare.run(tiny, tmp_path, jobs=1)
    victim = next((tmp_path / "trials").glob("lenet300-blocks-0.900-*"))
    victim.write_bytes(victim.read_bytes()[:100])
    stages = []
    result = compare.run(tiny, tmp_path, jobs=1, progress=lambda *step: stages.append(step))
    assert stages[0] == ("training", 10, 11)
    assert [v.test for v in result.networks["lenet300"]] == [v.test for v in finished[0].networks["lenet300"]]


def test_a_killed_run_leaves_whole_units_and_no_workers(tiny, finished, tmp_path):
    code = (
        "import sys, pathlib\n"
        "from slimtorch.experiments import compare\n"
        "from slimtorch.experiments.training import Recipe\n"
        "settings = compare.Settings(networks=('lenet300',), sparsities=(0.5, 0.9), seeds=1, batches=(1, 4),\n"
        "    samples=2, pack_seconds=0.02, recipe=Recipe(train=100, validation=50, test=100, epochs=0.25))\n"
        "if __name__ == '__main__':\n"
        "    compare.run(settings, pathlib.Path(sys.argv[1]), jobs=2)\n"
    )
    script = tmp_path / "job.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "out")], start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("trials/lenet300-*")):
        assert process.poll() is None, "the run ended before its first unit"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while _members(process.pid) and time.monotonic() < deadline:  # they notice as soon as they have started
        time.sleep(0.1)
    assert not _members(process.pid)
    result = compare.run(tiny, tmp_path / "out", jobs=1)
    # Several processes or one, interrupted or not: the same networks.
    assert [v.test for v in result.networks["lenet300"]] == [v.test for v in finished[0].networks["lenet300"]]


def _members(group: int) -> list[int]:
    """Processes of a group that still run; dead ones that nobody has collected do not count."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = entry.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(process_group) == group and state != "Z":
            members.append(int(entry.parent.name))
    return members


def _times(**seconds):
    return {name: Latency(value, value, value, 1, 1) for name, value in seconds.items()}


def _variant(method, sparsity, validation, latency):
    return compare.Variant(method, sparsity, [0.9], [validation], 1, 1, 1, 1, {1: latency}, {1: {}})


def test_what_it_concludes():
    dense = _variant(Method.DENSE, 0.0, 0.95, _times(torch=4.0, oneDNN=2.0))
    variants = [
        dense,
        _variant(Method.ONE_SHOT, 0.5, 0.95, _times(torch=4.0, oneDNN=2.0, packed=2.5)),
        _variant(Method.ONE_SHOT, 0.8, 0.945, _times(torch=4.0, oneDNN=2.0, packed=1.0)),
        _variant(Method.ONE_SHOT, 0.9, 0.92, _times(torch=4.0, oneDNN=2.0, packed=0.5)),
        _variant(Method.NEURONS, 0.5, 0.90, _times(torch=2.0, oneDNN=1.6, packed=2.1)),
    ]
    settings = compare.Settings(networks=("lenet300",), sparsities=(0.5, 0.8, 0.9), seeds=1, batches=(1,))
    facts = {"cpu": "c", "threads": 1, "dtype": "float32", "isa": "avx2", "torch": "2", "slimtorch": "0"}
    result = compare.Comparison(settings, facts, {"lenet300": variants})
    assert result.as_accurate("lenet300", Method.ONE_SHOT).sparsity == 0.8
    assert result.as_accurate("lenet300", Method.NEURONS) is None
    assert result.wins_from("lenet300", Method.ONE_SHOT, 1) == 0.8
    assert result.speedup("lenet300", variants[3], 1, "torch") == 8.0
    assert result.speedup("lenet300", variants[3], 1, "best") == 4.0
    assert result.speedup("lenet300", variants[4], 1, "best") == 1.25  # a smaller dense network needs no packing
    assert result.losses() == [
        "LeNet-300-100, batch 1, weights one-shot: slower than the best dense code at 50% (0.80x)"
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"networks": ("lenet7",)}, "networks: expected some of lenet300, lenet5, got 'lenet7'"),
        ({"sparsities": (1.0,)}, "sparsities: expected shares between 0 and 1, got 1.0"),
        ({"seeds": 0}, "seeds: expected at least 1, got 0"),
    ],
)
def test_bad_settings(change, text):
    with pytest.raises(ValueError, match=text):
        compare.Settings(**change)
