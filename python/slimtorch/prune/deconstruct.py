# SPDX-License-Identifier: Apache-2.0
"""What makes a lottery ticket win: other masks, other starting weights, other values for what is masked (Zhou et al.,
"Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask", 1905.01067, sections 2 to 4).

    initial, final ──criterion──▶ mask      choose_masks      large_final, movement, …
    ticket ──mask-1 action──▶ ticket        mask_1            kept weights start elsewhere: reshuffled, ±α, …
    ticket ──mask-0 action──▶ Frozen        mask_0            masked weights stay at a value other than zero

    dense, *tickets = slim.prune.lottery.search(model, train, rounds=5, criterion="magnitude_increase")
    signed = deconstruct.mask_1(tickets[-1], "constant", keep_sign=True)     # ±α with the signs of the start
    frozen = deconstruct.mask_0(tickets[-1], "initial")
    frozen.apply_(fresh)                                                     # then train it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimtorch.prune import mask as _masks
from slimtorch.prune.criteria import CRITERIA, Criterion, choose
from slimtorch.prune.lottery import Ticket, _check_fits, _load
from slimtorch.prune.magnitude import check_count

__all__ = [
    "CRITERIA",
    "Criterion",
    "Frozen",
    "FrozenWeights",
    "Mask0",
    "Mask1",
    "bake_",
    "choose",
    "choose_masks",
    "last_trained",
    "mask_0",
    "mask_1",
]

Mask1 = Literal["rewind", "reshuffle", "reinit", "constant"]
Mask0 = Literal["zero", "initial", "zero_if_shrunk"]


def choose_masks(
    ticket: Ticket, criterion: str | Criterion, kept: float | Mapping[str, float], *, seed: int = 0
) -> Ticket:
    """The ticket that a criterion draws at once from a trained one, for example from the dense network (round 0).

    Args:
        ticket: trained; its `start` and `final` are what the criterion compares. What its masks have removed stays
            removed.
        criterion: a name of `CRITERIA` or a function (initial, final) -> scores.
        kept: share of each layer's weights, in (0, 1]: one number, or by layer name.
        seed: of the order in which ties are broken.

    Raises:
        ValueError: the ticket was not trained, the criterion is unknown or gives NaN, a layer is not of the ticket or
            would have no weight left.
    """
    if not ticket.final:
        raise ValueError("ticket: expected a trained one, whose final weights the criterion looks at")
    if isinstance(kept, Mapping):
        strangers = sorted(set(kept) - set(ticket.masks))
        if strangers:
            raise ValueError(f"kept: expected layers of the ticket, {', '.join(ticket.masks)}; got {strangers}")
        shares = {name: kept.get(name, 1.0) for name in ticket.masks}
    else:
        shares = dict.fromkeys(ticket.masks, kept)
    first = {name: ticket.start[_key(name)] for name in ticket.masks}
    last = {name: ticket.final[_key(name)] for name in ticket.masks}
    masks = choose(criterion, first, last, shares, within=ticket.masks, seed=seed)
    return replace(ticket, round=ticket.round + 1, masks=masks, final={}, result=None)


def mask_1(
    ticket: Ticket,
    action: Mask1,
    *,
    keep_sign: bool,
    seed: int = 0,
    fresh: Mapping[str, Tensor] | nn.Module | None = None,
) -> Ticket:
    """The ticket with other values for the weights that it keeps (section 3, figure 4).

    Masked weights, biases and all else stay as they are in `ticket.start`, which counts as the initialisation.

    Args:
        ticket: whose masks and start to take.
        action: "rewind" leaves the weights as they start; "reshuffle" permutes those kept within each layer; "reinit"
            takes those of `fresh`; "constant" sets them to ±α, α being the standard deviation of all weights of the
            layer in `start`.
        keep_sign: each weight keeps the sign that it has in `start`: magnitudes are shuffled, drawn or constant. False:
            values come with their own signs, for "constant" by tossing a coin. A rewound weight always keeps its sign.
        seed: of shuffling and tossing.
        fresh: for "reinit" only: a newly drawn network of the same class without masks, or its state.

    Raises:
        ValueError: another action, `fresh` missing, superfluous or of another shape, or "rewind" without its sign.
    """
    _check_action(action, Mask1)
    check_count("seed", seed, 0)
    if action == "rewind" and not keep_sign:
        raise ValueError("keep_sign: expected True for 'rewind', which leaves weights as they are, got False")
    if (action == "reinit") != (fresh is not None):
        raise ValueError("fresh: expected newly drawn weights for 'reinit', and for nothing else")
    drawn = {} if fresh is None else ticket.with_start(fresh).start
    generator = torch.Generator().manual_seed(seed)
    start = {key: value.clone() for key, value in ticket.start.items()}
    for name, kept in ticket.masks.items():
        weight = start[_key(name)]
        kept = kept.to(weight.device)
        old = weight[kept]
        if action == "rewind":
            continue
        if action == "reshuffle":
            new = old[torch.randperm(len(old), generator=generator).to(old.device)]
        elif action == "reinit":
            new = drawn[_key(name)].to(weight)[kept]
        else:
            coins = torch.randint(0, 2, (len(old),), generator=generator).to(old) * 2 - 1
            new = coins * weight.float().std().to(weight.dtype)
        weight[kept] = new.abs() * torch.where(old < 0, -1, 1).to(old) if keep_sign else new
    return replace(ticket, start=start, final={}, result=None)


def last_trained(tickets: Sequence[Ticket]) -> dict[str, Tensor]:
    """Each weight as it was at the end of the last training that it took part in: when it was pruned, that is.

    What `mask_0` needs to know in which direction a weight moved, where tickets come from several rounds.

    Args:
        tickets: of one search, in its order; each trained.

    Raises:
        ValueError: no ticket, or one that was not trained.
    """
    if not tickets or not all(ticket.final for ticket in tickets):
        raise ValueError("tickets: expected at least one, and each of them trained")
    values = {key: value.clone() for key, value in tickets[0].final.items()}
    for ticket in tickets[1:]:
        for key, value in ticket.final.items():
            name = key.removesuffix("weight").removesuffix(".")
            kept = ticket.masks.get(name) if key == _key(name) else None
            values[key] = value.clone() if kept is None else torch.where(kept, value, values[key])
    return values


@dataclass(frozen=True)
class Frozen:
    """A ticket whose masked weights are held at values of their own.

    Attributes:
        ticket: masks, and the weights that those kept start from.
        held: layer name → the weight's shape and dtype; where the mask is False, what the weight is held at.
    """

    ticket: Ticket
    held: dict[str, Tensor]

    @property
    def remaining(self) -> float:
        """The share of the weights that are trained, in [0, 1]."""
        return self.ticket.remaining

    def apply_(self, model: nn.Module) -> None:
        """Freezes what is masked and puts the starting weights into the model, in place.

        Raises:
            ValueError: layers or shapes do not fit, or one of the layers has a mask or another parametrization. The
                model is left as it was.
        """
        _check_fits(model, self.ticket.masks, self.ticket.start)
        layers = dict(model.named_modules())
        for name in self.ticket.masks:
            if parametrize.is_parametrized(layers[name], "weight"):
                raise ValueError(f"model: the weight of layer {name!r} is masked or parametrized; bake it first")
        _load(model, self.ticket.start)
        for name, kept in self.ticket.masks.items():
            weight = cast(Tensor, layers[name].weight)
            held = self.held[name].to(weight, copy=True)
            _masks.attach(layers[name], FrozenWeights(kept.to(weight.device, copy=True), held))


class FrozenWeights(nn.Module):
    """The parametrization `weight = where(mask, original, held)`: what is masked has a value, and no gradient.

    Args:
        mask: bool, the weight's shape; True where the weight is trained. A buffer, as `held` is.
        held: the weight's shape and dtype.
    """

    mask: Tensor
    held: Tensor

    def __init__(self, mask: Tensor, held: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("held", held)

    def forward(self, original: Tensor) -> Tensor:
        """`original` where the mask is True, else `held`."""
        return torch.where(self.mask, original, self.held)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Lets `layer.weight = tensor` work; what is masked stays as it is. ValueError on another shape."""
        if weight.shape != self.mask.shape:
            raise ValueError(f"weight: expected shape {tuple(self.mask.shape)}, got {tuple(weight.shape)}")
        return weight


def mask_0(
    ticket: Ticket,
    action: Mask0,
    *,
    initial: Mapping[str, Tensor] | None = None,
    trained: Mapping[str, Tensor] | None = None,
) -> Frozen:
    """The ticket with other values for the weights that it masks, where they stay (section 4, figure 5).

    Args:
        ticket: whose masks and start to take.
        action: "zero", as in an ordinary ticket; "initial": where they began; "zero_if_shrunk": at zero those that
            training had moved towards zero before they were pruned, |w_f| < |w_i|, the others where they began.
        initial: the values they began with, by the model's own names; None: `ticket.start`.
        trained: for "zero_if_shrunk" only: a state with their values when they were pruned, see `last_trained`.

    Raises:
        ValueError: another action, `trained` missing or superfluous, or names or shapes that do not fit.
    """
    _check_action(action, Mask0)
    if (action == "zero_if_shrunk") != (trained is not None):
        raise ValueError("trained: expected the weights as they were when pruned for 'zero_if_shrunk', and only there")
    first = ticket.start if initial is None else initial
    held = {}
    for name, kept in ticket.masks.items():
        began = _weight("initial", first, name, kept)
        if action == "zero":
            held[name] = torch.zeros_like(began)
        elif trained is None:
            held[name] = began.clone()
        else:
            ended = _weight("trained", trained, name, kept).to(began)
            held[name] = torch.where(ended.abs() < began.abs(), 0, began)
    return Frozen(replace(ticket, final={}, result=None), held)


@torch.inference_mode(False)
def bake_(model: nn.Module) -> list[str]:
    """Takes `FrozenWeights` away and leaves the values, held ones too, in plain weights, in place.

    Returns:
        The names of the layers that had any.
    """
    found = [(name, module) for name, module in model.named_modules() if _frozen(module)]
    for _, module in found:
        _masks.detach(module, keep=True)
    return [name for name, _ in found]


def _frozen(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight") and any(
        isinstance(part, FrozenWeights) for part in cast(Any, module).parametrizations.weight
    )


def _key(name: str) -> str:
    return f"{name}.weight" if name else "weight"


def _weight(argument: str, state: Mapping[str, Tensor], name: str, mask: Tensor) -> Tensor:
    weight = state.get(_key(name))
    if weight is None or weight.shape != mask.shape:
        got = "none" if weight is None else f"shape {tuple(weight.shape)}"
        raise ValueError(f"{argument}: expected {_key(name)!r} of shape {tuple(mask.shape)}, got {got}")
    return weight.detach()


def _check_action(action: str, kind: object) -> None:
    known = get_args(kind)
    if action not in known:
        raise ValueError(f"action: expected one of {', '.join(known)}, got {action!r}")
