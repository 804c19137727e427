# SPDX-License-Identifier: Apache-2.0
"""`StochasticDepth` trains with residual blocks missing at random; `drop_layers_` then leaves some out for good.

    training    each block is there with a probability p of its own, drawn for a whole batch: what is missing is free
    inference   all blocks, each branch times p (Huang et al. 2016, "Deep Networks with Stochastic Depth",
                1603.09382), or fewer blocks, whole (Fan et al. 2019, "Reducing Transformer Depth on Demand with
                Structured Dropout", 1909.11556), as the training has seen many such networks
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtorch._evaluate import Measure, finite, number_of
from slimtorch._progress import shown
from slimtorch.dynamic._blocks import (
    Skipped,
    check_number,
    check_shapes,
    check_steps,
    choose,
    left,
    matched,
    scaled,
    splits,
    steps,
)
from slimtorch.dynamic._statistics import renew_statistics_, restore_statistics, statistics
from slimtorch.measure import count_macs, eval_mode
from slimtorch.report import Table


class StochasticDepth(nn.Module):
    """A sequential network whose residual blocks are left out at random while it trains.

    One draw from torch's generator per block and batch (1603.09382, section 3). A block that is left out has no
    gradients in that step: under DistributedDataParallel set ``find_unused_parameters=True``.

    Args:
        model: an `nn.Sequential`, also of others; it is used, not copied.
        survival: the probability p with which the last block is there, in (0, 1].
        decay: "linear": block l of L is there with 1 - l/L · (1 - p) (equation 4); "constant": all with p (LayerDrop).
        blocks: names (globs) of what may be left out; None: every block with methods `branch` and `join`, as those of
            `slimtorch.models`' residual networks have. Blocks without them must keep the shape of their input.
        scale: in evaluation each branch is multiplied by its probability (equation 5); False: blocks run whole, as
            LayerDrop has it. Can be set later.

    Raises:
        TypeError: `model` is not sequential, a probability is no number.
        ValueError: an unknown name (with the closest ones), a probability or a decay that is none; a sequential network
            with a `forward` or hooks of its own, which would not run here.
    """

    def __init__(
        self,
        model: nn.Sequential,
        survival: float = 0.5,
        *,
        decay: str = "linear",
        blocks: str | Sequence[str] | None = None,
        scale: bool = True,
    ) -> None:
        super().__init__()
        names = choose(model, blocks)
        check_steps(model)
        check_number("survival", survival)
        if not 0 < survival <= 1:
            raise ValueError(f"survival: expected a probability in (0, 1], got {survival}")
        if decay not in ("linear", "constant"):
            raise ValueError(f"decay: expected 'linear' or 'constant', got {decay!r}")
        self.model = model
        self.scale = scale
        count = len(names)
        self.survival: dict[str, float] = {
            name: float(survival) if decay == "constant" else 1 - (index + 1) / count * (1 - survival)
            for index, name in enumerate(names)
        }

    def forward(self, x: Tensor) -> Tensor:
        """The network's output on [N, …]."""
        draws = torch.rand(len(self.survival)).tolist() if self.training else []
        there = {name: draw < p for draw, (name, p) in zip(draws, self.survival.items(), strict=False)}
        for name, module in steps(self.model):
            p = self.survival.get(name)
            if p is None or (not self.training and not self.scale):
                x = module(x)
            elif not self.training:
                x = scaled(module, x, p)
            elif there[name]:
                y = module(x)
                check_shapes(name, module, x, y)
                x = y
            else:
                x = left(module, x)
        return x

    def extra_repr(self) -> str:
        chances = ", ".join(f"{name}: {p:.3g}" for name, p in self.survival.items())
        return f"survival={{{chances}}}, scale={self.scale}"


@dataclass(frozen=True)
class DropReport:
    """What `drop_layers_` did; prints as a table.

    Attributes:
        kept, dropped: names of blocks, in the network's order.
        macs: of each block, in the network's order, for one sample; None without example inputs.
        macs_before, macs_after: of the whole network for one sample.
        order: of a search: what was dropped, the first one first, with the measure after it.
    """

    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    macs: dict[str, int] | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    order: tuple[tuple[str, float], ...] = ()

    def table(self) -> Table:
        names = [*self.kept, *self.dropped] if self.macs is None else list(self.macs)
        after = dict(self.order)
        rows: list[list[object]] = [
            [name, None if self.macs is None else self.macs[name], "kept" if name in self.kept else "dropped",
             after.get(name)]
            for name in names
        ]  # fmt: skip
        notes = [f"{len(self.kept)} of {len(names)} blocks kept"]
        if self.macs_before is not None and self.macs_after is not None:
            notes.append(f"MACs of a sample: {self.macs_before:,} before, {self.macs_after:,} after")
        return Table("Layers dropped", ["block", "MACs", "", "measure after"], rows, notes)

    def __str__(self) -> str:
        return str(self.table())


def drop_layers_(
    model: nn.Sequential | StochasticDepth,
    keep: int | float | Sequence[str],
    *,
    blocks: str | Sequence[str] | None = None,
    measure: Measure | None = None,
    data: Iterable[Any] | None = None,
    example_inputs: Tensor | None = None,
) -> DropReport:
    """Leaves residual blocks out of a network for good, in place: a smaller, plain network.

    Meant for networks that were trained with `StochasticDepth`; others lose their accuracy. What is left of a block is
    its shortcut (nothing, for blocks that keep their shape). Names of the other layers stay, so a fresh network
    on which the same blocks are dropped (`keep=report.kept`) takes the `state_dict`.

    Args:
        model: an `nn.Sequential`, or a `StochasticDepth`, whose network is changed; blocks that are kept then run
            whole, as in a step of its training (its `scale` becomes False).
        keep: how many blocks to keep (int), what share of them (float in (0, 1]), or which (names or globs).
        blocks: what may be dropped, as in `StochasticDepth`, which knows for itself. A block of yours that has methods
            `branch` and `join` keeps its weights unless a method `skipped()` gives the module that takes its place.
        measure: without it the kept ones are spread evenly, as in "every other" (1909.11556, section 3.2.2), the first
            always among them. With it they are searched: of the blocks left, the one goes without which the measure is
            smallest, again and again. `measure(model) -> number`, smaller is better, or `(data, loss_fn)`.
        data: batches `inputs` or `(inputs, …)` of training data, for `renew_statistics_` of batch norms, in a search
            before every measurement. Without it a network with batch norms loses much more than it has to.
        example_inputs: [N, …], for the MACs in the report.

    Raises:
        TypeError: `model` or `keep` is of another kind.
        ValueError: more blocks than there are, none, a name that is none of them; a measure that is not finite; a block
            without shortcut that changes the shape; no data. The model is then as it was.
    """
    network = model.model if isinstance(model, StochasticDepth) else model
    names = list(model.survival) if isinstance(model, StochasticDepth) else list(choose(network, blocks))
    if isinstance(model, StochasticDepth) and blocks is not None:
        raise ValueError("blocks: StochasticDepth knows its blocks, expected None")
    wanted = _wanted(keep, names)
    before = {name: module for name, module in steps(network) if name in names}
    macs = None if example_inputs is None else _macs(network, names, example_inputs)

    if isinstance(data, Iterator):
        data = list(data)  # a search reads it many times
    known = [] if data is None else statistics(network)
    scale = model.scale if isinstance(model, StochasticDepth) else None
    order: list[tuple[str, float]] = []
    try:
        if isinstance(model, StochasticDepth):
            model.scale = False
        if isinstance(wanted, int) and measure is not None:
            order = _search(network, names, wanted, measure, data)
            gone = {name for name, _ in order}
            kept = [name for name in names if name not in gone]
        elif isinstance(wanted, int):
            kept = [names[index * len(names) // wanted] for index in range(wanted)]
        else:
            if measure is not None:
                raise ValueError("measure: expected None where keep names the blocks")
            kept = wanted
        for name in names:
            if name not in kept:
                _put(network, name, _left(before[name]))
        if data is not None:
            renew_statistics_(network, data)
    except BaseException:
        restore_statistics(known)
        for name, block in before.items():
            _put(network, name, block)
        if isinstance(model, StochasticDepth):
            model.scale = bool(scale)
        raise
    if isinstance(model, StochasticDepth):
        model.survival = {name: p for name, p in model.survival.items() if name in kept}
    after = None if example_inputs is None else count_macs(network, (example_inputs[:1],))[1]
    return DropReport(
        kept=tuple(kept),
        dropped=tuple(name for name in names if name not in kept),
        macs=None if macs is None else macs[1],
        macs_before=None if macs is None else macs[0],
        macs_after=after,
        order=tuple(order),
    )


def _wanted(keep: Any, names: list[str]) -> int | list[str]:
    """A number of blocks, or their names."""
    count = len(names)
    if isinstance(keep, bool) or not isinstance(keep, (int, float, str, list, tuple)):
        raise TypeError(f"keep: expected a number, a share or names of blocks, got {keep!r}")
    if isinstance(keep, int):
        if not 1 <= keep <= count:
            raise ValueError(f"keep: expected 1 to {count} blocks, got {keep}")
        return keep
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(f"keep: expected a share in (0, 1], got {keep}")
        return max(1, round(keep * count))
    found = matched("keep", keep, names, kind="names of blocks", missed="is no block")
    if not found:
        raise ValueError(f"keep: expected at least one block, got {keep!r}")
    return [name for name in names if name in found]


def _search(
    network: nn.Sequential, names: list[str], keep: int, measure: Measure, data: Iterable[Any] | None
) -> list[tuple[str, float]]:
    """Drops one block after the other, each time the one without which the measure is smallest."""
    of = number_of(measure)
    left = list(names)
    dropped: list[tuple[str, float]] = []
    rounds = sum(range(keep + 1, len(names) + 1))

    def tries() -> Any:
        while len(left) > keep:
            yield from list(left)

    values: dict[str, float] = {}
    for name in shown(tries(), "which layers to drop", rounds):
        block = network.get_submodule(name)
        _put(network, name, _left(block))
        try:
            if data is not None:
                renew_statistics_(network, data)
            values[name] = finite(of(network), f"without block {name!r}")
        finally:
            _put(network, name, block)
        if len(values) == len(left):
            best = min(values, key=values.__getitem__)
            dropped.append((best, values[best]))
            _put(network, best, _left(network.get_submodule(best)))
            left.remove(best)
            values = {}
    return dropped


def _left(block: nn.Module) -> nn.Module:
    """What stands in the place of a dropped block."""
    if not splits(block):
        return nn.Identity()
    skipped = getattr(block, "skipped", None)
    return skipped() if callable(skipped) else Skipped(block)


def _put(network: nn.Sequential, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)


def _macs(network: nn.Sequential, names: list[str], inputs: Tensor) -> tuple[int, dict[str, int]]:
    """MACs of one sample: of all, of each block. ValueError for a block that changes shapes and has no shortcut."""
    x, total, macs = inputs[:1], 0, {}
    with eval_mode(network), torch.no_grad():
        for name, module in steps(network):
            own = count_macs(module, (x,))[1]
            y = module(x)
            if name in names:
                check_shapes(name, module, x, y)
                macs[name] = own
            total += own
            x = y
    return total, macs
