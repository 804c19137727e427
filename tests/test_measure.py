# SPDX-License-Identifier: Apache-2.0
"""slim.measure: what it counts, and that it leaves everything as it was."""

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn

from slimtorch import nn as slim_nn
from slimtorch import prune
from slimtorch.measure import (
    Latency,
    count_macs,
    count_parameters,
    device_of,
    disk_bytes,
    interleave,
    measure,
    memory_bytes,
    threads_of_torch,
)
from slimtorch.models import LeNet5, LeNet300


def test_a_dense_network():
    report = measure(LeNet5(), torch.randn(2, 1, 28, 28), repeats=3, threads=1)
    assert report.parameters == report.nonzero == 431_080
    assert report.macs == report.macs_dense == 2 * (24 * 24 * 500 + 8 * 8 * 25_000 + 400_000 + 5_000)
    assert report.bytes_memory == 4 * 431_080
    assert report.bytes_prepacked == 0
    assert [layer.name for layer in report.layers] == ["conv1", "conv2", "fc1", "fc2"]
    assert report.latency.samples == 3
    assert 0 < report.latency.p10 <= report.latency.median <= report.latency.p90
    assert report.threads == 1
    assert "conv2" in str(report)
    assert max(map(len, str(report).splitlines())) <= 100
    assert json.loads(json.dumps(report.to_dict()))["latency"]["median"] == report.latency.median


@pytest.mark.parametrize(
    "inputs", [torch.randn(4, 8), (torch.randn(4, 8),), [torch.randn(4, 8)], {"input": torch.randn(4, 8)}]
)
def test_a_single_layer_and_every_kind_of_inputs(inputs):
    report = measure(nn.Linear(8, 3), inputs, repeats=1)
    assert report.macs == 4 * 8 * 3
    assert report.layers[0].name == ""


def test_everything_is_as_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4))
    model[1].eval()
    model(torch.randn(3, 4)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradient, flags = model[0].weight.grad.clone(), [module.training for module in model.modules()]
    hooks, threads = len(model[0]._forward_hooks), torch.get_num_threads()
    measure(model, torch.randn(3, 4), repeats=2, threads=1)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(model[0].weight.grad, gradient)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(model[0]._forward_hooks) == hooks
    assert torch.get_num_threads() == threads


def test_everything_is_as_before_after_a_failure():
    model = LeNet300().train()
    with pytest.raises(ValueError, match=r"example_inputs: the model cannot run on float32\[2, 5\]"):
        measure(model, torch.randn(2, 5), threads=1)
    assert model.training
    assert not model.fc1._forward_hooks


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": "x"}, TypeError, "model: expected a torch.nn.Module, got str"),
        ({"repeats": 0}, ValueError, "repeats: expected at least 1, got 0"),
        ({"repeats": 1.5}, TypeError, "repeats: expected an int, got 1.5"),
        ({"threads": 0}, ValueError, "threads: expected at least 1, got 0"),
        ({"threads": True}, TypeError, "threads: expected an int or None, got True"),
        ({"example_inputs": None}, ValueError, "cannot run on NoneType"),
    ],
)
def test_bad_arguments(change, error, text):
    arguments = {"model": nn.Linear(2, 2), "example_inputs": torch.randn(1, 2), **change}
    with pytest.raises(error, match=text):
        measure(**arguments)


def test_masked_weights_are_stored_but_zero_and_still_multiplied():
    layer = nn.Linear(10, 10)
    prune.prune_(layer, prune.Magnitude(sparsity=0.5))
    assert count_parameters(layer) == (110, 60)
    report = measure(layer, torch.randn(1, 10), repeats=1)
    assert (report.parameters, report.nonzero, report.macs) == (110, 60, 100)
    assert report.layers[0].kind == "Linear"


@pytest.mark.parametrize("kind", ["sparse", "blocks"])
def test_packed_layers_count_what_they_keep(kind):
    weight = torch.zeros(32, 48)
    weight[:16, :16] = 1.0
    dense = nn.Linear(48, 32)
    dense.weight.data = weight
    packed = slim_nn.SparseLinear.from_dense(dense) if kind == "sparse" else slim_nn.BlockSparseLinear.from_dense(dense)
    report = measure(nn.Sequential(packed), torch.randn(3, 48), repeats=1)
    assert report.parameters == 256 + 32
    assert report.macs == 3 * 256
    assert report.macs_dense == 3 * 48 * 32
    assert report.bytes_memory == memory_bytes(packed) < 4 * 48 * 32
    assert report.bytes_memory >= packed.format.nbytes + 4 * 32


def test_packed_convolution_counts_positions():
    dense = nn.Conv2d(4, 8, 3, padding=1, groups=2)
    with torch.no_grad():
        dense.weight[:, :, 0] = 0
    packed = slim_nn.SparseConv2d.from_dense(dense)
    assert count_macs(packed, torch.randn(2, 4, 5, 5)) == (2 * 25 * 8 * 2 * 9, 2 * 25 * 8 * 2 * 6)


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert count_parameters(model) == (16, 16)
    assert memory_bytes(model) == 64
    assert count_macs(model, torch.randn(1, 4)) == (32, 32)


def test_a_layer_called_twice_counts_twice_and_an_unused_one_not():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(self.used(x))

    report = measure(Twice(), torch.randn(1, 4), repeats=1)
    assert [(layer.name, layer.macs) for layer in report.layers] == [("used", 32), ("unused", 0)]


def test_a_model_without_parameters():
    report = measure(nn.ReLU(), torch.randn(2), repeats=1)
    assert (report.parameters, report.macs, report.bytes_memory, report.layers) == (0, 0, 0, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_disk_bytes_are_those_of_safetensors(dtype):
    state = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 11)).to(dtype).state_dict()
    state["mask"] = torch.ones(13, dtype=torch.bool)
    state["columns"] = torch.ones(3, dtype=torch.int32)
    assert disk_bytes(state) == len(safetensors.torch.save(state))


def test_disk_bytes_of_other_things():
    assert disk_bytes({"a": torch.ones(2), "extra": {"version": 1}}) > disk_bytes({"a": torch.ones(2)})


def test_interleave_takes_turns():
    order = []
    rounds = []
    times = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        samples=3,
        min_sample_seconds=0.0,
        on_round=rounds.append,
    )
    assert "".join(order).endswith("ab" * 3)
    assert rounds == [1, 2, 3]
    assert times["a"].calls == 1
    assert isinstance(times["b"], Latency)
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        interleave({}, samples=0)


def test_short_calls_are_repeated():
    assert interleave({"nothing": lambda: None}, samples=2, min_sample_seconds=1e-3)["nothing"].calls > 100


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    seen = []

    def work():
        with threads_of_torch(1):
            seen.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert seen == [1]
    assert torch.get_num_threads() == before


# --- on a GPU, as far as that shows without one -----------------------------------------------------------------------


class FakeCuda:
    """CUDA's clock: a call takes a millisecond on its device, and nothing anywhere else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.now, self.log = 0, 0.0, []
        fake = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at = None

            def record(self) -> None:
                fake.log.append(("record", fake.current))
                self.at = fake.now

            def synchronize(self) -> None:
                fake.log.append(("wait", fake.current))

            def elapsed_time(self, end) -> float:
                return end.at - self.at

        class Device:
            def __init__(self, device: torch.device) -> None:
                self.index = device.index

            def __enter__(self) -> None:
                self.before, fake.current = fake.current, self.index

            def __exit__(self, *error) -> None:
                fake.current = self.before

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", Device)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append(("synchronize", self.current)))

    def call(self) -> None:
        self.now += 1.0  # milliseconds


def test_a_gpu_is_timed_by_its_own_events(monkeypatch):
    fake = FakeCuda(monkeypatch)
    found = interleave({"a": fake.call}, samples=4, min_sample_seconds=5e-3, device=torch.device("cuda", 1))["a"]
    assert found == Latency(1e-3, 1e-3, 1e-3, 4, 5)
    assert {device for _, device in fake.log} == {1}  # that of the callables, whatever is current
    assert fake.current == 0
    assert [what for what, _ in fake.log[-4:]] == ["synchronize", "record", "record", "wait"]


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_the_cpu_is_timed_without_cuda(monkeypatch, device):
    fake = FakeCuda(monkeypatch)
    interleave({"a": lambda: None}, samples=1, min_sample_seconds=1e-5, device=device)
    assert fake.log == []


def test_where_a_model_runs():
    model = nn.Linear(2, 2, device="meta")
    cpu = torch.zeros(1, 2)
    assert device_of(model, (cpu,), {}).type == "meta"  # an input that stays on the CPU is no sign
    assert device_of(nn.Linear(2, 2), (cpu,), {}).type == "cpu"
    assert device_of(nn.Linear(2, 2), (), {"x": cpu.to("meta")}).type == "meta"
    assert device_of(nn.ReLU(), (), {}).type == "cpu"


@pytest.mark.cuda
def test_measure_on_a_gpu():
    report = measure(LeNet5().cuda(), torch.randn(2, 1, 28, 28, device="cuda"), repeats=3)
    assert report.device == "cuda:0"
    assert 0 < report.latency.p10 <= report.latency.median < 1
