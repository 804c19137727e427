# SPDX-License-Identifier: Apache-2.0
"""The memory of contrastive distillation (Tian et al., arXiv 1910.10699, section 3.2 and appendix).

Every training sample has two remembered embeddings, one of each network, unit vectors: negatives are drawn from them,
thousands at no cost of forward passes. Both embeddings are linear layers, trained with the student.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch.distill.losses import _product, _wide, check_temperature, contrastive_loss


class ContrastiveMemory(nn.Module):
    """Embeds features of both networks and tells samples apart in both directions.

    Args:
        student_features, teacher_features: numbers of features, flattened.
        samples: M, size of the training set.
        features: of the embeddings.
        negatives: drawn for each sample, with replacement, never the sample itself.
        temperature: τ > 0.
        momentum: of the memory: ``m <- normalise(momentum * m + (1 - momentum) * embedding)``.

    The constants that scores are divided by (`contrastive_loss`) are estimated on the first batch in train mode and
    kept, as in the authors' code.

    Where torch.distributed runs, every process remembers the samples of all, so all must call it in train mode equally
    often, as with SyncBatchNorm.

    Raises:
        TypeError, ValueError: a number that is out of range or of another kind.
    """

    student_memory: Tensor
    teacher_memory: Tensor
    log_normalizers: Tensor

    def __init__(
        self,
        student_features: int,
        teacher_features: int,
        samples: int,
        *,
        features: int = 128,
        negatives: int = 1024,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        check_contrast(samples, features, negatives, temperature, momentum)
        self.student_embedding = nn.Linear(student_features, features)
        self.teacher_embedding = nn.Linear(teacher_features, features)
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, F.normalize(torch.randn(samples, features), dim=1))
        self.register_buffer("log_normalizers", torch.full((2,), -math.inf))  # of both directions; not known yet

    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor | None) -> Tensor:
        """Loss of features ``[batch, …]`` of the samples ``indices`` ``[batch]``; the memory moves in train mode.

        Raises:
            TypeError: ``indices`` are no integers.
            ValueError: ``indices`` are missing, not one for each sample, or out of range.
        """
        samples = len(self.student_memory)
        if indices is None:
            raise ValueError("indices: Contrastive needs the number of each sample in the training set, got None")
        if not isinstance(indices, Tensor):
            raise TypeError(f"indices: expected a tensor, got {type(indices).__name__}")
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"indices: expected integers, got {indices.dtype}")
        if indices.shape != student.shape[:1]:
            raise ValueError(f"indices: expected shape [{len(student)}], got {list(indices.shape)}")
        if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < samples):
            raise ValueError(
                f"indices: expected numbers from 0 to {samples - 1}, got {int(indices.min())} to {int(indices.max())}"
            )
        indices = indices.to(self.student_memory.device, torch.long)  # uint8 would be a mask
        width = self.student_embedding.weight.dtype
        (ours,) = _wide(self.student_embedding(student.flatten(1).to(width)))
        (theirs,) = _wide(self.teacher_embedding(teacher.flatten(1).to(width)))
        ours, theirs = F.normalize(ours, dim=1), F.normalize(theirs, dim=1)
        # a shift by 1 to M - 1 never meets the sample itself
        shift = torch.randint(1, samples, (len(indices), self.negatives), device=indices.device)
        others = (indices[:, None] + shift) % samples
        loss = self._contrast(0, ours, theirs, self.teacher_memory[others])
        loss = loss + self._contrast(1, theirs, ours, self.student_memory[others])
        if self.training:
            where, new = _of_all_processes(indices), _of_all_processes(torch.stack([ours, theirs], dim=1).detach())
            self._remember(self.student_memory, where, new[:, 0])
            self._remember(self.teacher_memory, where, new[:, 1])
        return loss

    def _contrast(self, direction: int, anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        samples, known = len(self.student_memory), self.log_normalizers[direction].float()
        if not torch.isfinite(known):
            known = self._estimate(anchors, negatives)
            if self.training:
                everyone = _of_all_processes(known[None])
                known = everyone.logsumexp(0) - math.log(len(everyone))
                self.log_normalizers[direction] = known
        return contrastive_loss(anchors, positives, negatives, samples, self.temperature, log_normalizer=known)

    @torch.no_grad()
    def _estimate(self, anchors: Tensor, negatives: Tensor) -> Tensor:
        """log Z, Z = M · mean e^(a·b/τ). An empty batch leaves it at -∞, and its loss is 0."""
        anchors, negatives = _wide(anchors, negatives)
        scores = _product(negatives, anchors.unsqueeze(2)).flatten() / self.temperature
        return scores.logsumexp(0) - math.log(max(len(scores), 1)) + math.log(len(self.student_memory))

    @torch.no_grad()
    def _remember(self, memory: Tensor, indices: Tensor, embedding: Tensor) -> None:
        moved = self.momentum * memory[indices] + (1 - self.momentum) * embedding.to(memory.dtype)
        memory[indices] = F.normalize(moved, dim=1)


def _of_all_processes(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; they may differ in number."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    lengths = [int(length) for length in counts]
    padded = torch.cat([rows, rows.new_zeros(max(lengths) - len(rows), *rows.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])


def check_contrast(samples: int, features: int, negatives: int, temperature: float, momentum: float) -> None:
    """TypeError or ValueError for settings that are no settings of a memory."""
    for name, value, least in (("samples", samples, 2), ("features", features, 1), ("negatives", negatives, 1)):
        what = f"{name}: expected a whole number, {least} or more"
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{what}, got {value!r}")
        if value < least:
            raise ValueError(f"{what}, got {value!r}")
    check_temperature(temperature)
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum: expected a number in [0, 1), got {momentum!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum!r}")
