"""Captures: what is kept is what the model's attention saw, of any pipeline, and what cannot be had is said."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dsattn
from dsattn.cli.app import run as run_app
from dsattn.errors import UsageError
from dsattn.pipelines.tiny.data import vocabulary
from dsattn.pipelines.tiny.loader import load_tiny

from .bench_scripts import module
from .tiny_pipelines import BUILDERS, run

capture_qkv = module("capture_qkv")
captures = module("captures")
frontier = module("frontier")

# 2 x 4 x 4 tokens, two steps.
SIZE = ["--frames", "5", "--height", "32", "--width", "32", "--steps", "2"]


def capture(out: Path, *options: str) -> int:
    return run_app(["--out", str(out), *SIZE, "--threads", "1", *options], capture_qkv.app, "capture_qkv")


def test_equals_what_a_hook_of_its_own_sees(tmp_path, monkeypatch, capsys):
    assert capture(tmp_path, "--at", "0,1", "--branches", "cond,uncond", "--first", "1", "--seeds", "3") == 0
    assert "24 calls of 32 tokens, 0.1 MB each" in capsys.readouterr().err
    seen = []
    stock = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, *args, **options):
        if query.shape[2] == key.shape[2] == 32:
            seen.append([x.transpose(1, 2).clone() for x in (query, key, value)])
        return stock(query, key, value, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    options = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    load_tiny()(capture_qkv.PROMPTS[0], generator=torch.Generator().manual_seed(3), **options)
    found = {(c.facts["branch"], c.call.step, c.call.layer): c for c in captures.read(tmp_path, None)}
    # Six layers of the conditional branch, then of the other, at every step.
    order = [(branch, step, layer) for step in range(2) for branch in ("cond", "uncond") for layer in range(6)]
    assert len(seen) == len(order) == len(found)
    for key, wanted in zip(order, seen, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found[key].load(), wanted, strict=True)), key
    one = found["cond", 1, 4]
    assert one.run == "00-seed3-cond" and one.heads == 3 and one.call.num_steps == 2
    assert one.facts["prompt"] == capture_qkv.PROMPTS[0] and one.facts["guidance"] == "4.0"
    assert all(torch.equal(x, y[0, :, 2]) for x, y in zip(one.load("kv", head=2), one.load("kv"), strict=True))


def test_files_of_prompts_seeds_and_half_precision(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two\na red circle moves left\n\na blue star moves up\n")
    out = tmp_path / "out"
    options = ("--prompts", str(prompts), "--seeds", "0,7", "--at", "1", "--layers", "2,5", "--store", "float16")
    assert capture(out, *options) == 0
    assert [x.name for x in sorted(out.iterdir())] == [
        f"{prompt}-seed{seed}-cond.safetensors" for prompt in ("00", "01") for seed in (0, 7)
    ]
    found = captures.read(out)
    assert [(c.call.layer, c.call.step) for c in found[:2]] == [(2, 1), (5, 1)] and len(found) == 8
    assert found[0].facts["stored"] == "float16" and found[0].load("q")[0].dtype == torch.float32
    assert sorted(out.iterdir())[0].stat().st_size < 2 * 3 * 32 * 192 * 2 + 2000
    with pytest.raises(UsageError, match="captures of cond only"):
        captures.read(out, ("uncond",))
    # The frontier takes one run per prompt.
    items = list(frontier.load(out, (1,), prompts=1))
    assert [(item.run, item.call.layer) for item in items] == [("00-seed0-cond", 2), ("00-seed0-cond", 5)]
    q, k, v = (x.double().transpose(1, 2) for x in items[0].qkv)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert torch.allclose(exact[:, items[0].rows], items[0].exact)
    assert {item.run for item in frontier.load(out)} == {"00-seed0-cond", "01-seed0-cond"}
    point = frontier.measure_point("topk", {"density": 0.5, "impl": "torch", "block_q": 16, "block_k": 16}, items)
    assert 0 < point["error"] < 1 and point["density"] == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--at", "2"), "--at must name steps below --steps 2, got '2'"),
        (("--at", "x"), "--at must be whole numbers with commas between them, got 'x'"),
        (("--at", "0", "--layers", "9"), "--layers: 9 did not run; the model ran 0, 1, 2, 3, 4, 5"),
        (("--at", "0", "--guidance", "1", "--branches", "cond,uncond"), "--branches: uncond did not run"),
        (("--at", "0", "--branches", "both"), "--branches must be cond, uncond or both with a comma, got both"),
        (("--at", "0", "--store", "int8"), "--store must be one of float32, float16; got 'int8'"),
        (("--at", "0", "--model", "/nowhere"), "--model /nowhere does not exist"),
        (("--at", "0", "--height", "33"), "--height must be a multiple of 16"),
    ],
)
def test_what_cannot_be_had(tmp_path, capsys, options, message):
    assert capture(tmp_path / "out", "--first", "1", *options) == 2
    assert message in capsys.readouterr().err
    assert list((tmp_path / "out").glob("*")) == []


def test_two_runs_do_not_mix_and_disks_end(tmp_path, monkeypatch, capsys):
    (tmp_path / "00.safetensors").touch()
    assert capture(tmp_path, "--at", "0") == 2
    assert "already holds 00.safetensors" in capsys.readouterr().err
    usage = type("Usage", (), {"free": 10**5})
    monkeypatch.setattr(capture_qkv.shutil, "disk_usage", lambda path: usage)
    assert capture(tmp_path / "new", "--at", "0") == 2
    assert "0.00 GB are free; keep fewer steps" in capsys.readouterr().err


def test_other_files_are_no_captures(tmp_path):
    with pytest.raises(UsageError, match=r"holds no captures; make them with 'python scripts/capture_qkv\.py"):
        captures.read(tmp_path)
    captures.save_file({"0/0/q": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"prompt": "x"})
    with pytest.raises(UsageError, match=r"x\.safetensors is no capture .* lacks model, seed, branch"):
        captures.read(tmp_path)
    with pytest.raises(ValueError, match="missing: prompt"):
        facts = dict.fromkeys(captures.FACTS, "x")
        del facts["prompt"]
        captures.write(tmp_path / "y.safetensors", {}, dsattn.VideoGrid(1, 1, 1), facts)


def test_default_prompts_are_in_the_words_of_the_shipped_model():
    assert not {word for prompt in capture_qkv.PROMPTS for word in prompt.split()} - set(vocabulary())


def test_branches_of_batched_calls():
    call = dsattn.Call(0, 0, dsattn.VideoGrid(1, 2, 2))
    assert capture_qkv.branches_of(call, 1) == {"cond": 0}
    assert capture_qkv.branches_of(replace(call, branch="cond_uncond"), 2) == {"uncond": 0, "cond": 1}
    assert capture_qkv.branches_of(replace(call, branch="cond_uncond[0]"), 1) == {"uncond": 0}
    assert capture_qkv.branches_of(replace(call, branch="cond_uncond[1]"), 1) == {"cond": 0}


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox", "mochi", "ltx"])
def test_other_pipelines(name):
    """Whatever the layout: rows of the conditional branch, padded text cut off, the factor folded in."""
    pipe, args = BUILDERS[name]()
    recorder = capture_qkv.Recorder(capture_qkv.Wanted((1,)))
    with dsattn.enabled(pipe, recorder), contextlib.suppress(capture_qkv.Enough):
        run(pipe, args)
    assert max(step for _, step, _ in recorder.seen) == 1
    recorder.check()
    kept = recorder.found["cond"]
    assert kept.calls and all(step == 1 for step, _ in kept.calls)
    for q, k, v in kept.calls.values():
        assert q.shape == k.shape == v.shape and q.shape[:2] == (1, kept.grid.tokens)


def test_padded_text_and_other_factors():
    grid = dsattn.VideoGrid(2, 3, 3, text=6)
    q, k, v = (torch.randn(1, grid.tokens, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    recorder = capture_qkv.Recorder(capture_qkv.Wanted((0,)))
    lengths = torch.tensor([20])
    out = recorder(q, k, v, dsattn.Call(0, 0, grid), key_lengths=lengths, scale=0.1)
    kept = recorder.found["cond"]
    assert kept.grid == dsattn.VideoGrid(2, 3, 3, text=2)
    mine = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in kept.calls[0, 0]))
    assert torch.allclose(mine.transpose(1, 2), out[:, :20], atol=1e-6)


def test_half_precision_refuses_what_does_not_fit():
    with pytest.raises(UsageError, match="does not fit"):
        captures.stored(torch.tensor([1e6]), torch.float16)
