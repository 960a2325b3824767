"""The runner on the shipped model: what it measures is right, and the pipeline is left as it was."""

import mmap
import time

import numpy as np
import pytest
import torch
from torch import nn

from dsattn import Config, Engine, UsageError
from dsattn.compare import Comparison, compare
from dsattn.errors import DsattnError
from dsattn.measure import Job, Watch, generate, parameters
from dsattn.metrics import Clock, PeakMemory
from dsattn.pipelines.tiny.loader import load_tiny
from dsattn.survey import BASELINES, fastest, survey

from . import tiny_pipelines

PROMPT = "a large red circle moves left over a striped background"
# 2 x 6 x 8 latent tokens: no multiple of the block size.
JOB = Job(PROMPT, seed=3, height=48, width=64, frames=5, steps=3)
TOKENS, LAYERS, HEADS, DIM, BRANCHES = 96, 6, 3, 64, 2
SPARSE = Config("topk", {"density": 0.5, "block_q": 16, "block_k": 16}, dense_steps=1, refresh=2, impl="torch")


@pytest.fixture(scope="module")
def pipe():
    return load_tiny()


def state(pipe):
    """Everything a run might leave behind."""
    return (
        sorted(name for name in vars(pipe) if not name.startswith("_")),
        sorted(name for name in vars(pipe.vae) if not name.startswith("_")),
        [id(block.attn1.processor) for block in pipe.transformer.blocks],
        len(pipe.transformer._forward_pre_hooks),
        # diffusers makes a registry of its own for every run.
        sorted(getattr(getattr(pipe.transformer, "_diffusers_hook", None), "hooks", ())),
    )


class Recorder(Watch):
    def __init__(self):
        self.events = []

    def begin(self, label, steps):
        self.events.append((label, steps))

    def step(self):
        self.events.append("step")

    def end(self):
        self.events.append("end")


@pytest.fixture(scope="module")
def result(pipe) -> Comparison:
    before = state(pipe)
    out = compare(pipe, JOB, SPARSE, repeats=2, baseline=BASELINES["pipeline"])
    assert state(pipe) == before
    return out


def test_measuring_changes_nothing(pipe):
    stock = pipe(
        PROMPT,
        height=48,
        width=64,
        num_frames=5,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    run = generate(pipe, JOB)
    assert np.array_equal(run.frames, np.rint(stock * 255).astype(np.uint8))
    assert run.summary is None and run.latents_from == "last step"
    assert np.array_equal(generate(pipe, JOB, Engine("dense")).frames, run.frames)


def test_times_add_up(pipe):
    watch = Recorder()
    run = generate(pipe, JOB, watch=watch, label="here")
    assert watch.events == [("here", 3), "step", "step", "step", "end"]
    assert len(run.step_s) == 3 and all(t > 0 for t in run.step_s)
    assert sum(run.step_s) <= run.denoise_s
    assert 0 < run.text_s + run.vae_s + run.denoise_s <= run.e2e_s
    assert run.memory["process_rss"] > 50 * 2**20


def test_survey_counts_the_work(pipe):
    """FLOPs beside self-attention, against a count by hand over the modules that multiply."""
    found = survey(pipe, JOB)
    assert found.qkv_shape == (1, TOKENS, HEADS, DIM)
    assert (found.call.layer, found.call.num_layers, found.call.grid.tokens) == (0, LAYERS, TOKENS)
    assert found.pairs_per_step == LAYERS * BRANCHES * HEADS * TOKENS**2
    assert found.attention_flops == 4 * DIM * found.pairs_per_step

    flops = []

    def linear(module, args, output):
        flops.append(2 * output.numel() * module.in_features)

    def patches(module, args, output):
        flops.append(2 * output.numel() * module.weight[0].numel())

    def cross(module, args, kwargs):
        hidden, text = (*args, *kwargs.values())[:2]
        flops.append(4 * hidden.shape[0] * hidden.shape[1] * text.shape[1] * HEADS * DIM)

    hooks = [m.register_forward_hook(linear) for m in pipe.transformer.modules() if isinstance(m, nn.Linear)]
    hooks.append(pipe.transformer.patch_embedding.register_forward_hook(patches))
    hooks += [b.attn2.register_forward_pre_hook(cross, with_kwargs=True) for b in pipe.transformer.blocks]
    generate(pipe, JOB, steps=1, decode=False)
    for hook in hooks:
        hook.remove()
    assert found.other_flops == sum(flops)


def test_survey_probes_real_backends(pipe):
    found = survey(pipe, JOB)
    assert set(found.probe_ms) == {"pipeline", "flex"}
    assert found.probe_ms["pipeline"] > 0
    assert (found.probe_ms["flex"] is None) == ("flex" in found.probe_why)


@pytest.mark.parametrize(
    ("times", "name"),
    [
        ({"pipeline": 10.0, "flex": 20.0}, "pipeline"),
        ({"pipeline": 10.0, "flex": 5.0}, "flex"),
        ({"pipeline": 10.0, "flex": 9.8}, "pipeline"),
        ({"pipeline": 10.0, "flex": None}, "pipeline"),
        ({"pipeline": 10.0, "cudnn": 6.0, "flex": 7.0, "xformers": None}, "cudnn"),
    ],
)
def test_baseline_is_the_clearly_fastest(times, name):
    assert fastest(times).name == name


def test_runs_in_turns_and_repeats(result):
    assert result.order == "DSDS" and len(result.dense) == len(result.sparse) == 2
    assert np.array_equal(result.dense[0].frames, result.dense[1].frames), "one seed, one result"
    assert torch.equal(result.dense[0].latents, result.dense[1].latents)
    assert not torch.equal(result.dense[0].latents, result.sparse[0].latents), "sparse attention was active"
    assert result.sparse[1].frames is None, "frames nobody needs are let go"
    assert result.own is None and result.instrumented == {}
    assert all(seconds > 0 for seconds in result.warmup_s.values())
    assert result.compile_s == {"dense": 0.0, "sparse": 0.0}, "gathering compiles nothing"


def test_all_compilation_is_in_the_warmup(pipe):
    """flex compiles one graph for planned and one for pooled shapes: none may fall into measured runs."""
    job = Job(PROMPT, height=80, width=48, frames=5, steps=3)
    config = Config("topk", {"density": 0.4, "block_q": 16, "block_k": 16}, dense_steps=0.4, refresh=2)
    out = compare(pipe, job, config, repeats=1)
    assert out.compiled_while_measuring == 0
    assert 0 < out.compile_s["sparse"] < out.warmup_s["sparse"]
    assert all(run.summary["compile_s"] == 0 for run in out.dense + out.sparse)


def test_sparse_run_follows_its_schedule(result):
    summary = result.sparse[0].summary
    calls = LAYERS * BRANCHES
    assert summary["calls"] == {"dense": calls, "refresh": calls, "reuse": calls}
    assert summary["fallbacks"] == {}
    assert summary["density_by_step"][0] == 1 and summary["density_by_step"][1] < 1
    assert summary["plan_s"] > 0 and summary["attend_s"] > 0
    assert result.dense[0].summary["calls"] == {"dense": calls * 3}


def test_other_baseline_serves_both_modes_and_the_own_one_is_shown(pipe):
    finished = []
    out = compare(
        pipe, JOB, SPARSE, repeats=1, baseline=BASELINES["flex"], finished=lambda name, run: finished.append(name)
    )
    assert finished == ["dense", "sparse"]
    assert out.dense[0].summary["impls"] == {"flex": 3 * LAYERS * BRANCHES}
    assert out.sparse[0].summary["impls"] == {"flex": LAYERS * BRANCHES, "torch": 2 * LAYERS * BRANCHES}
    assert out.own.summary["impls"] == {"pipeline": 3 * LAYERS * BRANCHES} and out.own.e2e_s > 0


def test_another_family():
    """LTX packs its latents, has no negative default and other names for its scale factors."""
    pipe, arguments = tiny_pipelines.ltx()
    job = Job(arguments["prompt"], height=arguments["height"], width=arguments["width"], frames=9, steps=2)
    run = generate(pipe, job, Engine("topk", impl="torch", block_q=16, block_k=16))
    assert run.frames.shape == (9, job.height, job.width, 3) and run.frames.dtype == np.uint8
    assert len(run.step_s) == 2 and set(run.summary["calls"]) == {"refresh"}


def test_bad_input_is_the_users(pipe):
    with pytest.raises(UsageError, match=r"TinyPipeline refuses this input: .*divisible by 16"):
        generate(pipe, Job(PROMPT, height=40, width=64, frames=5, steps=1))
    with pytest.raises(UsageError, match="needs a sparse method"):
        compare(pipe, JOB, Config("dense"))
    with pytest.raises(UsageError, match="at least 1"):
        compare(pipe, JOB, SPARSE, repeats=0)
    before = state(pipe)
    with pytest.raises(ValueError, match="unexpected inside"):
        generate(pipe, JOB, watch=Failing())
    assert state(pipe) == before, "a failed run is cleaned up too"


class Failing(Watch):
    def step(self):
        raise ValueError("unexpected inside")


def test_unsupported_argument_and_pipeline():
    pipe, arguments = tiny_pipelines.skyreels()
    assert "guidance_scale" in parameters(pipe)
    pipe.transformer = None
    with pytest.raises(UsageError, match="dsattn cannot be used on this SkyReelsV2Pipeline"):
        generate(pipe, Job("x", steps=1), Engine("topk"))


def test_frames_that_are_not_finite_are_refused(pipe):
    weight = pipe.transformer.proj_out.bias
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        with pytest.raises(DsattnError, match="not finite"):
            generate(pipe, JOB, steps=1)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_clock_and_memory():
    clock = Clock(torch.device("cpu"))
    first = clock.mark()
    time.sleep(0.02)
    assert 0.02 <= clock.between(first, clock.mark()) < 5
    with PeakMemory(torch.device("cpu")) as small:
        pass
    # Fresh pages: what an allocator hands out again is resident already, and the peak would not move.
    with PeakMemory(torch.device("cpu")) as large, mmap.mmap(-1, 40 * 2**20) as pages:
        pages[:] = b"1" * len(pages)
        time.sleep(0.1)
    assert large.peaks["process_rss"] - small.peaks["process_rss"] > 20 * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    pipe = load_tiny(torch_dtype=torch.bfloat16).to("cuda")
    out = compare(pipe, JOB, Config("topk", dense_steps=1), repeats=1)
    assert set(out.instrumented) == {"dense", "sparse"}
    assert out.instrumented["sparse"].summary["attend_s"] > 0
    assert out.dense[0].memory["allocated"] > 0
    assert "cudnn" in out.survey.probe_ms
