# SPDX-License-Identifier: Apache-2.0
"""Argument checks and shape arithmetic shared by the operator families."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from slimtorch import _C

Activation = Literal["relu"] | None
Pair = tuple[int, int]
Operator = TypeVar("Operator", bound=Callable[..., Tensor])

_HALVES = (torch.float16, torch.bfloat16)

# Dtypes with native kernels, by device type. Others run the plain-torch reference, with one warning.
KERNEL_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
}
if _C.cuda_archs():
    KERNEL_DTYPES["cuda"] = (torch.float32, torch.float16, torch.bfloat16)
_warned: set[tuple[str, str, torch.dtype]] = set()


def has_kernel(op: str, x: Tensor, dtypes: dict[str, tuple[torch.dtype, ...]] = KERNEL_DTYPES) -> bool:
    """Whether ``op`` runs natively on ``x``; says once per (op, device, dtype) when it does not, and why."""
    device = x.device.type
    if device == "meta":  # shapes only, any dtype
        return True
    compiling = torch.compiler.is_compiling()
    old = None if compiling or device != "cuda" else _too_old(x.device.index or 0)
    if x.dtype in dtypes.get(device, ()) and old is None:
        return True
    key = (op, device, x.dtype)
    if key not in _warned and not compiling:
        _warned.add(key)
        why = f" ({old})" if old else ""
        if device == "cuda" and device not in dtypes:
            why = " (this build of slimtorch has no CUDA kernels)"
        warnings.warn(f"slimtorch.{op} has no kernel for {x.dtype} on {device}{why}: running dense torch", stacklevel=3)
    return False


@functools.lru_cache
def _too_old(index: int) -> str | None:
    """Why the CUDA kernels cannot run on a GPU, or None."""
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"its compute capability is {major}.{minor}, the kernels need 8.0 or later"


def says_out_of_memory(function: Operator) -> Operator:
    """``function``, a wrapper of operators, with torch.OutOfMemoryError where an operator finds no memory on a GPU.

    Operators allocate through torch's stable interface, which lets only the text of an error through, as RuntimeError.
    """

    @functools.wraps(function)
    def checked(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return function(x, *args, **kwargs)
        except RuntimeError as error:
            said = not isinstance(error, torch.OutOfMemoryError) and _ALLOCATES.search(str(error))
            if said and x.device.type == "cuda":
                raise torch.OutOfMemoryError(f"{function.__name__}: out of memory on {x.device}") from error
            raise

    return cast(Operator, checked)


# In the text of an error: the call that failed. With sizes that were checked, memory is all that these can lack.
_ALLOCATES = re.compile(r"aten::(new_empty|new_zeros|empty|zeros|clone|contiguous)\b")


def is_inference(x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing records, casts or traces this call, so that it can go straight to the kernel."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.device.type == "meta":
        return False  # torch refuses to say whether it casts on "meta"
    if values.device != x.device or (bias is not None and bias.device != x.device):
        return False  # one tensor on "meta" would make the dispatcher run shapes only
    if torch.is_autocast_enabled(x.device.type):
        return False
    if not torch.is_grad_enabled():
        return True
    return not (x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad))


def relu_flag(activation: Activation) -> bool:
    if activation not in (None, "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    return activation == "relu"


def autocast(x: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as ``F.linear`` does inside ``torch.autocast``; outside it, return the tensors as they are."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, values, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)


def check_operands(x: Tensor, values: Tensor, bias: Tensor | None, out_features: int) -> None:
    """What F.linear and F.conv2d would refuse too: mixed devices and dtypes, a bias that does not fit."""
    for name, tensor in (("weight", values), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (that of x), got {tensor.device}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"x: expected {tensor.dtype} (that of {name}), got {x.dtype}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias: expected shape [{out_features}], got {list(bias.shape)}")


def check_linear(x: Tensor, values: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> None:
    if len(shape) != 2:
        raise ValueError(f"weight: expected the format of a linear layer, got shape {list(shape)}")
    check_operands(x, values, bias, shape[0])
    if x.dim() < 1 or x.shape[-1] != shape[1]:
        raise ValueError(f"x: expected shape [..., {shape[1]}], got {list(x.shape)}")


def pair(name: str, value: int | Pair, minimum: int) -> Pair:
    """An int or a pair of ints as a pair, each at least ``minimum``."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(v, int) for v in both):
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
    if min(both) < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value!r}")
    return both[0], both[1]


def geometry(stride: int | Pair, padding: int | Pair, dilation: int | Pair) -> tuple[Pair, Pair, Pair]:
    """The three as pairs, checked."""
    return pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)


def conv_output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Height and width of a convolution's output (works on symbolic sizes too)."""
    height, width = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return height, width


def check_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    shape: tuple[int, ...],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> None:
    if len(shape) != 4:
        raise ValueError(f"weight: expected the format of a conv2d layer, got shape {list(shape)}")
    check_operands(x, values, bias, shape[0])
    if not isinstance(groups, int) or groups < 1 or shape[0] % groups:
        raise ValueError(f"groups: expected a positive divisor of the {shape[0]} output channels, got {groups!r}")
    if x.dim() not in (3, 4) or x.shape[-3] != shape[1] * groups:
        raise ValueError(f"x: expected shape [N, {shape[1] * groups}, H, W] or without N, got {list(x.shape)}")
    for i, axis in enumerate("HW"):
        extent = x.shape[-2 + i] + 2 * padding[i]
        if extent < dilation[i] * (shape[2 + i] - 1) + 1:
            raise ValueError(
                f"x: expected a padded {axis} of at least {dilation[i] * (shape[2 + i] - 1) + 1}, got {extent}"
            )


def fold_dtype(dtype: torch.dtype, kernel: Pair) -> torch.dtype:
    """The dtype for ``fold_columns``, which sums the taps of a pixel in it: float32 or wider if there are any."""
    return torch.float32 if dtype in _HALVES and kernel != (1, 1) else dtype


def fold_columns(columns: Tensor, size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Sum ``[N, C * kh * kw, Ho, Wo]`` back into ``[N, C, H, W]``: the transpose of lowering."""
    if kernel == (1, 1) and stride == (1, 1) and padding == (0, 0):
        return columns
    return F.fold(columns.flatten(2), size, kernel, dilation, padding, stride)


def masked_by_relu(grad: Tensor, output: Tensor | None) -> Tensor:
    """Gradient before a fused ReLU, whose output says where it was open. Expanded gradients become contiguous here."""
    # NaN counts as open, as in torch's own ReLU.
    return grad.contiguous() if output is None else torch.where(output <= 0, 0, grad).to(grad.dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients of ``dtype`` are summed in: float32 or wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """``tensor``, of 16 bits in float32: gradients of shared weights are summed before they are rounded."""
    return tensor.float() if tensor.dtype in _HALVES else tensor


def sum_to_bias(grad: Tensor, dims: list[int]) -> Tensor:
    """Bias gradient: sum over everything but channels, in float32 or wider."""
    if not dims:  # torch would sum over everything
        return grad
    return grad.sum(dim=dims, dtype=sum_dtype(grad.dtype)).to(grad.dtype)


def save(ctx: Any, **tensors: Tensor | None) -> None:
    """``ctx.save_for_backward`` by name, so that forward and backward cannot disagree about an order."""
    ctx.saved_names = tuple(tensors)
    ctx.save_for_backward(*tensors.values())


def saved(ctx: Any) -> dict[str, Tensor]:
    return dict(zip(ctx.saved_names, ctx.saved_tensors, strict=True))
