# SPDX-License-Identifier: Apache-2.0
"""Models to records, and records into models.

Loading builds every tensor, format and layer first, beside the model; what then touches the model only assigns, and is
undone as a whole should it fail.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from slimtorch.design._replace import replaced_attributes
from slimtorch.nn import PackedLayer
from slimtorch.prune.mask import Mask
from slimtorch.storage._container import HEADER_LIMIT, Reader, fail
from slimtorch.storage._encodings import NAMES, TensorRecord, TensorWriter
from slimtorch.storage._records import (
    FAMILIES,
    KINDS,
    REPLACED,
    REPLACEMENTS,
    Geometry,
    LayerRecord,
    _jsonable,
    family_of,
    kind_of,
    options_of,
    stand_in,
)

_LARGER = 4  # how many times the numbers of a dense layer what stands in its place may hold

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with every name it has, in the model's order; what parametrizes a weight is left out."""
    yield from _walk(model, "", ())


def _walk(module: nn.Module, name: str, above: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    if any(module is outer for outer in above):
        return  # a module within itself
    yield name, module
    for key, child in module._modules.items():
        if child is not None and not (key == "parametrizations" and parametrize.is_parametrized(module)):
            yield from _walk(child, f"{name}.{key}" if name else key, (*above, module))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a module itself."""
    hidden = module._non_persistent_buffers_set
    buffers = {name: buffer for name, buffer in module._buffers.items() if name not in hidden}
    return {name: tensor for name, tensor in (*module._parameters.items(), *buffers.items()) if tensor is not None}


# --- saving -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def describe(model: nn.Module, writer: TensorWriter) -> list[dict[str, Any]]:
    """The records of all layers that have tensors, their tensors written.

    Raises:
        ValueError: a layer holds what files cannot.
    """
    layers = []
    done: dict[int, tuple[nn.Module, dict[str, Any] | None]] = {}
    for name, module in _saved(model):
        if id(module) not in done:
            done[id(module)] = (module, _describe(name, module, writer))
        _, record = done[id(module)]
        if record is not None:
            layers.append({"name": name, **record})
    return layers


def _saved(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As :func:`walk`, with modules of training replaced by what they pack into."""
    stand_ins: dict[int, nn.Module] = {}
    below: str | None = None
    for name, module in walk(model):
        if below is not None and name.startswith(below):
            continue
        below = None
        pack = getattr(module, "packed", None)
        if not callable(pack):
            yield name, module
            continue
        below = f"{name}." if name else ""
        if id(module) not in stand_ins:
            stand_in = pack()
            if not isinstance(stand_in, nn.Module):
                raise ValueError(
                    f"model: packed() of layer {name!r} should return a module, got {type(stand_in).__name__}"
                )
            stand_ins[id(module)] = stand_in
        yield from _walk(stand_ins[id(module)], name, ())


def _describe(name: str, module: nn.Module, writer: TensorWriter) -> dict[str, Any] | None:
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        raise ValueError(
            f"model: layer {name!r} keeps state that is no tensor (get_extra_state); a file cannot hold it"
        )
    tensors = own_tensors(module)
    if type(module) in REPLACEMENTS.values() and not tensors:
        geometry = cast(Any, module).geometry()
        return {"kind": type(module).__name__, "format": REPLACED, "geometry": geometry, "options": {}, "tensors": {}}
    kind = kind_of(module)
    record: dict[str, Any] = {
        "kind": type(module).__name__ if kind is None else kind.name,
        "format": "dense",
        "geometry": {} if kind is None else kind.geometry(module),
        "options": {},
        "tensors": {},
    }
    if isinstance(module, PackedLayer):
        try:
            family = family_of(module)
            held = module.format.validate()
            written = family.write(writer, held)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: layer {name!r} cannot be saved: {error}") from error
        known = {*(key for key in written), "bias", "weight_shape"}
        if tensors.keys() - known:
            raise ValueError(f"model: layer {name!r} has tensors beside its format: {sorted(tensors.keys() - known)}")
        record |= {"format": family.name, "options": options_of(module)}
        if module.bias is not None:
            written["bias"] = _write(writer, f"{name}.bias", module.bias)
        return {**record, "tensors": written}
    if parametrize.is_parametrized(module):
        tensors = {"weight": _baked(name, module), **tensors}
    if not tensors:
        return None
    record["tensors"] = {
        key: _write(writer, f"{name}.{key}" if name else key, tensor) for key, tensor in tensors.items()
    }
    return record


def _write(writer: TensorWriter, name: str, tensor: Tensor) -> int:
    if is_lazy(tensor):
        raise ValueError(f"model: {name!r} has no shape yet; run the model once")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in NAMES:
        raise ValueError(f"model: {name!r} is a {tensor.layout} tensor of {tensor.dtype}, which files cannot hold")
    if tensor.is_meta:
        raise ValueError(f"model: {name!r} is on the meta device and has no values")
    return writer.add(tensor)


def _baked(name: str, module: nn.Module) -> Tensor:
    """The weight of a layer with a mask, its zeros in place."""
    lists = cast("Mapping[str, Any]", module.parametrizations)
    strangers = [
        type(part).__name__ for key in lists for part in lists[key] if key != "weight" or not isinstance(part, Mask)
    ]
    if strangers:
        raise ValueError(
            f"model: layer {name!r} is parametrized by {', '.join(strangers)}; a file holds masks of slimtorch.prune "
            "only. Make the weight permanent first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return cast(Tensor, module.weight).detach()


# --- loading ------------------------------------------------------------------------------------------------------


def header_limit(model: nn.Module) -> int:
    """Bytes that the header of a file for this model has at most, far above what one takes."""
    size = 1 << 16
    for name, module in walk(model):
        size += 8 * len(name) + 2048 * (1 + len(module._parameters) + len(module._buffers))
        if isinstance(module, (nn.Linear, nn.Conv2d)):  # four parts may stand in its place, each packed
            size += 32 * len(name) + 16384
    return min(size, HEADER_LIMIT)


@dataclass
class _Change:
    """What a module becomes: its class and its attributes."""

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]


@dataclass
class Loader:
    """Puts a file into a model: ``match``, ``build``, ``commit``, of which the last alone touches the model."""

    model: nn.Module
    layers: Sequence[LayerRecord]
    tensors: Sequence[TensorRecord]
    _changes: list[_Change] = field(default_factory=list)
    _values: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    _stand_ins: dict[int, nn.Module] = field(default_factory=dict)  # id of a dense layer -> what takes its place

    def match(self) -> list[tuple[LayerRecord, nn.Module]]:
        """The layer of the model for each record, every one found to fit before anything is decoded."""
        targets: dict[str, nn.Module] = {}
        for name, module in self._walk():
            if parametrize.is_parametrized(module) or callable(getattr(module, "packed", None)):
                raise ValueError(
                    f"model: expected a fresh dense model; layer {name!r} is a {type(module).__name__}, "
                    "set up for training"
                )
            if own_tensors(module) or type(module) in REPLACEMENTS.values():
                targets[name] = module
        names = {layer.name for layer in self.layers}
        surplus = [layer.name for layer in self.layers if layer.name not in targets]
        missing = [name for name in targets if name not in names]
        if surplus or missing:
            parts = [f"the file has {_list(surplus)}, which the model lacks"] if surplus else []
            parts += [f"the model has {_list(missing)}, which the file lacks"] if missing else []
            fail("layers", "; ".join(parts))
        pairs: dict[int, tuple[LayerRecord, nn.Module]] = {}
        for layer in self.layers:
            module = targets[layer.name]
            twice = pairs.get(id(module))
            if twice is not None:
                if _but_name(twice[0]) != _but_name(layer):
                    fail(
                        layer.place, f"{layer.name!r} and {twice[0].name!r} are one layer in the model, not in the file"
                    )
                continue
            self._fit(layer, module)
            pairs[id(module)] = (layer, module)
        return list(pairs.values())

    def _walk(self) -> Iterator[tuple[str, nn.Module]]:
        """The model's layers; after one that the file replaces, the parts of what takes its place."""
        replaced = {layer.name: layer for layer in self.layers if layer.format == REPLACED}
        for name, module in walk(self.model):
            yield name, module
            if name in replaced and type(module) not in REPLACEMENTS.values():
                if id(module) not in self._stand_ins:
                    self._stand_ins[id(module)] = self._stand_in(replaced[name], module)
                yield from itertools.islice(_walk(self._stand_ins[id(module)], name, ()), 1, None)

    def _stand_in(self, layer: LayerRecord, module: nn.Module) -> nn.Module:
        """What the file has in place of a dense layer, found to fit there; its tensors have no values yet."""
        place = f"{layer.place} ({layer.name!r})"
        made = stand_in(layer.kind, layer.geometry, layer.place)
        dense = REPLACEMENTS[layer.kind].replaces
        if type(module) is not dense or "forward" in module.__dict__:
            fail(place, f"the file has a {layer.kind} for a {dense.__name__}, the model a {type(module).__name__}")
        kind = kind_of(module)
        assert kind is not None
        ours = kind.geometry(module)
        if ours.pop("groups", 1) != 1:
            fail(place, f"the file has a {layer.kind}, the model a layer with groups")
        _fit_geometry(place, {name: _jsonable(getattr(made, name)) for name in ours}, ours, kind.sized)
        if (cast(Any, made).bias is None) != (module.bias is None):
            fail(place, f"of the {layer.kind} in the file and the layer in the model only one has a bias")
        weight = cast(Tensor, module.weight)
        if is_lazy(weight):
            raise ValueError(f"model: the weight of {layer.name!r} has no shape yet; run the model once")
        most = sum(parameter.numel() for parameter in module.parameters())
        size = sum(tensor.numel() for tensor in (*made.parameters(), *made.buffers()))
        if size > _LARGER * most + 64 * (weight.shape[0] + weight.shape[1]):
            fail(place, f"a {layer.kind} of {size} numbers in place of {most}")
        made = made.to_empty(device=weight.device).requires_grad_(weight.requires_grad)
        return made.train(module.training)

    def _fit(self, layer: LayerRecord, module: nn.Module) -> None:
        place = f"{layer.place} ({layer.name!r})"
        if layer.format == REPLACED:
            if id(module) not in self._stand_ins and type(module) is not REPLACEMENTS[layer.kind]:
                fail(place, f"the file has a {layer.kind}, the model a {type(module).__name__}")
            return
        kind = kind_of(module)
        ours = type(module).__name__ if kind is None else kind.name
        if ours != layer.kind and (kind is not None or layer.kind in KINDS):
            fail(place, f"the file has a {layer.kind}, the model a {ours}")
        if kind is not None:
            _fit_geometry(place, layer.geometry, kind.geometry(module), kind.sized)
        present = own_tensors(module)
        if layer.format == "dense":
            if isinstance(module, PackedLayer):
                fail(place, f"the file has a dense weight, the model a {type(module).__name__}")
            if layer.numbers.keys() != present.keys():
                fail(place, f"the file has {_list(layer.numbers)}, the model {_list(present)}")
            for name, number in layer.numbers.items():
                self._fit_tensor(self.tensors[number], name, present[name])
            return
        if not isinstance(module, PackedLayer):
            own = nn.Linear if layer.kind == "Linear" else nn.Conv2d
            if type(module).forward is not own.forward or "forward" in module.__dict__:
                fail(place, f"the file has a {layer.format} weight; {type(module).__name__} computes in its own way")
            wanted = {"weight"}
        else:
            wanted = set(present) - {"bias"}
        if set(present) - {"bias"} != wanted or ("bias" in present) != ("bias" in layer.numbers):
            fail(place, f"the file has {_list(layer.numbers)}, the model {_list(present)}")
        weight = module._values() if isinstance(module, PackedLayer) else cast(Tensor, module.weight)
        if not weight.is_floating_point():
            fail(place, f"the file has a floating-point weight, the model {weight.dtype}")
        if "bias" in present:
            self._fit_tensor(self.tensors[layer.numbers["bias"]], "bias", present["bias"])

    def _fit_tensor(self, tensor: TensorRecord, name: str, present: Tensor) -> None:
        """A tensor of the file must be of the same sort as the model's, and not larger."""
        if is_lazy(present):
            raise ValueError(f"model: {name!r} has no shape yet; run the model once")
        if len(tensor.shape) != present.dim() or any(a > b for a, b in zip(tensor.shape, present.shape, strict=True)):
            fail(
                f"{tensor.place}.shape", f"expected at most {list(present.shape)} of {name!r}, got {list(tensor.shape)}"
            )
        both = tensor.dtype.is_floating_point and present.is_floating_point()
        if tensor.dtype != present.dtype and not both:
            fail(f"{tensor.place}.dtype", f"expected {present.dtype} of {name!r}, got {tensor.dtype}")

    def build(self, pairs: Sequence[tuple[LayerRecord, nn.Module]], reader: Reader) -> None:
        """Decode all tensors and make all layers."""
        decoded: dict[int, Tensor] = {}
        for number, tensor in enumerate(self.tensors):
            decoded[number] = tensor.decode(reader, decoded)
        placed = _Placed(decoded, self._values)
        for layer, module in pairs:
            if layer.format == REPLACED:
                made = self._stand_ins.get(id(module))
                if made is not None:
                    self._changes.append(_Change(module, type(made), replaced_attributes(module, made)))
            elif layer.format == "dense":
                self._changes.append(_dense_change(layer, module, placed))
            else:
                self._changes.append(_packed_change(layer, module, decoded, placed))

    def commit(self) -> None:
        """Change the model."""
        undo: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
        before: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for parameter, value in self._values:
                before.append((parameter, parameter.data))
                parameter.data = value
            for change in self._changes:
                undo.append((change.module, type(change.module), change.module.__dict__))
                _become(change.module, change.kind, change.attributes)
        except BaseException:
            for module, kind, attributes in reversed(undo):
                _become(module, kind, attributes)
            for parameter, value in before:
                parameter.data = value
            raise


def _become(module: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
    """Change class and attributes, past any ``__setattr__`` of the module's own."""
    if type(module) is not kind:
        object.__setattr__(module, "__class__", kind)
    object.__setattr__(module, "__dict__", attributes)


@dataclass
class _Placed:
    """Which tensor of the file becomes which parameter, so that those shared in the file are shared again."""

    decoded: Mapping[int, Tensor]
    values: list[tuple[nn.Parameter, Tensor]]
    _parameters: dict[int, nn.Parameter] = field(default_factory=dict)
    _moved: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)
    _taken: dict[int, int] = field(default_factory=dict)  # id of a parameter of the model -> its tensor in the file

    def tensor(self, number: int, device: torch.device) -> Tensor:
        key = (number, device)
        if key not in self._moved:
            self._moved[key] = self.decoded[number].to("cpu" if device.type == "meta" else device)
        return self._moved[key]

    def parameter(self, number: int, present: nn.Parameter, made: nn.Parameter | None = None) -> nn.Parameter:
        """The parameter for a tensor: the model's own where it can be, ``made`` or a new one where it cannot."""
        if number in self._parameters:
            return self._parameters[number]
        value = self.tensor(number, present.device)
        free = self._taken.setdefault(id(present), number) == number
        if made is not None:
            chosen = made
        elif free and value.device == present.device and not present.is_inference():
            chosen = present
            self.values.append((present, value))
        else:
            chosen = nn.Parameter(value, requires_grad=present.requires_grad)
        self._parameters[number] = chosen
        return chosen


def _dense_change(layer: LayerRecord, module: nn.Module, placed: _Placed) -> _Change:
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    for name, number in layer.numbers.items():
        present = parameters.get(name)
        if present is not None:
            parameters[name] = placed.parameter(number, present)
        else:
            buffers[name] = placed.tensor(number, cast(Tensor, buffers[name]).device)
    sizes: dict[str, Any] = {}
    if layer.kind in KINDS:
        for name in KINDS[layer.kind].sized:
            value = layer.geometry[name]
            sizes[name] = tuple(value) if isinstance(value, list) else value
    attributes = {**module.__dict__, **sizes, "_parameters": parameters, "_buffers": buffers}
    return _Change(module, type(module), attributes)


def _packed_change(layer: LayerRecord, module: nn.Module, decoded: Mapping[int, Tensor], placed: _Placed) -> _Change:
    family = FAMILIES[layer.format]
    present = module._values() if isinstance(module, PackedLayer) else cast(nn.Parameter, module.weight)
    tensors = {name: placed.tensor(number, present.device) for name, number in layer.numbers.items()}
    held = layer.build({name: tensor for name, tensor in tensors.items() if name != "bias"})
    twin = _twin(layer, module, present.requires_grad)
    options = {"activation": layer.options["activation"]}
    if layer.format == "binary":
        options |= {"binarize_input": layer.options["binarize_input"], "scale": layer.options["scale"]}
    packed = cast(Any, family.layers[layer.kind]).from_format(twin, held, **options)
    values = placed.parameter(
        layer.numbers[family.values], cast(nn.Parameter, present), packed._parameters[family.values]
    )
    packed._parameters[family.values] = values
    packed._held = None
    if "bias" in layer.numbers:
        own = cast(nn.Parameter, module._parameters["bias"])
        packed._parameters["bias"] = placed.parameter(layer.numbers["bias"], own)
    kept = {key: value for key, value in module.__dict__.items() if key not in _standard(type(module), layer.kind)}
    hooks = {key: module.__dict__[key] for key in _HOOKS if key in module.__dict__}
    buffers = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
    attributes = {
        **kept, **packed.__dict__, **hooks, "training": module.training, "_modules": module._modules,
        "_buffers": {**buffers, **packed._buffers}, "_non_persistent_buffers_set": module._non_persistent_buffers_set,
    }  # fmt: skip
    return _Change(module, type(packed), attributes)


def _twin(layer: LayerRecord, module: nn.Module, requires_grad: bool) -> nn.Linear | nn.Conv2d:
    """A dense layer without values, of the file's geometry, for a packed one to take the place of."""
    own = nn.Linear if layer.kind == "Linear" else nn.Conv2d
    twin = cast("nn.Linear | nn.Conv2d", own.__new__(own))
    nn.Module.__init__(twin)
    for name, value in layer.geometry.items():
        setattr(twin, name, tuple(value) if isinstance(value, list) else value)
    twin.weight = nn.Parameter(torch.empty(layer.shape, device="meta"), requires_grad=requires_grad)
    twin.register_parameter("bias", None)
    if "bias" in layer.numbers:  # a place for the real one
        twin.bias = nn.Parameter(torch.empty(layer.shape[0], device="meta"), requires_grad=False)
    return twin.train(module.training)


_STANDARD: dict[str, frozenset[str]] = {}


def _standard(kind: type[nn.Module], name: str) -> frozenset[str]:
    """Attributes that a layer has by its class, and that go when it becomes another."""
    if name not in _STANDARD:
        twin = nn.Linear(1, 1, device="meta") if name == "Linear" else nn.Conv2d(1, 1, 1, device="meta")
        packed = {"activation", "groups", "bits", "group_size", "zero", "block_size", "binarize_input", "scaled",
                  "_shape", "_plans", "_planned", "_held", "_sides", "_extra"}  # fmt: skip
        _STANDARD[name] = frozenset(twin.__dict__)
        _STANDARD[f"packed {name}"] = frozenset(twin.__dict__) | packed
    return _STANDARD[f"packed {name}" if issubclass(kind, PackedLayer) else name]


def _fit_geometry(place: str, file: Geometry, model: Geometry, sized: Sequence[str]) -> None:
    for name, ours in model.items():
        theirs = file[name]
        if name in sized:
            pairs = zip(theirs, ours, strict=False) if isinstance(ours, list) else [(theirs, ours)]
            if (isinstance(ours, list) and len(theirs) != len(ours)) or any(a > b for a, b in pairs):
                fail(f"{place}.{name}", f"expected at most {ours}, got {theirs}")
        elif theirs != ours:
            fail(f"{place}.{name}", f"the file has {theirs!r:.40}, the model {ours!r}")


def _but_name(layer: LayerRecord) -> object:
    return layer.kind, layer.format, layer.geometry, layer.options, layer.numbers


def _list(names: Any) -> str:
    """The first few names, quoted."""
    shown = [repr(name) for name in itertools.islice(names, 6)]
    more = len(names) - 5
    return ", ".join(shown) if more <= 1 else ", ".join([*shown[:5], f"{more} more"])
