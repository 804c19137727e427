# SPDX-License-Identifier: Apache-2.0
"""The memory of contrastive distillation (Tian et al., arXiv 1910.10699, section 3.2 and appendix).

Every training sample has two remembered embeddings, one of each network, unit vectors: negatives are drawn from them,
thousands at no cost of forward passes. Both embeddings are linear layers, trained with the student.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtorch.distill.losses import contrastive_loss


class ContrastiveMemory(nn.Module):
    """Embeds features of both networks and tells samples apart in both directions.

    Args:
        student_features, teacher_features: numbers of features, flattened.
        samples: M, size of the training set.
        features: of the embeddings.
        negatives: drawn for each sample, with replacement, never the sample itself.
        temperature: τ > 0.
        momentum: of the memory: ``m <- normalise(momentum * m + (1 - momentum) * embedding)``.

    With DistributedDataParallel, ``broadcast_buffers=False`` leaves every process its own memory; otherwise that of the
    first process is used by all.
    """

    student_memory: Tensor
    teacher_memory: Tensor

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
        if samples < 2:
            raise ValueError(f"samples: expected the size of the training set, 2 or more, got {samples!r}")
        if negatives < 1 or features < 1:
            raise ValueError(f"negatives, features: expected 1 or more of each, got {negatives!r}, {features!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum!r}")
        self.student_embedding = nn.Linear(student_features, features)
        self.teacher_embedding = nn.Linear(teacher_features, features)
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, F.normalize(torch.randn(samples, features), dim=1))

    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor | None) -> Tensor:
        """Loss of features ``[batch, …]`` of the samples ``indices`` ``[batch]``; the memory moves in train mode."""
        samples = len(self.student_memory)
        if indices is None:
            raise ValueError("indices: Contrastive needs the number of each sample in the training set, got None")
        if indices.shape != student.shape[:1] or indices.is_floating_point():
            raise ValueError(
                f"indices: expected integers of shape [{len(student)}], got {indices.dtype} {list(indices.shape)}"
            )
        if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < samples):
            raise ValueError(
                f"indices: expected numbers from 0 to {samples - 1}, got {int(indices.min())} to {int(indices.max())}"
            )
        width = self.student_embedding.weight.dtype
        ours = F.normalize(self.student_embedding(student.flatten(1).to(width)).float(), dim=1)
        theirs = F.normalize(self.teacher_embedding(teacher.flatten(1).to(width)).float(), dim=1)
        # a shift by 1 to M - 1 never meets the sample itself
        shift = torch.randint(1, samples, (len(indices), self.negatives), device=indices.device)
        others = (indices[:, None] + shift) % samples
        loss = contrastive_loss(ours, theirs, self.teacher_memory[others], samples, self.temperature)
        loss = loss + contrastive_loss(theirs, ours, self.student_memory[others], samples, self.temperature)
        if self.training:
            self._remember(self.student_memory, indices, ours)
            self._remember(self.teacher_memory, indices, theirs)
        return loss

    @torch.no_grad()
    def _remember(self, memory: Tensor, indices: Tensor, embedding: Tensor) -> None:
        moved = self.momentum * memory[indices] + (1 - self.momentum) * embedding.to(memory.dtype)
        memory[indices] = F.normalize(moved, dim=1)
