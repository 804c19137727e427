# SPDX-License-Identifier: Apache-2.0
"""Storage formats: what a method produces, a layer holds and an op runs.

Each format is a small dataclass of tensors in a *portable canonical* form; whatever an instruction set or a GPU wants
besides is derived from it, cached on the object and never saved.
"""

from slimtorch.formats.binary import Binary
from slimtorch.formats.block_sparse import BlockSparse
from slimtorch.formats.codebook import Codebook
from slimtorch.formats.sparse import Sparse
from slimtorch.formats.sparse_codebook import SparseCodebook

Format = Sparse | BlockSparse | Codebook | SparseCodebook | Binary

__all__ = ["Binary", "BlockSparse", "Codebook", "Format", "Sparse", "SparseCodebook"]
