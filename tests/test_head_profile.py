"""Head profiles: from a pipeline to disk and back, and every way in which one must be refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsattn
from dsattn.errors import UsageError
from dsattn.head_profile import HeadProfile
from dsattn.methods import auto
from dsattn.pipelines.facts import describe_pipeline
from dsattn.pipelines.overlay import SparseProcessor

from . import tiny_pipelines as tiny
from .profile_inputs import head_profile

AUTO: dict[str, Any] = {"target_error": 0.3, "rows": 16, "impl": "torch", "refresh": 2}
# 3 x 8 x 8 tokens: more than one block of every candidate.
SIZES = {"height": 128, "width": 128}


def profiled(pipe: Any, args: dict[str, Any], **options: Any) -> HeadProfile:
    with dsattn.enabled(pipe, "auto", **{**AUTO, **options}) as handle:
        tiny.run(pipe, args, **SIZES)
        return handle.head_profile()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, args = tiny.wan()
    file = tmp_path_factory.mktemp("profile") / "wan.json"
    profiled(pipe, args).save(file)
    return file


def test_facts_are_those_of_architecture_and_noise_schedule(tmp_path: Path) -> None:
    pipe, _ = tiny.wan()
    facts = describe_pipeline(pipe)
    assert facts.keys() == {"transformer", "scheduler"}
    assert facts["transformer"].startswith("WanTransformer3DModel ") and "shift=7.0" in facts["scheduler"]
    pipe.save_pretrained(tmp_path / "wan")
    again = type(pipe).from_pretrained(tmp_path / "wan")
    assert describe_pipeline(again) == facts, "where a model was loaded from does not matter"
    assert describe_pipeline(pipe.transformer) == {"transformer": facts["transformer"]}
    deeper, _ = tiny.wan(layers=3)
    assert describe_pipeline(deeper)["transformer"] != facts["transformer"]
    again.scheduler = tiny.flow(shift=3.0)
    assert describe_pipeline(again)["scheduler"] != facts["scheduler"]
    again.scheduler = tiny.unipc()
    assert describe_pipeline(again)["scheduler"].startswith("UniPCMultistepScheduler ")
    assert describe_pipeline(tiny.wan_two()[0]).keys() == {"transformer", "transformer_2", "scheduler"}


@pytest.mark.parametrize("dense_steps", [0, 1])
def test_a_profile_serves_another_prompt_without_measuring(
    dense_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, args = tiny.wan()
    profile = profiled(pipe, args, dense_steps=dense_steps)
    assert set(profile.layers) == {("transformer", b, i) for b in ("cond", "uncond") for i in range(2)}
    assert profile.steps == 3 and profile.grid.tokens == 3 * 8 * 8 and profile.pipeline == describe_pipeline(pipe)
    profile.save(tmp_path / "p.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json", "p.safetensors"]

    def measured(*_: Any) -> None:
        raise AssertionError("a candidate was traced")

    monkeypatch.setattr(auto, "trace", measured)
    options = {**AUTO, "dense_steps": dense_steps, "profile": tmp_path / "p.json"}
    with dsattn.enabled(pipe, "auto", **options) as handle:
        tiny.run(pipe, {**args, "prompt": "a grey wolf"}, **SIZES)
        used = handle.head_profile()
        calls = handle.summary()["calls"]
    assert calls["refresh"] > 0 and "fallback" not in calls
    assert used.layers.keys() == profile.layers.keys()
    for key, layer in used.layers.items():
        assert torch.equal(layer.choice, profile.layers[key].choice)
        assert torch.equal(layer.error, profile.layers[key].error)


def test_another_budget_chooses_anew_from_the_same_measurements(saved: Path) -> None:
    pipe, args = tiny.wan()
    chosen = []
    for target in (0.02, 0.9):
        profile = profiled(pipe, args, profile=saved, target_error=target)
        layers = profile.layers.values()
        chosen.append(torch.stack([layer.at_choice("density") for layer in layers]).mean())
    assert chosen[0] > chosen[1]


def test_both_transformers_of_a_pipeline_are_profiled() -> None:
    pipe, args = tiny.wan_two()
    profile = profiled(pipe, args)
    assert {model for model, _, _ in profile.layers} == {"transformer", "transformer_2"}


def test_prompts_of_another_length_use_the_profile_where_text_takes_part(tmp_path: Path) -> None:
    pipe, args = tiny.mochi()
    with dsattn.enabled(pipe, "auto", **AUTO) as handle:
        tiny.run(pipe, args)
        profile = handle.head_profile()
    profile.save(tmp_path / "p.json")
    with dsattn.enabled(pipe, "auto", profile=tmp_path / "p.json", impl="torch") as handle:
        tiny.run(pipe, {**args, "prompt": "a very red fox"})
        again = handle.head_profile()
    assert again.grid.text > profile.grid.text and again.layers.keys() == profile.layers.keys()


def test_only_auto_profiles_and_only_after_a_run() -> None:
    pipe, args = tiny.wan()
    with dsattn.enabled(pipe, **tiny.SPARSE) as handle:
        tiny.run(pipe, args)
        with pytest.raises(UsageError, match="only the method 'auto' profiles heads; this is 'topk'"):
            handle.head_profile()
    with dsattn.enabled(pipe, "auto", **AUTO) as handle:
        with pytest.raises(UsageError, match="no head has been measured: run the pipeline first"):
            handle.head_profile()
        tiny.run(pipe, args, **SIZES)
    with pytest.raises(UsageError, match=r"before handle.remove\(\)"):
        handle.head_profile()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: setattr(pipe, "scheduler", tiny.unipc()), "made with scheduler FlowMatch.*has UniPC"),
        (lambda pipe: setattr(pipe, "scheduler", tiny.flow(shift=2.0)), "shift=7.0.*shift=2.0"),
        (lambda pipe: setattr(pipe, "transformer", tiny.wan_transformer(num_layers=3)), "made with transformer Wan"),
        (
            lambda pipe: setattr(
                pipe, "transformer", tiny.wan_transformer(num_attention_heads=4, attention_head_dim=6)
            ),
            "made with transformer Wan",
        ),
    ],
)
def test_another_pipeline_is_refused_before_anything_is_installed(saved: Path, change: Any, message: str) -> None:
    pipe, args = tiny.wan()
    change(pipe)
    for enable in (
        lambda: dsattn.enable(pipe, "auto", profile=saved),
        lambda: pipe.set_attn_processor(dsattn.SparseAttnProcessor("auto", profile=saved)),
    ):
        with pytest.raises(UsageError, match=f"does not fit: .*{message}.*dsattn profile"):
            enable()
    assert not any(isinstance(getattr(m, "processor", None), SparseProcessor) for m in pipe.transformer.modules())
    assert not pipe.transformer._forward_pre_hooks


def test_attn_processors_check_the_model_too(saved: Path) -> None:
    other = tiny.wan_transformer(num_layers=3)
    with pytest.raises(UsageError, match="made with transformer"):
        dsattn.attn_processors(other, "auto", profile=saved)
    same, _ = tiny.wan()
    assert len(dsattn.attn_processors(same.transformer, "auto", profile=saved)) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_inference_steps": 4}, "number of steps 3, this run has 4"),
        ({"num_frames": 13}, r"the grid VideoGrid\(frames=3.*frames=4"),
        ({"width": 96}, r"the grid VideoGrid\(.*width=8.*width=6"),
    ],
)
def test_another_run_is_refused(saved: Path, more: dict[str, Any], message: str) -> None:
    pipe, args = tiny.wan()
    with dsattn.enabled(pipe, "auto", profile=saved, impl="torch"), pytest.raises(UsageError, match=message):
        tiny.run(pipe, args, **{**SIZES, **more})


def test_other_heads_and_missing_layers_are_refused() -> None:
    profile = head_profile(layers=2, heads=3)
    call = dsattn.Call(0, 0, profile.grid, num_steps=20)
    with pytest.raises(UsageError, match="profile has 3 heads a layer, this model has 4"):
        profile.layers_of(call, 1, 4)
    with pytest.raises(UsageError, match=r"no transformer/cond/5; it has transformer/cond/0"):
        profile.layers_of(dsattn.Call(5, 0, profile.grid), 1, 3)
    assert profile.layers_of(call, 2, 3)[1].weight.shape == (2, 3)


def _edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _edit_curves(file: Path, change: Any) -> None:
    curves = load_file(file.with_suffix(".safetensors"))
    change(curves)
    save_file(curves, file.with_suffix(".safetensors"))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


ERROR = "transformer/cond/0/error"
DAMAGES = [
    (lambda f: f.unlink(), "cannot be read"),
    (lambda f: f.with_suffix(".safetensors").unlink(), r"p\.safetensors beside it\) cannot be read"),
    (_truncate, "cannot be read"),
    (lambda f: _truncate(f.with_suffix(".safetensors")), "cannot be read"),
    (lambda f: f.with_suffix(".safetensors").write_bytes(b""), "cannot be read"),
    (lambda f: f.write_bytes(b"\xff\xfe"), "cannot be read"),
    (lambda f: f.write_text("[]"), "no dsattn.profile/1 file.*list"),
    (lambda f: _edit(f, schema="dsattn.profile/9"), "its schema is 'dsattn.profile/9'"),
    (lambda f: _edit(f, densities=[0.1, 1.0]), "other densities"),
    (lambda f: _edit(f, grid={"frames": 0, "height": 1, "width": 1}), "damaged"),
    (lambda f: _edit(f, layers={"transformer": {}}), "damaged"),
    (lambda f: _edit(f, layers=[]), "damaged"),
    (lambda f: _edit_curves(f, lambda c: c.pop(ERROR)), "damaged: KeyError"),
    (lambda f: _edit_curves(f, lambda c: c.update({ERROR: c[ERROR][:1].clone()})), f"damaged.*{ERROR} is"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_files_are_named(damage: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    head_profile(layers=2, heads=3).save(file)
    HeadProfile.load(file)
    damage(file)
    with pytest.raises(UsageError, match=message) as caught:
        HeadProfile.load(file)
    assert str(file) in str(caught.value)


def test_other_names_and_unknown_candidates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.json, got 'p\.yaml'"):
        HeadProfile.load("p.yaml")
    profile = head_profile(layers=1, heads=2)
    profile.layers["transformer", "cond", 0].candidates = ("semantic", "topk", "magic")
    profile.save(tmp_path / "p.json")
    with pytest.raises(UsageError, match="candidates that this version does not know: magic"):
        dsattn.enable(tiny.wan()[0], "auto", profile=tmp_path / "p.json")


def test_values_survive_the_disk(tmp_path: Path) -> None:
    profile = head_profile(layers=3, heads=5, branches=("cond", "uncond[1]"), batch=2)
    profile.save(tmp_path / "deep" / "p.json")
    again = HeadProfile.load(tmp_path / "deep" / "p.json")
    assert (again.grid, again.steps, again.pipeline) == (profile.grid, profile.steps, profile.pipeline)
    assert again.layers.keys() == profile.layers.keys()
    for key, layer in again.layers.items():
        for name in ("error", "recall", "density", "cost", "weight"):
            assert torch.equal(getattr(layer, name), getattr(profile.layers[key], name))
        assert len(layer.choice) == 0, "the choice follows from the budget of the run that uses it"
    heads = json.loads((tmp_path / "deep" / "p.json").read_text())["layers"]["transformer/cond/0"]["heads"]
    assert len(heads) == 2 and len(heads[0]) == 5 and heads[0][0].keys() == {"method", "density", "error"}


@pytest.mark.parametrize("fails_at", [1, 2])
def test_half_written_files_never_remain(fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p.json"
    calls = []
    move = os.replace

    def full_disk(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UsageError, match=r"cannot be written: .*No space"):
        head_profile(layers=1, heads=2).save(file)
    assert not [p for p in tmp_path.iterdir() if "part" in p.name]
    assert not file.exists(), "without its .json nothing is taken for a profile"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"profile .*p\.json cannot be written: .*file"):
        head_profile(layers=1, heads=2).save(tmp_path / "file" / "p.json")
