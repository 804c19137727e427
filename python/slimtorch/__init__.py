# SPDX-License-Identifier: Apache-2.0
"""slimtorch: trained PyTorch networks made smaller and really faster.

    prune_      which weights, blocks or neurons to keep
    cluster_    weights that share few values
    binarize_   layers that train binary weights
    factorize_  layers of low rank
    separate_   convolutions that become depthwise and 1x1
    pack_       each layer goes to the format that measured fastest, or stays dense
    save, load  one small file, which loads into a fresh dense model
    measure     parameters, bytes, multiply-accumulates, latency
    Recipe      all of these in an order, resumable, from Python or one YAML file

Formats are in :mod:`slimtorch.formats`, layers in :mod:`slimtorch.nn`, operators in :mod:`slimtorch.ops`,
networks of the literature in :mod:`slimtorch.models`.
"""

import torch  # noqa: F401  the native library links against torch's, which must be loaded first

try:
    from slimtorch import _C
except ImportError as error:
    raise ImportError(
        f"slimtorch: the native library slimtorch._C cannot be loaded ({error}); "
        "build it with `pip install .` in the source tree, with the torch that runs it"
    ) from error

from slimtorch import design, distill, dynamic, formats, models, nn, ops, prune, quantize, recipe, reference, storage
from slimtorch.design import factorize_, separate_
from slimtorch.measure import Measurement, measure
from slimtorch.packing import PackReport, pack_
from slimtorch.prune import prune_
from slimtorch.quantize import binarize_, cluster_
from slimtorch.recipe import Recipe
from slimtorch.storage import FormatError, load, save

__version__: str = _C.version

__all__ = [
    "_C",
    "FormatError",
    "Measurement",
    "PackReport",
    "Recipe",
    "__version__",
    "binarize_",
    "cluster_",
    "design",
    "distill",
    "dynamic",
    "factorize_",
    "formats",
    "load",
    "measure",
    "models",
    "nn",
    "ops",
    "pack_",
    "prune",
    "prune_",
    "quantize",
    "recipe",
    "reference",
    "save",
    "separate_",
    "storage",
]
