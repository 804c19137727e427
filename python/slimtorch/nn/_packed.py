# SPDX-License-Identifier: Apache-2.0
"""What every packed layer shares: how it stores a format, loads it, moves it and pickles it.

    values         Parameter            trained, saved; named by the family (tables of a codebook, say)
    bias           Parameter or None    trained, saved
    positions      buffers              saved; integer tensors (positions, indices, signs), named by the family
    weight_shape   buffer               saved; the dense shape, so that a state says which layer it belongs to
    plans          plain dict           derived from the positions alone: never saved, never stale when values change

The plans are no buffers on purpose: DistributedDataParallel would send them to every process at every step, and
``model.buffers()`` would count them as the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch.formats import BlockSparse, Format, Sparse
from slimtorch.formats._common import on_gpu
from slimtorch.ops._common import Activation, Pair, relu_flag

Plans = dict[tuple[int, bool], Tensor]
Twin = TypeVar("Twin", nn.Linear, nn.Conv2d)
Layer = TypeVar("Layer", bound="PackedLayer")


class PackedLayer(nn.Module):
    """Base of the packed layers: a family says how its format is built, a kind (linear, conv2d) what shapes mean."""

    VALUES: ClassVar[str] = "values"  # field of the format and parameter of the layer alike
    POSITIONS: ClassVar[tuple[str, ...]]  # fields of the format and buffers of the layer alike

    bias: nn.Parameter | None
    weight_shape: Tensor
    activation: Activation
    groups: int
    _shape: tuple[int, ...]
    _plans: Plans
    _planned: tuple[Tensor, ...] | None  # the positions that the plans were derived from
    _held: tuple[Tensor, tuple[Tensor, ...], Format] | None  # values and positions of the last call, and their format

    # ---- what family and kind provide ----

    def _as_format(self, values: Tensor, positions: tuple[Tensor, ...], plans: Plans) -> Format:
        raise NotImplementedError

    def _twin(self, device: torch.device | None, dtype: torch.dtype | None) -> nn.Linear | nn.Conv2d:
        """The torch.nn layer of the same geometry, freshly initialised."""
        raise NotImplementedError

    def _adopt(self, twin: nn.Linear | nn.Conv2d, weight: Format, activation: Activation) -> None:
        """Become a layer that computes what ``twin`` does with ``weight``. The twin's bias is copied."""
        relu_flag(activation)
        self.activation = activation
        self._shape = tuple(weight.shape)
        self._plans, self._planned, self._held = {}, None, None
        values = cast(Tensor, getattr(weight, self.VALUES))
        self.register_parameter(self.VALUES, nn.Parameter(values, requires_grad=twin.weight.requires_grad))
        if twin.bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(twin.bias.detach().clone(), requires_grad=twin.bias.requires_grad)
        for name in self.POSITIONS:
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("weight_shape", torch.tensor(self._shape, dtype=torch.int64, device=values.device))
        self.training = twin.training

    @classmethod
    def from_format(
        cls: type[Layer], module: nn.Linear | nn.Conv2d, weight: Format, *, activation: Activation = None
    ) -> Layer:
        """As ``from_dense``, with the weight already packed; the layer shares the format's tensors."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(module, weight, activation)
        return layer

    # ---- the format ----

    @property
    def format(self) -> Format:
        """The weight as a format object that shares this layer's tensors and its cached plans."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight, of the twin's shape; differentiable with respect to the stored values."""
        return self.format.to_dense()

    def to_dense(self) -> nn.Module:
        """The ``torch.nn`` twin, with copies of weight and bias; a fused activation follows it in a ``Sequential``."""
        dense = self.weight.detach()
        twin = self._twin(torch.device("meta"), dense.dtype)
        twin.weight = nn.Parameter(dense, requires_grad=self._values().requires_grad)
        if self.bias is not None:
            twin.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        model = twin if self.activation is None else nn.Sequential(twin, nn.ReLU())
        return model.train(self.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The twin's default initialisation, at the positions that are stored."""
        values = self._values()
        twin = self._twin(values.device, values.dtype)
        self._reset(twin.weight.detach())
        if self.bias is not None and twin.bias is not None:
            self.bias.copy_(twin.bias)

    def _reset(self, dense: Tensor) -> None:
        """Hold ``dense`` where this layer stores weights."""
        self._values().copy_(self._gather(dense))

    def _gather(self, dense: Tensor) -> Tensor:
        """The entries of ``dense`` at the stored positions, in the layout of the values; summed where one is shared."""
        # The gradient of to_dense() is exactly this gather, padding of edge blocks (zero) included.
        with torch.enable_grad():
            values = torch.zeros_like(self._values(), requires_grad=True)
            full = self._as_format(values, self._positions(), {}).to_dense()
            (gathered,) = torch.autograd.grad(full, values, dense.detach())
        return gathered

    def _held_format(self) -> Format:
        """The format object, the same one as long as the tensors in it are."""
        values, positions = self._values(), self._positions()
        if torch.compiler.is_compiling():  # before a look at what is held, which would be guarded
            return self._as_format(values, positions, self._plans_for(positions))
        held = self.__dict__.get("_held")
        if held is not None:
            own, placed, format = held
            if own is values:
                for now, then in zip(positions, placed):  # noqa: B905  on the path of every call
                    if now is not then:
                        break
                else:
                    return cast(Format, format)
        format = self._as_format(values, positions, self._plans_for(positions))
        self.__dict__["_held"] = (values, positions, format)
        return format

    # ---- plans ----

    def _values(self) -> Tensor:
        return cast(Tensor, self._parameters[self.VALUES])

    def _positions(self) -> tuple[Tensor, ...]:
        buffers = self._buffers  # not by attribute: nn.Module's look-up costs as much as a small layer
        return tuple([cast(Tensor, buffers[name]) for name in self.POSITIONS])

    def _plans_for(self, positions: tuple[Tensor, ...]) -> Plans:
        """The cached plans, or none where someone (torch.func.functional_call) has put other positions in place."""
        planned = self._planned
        if planned is None or torch.compiler.is_compiling():
            return self._plans
        for now, then in zip(positions, planned):  # noqa: B905  pairs, on the path of every call
            if now is not then and (now.shape != then.shape or now.data_ptr() != then.data_ptr()):
                return {}
        return self._plans

    def _prepare(self) -> None:
        """Derive the plans now, so that no graph that is traced later has to.

        The plan of the backward pass only where training is in sight; otherwise the first backward pass that needs it
        derives it. Positions that are not valid yet (``to_empty``) are reported when the layer is called.
        """
        positions = self._positions()
        self._plans, self._planned, self._held = {}, positions, None
        if positions[0].device.type != "cpu" and not on_gpu(positions[0]):
            return
        try:
            self._derive_plans()
            self._prepare_backward()
        except (TypeError, ValueError):
            self._plans, self._held = {}, None

    def _derive_plans(self) -> None:
        """Derive and cache what a forward call needs; TypeError or ValueError where the positions are not valid."""

    def _prepare_backward(self) -> None:
        """Derive what a backward pass needs besides, if one is in sight."""

    def train(self, mode: bool = True) -> PackedLayer:
        """As ``nn.Module.train``; entering training also derives the plan of the backward pass."""
        super().train(mode)
        self._prepare_backward()
        return self

    # ---- moving, pickling, loading ----

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        before = self._positions()
        super()._apply(fn, recurse)
        if any(new is not old for new, old in zip(self._positions(), before, strict=True)):
            self._prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}, "_planned": None, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

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
        # Another number of stored values is no mismatch here: sizes follow the state, once it has proved valid.
        names = (self.VALUES, *self.POSITIONS)
        given = {
            name: state_dict[prefix + name] for name in (*names, "weight_shape", "bias") if prefix + name in state_dict
        }
        problem = self._misfit(given)
        if problem is not None:
            error_msgs.append(f'"{prefix}…" does not fit {type(self).__name__}: {prefix}{problem}')
            return
        for name in names:
            own = cast(Tensor, getattr(self, name))
            if name not in given or given[name].shape == own.shape:
                continue
            room = own.detach().new_empty(given[name].shape)
            if name == self.VALUES:
                own.data, own.grad = room, None  # the same Parameter: optimizers keep it
            else:
                self._buffers[name] = room
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._prepare()

    def _misfit(self, given: dict[str, Any]) -> str | None:
        """What is wrong with the tensors of a state, beginning with the name of the tensor (no prefix); or None."""
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor):
                return f"{name}: expected a torch.Tensor, got {type(tensor).__name__}"
        shape = given.get("weight_shape")
        if shape is not None and not shape.is_meta and tuple(shape.tolist()) != self._shape:
            return f"weight_shape: expected {list(self._shape)}, got {shape.tolist()}"
        bias = given.get("bias")
        if bias is not None and self.bias is not None and bias.shape != self.bias.shape:
            return f"bias: expected shape {list(self.bias.shape)}, got {list(bias.shape)}"
        names = (self.VALUES, *self.POSITIONS)
        if not any(name in given for name in names):
            return None
        # A partial state is judged together with what the layer holds.
        tensors = [given.get(name, getattr(self, name)).detach() for name in names]
        if any(tensor.is_meta for tensor in tensors):
            return None
        try:
            self._as_format(tensors[0], tuple(tensors[1:]), {}).validate()
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def extra_repr(self) -> str:
        """The twin's arguments, and what is stored."""
        fused = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{self._geometry()}, bias={self.bias is not None}{self._options()}{fused}{self._stored()}"

    def _stored(self) -> str:
        """What is stored, for ``extra_repr``, each part after a comma."""
        return ""

    def _options(self) -> str:
        """The family's own options for ``extra_repr``, each after a comma."""
        return ""

    def _geometry(self) -> str:
        raise NotImplementedError


class PlannedLayer(PackedLayer):
    """What the sparse families share: values at stored positions, and plans for the forward and the backward pass."""

    values: nn.Parameter

    def _derive_plans(self) -> None:
        cast("Sparse | BlockSparse", self.format).plan(self.groups)

    def _prepare_backward(self) -> None:
        if self.training and self.values.requires_grad and self._plans:
            cast("Sparse | BlockSparse", self.format).plan(self.groups, transposed=True)

    def _stored(self) -> str:
        held = cast("Sparse | BlockSparse", self.format)
        return f", stored={held.values.numel()}, density={held.density:.4g}"


class PackedLinear(PackedLayer):
    """The geometry of ``nn.Linear``."""

    in_features: int
    out_features: int

    def _adopt(self, twin: nn.Linear | nn.Conv2d, weight: Format, activation: Activation) -> None:
        super()._adopt(twin, weight, activation)
        self.out_features, self.in_features = self._shape
        self.groups = 1
        self._prepare()

    def _twin(self, device: torch.device | None, dtype: torch.dtype | None) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device, dtype)

    def _geometry(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedConv2d(PackedLayer):
    """The geometry of ``nn.Conv2d`` with zeros as padding."""

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: str | Pair
    dilation: Pair
    padding_mode: str
    _sides: Pair  # zeros that the operator adds on both sides of an axis
    _extra: tuple[int, int, int, int] | None  # zeros for F.pad, where the two sides of an axis differ

    def _adopt(self, twin: nn.Linear | nn.Conv2d, weight: Format, activation: Activation) -> None:
        super()._adopt(twin, weight, activation)
        assert isinstance(twin, nn.Conv2d)
        self.in_channels, self.out_channels, self.groups = twin.in_channels, twin.out_channels, twin.groups
        self.kernel_size, self.stride = cast(Pair, twin.kernel_size), cast(Pair, twin.stride)
        self.dilation, self.padding = cast(Pair, twin.dilation), cast("str | Pair", twin.padding)
        self.padding_mode = twin.padding_mode
        self._sides, self._extra = explicit_padding(self.padding, self.kernel_size, self.dilation)
        self._prepare()

    def _twin(self, device: torch.device | None, dtype: torch.dtype | None) -> nn.Conv2d:
        return nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, device=device, dtype=dtype,
        )  # fmt: skip

    def _padded(self, x: Tensor) -> Tensor:
        """``x`` with the zeros that the operator cannot add: those of an axis whose sides differ."""
        return x if self._extra is None else F.pad(x, self._extra)

    def _geometry(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}"
        )


def explicit_padding(
    padding: str | Pair, kernel: Pair, dilation: Pair
) -> tuple[Pair, tuple[int, int, int, int] | None]:
    """Padding as numbers: what both sides of (height, width) get, or else (left, right, top, bottom) for ``F.pad``."""
    if padding == "valid":
        return (0, 0), None
    if not isinstance(padding, str):
        return padding, None
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if all(t % 2 == 0 for t in total):
        return (total[0] // 2, total[1] // 2), None
    (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in total)
    return (0, 0), (left, right, top, bottom)


def check_linear(module: nn.Module) -> nn.Linear:
    """``module`` if a packed layer can stand in for it; TypeError or ValueError otherwise."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise TypeError(f"module: expected a torch.nn.Linear, got {type(module).__name__}")
    return _check_weight(module)


def check_conv2d(module: nn.Module) -> nn.Conv2d:
    """``module`` if a packed layer can stand in for it; TypeError or ValueError otherwise."""
    if (
        not isinstance(module, nn.Conv2d)
        or type(module).forward is not nn.Conv2d.forward
        or type(module)._conv_forward is not nn.Conv2d._conv_forward
    ):
        raise TypeError(f"module: expected a torch.nn.Conv2d, got {type(module).__name__}")
    check_padding_mode("module.padding_mode", module.padding_mode)
    return _check_weight(module)


def check_padding_mode(name: str, mode: str) -> None:
    if mode != "zeros":
        raise ValueError(f"{name}: expected 'zeros', got {mode!r}; pad with torch.nn.functional.pad before the layer")


def _check_weight(module: Twin) -> Twin:
    if module.weight.is_meta:
        raise ValueError("module: expected a weight with values, got one on the meta device")
    return module
