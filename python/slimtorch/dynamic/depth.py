# SPDX-License-Identifier: Apache-2.0
"""`DynamicDepth`: a gate before each residual block decides, for each sample, whether the block is computed.

    x [N, …] ──▶ gate ──▶ samples that go in [n, …] ──▶ block ──┐
                  └─────▶ the others ──▶ shortcut ──────────────┴──▶ back in order [N, …]

Feed-forward gates after SkipNet (Wang et al. 2018, 1711.09485, section 3) in the cheap form of Veit & Belongie
(1711.11503, section 3.2): global average, two small linear layers. Training draws hard decisions with Gumbel noise and
passes the gradient of the soft ones straight through; a penalty draws the share of computation to a target.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtorch.dynamic._blocks import (
    Skipped,
    check_number,
    check_shapes,
    check_steps,
    choose,
    left,
    scaled,
    steps,
)
from slimtorch.dynamic._walk import laid_out
from slimtorch.measure import count_macs, eval_mode
from slimtorch.report import Table

Run = Callable[[Tensor], Tensor]
Convert = Callable[[nn.Module, Tensor], Run]
"""`convert(segment, example input) -> callable` that gives what the segment gives."""

_REACH = 64.0  # scores that a threshold is looked for among
_MARGIN = 1e-3  # of a score: far above what rounding makes of another batch, far below what scores spread over


class PooledGate(nn.Module):
    """The score of each sample [N], above 0 where the block is worth it: mean per channel, linear, ReLU, linear.

    Args:
        channels: C of the input [N, C, …].
        hidden: width between the two layers.
        open_share: of the decisions of a gate that has not learned anything yet, under noise (1711.11503: 85 %).
    """

    def __init__(self, channels: int, hidden: int = 16, open_share: float = 0.85) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden)
        self.score = nn.Linear(hidden, 1)
        nn.init.normal_(self.score.weight, std=0.1)
        nn.init.constant_(self.score.bias, math.log(open_share / (1 - open_share)))

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x
        return self.score(torch.relu(self.hidden(pooled))).squeeze(1)


@dataclass(frozen=True)
class DepthRun:
    """What became of each sample.

    Attributes:
        logits: [N, …], the network's output.
        ran: bool [N, blocks]: the block was computed.
        macs: int64 [N]: multiply-accumulates, gates included.
    """

    logits: Tensor
    ran: Tensor
    macs: Tensor


@dataclass(frozen=True)
class DepthReport:
    """Computation per sample over a data set; prints as a table. MACs are those of one sample.

    Attributes:
        blocks: names, in order.
        block_macs, gate_macs: of each block, and of the gate before it.
        fixed_macs: of what every sample goes through, without gates.
        share: of the samples that ran each block.
        depths: samples by the number of blocks they ran, from 0 to all.
        paths: different choices of blocks that occur.
        macs: mean over samples, gates included.
        macs_whole: of the network without gates.
        accuracy: share right; None without labels.
    """

    blocks: tuple[str, ...]
    block_macs: tuple[int, ...]
    gate_macs: tuple[int, ...]
    fixed_macs: int
    share: tuple[float, ...]
    depths: tuple[int, ...]
    paths: int
    macs: float
    macs_whole: int
    accuracy: float | None = None

    @property
    def samples(self) -> int:
        return sum(self.depths)

    def table(self) -> Table:
        """One row per block: its cost, and how many samples ran it."""
        rows: list[list[object]] = [
            [name, own, gate, f"{share:.1%}"]
            for name, own, gate, share in zip(self.blocks, self.block_macs, self.gate_macs, self.share, strict=True)
        ]
        depth = sum(count * number for count, number in enumerate(self.depths)) / self.samples
        notes = [
            f"{self.samples:,} samples, {depth:.2f} of {len(self.blocks)} blocks each, {self.paths:,} different paths",
            f"MACs of a sample: {self.macs:,.0f} on average, {self.macs_whole:,} without skipping "
            f"({self.macs / self.macs_whole:.1%})",
        ]
        if self.accuracy is not None:
            notes.append(f"accuracy {self.accuracy:.2%}")
        return Table("Blocks computed per sample", ["block", "MACs", "MACs of its gate", "samples"], rows, notes)

    def __str__(self) -> str:
        return str(self.table())


@dataclass
class _Stage:
    """One step of a run: what every sample goes through, or a block with its gate."""

    name: str
    run: Run
    gate: Run | None = None
    skip: Run | None = None


class DynamicDepth(nn.Module):
    """A sequential network with residual blocks that each sample runs or skips, by a gate before each of them.

    In training every block is computed for every sample (its gate needs to know what it missed) and the gates' hard
    decisions are applied to the result; add `penalty()` to the loss. In evaluation skipped blocks cost nothing: those
    samples leave the batch for the length of the block. The forward of both gives the network's own output.

    **Decisions do not depend on the batch.** Another batch size means other kernels and other rounding, which could
    turn a score from one side of the threshold to the other. A score within `margin` of it is therefore not believed:
    it is computed anew for that sample alone, from the input on. So a sample takes the same path in any batch, on one
    machine with one number of threads; its output differs by rounding only.

    Args:
        model: an `nn.Sequential`, also of others; it is used, not copied.
        example_inputs: a batch [N, …] for it, N at least 1; shows the shapes.
        blocks: names (globs) of what may be skipped; None: every block with methods `branch` and `join`, as those of
            `slimtorch.models`' residual networks have. Blocks without them must keep the shape of their input.
        target: share of the blocks' MACs that `penalty` draws to, in (0, 1].
        penalty_weight: factor of `penalty`.
        per_block: each block is drawn to the target, not all together, as 1711.11503 (equation 4) has it: gates then
            cannot settle for some blocks that always run and others that never do.
        sampling: "gumbel": training decides by the score plus logistic noise (binary Gumbel-softmax, 1611.01144);
            "straight-through": without noise.
        temperature: of the soft decision whose gradient is used.
        gate: `gate(channels) -> module` from [N, channels, …] to scores [N] (or [N, 1]); None: `PooledGate`.

    Raises:
        TypeError: `model` is not sequential, an argument of another kind.
        ValueError: an unknown name (with the closest ones), a block that changes shapes, a number out of range; a
            sequential network with a `forward` or hooks of its own, which would not run here.
    """

    def __init__(
        self,
        model: nn.Sequential,
        example_inputs: Tensor,
        *,
        blocks: str | Sequence[str] | None = None,
        target: float = 0.5,
        penalty_weight: float = 1.0,
        per_block: bool = False,
        sampling: str = "gumbel",
        temperature: float = 1.0,
        gate: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        names = choose(model, blocks)
        check_steps(model)
        _check_batch("example_inputs", example_inputs, at_least=1)
        for argument, number in (("target", target), ("penalty_weight", penalty_weight), ("temperature", temperature)):
            check_number(argument, number)
        if gate is not None and not callable(gate):
            raise TypeError(f"gate: expected a function of the channels or None, got {gate!r}")
        if not 0 < target <= 1:
            raise ValueError(f"target: expected a share in (0, 1], got {target}")
        if not (penalty_weight >= 0 and math.isfinite(penalty_weight)):
            raise ValueError(f"penalty_weight: expected a number from 0 on, got {penalty_weight}")
        if sampling not in ("gumbel", "straight-through"):
            raise ValueError(f"sampling: expected 'gumbel' or 'straight-through', got {sampling!r}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature: expected a number above 0, got {temperature}")
        self.model = model
        self.blocks = names
        self.target = float(target)
        self.penalty_weight = float(penalty_weight)
        self.per_block = per_block
        self.sampling = sampling
        self.temperature = float(temperature)
        self.margin = _MARGIN
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros((), device=example_inputs.device))
        self.gates = nn.ModuleList()
        self._open: list[Tensor] = []  # decisions of the last training batch, [N] each

        costs: list[int] = []
        x = example_inputs[:1]
        with eval_mode(model), torch.no_grad():
            for name, module in steps(model):
                if name in names:
                    y = module(x)
                    check_shapes(name, module, x, y)
                    if x.dim() < 2:
                        raise ValueError(f"blocks: {name!r} gets {list(x.shape)}, expected [N, channels, …]")
                    made = (gate or PooledGate)(x.shape[1])
                    if not isinstance(made, nn.Module):
                        raise TypeError(f"gate: expected a module for {x.shape[1]} channels, got {made!r}")
                    self.gates.append(made.to(device=x.device, dtype=x.dtype))
                    costs.append(count_macs(module, (x,))[0])
                    x = y
                else:
                    x = module(x)
        if not any(costs):
            raise ValueError(f"blocks: {', '.join(names)} multiply nothing, so skipping them saves nothing")
        self._costs = tuple(cost / sum(costs) for cost in costs)

    # --- training -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """The network's output on [N, …]."""
        if self.training:
            return self._train(x)
        return self._output(self._stages(), x)

    def _train(self, x: Tensor) -> Tensor:
        opened: list[Tensor] = []
        gates = iter(self.gates)
        for name, module in steps(self.model):
            if name in self.blocks:
                score = _scores(next(gates)(x), x)
                if self.sampling == "gumbel":
                    noise = torch.rand_like(score).clamp_(1e-6, 1 - 1e-6)
                    score = score + noise.log() - (-noise).log1p()
                soft = torch.sigmoid(score / self.temperature)
                hard = (score >= 0).to(soft.dtype)
                decision = hard + soft - soft.detach()  # the value of the hard one, the gradient of the soft one
                opened.append(decision)
                x = scaled(module, x, decision.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1)))
            else:
                x = module(x)
        self._open = opened
        return x

    def computed(self) -> Tensor:
        """Share of the blocks' MACs that the last training batch ran, a scalar in [0, 1] with a gradient.

        Raises:
            RuntimeError: no batch went through in training mode yet.
        """
        shares = self._shares()
        return (shares * shares.new_tensor(self._costs)).sum()

    def penalty(self) -> Tensor:
        """`penalty_weight` · (share computed - `target`)², to add to the loss after a forward in training mode.

        With `per_block` the mean of that over blocks, weighted by their MACs.
        """
        shares = self._shares()
        costs = shares.new_tensor(self._costs)
        off = (shares - self.target) ** 2 @ costs if self.per_block else ((shares * costs).sum() - self.target) ** 2
        return self.penalty_weight * off

    def _shares(self) -> Tensor:
        """Of the samples of the last training batch, those that ran each block: [blocks]."""
        if not self._open:
            raise RuntimeError("DynamicDepth: no forward in training mode yet, so nothing to penalize")
        # of nobody nothing ran; a mean over nothing would be NaN, and so would all weights after the next step
        return torch.stack([opened.float().mean() if len(opened) else opened.float().sum() for opened in self._open])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": []}  # tensors with a graph cannot be copied

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def _stages(self) -> list[_Stage]:
        stages: list[_Stage] = []
        gates = iter(self.gates)
        for name, module in steps(self.model):
            if name in self.blocks:
                stages.append(_Stage(name, module, next(gates), functools.partial(left, module)))
            else:
                stages.append(_Stage(name, module))
        return stages

    def _infer(self, stages: Sequence[_Stage], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return _infer(stages, x, float(self.threshold), self.margin)

    def _output(self, stages: Sequence[_Stage], x: Tensor) -> Tensor:
        if len(x) == 1:
            return _infer_one(stages, x, float(self.threshold))[0]
        return self._infer(stages, x)[0]

    def segments(self) -> dict[str, nn.Module]:
        """What runs without a decision inside, in order: each can be exported by `torch.export` as one graph.

        Names: that of the first module of a stretch that every sample goes through (an `nn.Sequential`), and for a
        block "gate:NAME" (to scores [N]), "block:NAME" and "skip:NAME" (what is left of it).
        """
        found: dict[str, nn.Module] = {}
        stretch: list[tuple[str, nn.Module]] = []
        gates = iter(self.gates)
        for name, module in steps(self.model):
            if name not in self.blocks:
                stretch.append((name, module))
                continue
            if stretch:
                found[stretch[0][0]] = nn.Sequential(*(own for _, own in stretch))
                stretch = []
            found |= {f"gate:{name}": next(gates), f"block:{name}": module, f"skip:{name}": Skipped(module)}
        if stretch:
            found[stretch[0][0]] = nn.Sequential(*(own for _, own in stretch))
        return found

    def prepare(self, convert: Convert, example_inputs: Tensor) -> Run:
        """The network in evaluation with each segment converted: exported, compiled, frozen …

        Args:
            convert: called once for each of `segments()`, in evaluation mode, with an input for it.
            example_inputs: [N, …]; with N from 2 on, exporters keep the batch dynamic.

        Returns:
            `run(x)`, which decides and skips as the module itself does in evaluation.
        """
        _check_batch("example_inputs", example_inputs, at_least=1)
        stages: list[_Stage] = []
        x = example_inputs
        with eval_mode(self), torch.no_grad():
            for name, segment in self.segments().items():
                kind, _, block = name.rpartition(":")
                run = convert(segment, x)
                if kind == "gate":
                    stages.append(_Stage(block, run, gate=run))
                elif kind == "block":
                    stages[-1].run = run
                    after = segment(x)
                elif kind == "skip":
                    stages[-1].skip = run
                    x = after
                else:
                    stages.append(_Stage(name, run))
                    x = segment(x)
        return lambda x: self._output(stages, x)

    @torch.no_grad()
    def run(self, x: Tensor) -> DepthRun:
        """Output, decisions and MACs of each sample of [N, …], in evaluation mode whatever the module's mode is.

        MACs come from a run of the layers on one sample of this very shape.
        """
        _check_batch("x", x, at_least=0)
        with eval_mode(self):
            logits, ran = self._infer(self._stages(), x)
            decisions = torch.stack(ran, 1)
            if not len(x):
                return DepthRun(logits, decisions, torch.zeros(0, dtype=torch.int64, device=x.device))
            fixed, blocks, gates = self._macs(x[:1])
        own = (decisions * torch.tensor(blocks, device=x.device)).sum(1)
        return DepthRun(logits, decisions, own + fixed + sum(gates))

    def _macs(self, x: Tensor) -> tuple[int, list[int], list[int]]:
        """MACs that really run for one sample: outside blocks, of each block, of each gate."""
        fixed, blocks, gates = 0, [], []
        for stage in self._stages():
            assert isinstance(stage.run, nn.Module)
            own = count_macs(stage.run, (x,))[1]
            if isinstance(stage.gate, nn.Module):
                gates.append(count_macs(stage.gate, (x,))[1])
                shortcut = count_macs(Skipped(stage.run), (x,))[1]  # a convolution there runs in any case
                blocks.append(own - shortcut)
                fixed += shortcut
            else:
                fixed += own
            x = stage.run(x)
        return fixed, blocks, gates

    @torch.no_grad()
    def calibrate_(self, data: Iterable[Any], share: float) -> float:
        """Sets `threshold`, the score from which on a block runs (0 as trained), for a share of computation.

        Found by bisection: about 25 passes over the data.

        Args:
            data: batches `inputs` or `(inputs, …)`, for example of the validation set.
            share: of the blocks' MACs, in [0, 1], which the mean sample may spend at most.

        Returns:
            The share that it comes to, as near below `share` as scores of these samples allow.

        Raises:
            TypeError, ValueError: a share that is no number or out of range; no sample at all.
        """
        check_number("share", share)
        if not 0 <= share <= 1:
            raise ValueError(f"share: expected a number in [0, 1], got {share}")
        batches = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in data]
        if not sum(map(len, batches)):
            raise ValueError("data: expected at least one sample, got none")
        costs = torch.tensor(self._costs, dtype=torch.float64)

        def computed(threshold: float) -> float:
            self.threshold.fill_(threshold)
            with eval_mode(self):
                ran = torch.cat([torch.stack(self._infer(self._stages(), x)[1], 1) for x in batches])
            return float((ran.double().cpu() @ costs).mean())

        if computed(-math.inf) <= share:
            return 1.0
        low, high = -_REACH, _REACH
        found = computed(high)
        if found > share:  # scores beyond all reason
            high, found = math.inf, 0.0
        else:
            for _ in range(24):
                middle = (low + high) / 2
                now = computed(middle)
                if now <= share:
                    high, found = middle, now
                else:
                    low = middle
        self.threshold.fill_(high)
        return found

    @torch.no_grad()
    def report(self, data: Iterable[Any]) -> DepthReport:
        """Computation per sample over batches `inputs` or `(inputs, labels)`; labels, int64 [N], give the accuracy.

        Raises:
            ValueError: no sample at all, labels of another shape.
        """
        ran: list[Tensor] = []
        right: int | None = 0
        macs: tuple[int, list[int], list[int]] | None = None
        for batch in data:
            inputs, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
            with eval_mode(self):
                logits, decisions = self._infer(self._stages(), inputs)
                if macs is None and len(inputs):
                    macs = self._macs(inputs[:1])
            if rest and rest[0].shape != (len(inputs),):
                raise ValueError(f"data: expected labels [{len(inputs)}], got {list(rest[0].shape)}")
            ran.append(torch.stack(decisions, 1).cpu())
            right = right + int((logits.argmax(1) == rest[0]).sum()) if rest and right is not None else None
        if macs is None:
            raise ValueError("data: expected at least one sample, got none")
        every = torch.cat(ran)
        fixed, blocks, gates = macs
        mean = fixed + sum(gates) + float((every * torch.tensor(blocks)).sum(1).double().mean())
        return DepthReport(
            blocks=self.blocks,
            block_macs=tuple(blocks),
            gate_macs=tuple(gates),
            fixed_macs=fixed,
            share=tuple(every.double().mean(0).tolist()),
            depths=tuple(every.sum(1).bincount(minlength=len(self.blocks) + 1).tolist()),
            paths=len(every.unique(dim=0)),
            macs=mean,
            macs_whole=fixed + sum(blocks),
            accuracy=None if right is None else right / len(every),
        )

    def extra_repr(self) -> str:
        return f"blocks={list(self.blocks)}, target={self.target}"


# --- one run ------------------------------------------------------------------------------------------------------


def _infer(stages: Sequence[_Stage], x: Tensor, threshold: float, margin: float) -> tuple[Tensor, list[Tensor]]:
    """The output, and for each block the samples that ran it, bool [N]."""
    if len(x) == 1:
        y, path = _infer_one(stages, x, threshold)
        return y, [torch.tensor([ran], device=x.device) for ran in path]
    source = x
    decisions: list[Tensor] = []
    for stage in stages:
        if stage.gate is None or stage.skip is None:
            x = stage.run(x)
            continue
        scores = _scores(stage.gate(x), x).detach()
        ran = ~(scores < threshold)  # NaN runs: it must come out at the end
        unsure = (scores - threshold).abs() < max(margin, 64 * torch.finfo(scores.dtype).eps)
        for index in unsure.nonzero().squeeze(1).tolist():
            with torch.no_grad():
                ran[index] = _infer_one(stages, source[index : index + 1], threshold, len(decisions) + 1)[1][-1]
        decisions.append(ran)
        inside, outside = ran.nonzero().squeeze(1), (~ran).nonzero().squeeze(1)
        if not len(inside):
            x = stage.skip(x)
        elif not len(outside):
            x = stage.run(x)
        else:
            y, rest = stage.run(x.index_select(0, inside)), stage.skip(x.index_select(0, outside))
            x = torch.cat([y, rest.to(y.dtype)]).index_select(0, torch.cat([inside, outside]).argsort())
    return x, decisions


def _infer_one(
    stages: Sequence[_Stage], x: Tensor, threshold: float, gates: int | None = None
) -> tuple[Tensor, list[bool]]:
    """The same for one sample [1, …], always laid out alike; after so many gates it is left there."""
    x = laid_out(x)
    path: list[bool] = []
    for stage in stages:
        if stage.gate is None or stage.skip is None:
            x = stage.run(x)
            continue
        scores = stage.gate(x)
        path.append(not (scores if scores.numel() == 1 else _scores(scores, x)).item() < threshold)
        if len(path) == gates:
            break
        x = stage.run(x) if path[-1] else stage.skip(x)
    return x, path


def _scores(scores: Tensor, x: Tensor) -> Tensor:
    """What a gate gave, [N]."""
    if scores.numel() != len(x):
        raise ValueError(f"gate: expected one score for each of {len(x)} samples, got {list(scores.shape)}")
    return scores.reshape(len(x))


def _check_batch(argument: str, x: Tensor, at_least: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument}: expected a tensor [N, …], got {type(x).__name__}")
    if x.dim() < 2 or len(x) < at_least:
        raise ValueError(f"{argument}: expected a batch [N, …] of at least {at_least}, got {list(x.shape)}")
