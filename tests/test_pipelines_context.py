"""Runs, steps and branches: what starts a new run, and what must not."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from diffusers.modular_pipelines import WanBlocks
from torch.utils._python_dispatch import TorchDispatchMode

from dsattn.engine import Engine
from dsattn.pipelines import custom_op
from dsattn.pipelines.adapter import disable, enable
from dsattn.pipelines.context import ModelContext

from . import tiny_pipelines as tiny


@pytest.mark.parametrize("name", ["wan", "wan_v2v", "cogvideox", "hunyuan"])
@pytest.mark.parametrize("announces_end", [True, False])
def test_item08_a_second_run_starts_afresh(name: str, announces_end: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, args = tiny.BUILDERS[name]()
    if not announces_end:  # as modular pipelines, which never call it
        monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: None)
    engine = tiny.Recorder(**tiny.SPARSE, refresh=100)
    enable(pipe, engine)
    first = tiny.run(pipe, args)
    calls = list(engine.calls)
    engine.calls.clear()
    assert torch.equal(tiny.run(pipe, args), first)
    assert engine.calls == calls
    assert engine.resets == 2
    assert engine.summary()["calls"]["refresh"] > 0


def test_item08_a_run_that_was_interrupted_does_not_leak_into_the_next() -> None:
    pipe, args = tiny.wan_v2v()  # announces neither step nor branch
    engine = tiny.recorder()
    enable(pipe, engine)
    whole = tiny.run(pipe, args)
    steps = engine.steps()

    def stop(pipeline: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.run(pipe, args, callback_on_step_end=stop)
    engine.calls.clear()
    assert torch.equal(tiny.run(pipe, args), whole)
    assert engine.steps() == steps


def test_another_size_starts_a_new_run() -> None:
    pipe, args = tiny.wan()
    engine = tiny.recorder()
    enable(pipe, engine)
    tiny.run(pipe, args)
    engine.calls.clear()
    tiny.run(pipe, args, height=96, width=80)
    assert {(c.grid.height, c.grid.width) for c in engine.calls} == {(6, 5)}
    assert engine.steps()[0] == (0, "cond", "transformer")


def test_scheduler_with_two_model_calls_per_step_counts_each() -> None:
    pipe, args = tiny.wan_v2v()
    pipe.scheduler = HeunDiscreteScheduler()
    engine = tiny.recorder()
    enable(pipe, engine)
    tiny.run(pipe, args, strength=1.0)
    assert [step for step, branch, _ in engine.steps() if branch == "cond"] == list(range(pipe._num_timesteps))
    assert {call.num_steps for call in engine.calls} == {pipe._num_timesteps}


def test_modular_pipeline_that_announces_neither_branch_nor_end() -> None:
    pipe, args = tiny.wan()
    modular = WanBlocks().init_pipeline()
    modular.update_components(**{k: v for k, v in pipe.components.items() if k in modular.components and v is not None})
    engine = tiny.recorder()
    enable(modular, engine)
    names = ("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps")
    for _ in range(2):
        engine.calls.clear()
        generator = torch.Generator().manual_seed(0)
        modular(**{name: args[name] for name in names}, output="latents", generator=generator)
        assert engine.steps() == [(step, b, "transformer") for step in range(3) for b in ("cond", "uncond")]
    assert engine.resets == 2


def test_transformer_alone_counts_distinct_timesteps() -> None:
    seed = torch.Generator().manual_seed(0)
    transformer = tiny.wan_transformer()
    engine = tiny.recorder()
    enable(transformer, engine)
    video, text = torch.randn(1, 16, 3, 8, 8, generator=seed), torch.randn(1, 16, 32, generator=seed)
    for _ in range(2):
        for timestep in (999.0, 700.0, 100.0):
            for _ in range(2):
                transformer(video, torch.tensor([timestep]), text)  # positional arguments
    expected = [(step, branch, "transformer") for step in range(3) for branch in ("cond", "uncond")]
    assert engine.steps() == expected and engine.resets == 2


def test_forward_called_around_the_hooks_falls_back() -> None:
    transformer = tiny.wan_transformer()
    handle = enable(transformer, **tiny.SPARSE)
    transformer.forward(torch.randn(1, 16, 3, 8, 8), torch.tensor([1.0]), torch.randn(1, 16, 32))
    (reason,) = handle.summary()["fallbacks"]
    assert "forward() was called directly" in reason


def test_item09_hooks_survive_offload_that_is_set_up_later() -> None:
    """Model offload saves and restores ``module.forward`` around every run; ours must not be among what is lost."""
    pipe, args = tiny.wan()
    engine = tiny.recorder()
    enable(pipe, engine)
    transformer = pipe.transformer
    plain = transformer.forward

    def offload() -> None:
        transformer.forward = lambda *a, **k: plain(*a, **k)

    counts = []
    for _ in range(3):
        offload()
        engine.calls.clear()
        tiny.run(pipe, args)
        counts.append((len(engine.calls), engine.steps()[-1]))
        transformer.forward = plain
    assert counts == [(12, (2, "uncond", "transformer"))] * 3


def test_item09_hooks_survive_offload_that_was_set_up_before() -> None:
    pipe, args = tiny.wan()
    transformer = pipe.transformer
    plain = transformer.forward
    transformer.forward = lambda *a, **k: plain(*a, **k)
    engine = tiny.recorder()
    enable(pipe, engine)
    tiny.run(pipe, args)
    del transformer.forward  # what removing an accelerate hook does
    engine.calls.clear()
    tiny.run(pipe, args)
    assert len(engine.calls) == 12


def test_nothing_stays_reachable_after_remove_or_after_the_pipeline_is_gone() -> None:
    gc.collect()
    before = custom_op.live_addresses()
    pipe, _ = tiny.wan()
    handle = enable(pipe, Engine("dense"))
    assert custom_op.live_addresses() == before + 3  # two layers and one transformer
    handle.remove()
    assert custom_op.live_addresses() == before
    enable(pipe, Engine("dense"))
    del pipe, handle
    gc.collect()
    assert custom_op.live_addresses() == before


def test_context_is_found_on_the_transformer_only_while_enabled() -> None:
    pipe, _ = tiny.wan()
    assert ModelContext.of(pipe.transformer) is None
    enable(pipe, Engine("dense"))
    assert ModelContext.of(pipe.transformer) is not None
    disable(pipe)
    assert ModelContext.of(pipe.transformer) is None


@pytest.mark.parametrize("name", ["wan", "wan_transformer", "wan_v2v", "wan_ti2v", "hunyuan", "cogvideox", "ltx_i2v"])
def test_reading_the_context_never_waits_for_the_device(name: str) -> None:
    """On a GPU every value read back to the host stalls the stream; the wrapper must add none to the stock run."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    alone = name == "wan_transformer"  # without its pipeline; what that announces must be enough
    pipe, args = tiny.BUILDERS["wan" if alone else name]()
    with Reads() as stock:
        tiny.run(pipe, args)
    handle = enable(pipe.transformer if alone else pipe, Engine("dense"))
    with Reads() as ours:
        tiny.run(pipe, args)
    assert handle.summary()["calls"]["dense"] > 0
    assert ours.count == stock.count
