"""Sparse attention together with diffusers' caches, LoRA, fused projections, casting, offloading and guiders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from peft import LoraConfig

from dsattn.engine import Engine
from dsattn.pipelines.adapter import enable

from . import tiny_pipelines as tiny


def first_block(pipe: Any) -> FirstBlockCacheConfig:
    return FirstBlockCacheConfig(threshold=0.5)


def mag(pipe: Any) -> MagCacheConfig:
    return MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=8, threshold=0.5, max_skip_steps=2)


def broadcast(pipe: Any) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


@pytest.mark.parametrize("config", [first_block, mag, broadcast])
@pytest.mark.parametrize("cache_first", [True, False])
def test_item10_feature_caches_skip_calls_but_not_steps(config: Callable[[Any], Any], cache_first: bool) -> None:
    pipe, args = tiny.wan(layers=3)
    args["num_inference_steps"] = 8
    engine = tiny.recorder()
    if cache_first:
        pipe.transformer.enable_cache(config(pipe))
        enable(pipe, engine)
    else:
        enable(pipe, engine)
        pipe.transformer.enable_cache(config(pipe))
    first = tiny.run(pipe, args)
    calls = list(engine.calls)
    assert 0 < len(calls) < 8 * 2 * 3
    # Whatever was skipped, the calls that did run know the step the pipeline was at.
    assert sorted({call.step for call in calls})[0] == 0 and max(call.step for call in calls) >= 6
    assert engine.resets == 1
    engine.calls.clear()
    assert torch.equal(tiny.run(pipe, args), first)
    assert engine.calls == calls
    pipe.transformer.disable_cache()
    engine.calls.clear()
    tiny.run(pipe, args)
    assert len(engine.calls) == 8 * 2 * 3


@pytest.mark.parametrize("config", [first_block, broadcast])
def test_item10_dense_mode_under_a_cache_equals_the_cache_alone(config: Callable[[Any], Any]) -> None:
    pipe, args = tiny.wan(layers=3)
    pipe.transformer.enable_cache(config(pipe))
    stock = tiny.run(pipe, args)
    enable(pipe, Engine("dense"))
    assert torch.equal(tiny.run(pipe, args), stock)


def test_item10_faster_cache_that_drops_the_unconditional_half() -> None:
    pipe, args = tiny.cogvideox()
    args["num_inference_steps"] = 6
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 901),
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=lambda: pipe.current_timestep,
        is_guidance_distilled=False,
        tensor_format="BFCHW",
    )
    pipe.transformer.enable_cache(config)
    engine = tiny.recorder()
    enable(pipe, engine)
    first = tiny.run(pipe, args)
    assert torch.isfinite(first).all()
    calls = list(engine.calls)
    assert 0 < len(calls) < 6 * 2
    engine.calls.clear()
    assert torch.equal(tiny.run(pipe, args), first) and engine.calls == calls


def dense_equals_stock(pipe: Any, args: dict[str, Any]) -> None:
    stock = tiny.run(pipe, args)
    handle = enable(pipe, Engine("dense"))
    assert torch.equal(tiny.run(pipe, args), stock)
    handle.remove()
    handle = enable(pipe, **tiny.SPARSE)
    assert torch.isfinite(tiny.run(pipe, args)).all()
    assert set(handle.summary()["calls"]) == {"refresh"}


def test_item15_lora_before_and_after_enable() -> None:
    pipe, args = tiny.wan()
    plain = tiny.run(pipe, args)
    lora = LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    handle = enable(pipe, Engine("dense"))
    pipe.transformer.add_adapter(lora)
    adapted = tiny.run(pipe, args)
    assert not torch.allclose(adapted, plain)
    handle.remove()
    assert torch.equal(tiny.run(pipe, args), adapted)
    dense_equals_stock(pipe, args)
    pipe.transformer.delete_adapters("default")


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox_rotary"])
def test_item15_fused_projections_before_enable(name: str) -> None:
    pipe, args = tiny.BUILDERS[name]()
    pipe.transformer.fuse_qkv_projections()
    dense_equals_stock(pipe, args)


def test_item15_fused_projections_after_enable() -> None:
    pipe, args = tiny.wan()
    handle = enable(pipe, **tiny.SPARSE)
    sparse = tiny.run(pipe, args)
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(tiny.run(pipe, args), sparse, rtol=1e-4, atol=1e-5)
    assert handle.summary()["calls"] == {"refresh": 12}


@pytest.mark.parametrize("casting_first", [True, False])
def test_item15_layerwise_casting(casting_first: bool) -> None:
    pipe, args = tiny.wan()
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    if casting_first:
        pipe.transformer.enable_layerwise_casting(**cast)
        dense_equals_stock(pipe, args)
        return
    handle = enable(pipe, Engine("dense"))
    pipe.transformer.enable_layerwise_casting(**cast)
    ours = tiny.run(pipe, args)
    handle.remove()
    assert torch.equal(tiny.run(pipe, args), ours)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_item15_group_offloading(offload_type: str) -> None:
    pipe, args = tiny.wan()
    kwargs = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    device = torch.device("cpu")
    apply_group_offloading(
        pipe.transformer, onload_device=device, offload_device=device, offload_type=offload_type, **kwargs
    )
    dense_equals_stock(pipe, args)


def test_item15_bfloat16() -> None:
    pipe, args = tiny.wan()
    pipe.transformer.to(torch.bfloat16)
    dense_equals_stock(pipe, args)


def test_guiders_that_replace_scores_get_the_stock_attention() -> None:
    transformer = tiny.cogvideox_transformer()
    seed = torch.Generator().manual_seed(0)
    video, text = torch.randn(1, 3, 4, 8, 8, generator=seed), torch.randn(1, 16, 32, generator=seed)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return transformer(video, text, torch.tensor([500]), return_dict=False)[0]

    with AttentionScoreSkipFunctionMode():
        skipped = forward()
    assert not torch.allclose(skipped, forward())
    handle = enable(transformer, **tiny.SPARSE)
    with AttentionScoreSkipFunctionMode():
        assert torch.equal(forward(), skipped)
    assert list(handle.summary()["fallbacks"]) == ["a guider replaces attention scores (PAG, SLG)"]
