# SPDX-License-Identifier: Apache-2.0
"""Distillation: a small network learns from a large one, from several, or from its own last exit.

Losses are plain functions of two tensors. A `Distiller` joins several of them, taps layers by name and gives one loss
to any training loop. `TeacherCache` keeps a teacher's logits on disk.
"""

from slimtorch.distill.cache import TeacherCache
from slimtorch.distill.contrast import ContrastiveMemory
from slimtorch.distill.distiller import Distiller
from slimtorch.distill.losses import (
    attention_transfer_loss,
    contrastive_loss,
    decoupled_loss,
    dist_loss,
    hint_loss,
    logit_regression_loss,
    relation_loss,
    self_distillation_loss,
    similarity_loss,
    soft_target_loss,
)
from slimtorch.distill.terms import (
    Attention,
    Contrastive,
    Decoupled,
    Dist,
    FeatureTerm,
    Hint,
    LogitRegression,
    OutputTerm,
    Relation,
    Similarity,
    SoftTargets,
)

__all__ = [
    "Attention",
    "Contrastive",
    "ContrastiveMemory",
    "Decoupled",
    "Dist",
    "Distiller",
    "FeatureTerm",
    "Hint",
    "LogitRegression",
    "OutputTerm",
    "Relation",
    "Similarity",
    "SoftTargets",
    "TeacherCache",
    "attention_transfer_loss",
    "contrastive_loss",
    "decoupled_loss",
    "dist_loss",
    "hint_loss",
    "logit_regression_loss",
    "relation_loss",
    "self_distillation_loss",
    "similarity_loss",
    "soft_target_loss",
]
