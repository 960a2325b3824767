"""enable, disable, SparseAttnProcessor and attn_processors: what they set, what they leave, what they restore."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

import dsattn
from dsattn.engine import Engine
from dsattn.errors import StrictFallbackError, UsageError
from dsattn.pipelines.adapter import (
    SparseAttnProcessor,
    attn_processors,
    disable,
    enable,
    enabled,
    summary,
)
from dsattn.pipelines.overlay import SparseProcessor
from dsattn.pipelines.registry import FAMILIES

from . import tiny_pipelines as tiny


def processors(transformer: Any) -> dict[str, Any]:
    return {name: m.processor for name, m in transformer.named_modules() if hasattr(m, "processor")}


def hooks(transformer: Any) -> list[Any]:
    registry = getattr(transformer, "_diffusers_hook", None)
    return [
        dict(transformer._forward_pre_hooks),
        dict(transformer._forward_pre_hooks_with_kwargs),
        dict(transformer._forward_hooks),
        None if registry is None else (list(registry._hook_order), list(registry._fn_refs), dict(registry.hooks)),
        transformer.__dict__.get("forward"),
        sorted(transformer.__dict__),
    ]


@pytest.mark.parametrize("name", ["wan_two", "hunyuan", "mochi", "cogvideox", "ltx"])
@pytest.mark.parametrize("other_hooks", [False, True])
def test_item02_remove_restores_the_same_objects_and_hooks(name: str, other_hooks: bool) -> None:
    pipe, args = tiny.BUILDERS[name]()
    transformers = [pipe.components[c] for c in ("transformer", "transformer_2") if pipe.components.get(c) is not None]
    if other_hooks:
        tiny.run(pipe, args)  # leaves an empty hook registry
        for transformer in transformers:
            transformer.register_forward_pre_hook(lambda module, inputs: None)
    before = [(processors(t), hooks(t)) for t in transformers]
    handle = enable(pipe, **tiny.SPARSE)
    assert any(isinstance(p, SparseProcessor) for t in transformers for p in processors(t).values())
    tiny.run(pipe, args)
    handle.remove()
    handle.remove()
    for transformer, (old_processors, old_hooks) in zip(transformers, before, strict=True):
        now = processors(transformer)
        assert now.keys() == old_processors.keys() and all(now[key] is old_processors[key] for key in now)
        if other_hooks:
            assert hooks(transformer) == old_hooks
        else:  # the run itself made diffusers' empty registry
            assert hooks(transformer)[:3] == old_hooks[:3] and hooks(transformer)[4] is None


@pytest.mark.parametrize(
    ("name", "left_alone"),
    [("wan", "blocks.0.attn2"), ("hunyuan", "context_embedder.token_refiner.refiner_blocks.0.attn")],
)
def test_only_video_self_attention_is_replaced(name: str, left_alone: str) -> None:
    pipe, _ = tiny.BUILDERS[name]()
    before = processors(pipe.transformer)
    enable(pipe, Engine("dense"))
    after = processors(pipe.transformer)
    assert after[left_alone] is before[left_alone]
    replaced = {key for key in after if after[key] is not before[key]}
    assert replaced == {key for key in after if isinstance(after[key], SparseProcessor)}
    assert len(replaced) == 2


def test_sparse_attention_changes_the_result_and_says_how_dense_it_was() -> None:
    pipe, args = tiny.wan()
    stock = tiny.run(pipe, {**args, **tiny.LONGER})
    with enabled(pipe, **tiny.SPARSE) as handle:
        sparse = tiny.run(pipe, {**args, **tiny.LONGER})
        assert summary(pipe) == handle.summary()
        assert 0.2 < handle.summary()["density_all_calls"] < 0.5
        assert handle.summary()["plan_bytes"] > 0
    assert handle.summary()["plan_bytes"] == 0 and handle.summary()["calls"] == {"refresh": 12}
    assert not torch.allclose(sparse, stock, atol=1e-3) and torch.isfinite(sparse).all()
    assert torch.equal(tiny.run(pipe, {**args, **tiny.LONGER}), stock)


def test_enabling_twice_names_the_way_out() -> None:
    pipe, _ = tiny.wan_two()
    handle = enable(pipe.transformer_2, "topk")
    with pytest.raises(RuntimeError, match=r"already enabled on transformer_2.*disable"):
        enable(pipe, "topk")
    assert not any(isinstance(p, SparseProcessor) for p in processors(pipe.transformer).values())
    handle.remove()
    enable(pipe, "topk")


def test_unknown_targets_are_refused_with_what_is_supported() -> None:
    pipe, _ = tiny.wan()
    with pytest.raises(ValueError, match=r"supports no transformer of UMT5EncoderModel.*WanTransformer3DModel"):
        enable(pipe.text_encoder)
    with pytest.raises(TypeError, match="expected a diffusers pipeline or a video transformer, got str"):
        enable("Wan-AI/Wan2.1")
    with pytest.raises(UsageError, match="nonsense"):
        enable(pipe, "topk", nonsense=1)
    assert not any(isinstance(p, SparseProcessor) for p in processors(pipe.transformer).values())
    with pytest.raises(RuntimeError, match="not enabled"):
        summary(pipe)
    disable(pipe)


def test_processor_that_attends_in_its_own_way_is_refused() -> None:
    class Own:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
            return hidden_states

    pipe, _ = tiny.wan()
    pipe.transformer.blocks[1].attn1.set_processor(Own())
    with pytest.raises(TypeError, match="Own calls neither dispatch_attention_fn nor"):
        enable(pipe)
    assert not any(isinstance(p, SparseProcessor) for p in processors(pipe.transformer).values())


def test_yaml_file_and_engine_are_taken_as_method(tmp_path: Path) -> None:
    pipe, args = tiny.wan()
    file = tmp_path / "run.yaml"
    file.write_text("method: topk\ndensity: 0.5\nimpl: torch\ndense_steps: 1\n")
    with enabled(pipe, file) as handle:
        tiny.run(pipe, args)
        assert handle.summary()["calls"] == {"dense": 4, "refresh": 8}
    engine = Engine("dense")
    assert enable(pipe, engine).engine is engine


def test_pipeline_set_attn_processor_takes_a_request_and_replaces_it() -> None:
    pipe, args = tiny.mochi()  # its transformer has no set_attn_processor of its own
    pipe.set_attn_processor(SparseAttnProcessor("topk", density=0.5, impl="torch"))
    pipe.set_attn_processor(dsattn.SparseAttnProcessor("dense"))
    tiny.run(pipe, args)
    assert set(dsattn.summary(pipe)["calls"]) == {"dense"}
    dsattn.disable(pipe)
    assert not any(isinstance(p, SparseProcessor) for p in processors(pipe.transformer).values())


def test_pipeline_set_attn_processor_hands_stock_processors_on() -> None:
    pipe, _ = tiny.wan_two()
    pipe.set_attn_processor(SparseAttnProcessor("topk"))
    stock = type(pipe.transformer.blocks[0].attn2.processor)()
    pipe.set_attn_processor(stock)
    for transformer in (pipe.transformer, pipe.transformer_2):
        assert all(p is stock for p in processors(transformer).values())
        assert not transformer._forward_pre_hooks
    mine = dict(pipe.transformer.attn_processors)
    pipe.set_attn_processor(mine)
    assert len(mine) == 4  # diffusers empties the dictionary it is given


def test_transformer_set_attn_processor_takes_a_request() -> None:
    pipe, args = tiny.hunyuan()
    before = processors(pipe.transformer)
    refiner = "context_embedder.token_refiner.refiner_blocks.0.attn"
    pipe.transformer.set_attn_processor(SparseAttnProcessor("topk", density=1.0, impl="torch"))
    assert processors(pipe.transformer)[refiner] is before[refiner]
    tiny.run(pipe, args)
    assert summary(pipe)["calls"] == {"refresh": 6}


def test_request_put_on_a_module_itself_raises_with_the_way_out() -> None:
    pipe, args = tiny.wan()
    pipe.transformer.blocks[0].attn1.set_processor(SparseAttnProcessor("topk"))
    with pytest.raises(RuntimeError, match=r"dsattn.enable\(pipe"):
        tiny.run(pipe, args)


def test_attn_processors_is_a_full_dictionary_for_the_transformer() -> None:
    pipe, args = tiny.wan()
    stock = pipe.transformer.attn_processors
    mine = attn_processors(pipe.transformer, **tiny.SPARSE)
    assert mine.keys() == stock.keys()
    assert pipe.transformer.attn_processors == stock
    pipe.transformer.set_attn_processor(mine)
    tiny.run(pipe, args)
    assert summary(pipe)["calls"] == {"refresh": 12}
    disable(pipe)
    assert pipe.transformer.attn_processors == stock and not pipe.transformer._forward_pre_hooks
    with pytest.raises(TypeError, match="MochiTransformer3DModel has no set_attn_processor"):
        attn_processors(tiny.mochi()[0].transformer)


def test_a_warning_tells_when_other_processors_took_the_place_of_ours() -> None:
    pipe, args = tiny.cogvideox()
    enable(pipe, Engine("dense"))
    pipe.transformer.fuse_qkv_projections()  # sets processors of its own
    with pytest.warns(UserWarning, match="0 of 2 attention layers of transformer run through dsattn"):
        tiny.run(pipe, args)
    pipe.transformer.unfuse_qkv_projections()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny.run(pipe, args)


def test_strict_raises_at_the_first_fallback() -> None:
    pipe, args = tiny.skyreels_df()
    pipe.transformer.config.num_frame_per_block = 2
    enable(pipe, **tiny.SPARSE, strict=True)
    with pytest.raises(StrictFallbackError, match="key padding"):
        tiny.run(pipe, args)


def test_settings_made_while_enabled_reach_the_original_processors() -> None:
    pipe, args = tiny.wan()
    stock = tiny.run(pipe, args)
    handle = enable(pipe, Engine("dense"))
    for block in pipe.transformer.blocks:
        block.attn1.set_attention_backend("native")
    assert torch.equal(tiny.run(pipe, args), stock)
    handle.remove()
    assert pipe.transformer.blocks[0].attn1.processor._attention_backend == AttentionBackendName.NATIVE


def test_item13_saving_after_enable_adds_no_keys(tmp_path: Path) -> None:
    pipe, args = tiny.wan()
    keys = set(pipe.transformer.state_dict())
    enable(pipe, **tiny.SPARSE)
    tiny.run(pipe, args)
    assert set(pipe.transformer.state_dict()) == keys
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert not any(isinstance(p, SparseProcessor) for p in processors(loaded.transformer).values())
    disable(pipe)
    torch.testing.assert_close(tiny.run(loaded, args), tiny.run(pipe, args), rtol=1e-4, atol=1e-5)


def test_item14_a_deep_copy_works_on_its_own() -> None:
    pipe, args = tiny.wan()
    args = {**args, **tiny.LONGER}
    engine = tiny.recorder()
    enable(pipe, engine)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in twin.transformer.parameters():
            parameter.mul_(1.01)
    engine.calls.clear()
    other = tiny.run(twin, args)
    assert engine.calls == []
    own = tiny.run(pipe, args)
    assert not torch.equal(other, own)
    assert summary(twin)["calls"] == summary(pipe)["calls"] == {"refresh": 12}
    disable(twin)
    assert not any(isinstance(p, SparseProcessor) for p in processors(twin.transformer).values())
    assert torch.equal(tiny.run(pipe, args), own) and len(engine.calls) == 24


def test_item14_a_deep_copied_transformer_leaves_the_pipeline_behind() -> None:
    pipe, args = tiny.wan()
    enable(pipe, **tiny.SPARSE)
    sparse = tiny.run(pipe, args)
    pipe.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(tiny.run(pipe, args), sparse)
    assert summary(pipe)["calls"] == {"refresh": 12}


def test_item16_an_unrelated_pipeline_is_untouched() -> None:
    wan, args = tiny.wan()
    ltx, ltx_args = tiny.ltx()
    before = tiny.run(ltx, ltx_args)
    own = processors(ltx.transformer)
    backend = _AttentionBackendRegistry._active_backend
    members = list(AttentionBackendName)
    twin_stock, _ = tiny.wan()
    expected = tiny.run(twin_stock, {**args, **tiny.LONGER})
    enable(wan, **tiny.SPARSE)
    assert not torch.equal(tiny.run(wan, {**args, **tiny.LONGER}), expected)
    assert torch.equal(tiny.run(ltx, ltx_args), before)
    assert torch.equal(tiny.run(twin_stock, {**args, **tiny.LONGER}), expected)
    assert processors(ltx.transformer) == own and not ltx.transformer._forward_pre_hooks
    assert _AttentionBackendRegistry._active_backend == backend and list(AttentionBackendName) == members


def test_families_name_real_diffusers_classes() -> None:
    import diffusers

    assert all(hasattr(diffusers, name) for name in FAMILIES)
