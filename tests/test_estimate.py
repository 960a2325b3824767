"""The estimated error is the error: sampled rows against what attend really returns."""

import pytest
import torch

import dsattn
from dsattn.grid import Call, VideoGrid
from dsattn.methods.estimate import RowSample, relative_error, sample_rows

GRID = VideoGrid(4, 9, 11, text=13)


def tensors(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, GRID.tokens, 3, 16, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("topk", {"density": 0.2, "block_q": 32, "block_k": 16}),
        ("topk", {"density": 0.2, "tail": "none", "order": "hilbert", "block_q": 16, "block_k": 16}),
        ("topk", {"density": 0.2, "tail": "pooled_block", "block_q": 32, "block_k": 16}),
        ("semantic", {"density": 0.2}),
        ("semantic", {"density": 0.2, "tail": "pooled_block"}),
        ("semantic", {"top_p": 0.5, "tail": "none"}),
        ("spatial_temporal", {"density": 0.4, "block": 16}),
        ("radial", {"block": 32}),
        ("dense", {}),
    ],
)
def test_estimate_is_the_error_of_attend_on_those_rows(method, options):
    qkv = tensors()
    made = dsattn.plan(*qkv, Call(0, 0, GRID), method=method, **options)
    rows = sample_rows(GRID, 50, seed=3)
    sample = RowSample.of(*qkv, rows)
    out = dsattn.attend(*qkv, made, impl="reference").transpose(1, 2)[:, :, rows]
    q, k, v = (x.double().transpose(1, 2) for x in qkv)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, :, rows]
    want = relative_error(out.double(), exact)
    torch.testing.assert_close(sample.error(made).double(), want, rtol=1e-4, atol=2e-6)
    assert sample.error(made).shape == (2, 3)


def test_half_precision_inputs_are_estimated_in_fp32():
    qkv = tensors(dtype=torch.bfloat16)
    made = dsattn.plan(*qkv, Call(0, 0, GRID), method="dense")
    assert float(RowSample.of(*qkv, sample_rows(GRID, 20, 0)).error(made).max()) < 1e-6


@pytest.mark.parametrize("tail", ["none", "pooled", "pooled_block"])
def test_double_precision_inputs_are_estimated_in_fp32(tail):
    qkv = tensors(dtype=torch.float64)
    made = dsattn.plan(*qkv, Call(0, 0, GRID), method="topk", density=0.2, block_q=32, block_k=16, tail=tail)
    rows = sample_rows(GRID, 20, 0)
    found = RowSample.of(*qkv, rows).error(made)
    want = RowSample.of(*(x.float() for x in qkv), rows).error(made)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-6)


def test_relative_error_of_nothing_is_zero():
    zeros = torch.zeros(1, 2, 3, 4)
    assert relative_error(zeros, zeros).tolist() == [[0.0, 0.0]]
    assert relative_error(torch.ones(1, 1, 3, 4), 2 * torch.ones(1, 1, 3, 4)).item() == pytest.approx(0.5)
