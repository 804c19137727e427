# SPDX-License-Identifier: Apache-2.0
"""pack_: what it chooses, what it leaves alone, what it reports.

Choices are tested with times that are given, not measured; the last tests measure.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import slimtorch as slim
from slimtorch import packing
from slimtorch.measure import Latency

Times = Mapping[str, float] | Callable[[str], float]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """`timed({"dense": 1e-3, "sparse": 5e-4}, model={"packed": …})`: from now on these are the times.

    Formats that are not named take 1 s. Returns the list of what was raced, which grows.
    """

    def install(layer: Mapping[str, float], model: Mapping[str, float] | None = None) -> list[list[str]]:
        raced: list[list[str]] = []
        whole = {"dense": 1.0, "packed": 0.5, **(model or {})}

        def interleave(calls: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, Latency]:
            raced.append(list(calls))
            for call in calls.values():
                call()
            times = whole if "packed" in calls else layer
            return {name: Latency(times.get(name, 1.0), 0.0, 0.0, 3, 1) for name in calls}

        monkeypatch.setattr(packing, "interleave", interleave)
        return raced

    return install


def _pruned(module: Any, sparsity: float = 0.9, granularity: Any = "weight") -> Any:
    slim.prune_(module, slim.prune.Magnitude(sparsity=sparsity, granularity=granularity))
    slim.prune.bake_(module)
    return module


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return _pruned(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 64), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(64, 10),
        )
    )  # fmt: skip


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
FAST = {"dense": 1.0, "sparse": 0.5}


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything that must stay: tensors bit for bit, identities of parameters, classes, training flags, hooks."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "modules": [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
    }


def _assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["tensors"].keys() == after["tensors"].keys()
    assert all(torch.equal(before["tensors"][name], after["tensors"][name]) for name in before["tensors"])
    for key in ("parameters", "modules", "hooks"):
        assert before[key] == after[key]


# --- choices ---


def test_the_fastest_format_is_kept(timed: Any) -> None:
    timed({"dense": 1.0, "sparse": 0.5, "4x16": 0.25, "8x8": 0.4})
    model = _pruned(nn.Sequential(nn.Linear(64, 64)), 0.75, (4, 16))
    x, dense = torch.randn(8, 64), copy.deepcopy(model)
    report = slim.pack_(model, x)
    assert isinstance(model[0], slim.nn.BlockSparseLinear)
    assert model[0].block_size == (4, 16)
    torch.testing.assert_close(model(x), dense(x))
    (layer,) = report.layers
    assert (layer.name, layer.kind, layer.shape, layer.chosen) == ("0", "Linear", (64, 64), "4x16")
    assert layer.speedup == pytest.approx(4)
    assert layer.sparsity == pytest.approx(0.75)
    assert layer.inputs == [(8, 64)]
    assert layer.trial("sparse").latency.median == 0.5
    assert layer.trial("4x16").density == pytest.approx(0.25)
    assert report.speedup == pytest.approx(2)
    assert report.bytes_after < report.bytes_before


@pytest.mark.parametrize(("sparse", "chosen"), [(0.94, "sparse"), (0.96, "dense"), (1.5, "dense")])
def test_dense_stays_where_nothing_wins_by_min_gain(timed: Any, sparse: float, chosen: str) -> None:
    timed({"dense": 1.0, "sparse": sparse})
    model = _network()
    before = _state(model)
    report = slim.pack_(model, X)
    assert {layer.chosen for layer in report.layers} == {chosen}
    if chosen == "dense":
        _assert_same(before, _state(model))
        assert "no layer gains" in str(report)
        assert "1.05x needed" in " ".join(x.reason for x in report.layers)
        assert report.speedup == 1
        assert report.dense_latency is None
        assert report.bytes_before == report.bytes_after


def test_min_gain_is_an_option(timed: Any) -> None:
    timed({"dense": 1.0, "sparse": 0.7})
    assert not slim.pack_(_network(), X, min_gain=0.5).packed
    assert len(slim.pack_(_network(), X, min_gain=0.4).packed) == 3


def test_size_takes_the_fewest_bytes_that_are_not_slower(timed: Any) -> None:
    model = _pruned(nn.Sequential(nn.Linear(64, 64)), 0.75, (4, 16))
    x = torch.randn(8, 64)
    # blocks need fewer index bytes than single weights
    timed({"dense": 1.0, "sparse": 0.2, "4x16": 1.04, "8x8": 0.3})
    report = slim.pack_(copy.deepcopy(model), x, objective="size")
    assert report.layers[0].chosen == "4x16"
    assert report.layers[0].speedup == pytest.approx(1 / 1.04)
    timed({"dense": 1.0, "sparse": 0.2, "4x16": 1.06, "8x8": 2.0})
    small = slim.pack_(copy.deepcopy(model), x, objective="size").layers[0]
    assert small.chosen in ("1x16", "1x4", "sparse")
    assert small.trial(small.chosen).latency.median <= 1.05
    timed({"dense": 1.0})
    nothing = copy.deepcopy(model)
    packing_report = slim.pack_(nothing, x, objective="size", formats="sparse")
    assert packing_report.layers[0].chosen == "sparse"  # as fast as dense is fast enough
    timed({"dense": 0.1, "sparse": 1.0})
    assert slim.pack_(nothing, x, objective="size", formats="sparse").layers == []  # packed already


def test_size_may_cost_the_time_that_is_allowed(timed: Any) -> None:
    model, x = _pruned(nn.Sequential(nn.Linear(64, 64)), 0.75, (4, 16)), torch.randn(8, 64)
    timed({"dense": 1.0, "sparse": 0.9, "4x16": 2.9})
    for min_gain, chosen in ((2.0, "4x16"), (1.8, "sparse")):
        report = slim.pack_(
            copy.deepcopy(model), x, objective="size", min_gain=min_gain, formats=["sparse", "block_sparse"],
            block_sizes=[(4, 16)],
        )  # fmt: skip
        assert report.layers[0].chosen == chosen


def test_block_sizes_follow_the_zeros(timed: Any) -> None:
    timed(FAST)
    x = torch.randn(8, 128)
    scattered = slim.pack_(_pruned(nn.Linear(128, 128), 0.9), x).layers[0]
    assert [trial.label for trial in scattered.trials] == ["dense", "sparse"]
    blocks = slim.pack_(_pruned(nn.Linear(128, 128), 0.75, (32, 32)), x).layers[0]
    assert [trial.label for trial in blocks.trials] == [
        "dense",
        "sparse",
        "1x4",
        "1x16",
        "4x16",
        "8x8",
        "16x16",
        "32x32",
    ]
    dense = slim.pack_(nn.Linear(128, 128), x).layers[0]
    assert dense.trials == []
    assert "too few" in dense.reason
    named = slim.pack_(nn.Linear(128, 128), x, formats="block_sparse", block_sizes=[(2, 2)]).layers[0]
    assert [trial.label for trial in named.trials] == ["dense", "2x2"]


def test_block_density_is_what_the_format_stores() -> None:
    for shape in ((37, 53), (16, 16), (6, 3, 3, 3)):
        weight = _pruned(nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(3, 6, 3), 0.9).weight.detach()
        for size in packing.BLOCK_SIZES:
            stored = slim.formats.BlockSparse.pack(weight, size).density
            assert packing.block_density(weight, size) == pytest.approx(stored)


def test_formats_by_name_list_and_glob(timed: Any) -> None:
    timed(FAST)
    model = _network()
    report = slim.pack_(model, X, formats={"4": ["sparse", "block_sparse"], "7": "dense", "*": None})
    assert [layer.name for layer in report.layers] == ["4", "7"]
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[4], slim.nn.SparseLinear)
    assert type(model[7]) is nn.Linear
    assert "asked to stay dense" in report.layers[1].reason


def test_filter_fn(timed: Any) -> None:
    timed(FAST)
    model = _network()
    report = slim.pack_(model, X, filter_fn=lambda module, name: isinstance(module, nn.Conv2d))
    assert [layer.name for layer in report.layers] == ["0"]
    assert type(model[4]) is nn.Linear


def test_layers_go_back_to_dense_while_the_whole_model_is_slower(timed: Any) -> None:
    raced = timed(FAST, {"dense": 1.0, "packed": 1.02})
    model = _network()
    before = _state(model)
    report = slim.pack_(model, X)
    _assert_same(before, _state(model))
    assert not report.packed
    assert len(report.notes) == 4
    assert all("whole model was slower" in layer.reason for layer in report.layers)
    assert raced.count(["dense", "packed"]) == 3


def test_the_layer_that_gains_least_goes_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([1.2, 0.8])
    gains = iter([0.5, 0.5, 0.9, 0.9, 0.1, 0.1])

    def interleave(calls: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, Latency]:
        ours = next(rounds) if "packed" in calls else next(gains)
        return {name: Latency(1.0 if name == "dense" else ours, 0, 0, 3, 1) for name in calls}

    monkeypatch.setattr(packing, "interleave", interleave)
    model = _network()
    report = slim.pack_(model, X, formats="sparse")
    assert [layer.chosen for layer in report.layers] == ["sparse", "dense", "sparse"]
    assert type(model[4]) is nn.Linear
    assert isinstance(model[7], slim.nn.SparseLinear)
    assert "'4' went back to dense" in str(report).replace("\n", " ")


def test_wrong_results_never_win(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(FAST)
    right = slim.ops.sparse_linear
    monkeypatch.setattr(slim.ops, "sparse_linear", lambda *args, **kw: right(*args, **kw) * 1.001)
    model = _pruned(nn.Sequential(nn.Linear(64, 64)))
    report = slim.pack_(model, torch.randn(8, 64))
    assert type(model[0]) is nn.Linear
    assert "wrong results: sparse" in report.layers[0].reason
    assert report.layers[0].trial("sparse").latency is None
    assert report.layers[0].trial("sparse").error > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_right_results_pass_the_check(timed: Any, dtype: torch.dtype) -> None:
    timed({"dense": 1.0, "sparse": 0.5})
    model = _network().to(dtype)
    x = X.clone().to(dtype)
    x[0, 0, 0, 0] = float("inf")  # dense multiplies it with zeros: NaN, which packed layers do not make
    report = slim.pack_(model, x)
    assert len(report.packed) == 3
    assert all(trial.error <= 1 for layer in report.layers for trial in layer.trials)


# --- what stays ---


def test_identity_hooks_flags_and_attributes_stay(timed: Any) -> None:
    timed(FAST)
    model = _network()
    linear, bias = model[4], model[4].bias
    linear.tag = "mine"
    calls: list[str] = []
    handle = linear.register_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
    model[0].eval()
    linear.bias.requires_grad_(False)
    slim.pack_(model, X)
    assert model[4] is linear
    assert isinstance(linear, slim.nn.SparseLinear)
    assert linear.bias is bias
    assert not bias.requires_grad
    assert linear.tag == "mine"
    assert linear.training
    assert not model[0].training
    calls.clear()
    model(X)
    assert calls == ["SparseLinear"]
    handle.remove()
    model(X)
    assert calls == ["SparseLinear"]


def test_packed_models_copy_save_and_train(timed: Any) -> None:
    timed(FAST)
    model = _network()
    slim.pack_(model, X)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    model.eval(), twin.eval()
    assert torch.equal(twin(X), model(X))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().mean().backward()
    optimizer.step()
    assert not torch.equal(twin(X), model(X))


def test_batch_norm_and_random_state_are_not_touched(timed: Any) -> None:
    timed(FAST)
    model = _network()
    running = model[1].running_mean.clone()
    random = torch.get_rng_state()
    slim.pack_(model, X)
    assert torch.equal(model[1].running_mean, running)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())


def test_masks_are_baked(timed: Any) -> None:
    timed({"dense": 1.0, "sparse": 0.5})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    slim.prune_(model, slim.prune.Magnitude(sparsity=0.9))
    original = model[1].parametrizations.weight.original
    x = torch.randn(4, 32)
    y = model(x)
    slim.pack_(model, x, formats={"0": "sparse", "1": "dense"})
    assert isinstance(model[0], slim.nn.SparseLinear)
    assert model[0].values.numel() == round(0.1 * 32 * 32)
    assert model[0].values.requires_grad
    assert type(model[1]) is nn.Linear
    assert model[1].weight is original
    assert slim.prune.masks(model).keys() == {"2"}  # not considered: not touched
    torch.testing.assert_close(model(x), y)


def test_a_masked_model_is_as_before_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _network()
    slim.prune_(model, slim.prune.Magnitude(sparsity=0.95))
    before = _state(model)

    def interrupt(*_: Any, **__: Any) -> dict[str, Latency]:
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "interleave", interrupt)
    with pytest.raises(KeyboardInterrupt):
        slim.pack_(model, X)
    _assert_same(before, _state(model))


def test_an_interrupt_in_the_last_race_restores_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _network()
    slim.prune_(model, slim.prune.Magnitude(sparsity=0.95))
    before = _state(model)

    def interleave(calls: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, Latency]:
        for call in calls.values():
            call()
        if "packed" in calls:
            raise KeyboardInterrupt
        return {name: Latency(1.0 if name == "dense" else 0.5, 0, 0, 3, 1) for name in calls}

    monkeypatch.setattr(packing, "interleave", interleave)
    with pytest.raises(KeyboardInterrupt):
        slim.pack_(model, X)
    _assert_same(before, _state(model))


# --- shapes of models ---


@pytest.mark.parametrize("module", [nn.Linear(32, 16), nn.Conv2d(3, 8, 3)], ids=["linear", "conv2d"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_single_layer_is_a_model(timed: Any, module: nn.Module, masked: bool) -> None:
    timed(FAST)
    layer = copy.deepcopy(module)
    slim.prune_(layer, slim.prune.Magnitude(sparsity=0.9))
    if not masked:
        slim.prune.bake_(layer)
    x = torch.randn(5, 32) if isinstance(module, nn.Linear) else X
    y = layer(x)
    report = slim.pack_(layer, x)
    assert isinstance(layer, slim.nn.PackedLayer)
    assert report.layers[0].name == ""
    torch.testing.assert_close(layer(x), y)
    assert "(model)" in str(report)
    assert type(copy.deepcopy(layer)) is type(layer)


def test_a_layer_used_several_times_is_converted_once(timed: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.alias = _pruned(nn.Linear(16, 16))
            self.elsewhere = [self.first]

        def forward(self, x: Tensor) -> Tensor:
            return self.elsewhere[0](self.alias(self.first(x))) + self.first(x[:2]).sum()

    timed(FAST)
    model, x = Twice(), torch.randn(6, 16)
    y = model(x)
    report = slim.pack_(model, x)
    assert [layer.name for layer in report.layers] == ["first"]
    assert report.layers[0].inputs == [(6, 16), (2, 16)]  # three calls of one kind, one of another
    assert model.alias is model.first is model.elsewhere[0]
    assert isinstance(model.first, slim.nn.SparseLinear)
    torch.testing.assert_close(model(x), y)


def test_layers_that_share_a_weight_go_together(timed: Any) -> None:
    timed(FAST)
    model = _pruned(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)))
    model[1].weight = model[0].weight
    x = torch.randn(4, 16)
    y = model(x)
    report = slim.pack_(model, x)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert model[0].values is model[1].values
    assert model[2].values is not model[0].values
    assert model[1].bias is None
    torch.testing.assert_close(model(x), y)
    assert len(list(model.parameters())) == 4


def test_weights_shared_with_other_layers_stay(timed: Any) -> None:
    timed(FAST)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    _pruned(model)
    model[0].weight = model[1].weight
    report = slim.pack_(model, torch.tensor([1, 2]))
    assert "shared with '0'" in report.layers[0].reason
    assert type(model[1]) is nn.Linear


def test_layers_that_cannot_be_packed_say_why(timed: Any) -> None:
    class Own(nn.Linear):
        pass

    timed(FAST)
    replaced = nn.Linear(8, 8)
    replaced.forward = lambda input: input  # type: ignore[method-assign]
    hooked = torch_prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.9)
    model = nn.ModuleDict({
        "own": Own(8, 8), "replaced": replaced, "hooked": hooked, "unused": nn.Linear(8, 8), "empty": nn.Linear(8, 0),
        "norm": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        "reflect": nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
    })  # fmt: skip
    for name in ("own", "replaced", "unused"):
        _pruned(model[name])

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            for name in ("own", "replaced", "hooked", "norm", "empty"):
                y = self.layers[name](x)
            return self.layers["reflect"](x[None]) + y.sum()

    whole = Run()
    before = _state(whole)
    report = slim.pack_(whole, torch.randn(8, 8))
    _assert_same(before, _state(whole))
    reasons = {layer.name.split(".")[1]: layer.reason for layer in report.layers}
    expected = {
        "own": "Own is a class of its own", "replaced": "forward has been replaced", "hooked": "computed by a hook",
        "norm": "parametrized", "unused": "never reach it", "empty": "is empty", "reflect": "'reflect'",
    }  # fmt: skip
    assert reasons.keys() == expected.keys()
    for name, part in expected.items():
        assert part in reasons[name]


def test_dtypes_without_kernels_stay(timed: Any) -> None:
    timed(FAST)
    report = slim.pack_(_pruned(nn.Linear(16, 16)).half(), torch.randn(4, 16).half())
    assert "no kernels for torch.float16 on cpu" in report.layers[0].reason


def test_an_empty_batch_cannot_be_measured(timed: Any) -> None:
    timed(FAST)
    report = slim.pack_(_pruned(nn.Linear(16, 16)), torch.randn(0, 16))
    assert "empty batch" in report.layers[0].reason


def test_a_model_without_layers(timed: Any) -> None:
    timed(FAST)
    report = slim.pack_(nn.ReLU(), torch.randn(3))
    assert report.layers == []
    assert "no dense Linear or Conv2d" in str(report)


def test_keyword_inputs_and_keyword_calls(timed: Any) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = _pruned(nn.Linear(16, 16))

        def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
            return self.layer(input=a) + b

    timed(FAST)
    model = Named()
    slim.pack_(model, {"a": torch.randn(3, 16), "b": torch.ones(1)})
    assert isinstance(model.layer, slim.nn.SparseLinear)
    assert model(torch.randn(3, 16), b=torch.ones(1)).shape == (3, 16)


# --- bad input ---


@pytest.mark.parametrize(
    ("inputs", "text"),
    [(torch.randn(4, 7), r"float32\[4, 7\]"), (X.double(), "float64"), ((X, X), "float32"), ({"y": X}, "float32"),
     ("text", "str"), (None, "NoneType")],
    ids=["shape", "dtype", "count", "keyword", "kind", "none"],
)  # fmt: skip
def test_inputs_that_do_not_fit_change_nothing(inputs: Any, text: str) -> None:
    model = _network()
    slim.prune_(model, slim.prune.Magnitude(sparsity=0.95))
    before = _state(model)
    with pytest.raises(ValueError, match=f"example_inputs: the model cannot run on .*{text}"):
        slim.pack_(model, inputs)
    _assert_same(before, _state(model))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"formats": "csr"}, ValueError, "formats: expected one of"),
        ({"formats": ["sparse", "csr"]}, ValueError, "formats: expected one of"),
        ({"formats": 3}, TypeError, "formats: expected a name"),
        ({"formats": {"nothing*": "sparse"}}, ValueError, "matches no"),
        ({"objective": "speed"}, ValueError, "objective: expected"),
        ({"block_sizes": [(0, 4)]}, ValueError, "block_size"),
        ({"block_sizes": [4]}, TypeError, "block_size"),
        ({"min_gain": -0.1}, ValueError, "min_gain"),
        ({"min_gain": float("nan")}, ValueError, "min_gain"),
        ({"min_gain": "5%"}, TypeError, "min_gain"),
        ({"time_budget": float("inf")}, ValueError, "time_budget"),
        ({"filter_fn": 3}, TypeError, "filter_fn"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    model = _network()
    before = _state(model)
    with pytest.raises(error, match=text):
        slim.pack_(model, X, **arguments)
    _assert_same(before, _state(model))


def test_a_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match="model"):
        slim.pack_(lambda x: x, X)  # type: ignore[arg-type]


def test_nan_weights_are_named() -> None:
    model = _network()
    model[4].weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="layer '4' holds NaN"):
        slim.pack_(model, X)
    assert type(model[0]) is nn.Conv2d


# --- noise ---


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
@pytest.mark.parametrize("allowed", [True, False])
def test_on_a_gpu_the_dense_layer_may_round_to_tf32(
    kind: type[nn.Module], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = kind is nn.Conv2d
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=allowed == conv))
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed != conv))
    layer: Any = nn.Conv2d(1, 1, 1) if conv else nn.Linear(1, 1)

    def rounding(device: str, dtype: torch.dtype) -> float:
        output: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
        return packing._rounding(layer, output)

    single, half = 2 * torch.finfo(torch.float32).eps, 2 * torch.finfo(torch.float16).eps
    assert rounding("cpu", torch.float32) == single
    assert rounding("cuda", torch.float16) == half
    assert rounding("cuda", torch.float32) == single + (2.0**-9 if allowed else 0)


def test_times_are_taken_where_the_inputs_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def interleave(calls: Mapping[str, Any], *, device: Any, **options: Any) -> dict[str, Latency]:
        asked.append(device)
        return {name: Latency(1e-3, 1e-3, 1e-3, 1, 1) for name in calls}

    monkeypatch.setattr(packing, "interleave", interleave)
    layer = nn.Linear(64, 64)
    slim.prune_(layer, slim.prune.Magnitude(sparsity=0.9))
    x = torch.randn(4, 64)
    slim.pack_(layer, x, formats="sparse", objective="size")
    assert len(asked) >= 2  # of the layer, and of the whole model
    assert set(asked) == {x.device}


def test_noisy_times_are_compared_by_their_undisturbed_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = {"dense": Latency(1.0, 0.9, 1.2, 9, 1), "sparse": Latency(1.0, 0.6, 1.1, 9, 1)}

    def interleave(calls: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, Latency]:
        return {name: quiet.get(name, quiet["sparse"]) for name in calls}

    monkeypatch.setattr(packing, "interleave", interleave)
    report = slim.pack_(_pruned(nn.Linear(32, 32)), torch.randn(4, 32))
    assert report.layers[0].statistic == "p10"
    assert report.layers[0].speedup == pytest.approx(1.5)
    assert "sparse ~600 ms" in str(report)
    assert "varied a lot" in str(report)
    assert report.speedup == pytest.approx(1.5)


# --- with real times ---


@pytest.mark.parametrize("objective", ["latency", "size"])
def test_measured(objective: Any) -> None:
    model = _network().eval()
    dense = copy.deepcopy(model)
    threads = torch.get_num_threads()
    report = slim.pack_(model, X, objective=objective, time_budget=5)
    assert torch.get_num_threads() == threads == report.threads
    # one product after another: rounding of each layer, carried through
    torch.testing.assert_close(model(X), dense(X), rtol=1e-4, atol=1e-5)
    for layer in report.layers:
        assert layer.trials[0].label == "dense"
        assert layer.reason
        assert all(trial.latency is not None and trial.latency.median > 0 for trial in layer.trials)
    if report.packed:
        assert report.speedup >= 1 / 1.05
    again = json.loads(json.dumps(report.to_dict()))
    assert again["layers"][0]["name"] == "0"
    assert again["objective"] == objective
    for text in (str(report), str(report.trials())):
        assert all(len(line) <= 100 for line in text.splitlines())
    assert "dense" in str(report.trials())


def test_a_network_of_the_papers_packs_and_agrees() -> None:
    from slimtorch.models import LeNet5

    torch.manual_seed(0)
    model = _pruned(LeNet5(), 0.95).eval()
    dense, x = copy.deepcopy(model), torch.randn(16, 1, 28, 28)
    slim.pack_(model, x, time_budget=5)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
