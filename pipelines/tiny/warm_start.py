"""Start the joint model from the trained first one: HunyuanVideo's layers from Wan's, as far as the two agree.

What carries over exactly: time embedding, modulation of dual-stream blocks, projections, feed-forward, patches, output.
What cannot: Wan normalises queries and keys over all heads and HunyuanVideo per head; HunyuanVideo's last modulation
reads silu(time embedding) and Wan's the embedding itself; a single-stream block runs attention and feed-forward side
by side, with one input and one gate, where Wan runs them one after the other. There the closest weights are taken, in
the least-squares sense over all noise levels. Cross-attention has no counterpart; all text parts stay as initialised.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

# Singular values below this share of the largest are noise of the fit, and would blow its weights up.
_RCOND = 1e-4


@torch.no_grad()
def warm_start(joint: HunyuanVideoTransformer3DModel, wan: WanTransformer3DModel) -> None:
    """Overwrite the video parts of `joint` with those of `wan`, both in float32.

    Dual-stream blocks take the first of Wan's layers, single-stream blocks the rest, in order.

    Raises:
        ValueError: the two differ in width, heads, channels, patch size or number of layers.

    """
    _check(joint, wan)
    embedder = wan.condition_embedder
    _time_embedding(joint.time_text_embed, embedder.time_embedder)
    joint.x_embedder.proj.load_state_dict(wan.patch_embedding.state_dict())
    joint.proj_out.load_state_dict(wan.proj_out.state_dict())
    curve = embedder.time_embedder(embedder.timesteps_proj(torch.arange(1001.0)))
    _last_modulation(joint.norm_out.linear, wan.scale_shift_table, curve)
    duals = len(joint.transformer_blocks)
    for block, source in zip(joint.transformer_blocks, wan.blocks[:duals], strict=True):
        _dual(block, source, embedder.time_proj, F.silu(curve))
    for block, source in zip(joint.single_transformer_blocks, wan.blocks[duals:], strict=True):
        _single(block, source, embedder.time_proj, F.silu(curve))


def _check(joint: HunyuanVideoTransformer3DModel, wan: WanTransformer3DModel) -> None:
    def facts(config: Any, layers: int, patch: tuple[int, ...], inner: int) -> dict[str, Any]:
        names = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels")
        return {n: config[n] for n in names} | {"layers": layers, "patch": patch, "feed-forward": inner}

    a, b = joint.config, wan.config
    inner = int(a.num_attention_heads * a.attention_head_dim * a.mlp_ratio)
    got = facts(a, a.num_layers + a.num_single_layers, (a.patch_size_t, a.patch_size, a.patch_size), inner)
    want = facts(b, b.num_layers, tuple(b.patch_size), b.ffn_dim)
    if got != want or want["patch"] != (1, 1, 1):
        raise ValueError(f"weights of a Wan transformer with {want} do not fit a joint transformer with {got}")


# Modules are Any below: their parts are known by name alone.


def _time_embedding(target: Any, source: Any) -> None:
    """Wan's frequencies are every `step`-th of HunyuanVideo's 128; the others start without weight.

    The pooled text adds to the embedding and starts at zero, so that modulation starts as it was in Wan.
    """
    target.timestep_embedder.load_state_dict(
        {
            **source.state_dict(),
            "linear_1.weight": _spread(source.linear_1.weight, target.time_proj.num_channels),
        }
    )
    nn.init.zeros_(target.text_embedder.linear_2.weight)
    nn.init.zeros_(target.text_embedder.linear_2.bias)


def _spread(weight: Tensor, channels: int) -> Tensor:
    """`[out, few]` for few sinusoidal channels -> `[out, channels]` for more: cosines, then sines."""
    step, rest = divmod(channels, weight.shape[1])
    if rest:
        raise ValueError(f"{weight.shape[1]} time channels do not divide {channels}")
    cos_sin = weight.new_zeros(len(weight), 2, channels // 2)
    cos_sin[:, :, ::step] = weight.unflatten(1, (2, -1))
    return cos_sin.flatten(1)


def _last_modulation(target: nn.Linear, table: Tensor, curve: Tensor) -> None:
    """Linear map from silu(temb) to temb, fitted over the curve `[T, C]` that temb follows; scale first, then shift."""
    features = F.pad(F.silu(curve), (0, 1), value=1.0).double()
    fit = torch.linalg.lstsq(features, curve.double(), rcond=_RCOND, driver="gelsd").solution.to(curve.dtype)
    shift, scale = table[0]
    target.weight.copy_(torch.cat([fit[:-1].T, fit[:-1].T]))
    target.bias.copy_(torch.cat([fit[-1] + scale, fit[-1] + shift]))


def _modulation(source: Any, time_proj: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer's own modulation: `[6C, C]`, `[6C]`, shift, scale and gate twice."""
    return time_proj.weight, time_proj.bias + source.scale_shift_table.flatten()


def _dual(block: Any, source: Any, time_proj: nn.Linear, features: Tensor) -> None:
    weight, bias = _modulation(source, time_proj)
    block.norm1.linear.weight.copy_(weight)
    block.norm1.linear.bias.copy_(bias)
    shift, scale = (features @ weight.T + bias).unflatten(1, (6, -1))[:, :2].unbind(1)
    _attention(block.attn, source.attn1, shift, scale)
    block.attn.to_out[0].load_state_dict(source.attn1.to_out[0].state_dict())
    block.ff.load_state_dict(source.ffn.state_dict())
    # Text starts as it comes from the refiner and is changed by what training opens these gates for.
    nn.init.zeros_(block.norm1_context.linear.weight)
    nn.init.zeros_(block.norm1_context.linear.bias)


def _attention(target: Any, source: Any, shift: Tensor, scale: Tensor) -> None:
    """`shift`, `scale` `[T, C]`: how attention's input is modulated, over noise levels."""
    target.to_v.load_state_dict(source.to_v.state_dict())
    _normed(target.to_q, target.norm_q, source.to_q, source.norm_q, source.heads, shift, scale)
    _normed(target.to_k, target.norm_k, source.to_k, source.norm_k, source.heads, shift, scale)


def _normed(
    to: nn.Linear, norm: Any, source: nn.Linear, source_norm: Any, heads: int, shift: Tensor, scale: Tensor
) -> None:
    """Projection and RMS norm per head for a projection that was normalised over all heads; exact for one head.

    Directions stay: what a head's own norm weight has beyond the weight all heads share goes into the projection's
    rows. Lengths become one per head and token; the shared weight gets their mean over heads and noise levels, for
    inputs of unit variance before modulation.
    """
    own = source_norm.weight.unflatten(0, (heads, -1))
    shared = own.abs().clamp_min(1e-3).log().mean(0).exp()
    factors = own / shared
    power = (1 + scale).square() @ source.weight.square().T + F.linear(shift, source.weight, source.bias).square()
    power = power.unflatten(1, (heads, -1))  # [T, H, D], of each channel
    lengths = (power * factors.square()).mean(2).sqrt() / power.mean((1, 2)).sqrt()[:, None]
    to.weight.copy_(source.weight * factors.flatten()[:, None])
    to.bias.copy_(source.bias * factors.flatten())
    norm.weight.copy_(shared * lengths.log().mean().exp())


def _single(block: Any, source: Any, time_proj: nn.Linear, features: Tensor) -> None:
    weight, bias = _modulation(source, time_proj)
    over_time = (features @ weight.T + bias).unflatten(1, (6, -1))  # [T, 6, C]
    weights, biases = weight.unflatten(0, (6, -1)), bias.unflatten(0, (6, -1))
    # One gate for two: the best common one per channel is a sum of both, with factors for attention and feed-forward.
    gates = over_time[:, (2, 5)].permute(2, 0, 1)  # [C, T, 2]
    shares = torch.linalg.svd(gates, full_matrices=False).Vh[:, 0]  # [C, 2]
    gate = shares[:, :1] * weights[2] + shares[:, 1:] * weights[5]
    gate_bias = shares[:, 0] * biases[2] + shares[:, 1] * biases[5]
    block.norm.linear.weight.copy_(torch.cat([weights[0], weights[1], gate]))
    block.norm.linear.bias.copy_(torch.cat([biases[0], biases[1], gate_bias]))
    # The feed-forward reads attention's input: x (1 + scale) + shift of its own, from that of attention, for unit x.
    shift, scale, shift_ff, scale_ff = (over_time[:, i] for i in (0, 1, 3, 4))
    _attention(block.attn, source.attn1, shift, scale)
    spread = shift - shift.mean(0)
    factor = ((1 + scale) * (1 + scale_ff) + spread * shift_ff).mean(0)
    factor = factor / ((1 + scale).square() + spread.square()).mean(0).clamp_min(1e-6)
    offset = shift_ff.mean(0) - factor * shift.mean(0)
    up, down, out = source.ffn.net[0].proj, source.ffn.net[2], source.attn1.to_out[0]
    block.proj_mlp.weight.copy_(up.weight * factor)
    block.proj_mlp.bias.copy_(up.bias + up.weight @ offset)
    block.proj_out.weight.copy_(torch.cat([shares[:, :1] * out.weight, shares[:, 1:] * down.weight], dim=1))
    block.proj_out.bias.copy_(shares[:, 0] * out.bias + shares[:, 1] * down.bias)
