"""Every family: dense mode equals stock, and the grid, step and branch of each call are right."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from dsattn.engine import Engine
from dsattn.grid import VideoGrid
from dsattn.pipelines.adapter import enable
from dsattn.pipelines.family import grid_from_coords

from . import tiny_pipelines as tiny


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_item01_dense_mode_equals_stock_bit_for_bit(name: str) -> None:
    pipe, args = tiny.BUILDERS[name]()
    stock = tiny.run(pipe, args)
    handle = enable(pipe, Engine("dense"))
    ours = tiny.run(pipe, args)
    assert torch.isfinite(stock).all()
    assert torch.equal(ours, stock)
    calls = handle.summary()["calls"]
    assert set(calls) == {"dense"} and calls["dense"] > 0
    handle.remove()
    assert torch.equal(tiny.run(pipe, args), stock)


GRIDS = {
    "wan": {VideoGrid(3, 4, 4)},
    "wan_two": {VideoGrid(3, 4, 4)},
    "wan_vace": {VideoGrid(4, 4, 4)},  # one reference image is one more latent frame
    "skyreels_df": {VideoGrid(3, 4, 4)},
    "hunyuan": {VideoGrid(3, 8, 8, text=16)},
    "hunyuan15": {VideoGrid(3, 8, 8, text=23)},
    "cogvideox": {VideoGrid(3, 4, 4, text=16, text_first=True)},
    "cogvideox15": {VideoGrid(3, 4, 4, text=16, text_first=True)},  # 5 latent frames, padded to 6, patches of 2
    "ltx": {VideoGrid(3, 16, 16)},
    "ltx_condition": {VideoGrid(5, 16, 16, prefix=256)},
}
CFG_TWO_CALLS = [(step, branch, "transformer") for step in range(3) for branch in ("cond", "uncond")]
CFG_ONE_CALL = [(step, "cond_uncond", "transformer") for step in range(3)]
STEPS = {
    **dict.fromkeys(
        ("wan", "wan_ti2v", "wan_i2v", "wan_ti2v_i2v", "wan_vace", "skyreels", "skyreels_df"), CFG_TWO_CALLS
    ),
    "wan_v2v": CFG_TWO_CALLS,  # announces nothing, starts in the middle of its schedule
    "hunyuan15": CFG_TWO_CALLS,
    "hunyuan": [(step, "cond", "transformer") for step in range(3)],
    **dict.fromkeys(("cogvideox", "ltx", "ltx_i2v", "ltx_condition"), CFG_ONE_CALL),
    "wan_two": [
        (step, branch, "transformer" if step < 3 else "transformer_2")
        for step in range(6)
        for branch in ("cond", "uncond")
    ],
    "mochi": [(step, f"cond_uncond[{row}]", "transformer") for step in range(3) for row in (0, 1)],
}


@pytest.mark.parametrize("name", STEPS)
def test_calls_carry_step_branch_layer_and_grid(name: str) -> None:
    pipe, args = tiny.BUILDERS[name]()
    engine = tiny.recorder()
    enable(pipe, engine)
    out = tiny.run(pipe, args)
    assert torch.isfinite(out).all()
    assert engine.steps() == STEPS[name]
    assert {call.num_steps for call in engine.calls} == {6 if name == "wan_two" else 3}
    layers = {call.num_layers for call in engine.calls}
    assert len(layers) == 1 and {call.layer for call in engine.calls} == set(range(layers.pop() or 0))
    if name in GRIDS:
        assert {call.grid for call in engine.calls} == GRIDS[name]
    assert engine.summary()["fallbacks"] == {}


def test_item04_two_transformers_share_one_step_counter_and_one_warm_up() -> None:
    pipe, args = tiny.wan_two()
    handle = enable(pipe, **tiny.SPARSE, dense_steps=2)
    tiny.run(pipe, args)
    kinds = {(r.model, r.step, r.kind) for r in handle.engine.stats.records}
    assert {k for k in kinds if k[1] < 2} == {("transformer", 0, "dense"), ("transformer", 1, "dense")}
    assert {k[2] for k in kinds if k[1] >= 2} == {"refresh"}
    assert {k[0] for k in kinds if k[1] >= 3} == {"transformer_2"}


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan15", "cogvideox_rotary", "wan", "ltx", "mochi"])
def test_item03_wrapped_processors_keep_the_stock_signature(name: str) -> None:
    pipe, _ = tiny.BUILDERS[name]()
    enable(pipe, Engine("dense"))
    wrapped = [m.processor for m in pipe.transformer.modules() if hasattr(getattr(m, "processor", None), "dsattn_site")]
    assert wrapped
    for processor in wrapped:
        original = processor.dsattn_site.original
        assert isinstance(processor, type(original))
        assert inspect.signature(processor.__call__) == inspect.signature(original.__call__)


def test_item03_rotary_embeddings_reach_the_wrapped_processor() -> None:
    pipe, args = tiny.cogvideox_rotary()
    stock = tiny.run(pipe, args)
    enable(pipe, Engine("dense"))
    seen: list[Any] = []
    attention = pipe.transformer.transformer_blocks[0].attn1
    attention.register_forward_pre_hook(lambda m, a, k: seen.append(k["image_rotary_emb"]), with_kwargs=True)
    assert torch.equal(tiny.run(pipe, args), stock)
    assert seen and all(rotary is not None for rotary in seen)


@pytest.mark.parametrize("name", ["wan_ti2v_i2v", "ltx_i2v"])
def test_item05_step_from_the_largest_timestep_when_given_frames_have_zero(name: str) -> None:
    """Only the transformer is enabled, so there is no scheduler to ask; the first frame's tokens have timestep 0."""
    pipe, args = tiny.BUILDERS[name]()
    engine = tiny.recorder()
    enable(pipe.transformer, engine)
    timesteps: list[torch.Tensor] = []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: timesteps.append(k["timestep"]), with_kwargs=True)
    tiny.run(pipe, args)
    assert all(t.ndim == 2 and t.flatten()[0] == 0 and t.max() > 0 for t in timesteps)
    assert engine.steps() == STEPS[name]


def test_item06_mochi_reversed_time_and_ragged_text() -> None:
    pipe, args = tiny.mochi()
    engine = tiny.recorder()
    enable(pipe.transformer, engine)  # no scheduler: steps must follow from timesteps that rise
    timesteps: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: timesteps.append(float(k["timestep"][0])), with_kwargs=True
    )
    first = tiny.run(pipe, args)
    assert timesteps == sorted(timesteps) and timesteps[0] == 0
    steps = engine.steps()
    assert steps == STEPS["mochi"]
    text = {call.branch: call.grid.text for call in engine.calls}
    assert text["cond_uncond[0]"] == len("bad") + 1 and text["cond_uncond[1]"] == len("a red fox") + 1
    engine.calls.clear()
    assert torch.equal(tiny.run(pipe, args), first)
    assert engine.steps() == steps and engine.resets == 2


def test_item06_two_videos_per_prompt_keep_one_state_per_row() -> None:
    pipe, args = tiny.mochi()
    engine = tiny.recorder()
    enable(pipe, engine)
    tiny.run(pipe, args, num_videos_per_prompt=2)
    assert {call.branch for call in engine.calls} == {f"cond_uncond[{row}]" for row in range(4)}


def test_item07_ltx_condition_tokens_in_front_stay_exact() -> None:
    pipe, args = tiny.ltx_condition(frame_index=8)
    engine = tiny.recorder()
    enable(pipe, engine)
    tiny.run(pipe, args)
    (grid,) = {call.grid for call in engine.calls}
    assert grid.exact_segments == ((0, 256),) and grid.video_tokens == 5 * 16 * 16


def test_item07_ltx_condition_on_the_first_frame_adds_no_tokens() -> None:
    pipe, args = tiny.ltx_condition(frame_index=0)
    engine = tiny.recorder()
    enable(pipe, engine)
    tiny.run(pipe, args)
    assert {call.grid for call in engine.calls} == {VideoGrid(5, 16, 16)}


@pytest.mark.parametrize("size", [(5, 3, 7), (1, 4, 4), (3, 1, 1), (2, 1, 6)])
@pytest.mark.parametrize("condition", [0, 1, 2])
def test_grid_from_coordinates(size: tuple[int, int, int], condition: int) -> None:
    frames, height, width = size
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    video = torch.stack([t * 8.0 / 25, h * 32.0, w * 32.0]).flatten(1)
    front = video[:, : height * width].repeat(1, condition)
    front[0] += 3.3
    coords = torch.cat([front, video], dim=1)[None].repeat(2, 1, 1)
    assert grid_from_coords(coords) == size
    assert grid_from_coords(torch.stack([coords, coords + 1], dim=-1)) == size


def test_hunyuan_padded_text_is_masked_by_key_lengths() -> None:
    """A plan that keeps every block must equal dense attention, also where text is padded."""
    pipe, args = tiny.hunyuan()
    stock = tiny.run(pipe, args)
    handle = enable(pipe, "topk", density=1.0, impl="torch", strict=True)
    ours = tiny.run(pipe, args)
    assert handle.summary()["calls"] == {"refresh": 6}
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_hunyuan15_equals_stock_without_a_square_mask() -> None:
    class Largest(torch.overrides.TorchFunctionMode):
        """Remembers the largest boolean tensor any torch function returned."""

        numel = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
                self.numel = max(self.numel, out.numel())
            return out

    pipe, args = tiny.hunyuan15()
    tokens = 3 * 8 * 8 + 12 + 6 + 5
    with Largest() as stock_sizes:
        stock = tiny.run(pipe, args)
    assert stock_sizes.numel == tokens**2
    for engine in (Engine("dense"), Engine("topk", density=1.0, impl="torch", strict=True)):
        handle = enable(pipe, engine)
        with Largest() as sizes:
            ours = tiny.run(pipe, args)
        handle.remove()
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
        if engine.method.name == "dense":
            assert sizes.numel < 2 * tokens  # the refiner masks its 12 text tokens with a square


def test_skyreels_block_causal_mask_falls_back_with_its_reason() -> None:
    pipe, args = tiny.skyreels_df()
    pipe.transformer._set_ar_attention(causal_block_size=1)
    pipe.transformer.config.num_frame_per_block = 2
    stock = tiny.run(pipe, args)
    handle = enable(pipe, **tiny.SPARSE)
    assert torch.equal(tiny.run(pipe, args), stock)
    summary = handle.summary()
    assert summary["calls"] == {"fallback": 12}
    assert list(summary["fallbacks"]) == ["mask is not key padding: bool with 4 dimensions"]
