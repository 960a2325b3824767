"""The registry of methods: ``METHODS[name]`` makes a BlockPlan. One file per method."""

from dsattn.methods.auto import METHOD as AUTO
from dsattn.methods.base import Method
from dsattn.methods.dense import METHOD as DENSE
from dsattn.methods.radial import METHOD as RADIAL
from dsattn.methods.semantic import METHOD as SEMANTIC
from dsattn.methods.sol import METHOD as SOL
from dsattn.methods.sparse_linear import METHOD as SPARSE_LINEAR
from dsattn.methods.spatial_temporal import METHOD as SPATIAL_TEMPORAL
from dsattn.methods.temporal import METHOD as TEMPORAL
from dsattn.methods.topk import METHOD as TOPK

METHODS: dict[str, Method] = {
    method.name: method
    for method in (DENSE, RADIAL, SPATIAL_TEMPORAL, TOPK, SOL, SEMANTIC, SPARSE_LINEAR, TEMPORAL, AUTO)
}

__all__ = ["METHODS", "Method"]
