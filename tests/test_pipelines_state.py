"""Methods that keep what they saw, through pipelines: runs that break off, take turns, or change their inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsattn.pipelines.adapter import enable

from . import tiny_pipelines as tiny


class Breaks(tiny.Recorder):
    """Raises behind the call ``where`` (step, layer, branch), if one is given."""

    where: tuple[int, int, str] | None = None

    def __call__(self, q: Any, k: Any, v: Any, call: Any, **rest: Any) -> torch.Tensor:
        out = super().__call__(q, k, v, call, **rest)
        if (call.step, call.layer, call.branch) == self.where:
            raise KeyboardInterrupt
        return out


# Methods that keep what they saw; blocks of 16, because tiny runs have few tokens.
STATEFUL: dict[str, dict[str, Any]] = {
    "temporal": {"method": "temporal", "threshold": -1.0, "block_q": 16, "block_k": 16},
    "semantic": {"method": "semantic", "density": 0.3, "q_clusters": 8, "k_clusters": 12},
    "auto": {"method": "auto", "target_error": 0.1, "dense_steps": 1},
}


@pytest.mark.parametrize("method", STATEFUL)
@pytest.mark.parametrize("where", [(0, 1, "cond"), (1, 0, "uncond"), (2, 1, "cond")], ids=str)
def test_item08_a_run_that_broke_off_between_layers_leaves_nothing(method: str, where: tuple[int, int, str]) -> None:
    pipe, args = tiny.wan()
    args = {**args, **tiny.LONGER}
    engine = Breaks(**STATEFUL[method], refresh=100, impl="torch")
    enable(pipe, engine)
    whole = tiny.run(pipe, args)
    assert engine.summary()["calls"]["reuse"] > 0
    engine.where = where
    with pytest.raises(KeyboardInterrupt):
        tiny.run(pipe, {**args, "prompt": "something else"})
    engine.where = None
    assert torch.equal(tiny.run(pipe, args), whole)


def run_between(job: Any, found: list[torch.Tensor], pipeline: Any, i: int, t: Any, kwargs: dict[str, Any]) -> Any:
    """Callback at the end of a step: behind the second one another job runs."""
    if i == 1:
        found.append(tiny.run(*job))
    return kwargs


@pytest.mark.parametrize("method", STATEFUL)
def test_pipelines_that_take_turns_are_as_alone(method: str) -> None:
    """A whole run of one pipeline between two steps of another, and the other way round."""
    options = {**STATEFUL[method], "refresh": 2, "impl": "torch"}
    pipes = [tiny.wan(), tiny.mochi()]
    jobs = [(pipe, {**args, **size}) for (pipe, args), size in zip(pipes, (tiny.LONGER, {}), strict=True)]
    handles = [enable(pipe, **options) for pipe, _ in jobs]
    alone = [tiny.run(pipe, args) for pipe, args in jobs]
    calls = [handle.summary()["calls"] for handle in handles]
    for outer, inner in ((0, 1), (1, 0)):
        found: list[torch.Tensor] = []

        def run_inner(
            pipeline: Any, i: int, t: Any, kwargs: dict[str, Any], inner: int = inner, found: Any = found
        ) -> Any:
            if i == 1:
                found.append(tiny.run(*jobs[inner]))
            return kwargs

        pipe, args = jobs[outer]
        assert torch.equal(tiny.run(pipe, args, callback_on_step_end=run_inner), alone[outer])
        assert torch.equal(found[0], alone[inner])
    assert [handle.summary()["calls"] for handle in handles] == calls


@pytest.mark.parametrize("method", STATEFUL)
def test_another_dtype_or_batch_starts_as_a_new_pipeline_does(method: str) -> None:
    options = {**STATEFUL[method], "refresh": 100, "impl": "torch"}

    def fresh() -> tuple[Any, dict[str, Any]]:
        pipe, args = tiny.wan()
        enable(pipe, **options)
        return pipe, {**args, **tiny.LONGER}

    pipe, args = fresh()
    tiny.run(pipe, args)
    twice = {**args, "num_videos_per_prompt": 2}
    assert torch.equal(tiny.run(pipe, twice), tiny.run(fresh()[0], twice))
    pipe.to(torch.bfloat16)
    other = fresh()[0].to(torch.bfloat16)
    assert torch.equal(tiny.run(pipe, args), tiny.run(other, args))
