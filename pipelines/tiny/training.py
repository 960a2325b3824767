"""What training the small model needs beside stock parts: fast bfloat16 attention on a CPU, and Muon."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class _PlainAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v on `[N, S, D]` in bfloat16, a few heads at a time, recomputed in the backward pass.

    Two to three times faster than scaled_dot_product_attention with gradients on CPUs that multiply bfloat16 natively,
    and it never holds more than one chunk of probabilities.
    """

    CHUNK = 64 * 2**20  # probabilities per chunk

    @staticmethod
    def spans(q: Tensor, k: Tensor) -> list[slice]:
        size = max(1, _PlainAttention.CHUNK // (q.shape[1] * k.shape[1]))
        return [slice(i, i + size) for i in range(0, len(q), size)]

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        ctx.save_for_backward(q, k, v)
        parts = [torch.bmm(torch.softmax(torch.bmm(q[s], k[s].mT), dim=-1), v[s]) for s in _PlainAttention.spans(q, k)]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        grad = grads[0].contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for s in _PlainAttention.spans(q, k):
            p = torch.softmax(torch.bmm(q[s], k[s].mT), dim=-1)
            dv[s] = torch.bmm(p.mT, grad[s])
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(grad[s], v[s].mT), p, -1, p.dtype)
            dq[s], dk[s] = torch.bmm(ds, k[s]), torch.bmm(ds.mT, q[s])
        return dq.mul_(q.shape[-1] ** -0.5), dk, dv


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Wan's rotary embedding on `[B, S, H, D]`: neighbouring channels form the pairs."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


class CpuTrainingProcessor:
    """The computation of diffusers' WanAttnProcessor (text-to-video), arranged for bfloat16 training on a CPU."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`[B, S, C]` -> `[B, S, C]`, like the processor it stands in for; there is no mask in text-to-video."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(context).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            q, k = _rotate(q, *rotary_emb), _rotate(k, *rotary_emb)
        batch = q.shape[0]
        q, k, v = (x.transpose(1, 2).flatten(0, 1).to(v.dtype).contiguous() for x in (q, k, v))
        out = _PlainAttention.apply(q, k, v).unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def gradient(p: Tensor) -> Tensor:
    """The gradient of a parameter that took part in the loss."""
    if p.grad is None:
        raise RuntimeError(f"no gradient for a parameter of shape {tuple(p.shape)}: it does not enter the loss")
    return p.grad


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices, `[N, rows, cols]`."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Optimizer:
    """Muon for the matrices of the transformer blocks, AdamW for everything else; state lives in plain tensors."""

    def __init__(self, model: nn.Module, weight_decay: float = 0.01) -> None:
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.weight_decay, self.count = weight_decay, 0
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, p in self.params.items():
            if p.ndim == 2 and ".blocks." in name:
                groups.setdefault(tuple(p.shape), []).append(name)
        self.groups = list(groups.values())
        self.matrices = {n for g in self.groups for n in g}
        self.state = {f"{n}.m": torch.zeros_like(p) for n, p in self.params.items()}
        self.state |= {f"{n}.v": torch.zeros_like(p) for n, p in self.params.items() if n not in self.matrices}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update at learning rate `rate`; the parameters outside the matrices move at 0.7 of it."""
        self.count += 1
        for names in self.groups:
            updates = []
            for name in names:
                grad, m = gradient(self.params[name]), self.state[f"{name}.m"]
                m.mul_(0.95).add_(grad)
                updates.append(grad.add(m, alpha=0.95))
            rows, cols = updates[0].shape
            scale = 0.2 * math.sqrt(max(rows, cols))
            for name, update in zip(names, orthogonalise(torch.stack(updates)).unbind(), strict=True):
                self.params[name].mul_(1 - rate * self.weight_decay).add_(update, alpha=-rate * scale)
        for name, p in self.params.items():
            if name in self.matrices:
                continue
            m, v = self.state[f"{name}.m"], self.state[f"{name}.v"]
            m.lerp_(gradient(p), 0.1)
            v.lerp_(gradient(p).square(), 0.02)
            denom = (v / (1 - 0.98**self.count)).sqrt_().add_(1e-8)
            p.addcdiv_(m, denom, value=-0.7 * rate / (1 - 0.9**self.count))
