# SPDX-License-Identifier: Apache-2.0
"""Networks of the literature: their published sizes, shapes of the layers, and that they can be pruned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch import models, prune
from slimtorch.measure import count_macs
from slimtorch.models.resnet import _kept


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, size: int, channels: int = 3) -> int:
    return count_macs(model.eval(), torch.zeros(1, channels, size, size))[0]


# Exact counts. Where a paper rounds (all of them do), its figure stands beside ours; those of ImageNet networks are
# torchvision's, exactly.
EXACT: list[tuple[Callable[[], nn.Module], int, float]] = [
    (models.LeNet300, 266_610, 267e3),  # Han et al. 2015 (1506.02626), Table 1: 267 K
    (models.LeNet5, 431_080, 431e3),  # the same: 431 K
    (models.conv2, 4_301_642, 4.3e6),  # Frankle & Carbin 2018 (1803.03635), Figure 2
    (models.conv4, 2_425_930, 2.4e6),  # the same
    (models.vgg16, 14_987_722, 1.5e7),  # Li et al. 2016 (1608.08710), Table 1
    (models.resnet20, 269_722, 0.27e6),  # He et al. 2015 (1512.03385), Table 6
    (models.resnet56, 853_018, 0.85e6),  # the same
    (models.resnet110, 1_727_962, 1.7e6),  # the same
    (models.resnet18, 11_689_512, 11_689_512),  # torchvision: resnet18
    (models.resnet34, 21_797_672, 21_797_672),
    (models.resnet50, 25_557_032, 25_557_032),
    (models.mobilenet_v1, 4_231_976, 4.2e6),  # Howard et al. 2017 (1704.04861), Table 8
    (models.mobilenet_v2, 3_504_872, 3_504_872),  # torchvision: mobilenet_v2; 3.4 M in 1801.04381, Table 4
]


@pytest.mark.parametrize(("build", "count", "published"), EXACT, ids=lambda value: getattr(value, "__name__", None))
def test_parameters(build: Callable[[], nn.Module], count: int, published: float) -> None:
    assert parameters(build()) == count == pytest.approx(published, rel=0.02)


def test_weights_of_conv_networks() -> None:
    """1803.03635, Figure 2, gives weights in convolutions and in all; Conv-6's 1.7 M is not what its layers give."""
    for build, convolutions, total in [
        (models.conv2, 38_592, 4_300_992),  # 38 K, 4.3 M
        (models.conv4, 259_776, 2_425_024),  # 260 K, 2.4 M
        (models.conv6, 1_144_512, 2_261_184),  # 1.1 M
    ]:
        network = build()
        sizes = {name: p.numel() for name, p in network.named_parameters() if name.endswith("weight")}
        found = sum(m.weight.numel() for m in network if isinstance(m, nn.Conv2d))
        assert (found, sum(sizes.values())) == (convolutions, total)
    assert parameters(models.conv6()) == 2_262_602


def test_conv_networks_for_digits() -> None:
    assert models.conv2(channels=1, size=28)(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ValueError, match="size: expected a positive multiple of 8, got 28"):
        models.conv6(size=28)


@pytest.mark.parametrize(
    ("full", "pruned", "fewer_parameters", "fewer_macs", "macs_in_paper", "size"),
    [  # Li et al. 2016 (1608.08710), Table 1
        (models.vgg16, models.vgg16_a, 64.0, 34.2, 2.06e8, 32),
        (models.resnet56, models.resnet56_a, 9.4, 10.4, 1.12e8, 32),
        (models.resnet56, models.resnet56_b, 13.7, 27.6, 9.09e7, 32),
        (models.resnet110, models.resnet110_a, 2.3, 15.9, 2.13e8, 32),
        (models.resnet110, models.resnet110_b, 32.4, 38.6, 1.55e8, 32),
        (models.resnet34, models.resnet34_a, 7.6, 15.5, 3.08e9, 224),
        (models.resnet34, models.resnet34_b, 10.8, 24.2, 2.76e9, 224),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_pruned_shapes(
    full: Callable[[], nn.Module],
    pruned: Callable[[], nn.Module],
    fewer_parameters: float,
    fewer_macs: float,
    macs_in_paper: float,
    size: int,
) -> None:
    with torch.device("meta"):
        counts = parameters(full()), parameters(pruned())
    work = macs(full(), size), macs(pruned(), size)
    assert 100 * (1 - counts[1] / counts[0]) == pytest.approx(fewer_parameters, abs=0.15)
    assert 100 * (1 - work[1] / work[0]) == pytest.approx(fewer_macs, abs=0.15)
    assert work[1] == pytest.approx(macs_in_paper, rel=0.01)


def test_parameters_of_pruned_shapes() -> None:
    assert parameters(models.vgg16_a()) == 5_397_034
    assert parameters(models.resnet56_a()) == 773_336
    assert parameters(models.resnet56_b()) == 735_712
    assert parameters(models.resnet110_a()) == 1_688_522
    assert parameters(models.resnet110_b()) == 1_168_424


def test_blocks_that_stay_whole() -> None:
    # 56-A: convolution 16 is the first of block 8 (from 1), 20 of block 10, 38 of block 19, 54 of block 27
    inner = _kept((9, 9, 9), (16, 32, 64), (10, 10, 10), (16, 20, 38, 54))
    whole = [16] * 9 + [32] * 9 + [64] * 9
    assert [i + 1 for i in range(27) if inner[i] == whole[i]] == [8, 10, 19, 27]
    assert sorted(set(inner) - set(whole)) == [14, 28, 57]


@pytest.mark.parametrize(
    ("width", "millions", "mega_macs"),  # the authors' released models at 224x224, counted without batch norm
    [(1.4, 6.06, 582), (1.3, 5.34, 509), (1.0, 3.47, 300), (0.75, 2.61, 209), (0.5, 1.95, 97), (0.35, 1.66, 59)],
)
def test_mobilenet_v2_widths(width: float, millions: float, mega_macs: float) -> None:
    model = models.mobilenet_v2(width=width)
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert (parameters(model) - norms) / 1e6 == pytest.approx(millions, abs=0.01)
    assert macs(model, 224) / 1e6 == pytest.approx(mega_macs, rel=0.015)


@pytest.mark.parametrize(("width", "millions"), [(1.0, 4.2), (0.75, 2.6), (0.5, 1.3), (0.25, 0.5)])
def test_mobilenet_v1_widths(width: float, millions: float) -> None:
    """1704.04861, Table 6."""
    assert parameters(models.mobilenet(width=width)) / 1e6 == pytest.approx(millions, abs=0.05)
    assert models.mobilenet is models.mobilenet_v1


def test_macs_of_imagenet_networks() -> None:
    assert macs(models.resnet34(), 224) == pytest.approx(3.6e9, rel=0.02)  # 1512.03385, Table 1
    # its Table 1 says 3.8e9, with the stride in the first 1x1 convolution; torchvision gives 4.09e9
    assert macs(models.resnet50(), 224) == pytest.approx(4.09e9, rel=0.002)
    assert macs(models.vgg16(), 32) == pytest.approx(3.13e8, rel=0.005)  # 1608.08710, Table 1
    assert macs(models.resnet56(), 32) == pytest.approx(1.25e8, rel=0.005)
    assert macs(models.resnet110(), 32) == pytest.approx(2.53e8, rel=0.005)


def test_depth_is_what_the_name_says() -> None:
    for build, depth in [
        (models.resnet20, 20),
        (models.resnet56, 56),
        (models.resnet110, 110),
        (models.resnet18, 18),
        (models.resnet34, 34),
        (models.resnet50, 50),
        (models.conv6, 6 + 3),
        (models.vgg16, 13 + 2),
    ]:
        with torch.device("meta"):
            modules = list(build().named_modules())
        layers = [n for n, m in modules if isinstance(m, (nn.Conv2d, nn.Linear)) and "shortcut" not in n]
        assert len(layers) == depth


def test_shortcut_without_parameters() -> None:
    """Option A, 1512.03385, section 3.3: every second pixel, zeros for the new channels."""
    model = models.resnet20().eval()
    block = next(m for m in model if getattr(m, "conv1", None) is not None and m.conv1.stride == (2, 2))
    assert not any("shortcut" in name for name, _ in model.named_parameters())
    for size in (8, 7):
        x = torch.randn(2, 16, size, size)
        half = -(-size // 2)
        expected = torch.zeros(2, 32, half, half)
        for i in range(half):
            for j in range(half):
                expected[:, :16, i, j] = x[:, :, 2 * i, 2 * j]
        torch.testing.assert_close(block.shortcut(x), expected)
        y = F.conv2d(x, block.conv1.weight, stride=2, padding=1)
        y = F.relu(block.bn1(y))
        y = block.bn2(F.conv2d(y, block.conv2.weight, padding=1))
        torch.testing.assert_close(block(x), F.relu(y + expected))


def test_how_they_start() -> None:
    torch.manual_seed(0)
    for module in models.conv4():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            area = module.weight[0, 0].numel()
            fans = area * (module.weight.shape[0] + module.weight.shape[1])
            assert module.weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.1)
            assert not module.bias.any()
    for network in (models.vgg16(), models.resnet56()):
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
                area = module.weight[0, 0].numel()
                assert module.weight.std().item() == pytest.approx((2 / (area * module.out_channels)) ** 0.5, rel=0.1)


def test_glorot_with_a_generator_repeats() -> None:
    one, other = models.LeNet300(), models.LeNet300()
    models.glorot_(one, torch.Generator().manual_seed(3))
    models.glorot_(other, torch.Generator().manual_seed(3))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "build",
    [models.vgg16, models.vgg16_a, models.resnet20, models.resnet34, models.resnet50, models.mobilenet_v2],
)
def test_input_sizes_classes_and_training(build: Callable[..., nn.Module]) -> None:
    model = build(classes=7, channels=1)
    for size in (32, 45):
        assert model(torch.randn(2, 1, size, size)).shape == (2, 7)
    model(torch.randn(2, 1, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("full", "pruned", "whole"),
    [
        (models.resnet56, models.resnet56_a, (8, 10, 19, 27)),
        (models.resnet56, models.resnet56_b, (8, 9, 10, 17, 19, 27)),
        (models.resnet110, models.resnet110_a, (18, *range(19, 55))),
        (models.resnet110, models.resnet110_b, (18, 19, 37)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_narrow_residual_networks(
    full: Callable[..., nn.Module], pruned: Callable[..., nn.Module], whole: tuple[int, ...]
) -> None:
    """The pruned shape of a network of half the width: the same blocks stay whole, the same shares go."""
    with torch.device("meta"):
        wide, small, narrow = inner_widths(full(width=8)), inner_widths(pruned(width=8)), inner_widths(pruned())
    assert wide == [w // 2 for w in inner_widths_of(full)]
    assert tuple(i + 1 for i, (a, b) in enumerate(zip(wide, small, strict=True)) if a == b) == whole
    assert all(abs(2 * b - c) <= 2 for b, c in zip(small, narrow, strict=True))
    assert full(width=2, channels=1)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_narrow_vgg() -> None:
    model = models.vgg16(channels=1, widths=[w // 16 for w in models.VGG16_WIDTHS], hidden=32)
    widths = [m.out_channels for m in model if isinstance(m, nn.Conv2d)]
    assert widths == [4, 4, 8, 8, 16, 16, 16] + [32] * 6
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [32, 10]
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: models.resnet56(width=0), "width: expected at least 1, got 0"),
        (lambda: models.vgg16(widths=(64, 64)), "widths: expected 13 numbers of channels, got 2"),
        (lambda: models.resnet20(inner=(16,)), "inner: expected 9 numbers of channels, got 1"),
        (lambda: models.resnet34(inner=()), "inner: expected 16 numbers of channels, got 0"),
    ],
)
def test_wrong_widths(build: Callable[[], nn.Module], argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        build()


def inner_widths(model: nn.Module) -> list[int]:
    return [m.conv1.out_channels for m in model if isinstance(getattr(m, "conv1", None), nn.Conv2d)]


def inner_widths_of(build: Callable[[], nn.Module]) -> list[int]:
    with torch.device("meta"):
        return inner_widths(build())


def test_removing_neurons_gives_the_pruned_shape() -> None:
    """What `prune_` leaves of a ResNet is the network that `inner=` builds: its weights load."""
    model, x = models.resnet20(), torch.randn(2, 3, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="leave the layers concerned out"):  # zero padding ties channels of stages
        prune.prune_(model, prune.Neurons(0.5), example_inputs=x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    prune.prune_(model, {"*.conv1": prune.Neurons(0.5)}, example_inputs=x)
    assert inner_widths(model) == [8] * 3 + [16] * 3 + [32] * 3
    fresh = models.resnet20(inner=inner_widths(model))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x))


@pytest.mark.parametrize("build", [models.vgg16_a, models.resnet34, models.mobilenet_v2])
def test_neurons_can_be_removed(build: Callable[[], nn.Module]) -> None:
    model, x = build(), torch.randn(2, 3, 32, 32)
    before = parameters(model)
    report = prune.prune_(model, prune.Neurons(0.5), example_inputs=x)
    assert report.parameters_after == parameters(model) < 0.6 * before
    y: Tensor = model(x)
    assert y.shape[0] == 2
    y.sum().backward()
