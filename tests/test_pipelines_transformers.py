"""Families proved on their transformer alone: dense mode equals stock, every call is understood."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsattn.engine import Engine
from dsattn.pipelines.adapter import enable

from . import tiny_pipelines, tiny_transformers


def forward(model: Any, args: dict[str, Any]) -> torch.Tensor:
    clones = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in args.items()}
    with torch.no_grad():
        out = model(**clones, return_dict=False)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", tiny_transformers.CASES)
def test_dense_equals_stock_and_sparse_understands_the_layout(name: str) -> None:
    model, args, grid = tiny_transformers.CASES[name]()
    model.eval()
    stock = forward(model, args)
    assert torch.isfinite(stock).all()
    handle = enable(model, Engine("dense"))
    assert torch.equal(forward(model, args), stock)
    handle.remove()

    engine = tiny_pipelines.Recorder("topk", density=1.0, impl="torch", strict=True)
    enable(model, engine)
    everything = forward(model, args)
    torch.testing.assert_close(everything, stock, rtol=1e-4, atol=1e-5)
    assert {call.grid for call in engine.calls} == {grid}
    assert sorted(call.layer for call in engine.calls) == list(range(engine.calls[0].num_layers or 0))
