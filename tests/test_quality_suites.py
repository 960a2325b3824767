"""Suites, names and seeds; arms and what may differ between them."""

import json

import pytest

from dsattn.errors import UsageError
from dsattn.pipelines.tiny.data import vocabulary
from dsattn.quality import suites
from dsattn.quality.arms import ArmsDifferError, check_alike, parse_arm, parse_arms
from dsattn.quality.suites import Item, entries, item_seed, items, parse_shard, read_texts
from dsattn.quality.vbench import QUALITY

GROUPS = {
    ("subject_consistency", "dynamic_degree", "motion_smoothness"): 72,
    ("scene", "background_consistency"): 86,
    ("temporal_flickering",): 75,
    ("overall_consistency", "aesthetic_quality", "imaging_quality"): 93,
    ("color",): 85,
    ("human_action",): 100,
}


@pytest.fixture
def prompts(tmp_path):
    """A file in the form of VBench's, with its counts of quality dimensions."""
    values = [
        {"prompt_en": f"{group[0]} {i}", "dimension": list(group), "video_list": ["x.mp4"]}
        for group, count in GROUPS.items()
        for i in range(count)
    ]
    values.append({"prompt_en": "color 3", "dimension": ["appearance_style"], "auxiliary_info": {"a": 1}})
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(values))
    return path


def test_smoke_needs_nothing_and_speaks_the_shipped_models_words():
    found = entries("smoke")
    assert len(found) == 4 and all(entry["dimension"] == list(QUALITY) for entry in found)
    assert {word for entry in found for word in entry["prompt_en"].split()} <= set(vocabulary())


def test_suites_of_vbench(prompts):
    assert len(entries("full", prompts)) == sum(GROUPS.values()) + 1
    assert len(entries("quality", prompts)) == 72 + 86 + 75 + 93
    mini = entries("mini", prompts)
    assert len(mini) == 24 and len({entry["prompt_en"] for entry in mini}) == 24
    assert [e["prompt_en"] for e in mini[:6]] == [f"subject_consistency {i}" for i in (0, 12, 24, 36, 48, 60)]
    assert "video_list" not in mini[0]


def test_a_prompt_in_two_entries_is_made_once(prompts):
    full = entries("full", prompts)
    assert len(items(full, 5, 0)) == sum(GROUPS.values()) * 5


@pytest.mark.parametrize(
    ("text", "word"),
    [("{", "cannot be read"), ("[]", "must hold a list"), ('[{"prompt": 1}]', "must hold a list"), (None, "read")],
)
def test_wrong_prompt_files(tmp_path, text, word):
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=word):
        entries("quality", path)


def test_without_vbench_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(suites.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--prompts .*--suite smoke"):
        entries("mini")
    with pytest.raises(UsageError, match="suite must be one of smoke, mini, quality, full"):
        entries("huge")


def test_names_and_seeds():
    listed = [{"prompt_en": p, "dimension": []} for p in ("one", "two", "one")]
    found = items(listed, 2, 7)
    assert [item.name for item in found] == ["one-0", "one-1", "two-0", "two-1"]
    assert len({item.seed for item in found}) == 4 and all(0 <= item.seed < 2**63 for item in found)
    # The seed hangs on nothing but base, prompt and index.
    assert items(listed[1:2], 1, 7)[0] == Item("two", 0, item_seed(7, "two", 0)) == found[2]
    assert items(listed, 2, 8)[0].seed != found[0].seed
    for bad in ("a/b", "", "x" * 241, "a\nb"):
        with pytest.raises(UsageError, match="cannot be the name of a file"):
            items([{"prompt_en": bad}], 1, 0)
    with pytest.raises(UsageError, match="samples must be at least 1"):
        items(listed, 0, 0)


def test_longer_texts(tmp_path):
    listed = [{"prompt_en": p, "dimension": []} for p in ("one", "two", "one")]
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"one": "one, at length", "two": "two, at length", "three": "x"}))
    assert read_texts(path, listed) == {"one": "one, at length", "two": "two, at length"}
    for text, word in (('{"one": "x"}', "lacks 1 prompts .* 'two'"), ('{"one": ""}', "must hold"), ("[", "read")):
        path.write_text(text)
        with pytest.raises(UsageError, match=word):
            read_texts(path, listed)


def test_shards():
    assert parse_shard("2/8") == (2, 8)
    for bad in ("8/8", "x", "1", "-1/2", "1/0", ""):
        with pytest.raises(UsageError, match="--shard must be i/n"):
            parse_shard(bad)


def test_arms(tmp_path):
    assert parse_arm("dense").config is None
    arm = parse_arm("mine=topk:density=0.2,dense-steps=1,impl=torch")
    assert arm.name == "mine" and arm.config.method == "topk" and arm.config.options == {"density": 0.2}
    assert (arm.config.dense_steps, arm.config.impl, arm.config.refresh) == (1, "torch", 4)
    assert parse_arm("topk:density=0.2").name == "topk"
    assert parse_arm("fast", "shipped").config.dense_steps == 0.1
    path = tmp_path / "my.yaml"
    path.write_text('method: topk\ndensity: "0:0.5,0.5:0.2"\n')
    arm = parse_arm(str(path))
    assert arm.name == "my" and arm.config.options["density"] == "0:0.5,0.5:0.2" and arm.config.refresh == 1
    assert parse_arm(f"x={path}:density=0.1").config.options["density"] == 0.1


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        (["nothing"], "nothing"),
        (["topk:densty=1"], "densty"),
        (["topk:density"], "option=value"),
        (["../x=topk"], "name"),
        (["=topk"], "name"),
        (["topk", "topk:density=0.3"], "two arms are called topk"),
    ],
)
def test_wrong_arms(texts, word):
    with pytest.raises(UsageError, match=word):
        parse_arms(texts)


def test_arms_may_differ_in_attention_only():
    one = {"prompt": "p", "seed": 1, "model": {"id": "m"}, "shape": {"steps": 4}, "env": {"torch": "2"}, "index": 0}
    check_alike(one, {**one, "method": "topk", "config": {"density": 0.1}, "times_s": {"e2e": 3}}, ("dense", "topk"))
    for path, other in (
        ("seed", {"seed": 2}),
        ("shape", {"shape": {"steps": 5}}),
        ("model.id", {"model": {"id": "n"}}),
        ("env.torch", {"env": {"torch": "3"}}),
        ("negative_prompt", {"negative_prompt": "ugly"}),
    ):
        with pytest.raises(ArmsDifferError, match=f"dense and topk must differ in attention only, but {path} is"):
            check_alike(one, {**one, **other}, ("dense", "topk"))
