# SPDX-License-Identifier: Apache-2.0
"""`binarize_`: layers that train binary weights, in place of `nn.Linear` and `nn.Conv2d`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtorch import _select
from slimtorch.prune.magnitude import check_weight
from slimtorch.quantize.binary_layers import (
    METHODS,
    BinaryNet,
    LatentBinary,
    LatentBinaryConv2d,
    LatentBinaryLinear,
    Method,
    XnorNet,
)
from slimtorch.report import Table

_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)


# --- the report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BinarizedLayer:
    """What became of one layer.

    Attributes:
        name: in the model, "" for a bare layer.
        shape: of the weight.
        method: name of the configuration, None where the layer stays real.
        binary: "weights", "weights, input" or "nothing".
        learning_rate_scale: what updates of the weight are multiplied by once an optimizer is attached.
        reason: why it stays real, or what else there is to know; else "".
    """

    name: str
    shape: tuple[int, ...]
    method: str | None
    binary: str
    learning_rate_scale: float
    reason: str


@dataclass
class BinarizeReport:
    """The answer of `binarize_`; prints as a table.

    Attributes:
        layers: every Linear and Conv2d layer of the model, in its order.
        notes: what the table cannot say, one sentence each.
    """

    layers: list[BinarizedLayer]
    notes: list[str] = field(default_factory=list)
    _modules: list[LatentBinary] = field(default_factory=list, repr=False)

    @property
    def binarized(self) -> list[BinarizedLayer]:
        """The layers that train binary weights now."""
        return [layer for layer in self.layers if layer.method is not None]

    def attach(self, optimizer: torch.optim.Optimizer) -> Attachment:
        """Scale the updates that `optimizer` makes, and clip right after each step.

        Works with any `torch.optim` optimizer, whatever it makes of the gradient: what a step changed in a binarised
        weight is multiplied by the layer's `learning_rate_scale` (which is how the authors of BinaryConnect do it for
        Adam too), then the weight is clipped, and centred where the method says so.

        Returns:
            A handle; its `remove()` takes the hooks away again.

        Raises:
            TypeError: no optimizer.
            ValueError: the optimizer holds none of the binarised weights, or is attached already.
        """
        return Attachment(self._modules, optimizer)

    def table(self) -> Table:
        """One row per layer."""
        rows: list[list[object]] = [
            [
                layer.name or "(model)", layer.shape, layer.method, layer.binary,
                f"{layer.learning_rate_scale:.3g}" if layer.method else None, layer.reason,
            ]
            for layer in self.layers
        ]  # fmt: skip
        columns = ["layer", "weight", "method", "binary", "rate ×", "remark"]
        return Table("Binarized", columns, rows, list(self.notes))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        layers = [{**vars(layer), "shape": list(layer.shape)} for layer in self.layers]
        return {"layers": layers, "notes": list(self.notes)}

    def __str__(self) -> str:
        return str(self.table())


class Attachment:
    """Hooks on an optimizer that scale updates of latent weights and clip them; see `BinarizeReport.attach`."""

    def __init__(self, layers: list[LatentBinary], optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._layers = list(layers)
        self._before: list[tuple[Tensor, Tensor, float]] = []
        if not self._held_by(optimizer):
            raise ValueError("optimizer: expected one that holds weights of the binarized layers, got one with none")
        own = {id(layer) for layer in layers}
        for hook in optimizer._optimizer_step_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, Attachment) and own & {id(layer) for layer in other._layers}:
                raise ValueError("optimizer: it is attached already; updates would be scaled twice")
        self._handles = (
            optimizer.register_step_pre_hook(self._remember), optimizer.register_step_post_hook(self._settle)
        )  # fmt: skip

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _held_by(self, optimizer: torch.optim.Optimizer) -> list[LatentBinary]:
        """The layers, one for each weight, that are still trained as binary and that the optimizer updates."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found: dict[int, LatentBinary] = {}
        for layer in self._layers:
            # pack_ may have made another layer of it since
            if isinstance(layer, LatentBinary) and id(layer.weight) in held:
                found.setdefault(id(layer.weight), layer)
        return list(found.values())

    @torch.no_grad()
    def _remember(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._before = [
            (layer.weight, layer.weight.detach().clone(), layer.learning_rate_scale)
            for layer in self._held_by(optimizer)
            if layer.learning_rate_scale != 1
        ]

    @torch.no_grad()
    def _settle(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for weight, before, scale in self._before:
            weight.sub_(before).mul_(scale).add_(before)
        self._before = []
        for layer in self._held_by(optimizer):
            layer.settle_()


# --- the verb -------------------------------------------------------------------------------------------------------


def binarize_(
    model: nn.Module,
    config: Method | Mapping[str, Method | None],
    *,
    filter_fn: _select.FilterFn | None = None,
) -> BinarizeReport:
    """Turns Linear and Conv2d layers into layers that train binary weights, in place.

        report = binarize_(model, BinaryNet())
        optimizer = torch.optim.Adam(model.parameters())
        report.attach(optimizer)  # scales learning rates, clips after each step

    The weights stay the same `nn.Parameter` objects and `state_dict` keeps its keys. After training, `packed()` of each
    layer (or `pack_` on the model) gives the layer that runs on the signs. "First" and "last" in a configuration are
    the first and last Linear or Conv2d layer in the order of `model.named_modules()`; a bare layer is neither.

    Args:
        model: any module, or a single layer (whose name is then "").
        config: `BinaryConnect`, `BinaryNet`, `BinaryWeight` or `XnorNet`, or a mapping from glob of layer names to one
            of them or None: the first glob that matches wins, None leaves a layer alone.
        filter_fn: `filter_fn(module, name) -> bool`; layers for which it is false are left alone.

    Returns:
        What became of each layer, and why the others stay real; prints as a table.

    Raises:
        TypeError: `config` is of another kind.
        ValueError: NaN weights, weights not initialised, a layer that is binarized already, a glob that matches
            nothing. The model is left as it was.
    """
    if isinstance(config, Mapping) and not config:
        raise ValueError("config: expected at least one glob, got an empty mapping")
    for value in config.values() if isinstance(config, Mapping) else [config]:
        if not isinstance(value, METHODS) and not (value is None and isinstance(config, Mapping)):
            names = ", ".join(method.__name__ for method in METHODS)
            raise TypeError(f"config: expected {names} or a mapping of globs to them, got {value!r}")
    chosen: list[tuple[str, nn.Module, Method]] = _select.resolve(model, config, filter_fn, types=_TYPES)
    for name, module, _ in chosen:
        where = f"layer {name!r}" if name else "the layer"
        if isinstance(module, LatentBinary):
            kind = type(module.method).__name__
            raise ValueError(f"model: {where} is binarized already ({kind}); pack it, or begin with a real model")
        check_weight(name, module)

    every = _select.candidates(model, _TYPES)
    methods: dict[str, Method] = {name: method for name, _, method in chosen}
    ends = {every[0][0]: "first", every[-1][0]: "last"} if len(every) > 1 else {}
    if len(every) == 1 and every[0][0]:
        ends = {every[0][0]: "both"}
    reasons: dict[str, str] = {}
    for name, module in every:
        if name not in methods:
            reasons[name] = "left alone"
            if isinstance(module, LatentBinary):
                reasons[name] = f"binarized before, with {type(module.method).__name__}"
            continue
        method, end = methods[name], ends.get(name)
        stay = [e for e in ("first", "last") if end in (e, "both") and getattr(method, e) == "real"]
        if stay:
            reasons[name] = f"{' and '.join(stay)} layer stays real"
        else:
            obstacle = _obstacle(module)
            if obstacle:
                reasons[name] = obstacle
    _keep_shared_weights_real(model, every, reasons)

    report = BinarizeReport([])
    for name, module in every:
        weight = cast(Tensor, module.weight)
        shape = () if torch.nn.parameter.is_lazy(weight) else tuple(weight.shape)
        if name in reasons:
            report.layers.append(BinarizedLayer(name, shape, None, "nothing", 1.0, reasons[name]))
            continue
        method = methods[name]
        signs_of_input, remark = False, ""
        if isinstance(method, (BinaryNet, XnorNet)):
            signs_of_input = method.binarize_first_input or ends.get(name) not in ("first", "both")
            remark = "" if signs_of_input else "the network's input stays real"
        layer = _convert(module, method, signs_of_input)
        report._modules.append(layer)
        if layer.stochastic:
            remark = "signs are drawn in training; inference uses the real weights"
        binary = "weights, input" if signs_of_input else "weights"
        kind = type(method).__name__
        report.layers.append(BinarizedLayer(name, shape, kind, binary, layer.learning_rate_scale, remark))
    if not report._modules:
        report.notes.append("Nothing was binarized. The model is as it was.")
    if any(layer.learning_rate_scale != 1 for layer in report._modules):
        report.notes.append("Learning rates are scaled once an optimizer is attached: report.attach(optimizer).")
    return report


def _convert(module: nn.Module, method: Method, binarize_input: bool) -> LatentBinary:
    module.__class__ = LatentBinaryLinear if isinstance(module, nn.Linear) else LatentBinaryConv2d
    assert isinstance(module, LatentBinary)
    module.method, module.binarize_input, module._settled = method, binarize_input, None
    return module


def _obstacle(module: nn.Module) -> str | None:
    """Why the layer cannot train binary weights, or None."""
    if parametrize.is_parametrized(module):
        return "its weight is masked or parametrized: a sign cannot be zero, and bake_ turns zeros into +1"
    if "weight" not in module._parameters:
        return "its weight is computed by a hook; make it permanent first (torch.nn.utils.prune.remove and the like)"
    if type(module) not in _TYPES:
        return f"{type(module).__name__} is a class of its own"
    if "forward" in module.__dict__:
        return "its forward has been replaced"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"padding_mode is {module.padding_mode!r}"
    if module.weight.numel() == 0:  # type: ignore[operator]
        return "its weight is empty"
    return None


def _keep_shared_weights_real(model: nn.Module, every: list[tuple[str, nn.Module]], reasons: dict[str, str]) -> None:
    """A weight that also serves a layer that stays real must not be clipped: its other layers stay real too."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    changed = True
    while changed:
        changed = False
        binary = {id(module) for name, module in every if name not in reasons}
        for name, module in every:
            if name in reasons:
                continue
            real = [n for n, m in owners.get(id(module.weight), []) if id(m) not in binary]
            if real:
                reasons[name] = f"its weight is shared with {', '.join(map(repr, real))}, which stays real"
                changed = True


# --- what goes with it ----------------------------------------------------------------------------------------------


def squared_hinge_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of BinaryConnect and BinaryNet: the mean of `max(0, 1 - t · y)²` over samples and classes.

    Args:
        logits: `[N, classes]`, floating point.
        targets: `[N]`, whole numbers from 0 to classes - 1. A class is +1 for its own samples and -1 for all others.

    Returns:
        A scalar of the dtype of `logits`.

    Raises:
        TypeError: `logits` is not floating point or `targets` holds no whole numbers.
        ValueError: shapes do not fit, or a class is out of range.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating-point tensor, got {logits.dtype}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets: expected classes as whole numbers, got {targets.dtype}")
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets: expected logits [N, classes] and targets [N], got {list(logits.shape)} and {list(targets.shape)}"
        )
    classes = logits.shape[1]
    known = torch.compiler.is_compiling() or targets.numel() == 0
    if not known and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise ValueError(
            f"targets: expected classes from 0 to {classes - 1}, got {int(targets.min())} to {int(targets.max())}"
        )
    signs = F.one_hot(targets.long(), classes).to(logits.dtype) * 2 - 1
    return (1 - signs * logits).clamp(min=0).square().mean()


def xnor_block(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    pool: int | None = None,
    eps: float = 1e-4,
) -> nn.Sequential:
    """Batch-norm → convolution → max-pooling, the order that XNOR-Net needs (arXiv 1603.05279, figure 3).

    A plain `nn.Sequential` of torch layers; `binarize_(model, XnorNet())` puts the sign between the first two.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: of the convolution.
        pool: size (and stride) of the max-pooling; None leaves it out.
        eps: of the batch-norm.

    Shapes: `[N, in_channels, H, W]` to `[N, out_channels, H', W']`.
    """
    layers: list[nn.Module] = [
        nn.BatchNorm2d(in_channels, eps=eps),
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding),
    ]
    if pool is not None:
        layers.append(nn.MaxPool2d(pool))
    return nn.Sequential(*layers)
