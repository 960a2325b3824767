"""torch.compile: one graph for all layers, whatever step, branch or plan a call belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from dsattn.pipelines.adapter import enable

from . import tiny_pipelines as tiny


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


REGIONAL = {
    # builder, graphs: blocks only for Wan and LTX; HunyuanVideo also compiles its patch embedding and refiner
    "wan": (lambda: tiny.wan(10), 1),
    "ltx": (tiny.ltx, 1),
    "hunyuan": (lambda: tiny.hunyuan(9), 5),
    "hunyuan15": (tiny.hunyuan15, 3),
}


@pytest.mark.parametrize("name", REGIONAL)
def test_item11_regional_compilation_shares_one_graph(name: str) -> None:
    build, stock_graphs = REGIONAL[name]
    pipe, args = build()
    handle = enable(pipe, **tiny.SPARSE, dense_steps=1)
    eager = tiny.run(pipe, args)
    summary = handle.summary()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(tiny.run(pipe, args), eager, rtol=1e-5, atol=1e-5)
        assert handle.summary()["calls"] == summary["calls"]
        assert handle.summary()["fallbacks"] == {}
    assert graphs() == stock_graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("build", [lambda: tiny.wan(9), tiny.cogvideox_rotary, tiny.ltx_condition])
def test_item11_whole_transformer_in_full_graphs(build: Callable[[], tiny.Pipe]) -> None:
    pipe, args = build()
    handle = enable(pipe, **tiny.SPARSE, dense_steps=1)
    eager = tiny.run(pipe, args)
    summary = handle.summary()
    pipe.transformer.compile(fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(tiny.run(pipe, args), eager, rtol=1e-5, atol=1e-5)
        assert handle.summary()["calls"] == summary["calls"]
    assert graphs() <= 2  # the forward, and the hook in front of it
    assert not counters["graph_break"]


def test_item11_enable_after_compilation_and_remove() -> None:
    pipe, args = tiny.wan()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    stock = tiny.run(pipe, args)
    handle = enable(pipe, **tiny.SPARSE, dense_steps=1)
    tiny.run(pipe, args)
    assert handle.summary()["calls"] == {"dense": 4, "refresh": 8}
    handle.remove()
    assert torch.equal(tiny.run(pipe, args), stock)


def test_item11_inductor() -> None:
    pipe, args = tiny.ltx()
    handle = enable(pipe, **tiny.SPARSE, dense_steps=1)
    eager = tiny.run(pipe, args)
    calls = handle.summary()["calls"]
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(tiny.run(pipe, args), eager, rtol=1e-3, atol=1e-4)
    assert handle.summary()["calls"] == calls and graphs() == 1


def test_item11_operators_stay_out_of_cuda_graphs() -> None:
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch has no tag for operators that CUDA graphs must not capture")
    for operator in (torch.ops.dsattn.attention.default, torch.ops.dsattn.begin.default):
        assert torch.Tag.cudagraph_unsafe in operator.tags


def test_item11_a_compiled_call_after_remove_is_refused() -> None:
    pipe, args = tiny.wan()
    handle = enable(pipe, **tiny.SPARSE)
    address = pipe.transformer.blocks[0].attn1.processor.dsattn_address
    handle.remove()
    q = torch.randn(1, 48, 2, 12)
    with pytest.raises(RuntimeError, match="was removed"):
        torch.ops.dsattn.attention(q, q, q, None, None, -1, address)
