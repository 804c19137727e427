# SPDX-License-Identifier: Apache-2.0
"""Layers with binary weights while they are trained.

    latent weight (real, the optimizer's)  ──sign──▶  ±1 or ±α  ──▶  forward and backward
              ▲                                                          │
              └── clipped to [-1, 1] ◀── optimizer step ◀── gradient ────┘

A layer keeps the real weight as `weight`, the same `nn.Parameter` object as before: optimizers, `state_dict` and
whatever else knows a dense layer go on working. What inference runs on is made by `packed()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch.formats import Binary
from slimtorch.nn import BinaryConv2d, BinaryLinear
from slimtorch.reference import signs

Ends = Literal["binary", "real"]


# --- what to make of a layer ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BinaryConnect:
    """Binary weights in training, as a regularizer (Courbariaux et al. 2015, arXiv 1511.00363).

    The signs of the weights are used forward and backward; the gradient updates the real weights, which are clipped to
    [-1, 1] after each step. Activations stay real.

    Args:
        stochastic: draw each sign anew in every forward pass of training, +1 with probability
            `clip((w + 1) / 2, 0, 1)`. Inference then uses the real weights, as in the paper (section 2.6, method 2);
            otherwise the signs (method 1).
        scale_learning_rate: multiply the updates of the weights by `1 / sqrt(1.5 / (fan_in + fan_out))` (section 2.5);
            takes effect through `BinarizeReport.attach`.
        first, last: "binary" or "real": what becomes of the first and the last layer.
    """

    stochastic: bool = False
    scale_learning_rate: bool = True
    first: Ends = "binary"
    last: Ends = "binary"

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class BinaryNet:
    """Weights and activations of ±1 (Courbariaux et al. 2016, arXiv 1602.02830).

    The gradient passes the sign of an activation straight through where `|x| <= 1`. The sign is taken at the input of a
    layer, so a network should have its layers in the order linear → batch-norm → (sign, linear) → …

    Args:
        scale_learning_rate: as in `BinaryConnect`.
        binarize_first_input: take the signs of the network's input too; the paper keeps it real ("First Layer").
        first, last: "binary" or "real": what becomes of the first and the last layer.
    """

    scale_learning_rate: bool = True
    binarize_first_input: bool = False
    first: Ends = "binary"
    last: Ends = "binary"

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class BinaryWeight:
    """Binary weights with a scale per filter, real activations (Rastegari et al. 2016, arXiv 1603.05279, section 3.1).

    A filter W is replaced by `α sign(W)` with `α = mean |W|`. The gradient is that of the replaced weight times
    `α 1[|W| < 1] + 1 / n`, with n weights in the filter. After each step the real weights are centred over their input
    channels and clipped to [-1, 1], as in the authors' code; with one input channel, over the filter's positions.

    Args:
        center: centre the real weights.
        first, last: "binary" or "real": what becomes of the first and the last layer.
    """

    center: bool = True
    first: Ends = "real"
    last: Ends = "real"

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class XnorNet:
    """`BinaryWeight`, and the signs of the activations (Rastegari et al. 2016, arXiv 1603.05279, section 3.2).

    The sign is taken at the input of a layer. Order the network as batch-norm → (sign, conv) → pool: signs of
    max-pooled signs are nearly all +1 (section 3.2, figure 3); `xnor_block` builds one such block. Activations are not
    scaled (the paper's K), which the authors found to gain little.

    Args:
        center: centre the real weights.
        binarize_first_input: with `first="binary"`: take the signs of the network's input too.
        first, last: "binary" or "real": what becomes of the first and the last layer.
    """

    center: bool = True
    binarize_first_input: bool = False
    first: Ends = "real"
    last: Ends = "real"

    def __post_init__(self) -> None:
        _check_fields(self)


Method = BinaryConnect | BinaryNet | BinaryWeight | XnorNet
METHODS = (BinaryConnect, BinaryNet, BinaryWeight, XnorNet)


def _check_fields(config: Method) -> None:
    for name, value in vars(config).items():
        if name in ("first", "last"):
            if value not in ("binary", "real"):
                raise ValueError(f"{name}: expected 'binary' or 'real', got {value!r}")
        elif not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {value!r}")


# --- signs and their gradients --------------------------------------------------------------------------------------


class _SignOfActivation(torch.autograd.Function):
    """sign(x), sign(0) = +1; the gradient passes where |x| <= 1."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return signs(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0].abs() <= 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return gradient * inside


class _SignOfWeight(torch.autograd.Function):
    """sign(w); the gradient passes unchanged, clipping the weight being the optimizer step's business."""

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return signs(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _DrawnSignOfWeight(torch.autograd.Function):
    """+1 with probability clip((w + 1) / 2, 0, 1), else -1; the gradient passes unchanged."""

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        # Above the draw of [0, 1): w >= 1 always gives +1, w <= -1 never does.
        draws = torch.rand_like(weight)
        return torch.where(draws.mul_(2).sub_(1) < weight, 1.0, -1.0).to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _ScaledSignOfWeight(torch.autograd.Function):
    """α sign(w) with α = mean |w| per row; the gradient times α 1[|w| < 1] + 1 / n."""

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return _mean_magnitude(weight) * signs(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        factor = _mean_magnitude(weight) * (weight.abs() < 1) + 1 / weight[0].numel()
        return gradient * factor


def _mean_magnitude(weight: Tensor) -> Tensor:
    """mean |w| over each row, with dimensions kept."""
    return weight.abs().mean(dim=tuple(range(1, weight.dim())), keepdim=True)


# --- layers ---------------------------------------------------------------------------------------------------------


class LatentBinary(nn.Module):
    """What the two layers share; `binarize_` makes them, in place, of `nn.Linear` and `nn.Conv2d`.

    Attributes:
        weight: the real ("latent") weight, which the optimizer updates.
        method: the configuration given to `binarize_`.
        binarize_input: whether the signs of the input are taken.

    In training the weight is clipped (and centred, where the method says so) before the first forward pass after each
    change; `BinarizeReport.attach` does it right after the optimizer's step. `eval()` and `state_dict()` do it too, so
    that what is evaluated and saved is what training would go on with. In eval mode without gradients the layer
    computes with the very operator that the packed layer calls: both give the same bits.
    """

    weight: Tensor
    method: Method
    binarize_input: bool
    _settled: object  # identity and version of the weight when it was last known to be clipped; None: never

    @property
    def scaled(self) -> bool:
        """Whether each filter has a scale, mean |W|."""
        return isinstance(self.method, (BinaryWeight, XnorNet))

    @property
    def stochastic(self) -> bool:
        """Whether signs are drawn in training (and inference uses the real weights)."""
        return isinstance(self.method, BinaryConnect) and self.method.stochastic

    @property
    def learning_rate_scale(self) -> float:
        """What updates of the weight are multiplied by: 1 / sqrt(1.5 / (fan_in + fan_out)), or 1."""
        if not (isinstance(self.method, (BinaryConnect, BinaryNet)) and self.method.scale_learning_rate):
            return 1.0
        shape = self.weight.shape
        kernel = shape[2:].numel()
        return float(((shape[0] + shape[1]) * kernel / 1.5) ** 0.5)

    @torch.no_grad()
    def settle_(self) -> None:
        """Clip the real weight to [-1, 1], and centre it before where the method says so, if it changed since."""
        weight = self.weight
        if not isinstance(weight, nn.Parameter):  # torch.func.functional_call has put a tensor in its place
            return
        compiling = torch.compiler.is_compiling()
        if not compiling:
            if weight.is_inference() and not torch.is_inference_mode_enabled():
                return
            if not weight.is_inference() and self._settled == (id(weight), weight._version):
                return
        if isinstance(self.method, (BinaryWeight, XnorNet)) and self.method.center:
            axes = (1,) if weight.shape[1] > 1 else tuple(range(1, weight.dim()))
            if weight[0].numel() > 1:
                weight.sub_(weight.mean(dim=axes, keepdim=True))
        weight.clamp_(-1, 1)
        if not compiling:
            self._mark_settled()

    def _mark_settled(self) -> None:
        weight = self.weight
        self._settled = None if weight.is_inference() else (id(weight), weight._version)

    def used_weight(self) -> Tensor:
        """The weight that the next forward pass computes with; differentiable with respect to `weight`."""
        if self.scaled:
            return _ScaledSignOfWeight.apply(self.weight)
        if not self.stochastic:
            return _SignOfWeight.apply(self.weight)
        return _DrawnSignOfWeight.apply(self.weight) if self.training else self.weight

    def packed(self) -> nn.Module:
        """The layer for inference: `BinaryLinear` or `BinaryConv2d`; of stochastic BinaryConnect, the dense twin."""
        raise NotImplementedError

    def _runs_packed(self) -> bool:
        if self.training or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return False
        return not (torch.is_grad_enabled() and self.weight.requires_grad)

    def _activations(self, x: Tensor) -> Tensor:
        return _SignOfActivation.apply(x) if self.binarize_input else x

    def train(self, mode: bool = True) -> LatentBinary:
        """As `nn.Module.train`; `eval()` after training clips first."""
        if self.training and not mode:
            self.settle_()
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        """The twin's, and the method."""
        return f"{super().extra_repr()}, binarize_input={self.binarize_input}, method={self.method}"

    # A state that was saved counts as settled: centring it once more would change bits.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.training:
            self.settle_()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._mark_settled()

    def __getstate__(self) -> dict[str, Any]:
        if self.training:
            self.settle_()
        weight = self.weight
        return {**self.__dict__, "_settled": self._settled == (id(weight), weight._version)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_settled": None})
        if state["_settled"]:
            self._mark_settled()


class LatentBinaryLinear(LatentBinary, nn.Linear):
    """`nn.Linear` that trains binary weights; see `LatentBinary`.

    Shapes: input `[..., in_features]`, output `[..., out_features]`. State: that of `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`input [..., in_features]` to `[..., out_features]`."""
        if self.training:
            self.settle_()
        if self._runs_packed() and not self.stochastic:
            return cast(Tensor, self.packed()(input))
        return F.linear(self._activations(input), self.used_weight(), self.bias)

    def packed(self) -> BinaryLinear | nn.Linear:
        """As `LatentBinary.packed`; a new layer with copies of scale and bias."""
        if self.training:
            self.settle_()
        if not self.stochastic:
            weight = Binary.pack(self.weight, self.scaled)
            return BinaryLinear.from_format(self, weight, binarize_input=self.binarize_input, scale=self.scaled)
        twin = nn.Linear(self.in_features, self.out_features, self.bias is not None, torch.device("meta"))
        return _copy_into(twin, self)


class LatentBinaryConv2d(LatentBinary, nn.Conv2d):
    """`nn.Conv2d` that trains binary weights; see `LatentBinary`. Padding adds zeros, not signs.

    Shapes: as `nn.Conv2d`. State: that of `nn.Conv2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`input [N, C, H, W]` or `[C, H, W]` to the output of `nn.Conv2d`."""
        if self.training:
            self.settle_()
        if self._runs_packed() and not self.stochastic:
            return cast(Tensor, self.packed()(input))
        return self._conv_forward(self._activations(input), self.used_weight(), self.bias)

    def packed(self) -> BinaryConv2d | nn.Conv2d:
        """As `LatentBinary.packed`; a new layer with copies of scale and bias."""
        if self.training:
            self.settle_()
        if not self.stochastic:
            weight = Binary.pack(self.weight, self.scaled)
            return BinaryConv2d.from_format(self, weight, binarize_input=self.binarize_input, scale=self.scaled)
        twin = nn.Conv2d(
            self.in_channels, self.out_channels, cast(Any, self.kernel_size), cast(Any, self.stride),
            cast(Any, self.padding), cast(Any, self.dilation), self.groups, self.bias is not None,
            device=torch.device("meta"),
        )  # fmt: skip
        return _copy_into(twin, self)


def _copy_into(twin: Any, layer: LatentBinary) -> Any:
    """`twin` (on the meta device) with copies of the real weight and the bias."""
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        if value is not None:
            setattr(twin, name, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
    return twin.train(layer.training)
