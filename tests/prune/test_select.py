# SPDX-License-Identifier: Apache-2.0
"""Which layers a configuration reaches."""

from __future__ import annotations

import pytest
from torch import nn

from slimtorch import _select

LAYERS = (nn.Linear, nn.Conv2d)


def model() -> nn.Module:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    return nn.ModuleDict({"conv1": nn.Conv2d(1, 2, 3), "block": inner, "head": nn.Linear(4, 2)})


def names(config: object, **options: object) -> dict[str, object]:
    return {n: c for n, _, c in _select.resolve(model(), config, types=LAYERS, **options)}  # type: ignore[arg-type]


def test_one_config_reaches_every_layer_in_order() -> None:
    assert list(names("a")) == ["conv1", "block.0", "block.2", "head"]


def test_first_matching_glob_wins() -> None:
    assert names({"block.*": "b", "*": "rest"}) == {"conv1": "rest", "block.0": "b", "block.2": "b", "head": "rest"}
    assert names({"*": "rest", "block.*": "b"})["block.0"] == "rest"


def test_names_without_a_glob_and_none_are_left_alone() -> None:
    assert list(names({"conv*": "c"})) == ["conv1"]
    assert list(names({"head": None, "*": "c"})) == ["conv1", "block.0", "block.2"]


def test_filter_fn_sees_module_and_name() -> None:
    assert list(names("a", filter_fn=lambda m, n: isinstance(m, nn.Linear) and n != "head")) == ["block.0", "block.2"]


def test_bare_layer_has_the_empty_name() -> None:
    layer = nn.Linear(2, 2)
    assert _select.resolve(layer, "a", types=LAYERS) == [("", layer, "a")]
    assert _select.resolve(layer, {"*": "a"}, types=LAYERS) == [("", layer, "a")]
    assert _select.resolve(layer, "a", lambda m, n: n != "", types=LAYERS) == []


def test_shared_module_is_named_once() -> None:
    layer = nn.Linear(2, 2)
    assert len(_select.resolve(nn.ModuleList([layer, layer]), "a", types=LAYERS)) == 1


def test_glob_that_matches_nothing_suggests_names() -> None:
    with pytest.raises(ValueError, match=r"'con1' matches no Conv2d or Linear layer.*'conv1'"):
        names({"con1": "c"})
    with pytest.raises(ValueError, match="the model has none"):
        _select.resolve(nn.ReLU(), {"x": "c"}, types=LAYERS)


@pytest.mark.parametrize("bad", [3, "x"])
def test_wrong_types(bad: object) -> None:
    with pytest.raises(TypeError, match="filter_fn"):
        names("a", filter_fn=bad)
    with pytest.raises(TypeError, match="model"):
        _select.resolve(bad, "a", types=LAYERS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="globs"):
        names({3: "a"})
