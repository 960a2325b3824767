"""The second shipped model, with text in its self-attention: warm start, storage, loader, pipeline, command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor

import dsattn
from dsattn.cli.app import run as command
from dsattn.cli.errors import USAGE
from dsattn.engine import Engine
from dsattn.pipelines.tiny import data, training
from dsattn.pipelines.tiny.joint import DUAL, ROPE_AXES, SINGLE, TinyJointPipeline, build_joint_transformer
from dsattn.pipelines.tiny.loader import (
    FOLDERS,
    WEIGHTS,
    WEIGHTS_JOINT,
    export_weights,
    load_codec,
    load_shipped,
    load_tiny,
    load_tiny_joint,
    verify,
)
from dsattn.pipelines.tiny.model import GUIDANCE, MAX_TEXT, TEXT_DIM, build_text_encoder, build_tokenizer
from dsattn.pipelines.tiny.training import JointTrainingProcessor
from dsattn.pipelines.tiny.warm_start import warm_start
from dsattn.presets import SHIPPED_MODELS

Z = 6


def wan(heads: int, layers: int, seed: int = 0) -> WanTransformer3DModel:
    """A Wan transformer whose every weight matters: modulation as strong as training makes it, norms unequal."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=Z,
        out_channels=Z,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=4 * 64 * heads,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm_q" in name or "norm_k" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "scale_shift_table" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(batch: int = 2, tokens: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Latents, timestep, text, its mask (the second row is padded) and pooled text."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[1:, 4:] = 0
    return (
        torch.randn(batch, Z, 3, 4, 5, generator=generator),
        torch.linspace(900, 100, batch),
        torch.randn(batch, tokens, TEXT_DIM, generator=generator),
        mask,
        torch.randn(batch, TEXT_DIM, generator=generator),
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights in the layout of the shipped ones, on the shipped codec."""
    torch.manual_seed(3)
    codec = load_codec(WEIGHTS)
    parts = {
        "transformer": build_joint_transformer(codec.config.z_dim),
        "text_encoder": build_text_encoder(len(build_tokenizer())),
    }
    named = {f"{part}.{n}": p for part, module in parts.items() for n, p in module.named_parameters()}
    folder = tmp_path_factory.mktemp("joint")
    export_weights(folder, codec, named, "tiny-joint")
    return folder


@pytest.fixture(scope="module")
def pipe(weights: Path) -> TinyJointPipeline:
    pipe = load_tiny_joint(weights_dir=weights)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SMALL = {"height": 32, "width": 40, "num_frames": 5, "num_inference_steps": 2, "output_type": "np"}


def run(pipe: TinyJointPipeline, prompt: str | list[str] = data.DEFAULT_PROMPT, **options: object) -> np.ndarray:
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **(SMALL | options)).frames


# ---- warm start ----------------------------------------------------------------------------------------------------


def test_rotary_embedding_is_wans() -> None:
    joint, source = build_joint_transformer(Z), wan(3, 6)
    latents = torch.zeros(1, Z, 9, 13, 17)
    for got, want in zip(joint.rope(latents), source.rope(latents), strict=True):
        assert torch.allclose(got, want[0, :, 0], atol=5e-6)
    assert sum(ROPE_AXES) == 64


@torch.no_grad()
def test_time_embedding_and_modulation_carry_over_exactly() -> None:
    source, joint = wan(3, 6), build_joint_transformer(Z)
    warm_start(joint, source)
    steps = torch.tensor([0.0, 3.5, 250.0, 761.0, 1000.0])
    embedder = source.condition_embedder
    temb = embedder.time_embedder(embedder.timesteps_proj(steps))
    got, _ = joint.time_text_embed(steps, torch.randn(5, TEXT_DIM))  # the pooled text has no say yet
    assert torch.allclose(got, temb, atol=1e-5)
    x = torch.randn(5, 4, 192)
    proj = embedder.time_proj(F.silu(temb)).unflatten(1, (6, -1))
    for block, wan_block in zip(joint.transformer_blocks, source.blocks[:DUAL], strict=True):
        shift, scale, *rest = (wan_block.scale_shift_table + proj).chunk(6, dim=1)
        normed, gate, shift_ff, scale_ff, gate_ff = block.norm1(x, emb=got)
        assert torch.allclose(normed, wan_block.norm1(x) * (1 + scale) + shift, atol=1e-5)
        for ours, theirs in zip((gate, shift_ff, scale_ff, gate_ff), rest, strict=True):
            assert torch.allclose(ours[:, None], theirs, atol=1e-5)
    shift, scale = (source.scale_shift_table + temb[:, None]).chunk(2, dim=1)
    want = source.norm_out(x) * (1 + scale) + shift
    error = (joint.norm_out(x, got) - want).norm() / want.norm()
    assert error < 0.05  # fitted, see warm_start


@torch.no_grad()
@pytest.mark.parametrize(("heads", "tolerance"), [(1, 1e-4), (3, 0.2)])
def test_a_dual_stream_block_is_wans_without_cross_attention(heads: int, tolerance: float) -> None:
    """With one head the two norms of queries and keys are the same, so all of the block is."""
    source = wan(heads, 2)
    joint = build_joint_transformer(Z, dual=2, single=0, heads=heads)
    warm_start(joint, source)
    latents, step, text, _, _ = inputs()
    x = source.patch_embedding(latents).flatten(2).transpose(1, 2)
    temb, proj, _, _ = source.condition_embedder(step, text)
    for block, twin in zip(source.blocks, joint.transformer_blocks, strict=True):
        block.attn2.to_out[0].weight.zero_()
        block.attn2.to_out[0].bias.zero_()
        want = block(x, torch.zeros(2, 7, 64 * heads), proj.unflatten(1, (6, -1)), source.rope(latents))
        only_video = torch.ones(2, 1, 1, x.shape[1] + 7, dtype=torch.bool)
        only_video[..., x.shape[1] :] = False
        got, _ = twin(x, torch.randn(2, 7, 64 * heads), temb, only_video, joint.rope(latents))
        assert (got - want).norm() < tolerance * (want - x).norm()
        x = want


@torch.no_grad()
def test_a_single_stream_block_is_closer_to_wans_than_any_one_sided_start() -> None:
    source, joint = wan(1, 1), build_joint_transformer(Z, dual=0, single=1, heads=1)
    warm_start(joint, source)
    latents, step, text, _, _ = inputs()
    x = source.patch_embedding(latents).flatten(2).transpose(1, 2)
    temb, proj, _, _ = source.condition_embedder(step, text)
    block, twin = source.blocks[0], joint.single_transformer_blocks[0]
    block.attn2.to_out[0].weight.zero_()
    block.attn2.to_out[0].bias.zero_()
    want = block(x, torch.zeros(2, 7, 64), proj.unflatten(1, (6, -1)), source.rope(latents)) - x

    def error() -> float:
        only_video = torch.ones(2, 1, 1, x.shape[1] + 7, dtype=torch.bool)
        only_video[..., x.shape[1] :] = False
        got, _ = twin(x, torch.randn(2, 7, 64), temb, only_video, joint.rope(latents))
        return float((got - x - want).norm() / want.norm())

    both = error()
    assert both < 0.5
    weight = twin.proj_out.weight.clone()
    for half in (slice(0, 64), slice(64, None)):  # without attention, without feed-forward
        twin.proj_out.weight.copy_(weight)
        twin.proj_out.weight[:, half] = 0
        assert both < error()


def test_a_source_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'layers': 2.*do not fit.*'layers': 6"):
        warm_start(build_joint_transformer(Z), wan(3, 2))


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_training_attention_and_its_gradients_match_the_stock_processor(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "has_fast_bfloat16", lambda device: fast)  # each has an attention of its own
    torch.manual_seed(2)
    model = build_joint_transformer(Z, dual=2, single=2)
    latents, step, text, mask, pooled = inputs()

    def loss_gradients(text: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model(latents, step, text, mask, pooled, return_dict=False)[0]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    want, gradients = loss_gradients(text, mask)
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        assert type(block.attn.processor) is HunyuanVideoAttnProcessor2_0
        block.attn.set_processor(JointTrainingProcessor())
    got, ours = loss_gradients(text, mask)
    assert torch.allclose(got, want, atol=1e-4)
    largest = max(float(g.norm()) for g in gradients.values())
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest, name
    # What is padded has no say: the loss and every gradient stay when it changes.
    noise = torch.randn_like(text) * (1 - mask[..., None])
    changed, same = loss_gradients(text + noise, mask)
    assert torch.allclose(changed, got, atol=1e-5)
    for name, gradient in ours.items():
        assert (same[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest, name


# ---- weights -------------------------------------------------------------------------------------------------------


def test_names_of_the_shipped_models_are_known_everywhere() -> None:
    assert tuple(FOLDERS) == SHIPPED_MODELS
    with pytest.raises(ValueError, match="tiny, tiny-joint; got 'huge'"):
        load_shipped("huge")


def test_weights_are_small_and_share_the_codec(weights: Path) -> None:
    assert not (weights / "codec.safetensors").exists()
    assert sum(f.stat().st_size for f in weights.iterdir()) <= 8 * 10**6
    for folder in (weights, WEIGHTS_JOINT):
        sums = json.loads((folder / "checksums.json").read_text())
        assert set(sums) == {f.name for f in folder.iterdir()} - {"checksums.json"} | {"codec.safetensors"}
    first, second = load_tiny(), load_shipped("tiny-joint")
    for name, tensor in first.vae.state_dict().items():
        assert torch.equal(tensor, second.vae.state_dict()[name])
    assert sum(f.stat().st_size for folder in FOLDERS.values() for f in folder.iterdir()) <= 24 * 10**6


def test_eight_bits_store_every_weight_within_half_a_step_of_its_row(weights: Path) -> None:
    torch.manual_seed(3)
    original = build_joint_transformer(load_codec(WEIGHTS).config.z_dim)
    stored = load_tiny_joint(weights_dir=weights).transformer.state_dict()
    for name, want in original.state_dict().items():
        assert stored[name].shape == want.shape
        if want.ndim >= 2:
            half = want.abs().amax(1, keepdim=True) / 254
            assert ((stored[name] - want).abs() <= half * 1.001 + 1e-8).all(), name
        else:
            assert torch.equal(stored[name], want), name


def test_a_changed_file_and_another_codec_are_refused(weights: Path, tmp_path: Path) -> None:
    for file in weights.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    verify(tmp_path)
    codec = bytearray((WEIGHTS / "codec.safetensors").read_bytes())
    codec[-50] ^= 1
    (tmp_path / "codec.safetensors").write_bytes(codec)
    with pytest.raises(ValueError, match=r"codec\.safetensors.*expected SHA-256"):
        load_tiny_joint(weights_dir=tmp_path)
    (tmp_path / "codec.safetensors").unlink()
    (tmp_path / "transformer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"transformer\.safetensors is missing"):
        load_tiny_joint(weights_dir=tmp_path)


# ---- pipeline ------------------------------------------------------------------------------------------------------


def test_pipeline_generates_and_repeats(pipe: TinyJointPipeline) -> None:
    video = run(pipe, [data.DEFAULT_PROMPT, "an unheard-of thing"])
    assert video.shape == (2, 5, 32, 40, 3)
    assert np.isfinite(video).all() and video.min() >= 0 and video.max() <= 1
    assert np.array_equal(video, run(pipe, [data.DEFAULT_PROMPT, "an unheard-of thing"]))
    assert type(pipe.vae).__name__ == "JointCodec"
    latents = run(pipe, output_type="latent")
    assert latents.shape == (1, pipe.vae.config.z_dim, 2, 4, 5)


def test_bfloat16(pipe: TinyJointPipeline, weights: Path) -> None:
    """The dtype of a GPU: close to float32 after one step, and dsattn leaves it as it is."""
    half = load_tiny_joint(torch.bfloat16, weights)
    half.set_progress_bar_config(disable=True)
    assert {half.transformer.dtype, half.text_encoder.dtype, half.vae.dtype} == {torch.bfloat16}
    video = run(half, num_inference_steps=1)
    assert np.isfinite(video).all() and np.abs(video - run(pipe, num_inference_steps=1)).mean() < 0.02
    with dsattn.enabled(half, "dense"):
        assert np.array_equal(run(half, num_inference_steps=1), video)


@torch.no_grad()
def test_decoding_undoes_encoding(pipe: TinyJointPipeline) -> None:
    video = torch.rand(1, 3, 5, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = pipe.vae.normalise(pipe.vae.encode(video))
    back = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    reference = load_tiny().vae
    want = reference.decode(reference.encode(video), return_dict=False)[0]
    assert torch.allclose(back, want, atol=1e-4)
    assert torch.equal(pipe.vae(video).sample, back)  # encoding and decoding in one, as the evaluation does


def test_defaults_and_the_text_mask(pipe: TinyJointPipeline) -> None:
    seen = []

    def record(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(kwargs)
        if len(seen) == 2:
            raise InterruptedError

    hook = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    attention: list[Tensor] = []
    block = pipe.transformer.transformer_blocks[0].attn
    inner = block.register_forward_pre_hook(lambda m, a, k: attention.append(k["attention_mask"]), with_kwargs=True)
    with pytest.raises(InterruptedError):
        pipe("a red circle", height=32, width=32, num_frames=5)
    hook.remove()
    inner.remove()
    positive, negative = seen
    assert pipe.num_timesteps == 20 and pipe.guidance_scale == GUIDANCE
    assert positive["encoder_hidden_states"].shape == (1, MAX_TEXT, TEXT_DIM)
    assert positive["encoder_attention_mask"].sum() == 4 and negative["encoder_attention_mask"].sum() == 1
    valid = attention[0][0, 0, 0]
    assert valid.shape == (2 * 4 * 4 + MAX_TEXT,) and valid[: 32 + 4].all() and not valid[32 + 4 :].any()
    assert (positive["encoder_hidden_states"][0, 4:] == 0).all()
    text = positive["encoder_hidden_states"][0, :4].mean(0)
    assert torch.allclose(positive["pooled_projections"][0], text, atol=1e-5)


def test_guidance_and_embeddings(pipe: TinyJointPipeline) -> None:
    plain = run(pipe, guidance_scale=1.0)
    guided = run(pipe)
    assert not np.array_equal(plain, guided)
    text, pooled, mask = pipe.encode_prompt(data.DEFAULT_PROMPT)
    given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}
    assert np.array_equal(run(pipe, None, **given), guided)
    with pytest.raises(ValueError, match="give pooled_prompt_embeds and prompt_attention_mask"):
        run(pipe, None, prompt_embeds=text)
    with pytest.raises(TypeError, match="takes guidance_scale"):
        run(pipe, true_cfg_scale=3.0)
    with pytest.raises(ValueError, match="multiples of 8, got 36 and 40"):
        run(pipe, height=36)


# ---- dsattn on it --------------------------------------------------------------------------------------------------


def test_dense_through_dsattn_is_stock_bit_for_bit(pipe: TinyJointPipeline) -> None:
    want = run(pipe)
    with dsattn.enabled(pipe, "dense") as handle:
        got = run(pipe)
        summary = handle.summary()
    assert np.array_equal(got, want)
    assert sum(summary["calls"].values()) == 2 * 2 * (DUAL + SINGLE) and not summary["fallbacks"]
    pipe.set_attn_processor(dsattn.SparseAttnProcessor("dense"))
    assert np.array_equal(run(pipe), want)
    dsattn.disable(pipe)
    assert np.array_equal(run(pipe), want)


def test_sparse_attention_sees_the_text_and_keeps_it_exact(
    pipe: TinyJointPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, text_errors, video_errors, lengths = [], [], [], set()
    stock = Engine.__call__

    def watch(self: Engine, *args: Any, dense: Callable[[], Tensor], key_lengths: Tensor, **rest: Any) -> Tensor:
        out, want = stock(self, *args, dense=dense, key_lengths=key_lengths, **rest), dense()
        calls.append(args[3])
        lengths.update(key_lengths.tolist())
        video, end = args[3].grid.video_tokens, int(key_lengths[0])
        difference = (out - want).abs()
        video_errors.append(float(difference[:, :video].max()))
        text_errors.append(float(difference[:, video:end].max()))
        return out

    monkeypatch.setattr(Engine, "__call__", watch)
    options = {"density": 0.3, "dense_steps": 0, "dense_layers": [], "strict": True, "impl": "torch"}
    with dsattn.enabled(pipe, "topk", **options) as handle:
        run(pipe, height=128, width=128, num_frames=9, output_type="latent")
        summary = handle.summary()
    assert len(calls) == 2 * 2 * (DUAL + SINGLE) and not summary["fallbacks"]
    assert summary["density_sparse_calls"] < 0.6
    assert {(g.frames, g.height, g.width, g.text, g.text_first) for g in (c.grid for c in calls)} == {
        (3, 16, 16, MAX_TEXT, False)
    }
    prompt = int(pipe.tokenizer(data.DEFAULT_PROMPT, return_tensors="pt").attention_mask.sum())
    assert lengths == {768 + prompt, 768 + 1}  # of the prompt and of the empty one
    assert max(text_errors) < 1e-5 < 1e-3 < min(video_errors)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    size = ["--height", "64", "--width", "64", "--frames", "5", "--steps", "2"]
    model = ["--model", "tiny-joint", *size, "--impl", "torch", "--dense-steps", "1"]
    assert command(["generate", *model, "--method", "topk", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["id"] == "tiny-joint" and found["model"]["pipeline"] == "TinyJointPipeline"
    assert found["prompt"] == data.DEFAULT_PROMPT and found["density"]["sparse_calls"] is not None
    assert Path("out.mp4").stat().st_size > 0
    assert command(["compare", "a dragon", *model, "--method", "topk", "--out", "r"]) == 0
    assert "do not know: dragon" in capsys.readouterr().err
    report = json.loads(Path("r", "report.json").read_text(encoding="utf-8"))
    assert report["model"]["id"] == "tiny-joint" and report["schema"] == "dsattn.report/2"
    assert command(["profile", *model, "--out", "p"]) == 0
    assert json.loads(Path("p", "report.json").read_text(encoding="utf-8"))["grid"]["text"] == MAX_TEXT
    assert command(["generate", "a dragon", "--model", "tinyjoint"]) == USAGE
    assert "expected tiny, tiny-joint, a folder" in capsys.readouterr().err
