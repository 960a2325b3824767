"""Dense backends agree with a float64 oracle; one that cannot run says so and how to get it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsattn.errors import ImplUnavailableError, UsageError
from dsattn.kernels import dense, flex

HAS_XFORMERS = importlib.util.find_spec("xformers") is not None


def tensors(length: int, dtype: torch.dtype, device: str = "cpu"):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, length, 3, 40, generator=generator).to(device, dtype) for _ in range(3)]


def oracle(q, k, v, scale, key_lengths=None):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) * scale
    if key_lengths is not None:
        logits = logits.masked_fill(torch.arange(k.shape[2]) >= key_lengths[:, None, None, None], -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def budget(dtype: torch.dtype) -> float:
    # Values are of order one, and each output is a convex combination of them.
    return 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("length", [1, 131])
def test_against_oracle(backend, dtype, length):
    if backend == "flex" and (reason := flex.why_unavailable()):
        pytest.skip(reason)
    q, k, v = tensors(length, dtype)
    out = dense.attention(q, k, v, backend=backend, scale=0.3)
    assert (out.double() - oracle(q, k, v, 0.3)).abs().max() < budget(dtype)


def test_padded_keys_are_never_read():
    q, k, v = tensors(50, torch.float32)
    lengths = torch.tensor([50, 31])
    expected = oracle(q, k, v, 0.2, lengths)
    k[1, 31:] = 1e4
    out = dense.attention(q, k, v, backend="sdpa", scale=0.2, key_lengths=lengths)
    assert (out.double() - expected).abs().max() < budget(torch.float32)
    with pytest.raises(UsageError, match="dense='flex' cannot mask padded keys; use dense='sdpa'"):
        dense.attention(q, k, v, backend="flex", scale=0.2, key_lengths=lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not (HAS_XFORMERS and torch.cuda.is_available()), reason="needs xformers and a GPU")
def test_xformers_agrees_with_sdpa():
    q, k, v = tensors(131, torch.bfloat16, "cuda")
    out = dense.attention(q, k, v, backend="xformers", scale=0.3).cpu()
    assert (out.double() - oracle(q.cpu(), k.cpu(), v.cpu(), 0.3)).abs().max() < budget(torch.bfloat16)


def test_xformers_missing_names_the_extra():
    code = """
import sys
sys.modules["xformers"] = None
import torch
from dsattn.errors import ImplUnavailableError
from dsattn.kernels import dense
q = torch.zeros(1, 2, 1, 8)
try:
    dense.attention(q, q, q, backend="xformers", scale=1.0)
except ImplUnavailableError as error:
    print(error)
"""
    root = Path(__file__).resolve().parents[1]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert "pip install 'dsattn[xformers]'" in out


def test_flex_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(flex, "why_unavailable", lambda: "no C++ compiler was found (install g++ or clang++)")
    with pytest.raises(ImplUnavailableError, match="no C.. compiler was found .*use dense='sdpa'"):
        dense.attention(*tensors(3, torch.float32), backend="flex", scale=1.0)


def test_auto_falls_to_torch_without_a_compiler_and_says_so(monkeypatch):
    from dsattn.functional import choose_impl

    monkeypatch.setattr(flex, "why_unavailable", lambda: "no C++ compiler was found (install g++ or clang++)")
    name, why = choose_impl(torch.zeros(1, 2, 1, 8), "auto")
    assert name == "torch" and "no C++ compiler was found" in why
