"""What training the small models needs beside stock parts: fast attention on a CPU, and Muon."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn
from torch.utils import benchmark


class _PlainAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d) + bias) v on `[N, S, D]`, a few heads at a time, recomputed in the backward pass.

    `bias` `[N, T]` or None is added to the logits of the last T keys, of every query. Two to three times faster than
    scaled_dot_product_attention with gradients on CPUs that multiply bfloat16 natively, and it never holds more than
    one chunk of probabilities.
    """

    CHUNK = 64 * 2**20  # probabilities per chunk

    @staticmethod
    def spans(q: Tensor, k: Tensor) -> list[slice]:
        size = max(1, _PlainAttention.CHUNK // (q.shape[1] * k.shape[1]))
        return [slice(i, i + size) for i in range(0, len(q), size)]

    @staticmethod
    def probabilities(q: Tensor, k: Tensor, bias: Tensor | None, s: slice) -> Tensor:
        logits = torch.bmm(q[s], k[s].mT)
        if bias is not None:
            logits[:, :, -bias.shape[1] :] += bias[s, None]
        return torch.softmax(logits, dim=-1)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        ctx.save_for_backward(q, k, v, bias)
        attend = _PlainAttention.probabilities
        return torch.cat([torch.bmm(attend(q, k, bias, s), v[s]) for s in _PlainAttention.spans(q, k)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, bias = ctx.saved_tensors
        grad = grads[0].contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for s in _PlainAttention.spans(q, k):
            p = _PlainAttention.probabilities(q, k, bias, s)
            dv[s] = torch.bmm(p.mT, grad[s])
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(grad[s], v[s].mT), p, -1, p.dtype)
            dq[s], dk[s] = torch.bmm(ds, k[s]), torch.bmm(ds.mT, q[s])
        return dq.mul_(q.shape[-1] ** -0.5), dk, dv, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of Wan and HunyuanVideo on `[B, S, H, D]`: neighbouring channels form the pairs."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


class ChosenPositions(nn.Module):
    """Stands in for a transformer's rotary embedding: the tokens it sees are at `positions` instead of filling a grid.

    So the stock transformer runs on any subset of a grid's tokens, given as one row, `[B, z, 1, 1, n]`.
    """

    positions: Tensor  # [n, 3]: frame, row, column

    def __init__(self, axes: tuple[int, int, int], theta: float, four_dims: bool, length: int = 128) -> None:
        """`axes`: channels each. `four_dims`: tables are `[1, n, 1, D]` as in Wan, else `[n, D]` as in HunyuanVideo."""
        super().__init__()
        self.four_dims = four_dims
        for axis, size in enumerate(axes):
            cos, sin = get_1d_rotary_pos_embed(size, length, theta, use_real=True, freqs_dtype=torch.float64)
            self.register_buffer(f"cos{axis}", cos, persistent=False)
            self.register_buffer(f"sin{axis}", sin, persistent=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the chosen positions; `hidden_states` is only compared with their number."""
        if hidden_states.shape[-1] != len(self.positions):
            raise ValueError(f"{len(self.positions)} positions were chosen for {hidden_states.shape[-1]} tokens")
        tables = [
            torch.cat([getattr(self, f"{name}{axis}")[self.positions[:, axis]] for axis in range(3)], dim=1)
            for name in ("cos", "sin")
        ]
        cos, sin = (t[None, :, None] if self.four_dims else t for t in tables)
        return cos, sin


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
        return attn.to_out[1](attn.to_out[0](_attend(q, k, v)))


class JointTrainingProcessor:
    """The computation of diffusers' HunyuanVideoAttnProcessor2_0 on video and text, arranged like the one above."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video `[B, S, C]` and text `[B, T, C]` -> the same; the mask `[B, 1, 1, S + T]` is of text keys only."""

        def project(x: Tensor, names: tuple[str, str, str], norms: tuple[Any, Any]) -> tuple[Tensor, ...]:
            q, k, v = (getattr(attn, name)(x).unflatten(2, (attn.heads, -1)) for name in names)
            return norms[0](q), norms[1](k), v

        video = project(hidden_states, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))
        if attn.add_q_proj is None:
            text = project(encoder_hidden_states, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))
        else:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            text = project(encoder_hidden_states, names, (attn.norm_added_q, attn.norm_added_k))
        if image_rotary_emb is not None:
            cos, sin = (x[None, :, None] for x in image_rotary_emb)
            video = _rotate(video[0], cos, sin), _rotate(video[1], cos, sin), video[2]
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(video, text, strict=True))
        length = hidden_states.shape[1]
        valid = None if attention_mask is None else attention_mask[:, 0, 0, length:]
        out = _attend(q, k, v, None if valid is None or bool(valid.all()) else valid)
        out, text_out = out[:, :length], out[:, length:]
        if attn.to_out is not None:
            out = attn.to_out[1](attn.to_out[0](out))
        if attn.to_add_out is not None:
            text_out = attn.to_add_out(text_out)
        return out, text_out


def _attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Attention on `[B, S, H, D]` -> `[B, S, H * D]`; `valid` `[B, T]` says which of the last T keys count."""
    batch, length, heads, _ = q.shape
    bias = None
    if valid is not None:
        bias = torch.zeros(valid.shape, dtype=v.dtype).masked_fill_(~valid, -math.inf)
    q, k, v = (x.transpose(1, 2).to(v.dtype) for x in (q, k, v))
    if has_fast_bfloat16(q.device):
        bias = None if bias is None else bias.repeat_interleave(heads, dim=0)
        q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))
        out: Tensor = _PlainAttention.apply(q, k, v, bias).unflatten(0, (batch, heads))
    else:  # twice as fast in float32
        if bias is not None:
            bias = F.pad(bias, (k.shape[2] - bias.shape[1], 0))[:, None, None].expand(-1, 1, length, -1)
        out = F.scaled_dot_product_attention(q, k, v, bias)
    return out.transpose(1, 2).flatten(2)


@functools.cache
def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster there than in float32.

    CPUs without instructions for it emulate it, and some that have them are slower with them all the same, so a CPU is
    asked by timing a product of the size that training has, once per process.
    """
    if device.type != "cpu":
        return True
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    """What a product of tokens and weights takes."""
    operands = {"tokens": torch.ones(2048, 192, dtype=dtype), "weights": torch.ones(192, 768, dtype=dtype)}
    timer = benchmark.Timer("tokens @ weights", globals=operands, num_threads=torch.get_num_threads())
    return timer.timeit(8).mean


def gradient(p: Tensor) -> Tensor:
    """The gradient of a parameter that took part in the loss."""
    if p.grad is None:
        raise RuntimeError(f"no gradient for a parameter of shape {tuple(p.shape)}: it does not enter the loss")
    return p.grad


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices, `[N, rows, cols]`."""
    x = matrices.bfloat16() if has_fast_bfloat16(matrices.device) else matrices.float()
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
            # Modulation is left to AdamW: Wan's stands outside the blocks, HunyuanVideo's inside, named after its norm.
            if p.ndim == 2 and "blocks." in name and ".norm" not in name:
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
