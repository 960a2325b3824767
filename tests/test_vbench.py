"""VBench's numbers and files: normalisation, totals, JSON forms, and running its package."""

import json
import sys
from pathlib import Path

import pytest

from dsattn.errors import DsattnError, UsageError
from dsattn.quality import vbench
from dsattn.quality.vbench import QUALITY, SEMANTIC, Scores, full_info, read_results, totals, write_results

# As in VBench's scripts/constant.py: lowest, highest, weight.
CONSTANTS = """
subject consistency 0.1462 1.0 1; background consistency 0.2615 1.0 1; temporal flickering 0.6293 1.0 1
motion smoothness 0.706 0.9975 1; dynamic degree 0 1 0.5; aesthetic quality 0 1 1; imaging quality 0 1 1
object class 0 1 1; multiple objects 0 1 1; human action 0 1 1; color 0 1 1; spatial relationship 0 1 1
scene 0 0.8222 1; appearance style 0.0009 0.2855 1; temporal style 0 0.364 1; overall consistency 0 0.364 1
"""


def test_constants():
    rows = [row.split() for row in CONSTANTS.replace("\n", ";").split(";") if row.strip()]
    wanted = {"_".join(row[:-3]): tuple(map(float, row[-3:])) for row in rows}
    assert wanted == {**QUALITY, **SEMANTIC} and len(QUALITY) == 7 and len(SEMANTIC) == 9


def test_totals_by_hand():
    """Everything at its highest is 1; halving one dimension costs its weight's share."""
    best = {name: high for name, (_, high, _) in {**QUALITY, **SEMANTIC}.items()}
    assert (totals(best).quality, totals(best).semantic, totals(best).total) == pytest.approx((1, 1, 1))
    half = totals({**best, "dynamic_degree": 0.5, "scene": 0.8222 / 2})
    assert half.quality == pytest.approx(1 - 0.25 / 6.5) and half.semantic == pytest.approx(1 - 0.5 / 9)
    assert half.total == pytest.approx((4 * half.quality + half.semantic) / 5)
    # Not clamped: flickering may be worse than the worst VBench has seen.
    assert totals({**best, "temporal_flickering": 0.5}).quality == pytest.approx(1 + (-0.1293 / 0.3707 - 1) / 6.5)


def test_never_a_total_of_a_part():
    best = {name: high for name, (_, high, _) in {**QUALITY, **SEMANTIC}.items()}
    quality_only = totals({name: best[name] for name in QUALITY})
    assert quality_only.quality == pytest.approx(1) and quality_only.semantic is None and quality_only.total is None
    assert quality_only.dimensions == 7
    missing = totals({name: value for name, value in best.items() if name != "motion_smoothness"})
    assert missing.quality is None and missing.total is None and missing.semantic == pytest.approx(1)
    assert totals({"psnr": 30.0}).dimensions == 0


def test_results_there_and_back(tmp_path):
    results = {
        "temporal_flickering": Scores(0.97, {"a-0.mp4": 0.98, "b-0.mp4": 0.96}),
        "imaging_quality": Scores(0.55, {"a-0.mp4": 0.5, "b-0.mp4": 0.6}),
    }
    path = tmp_path / "dense_eval_results.json"
    write_results(path, results, Path("videos/dense"))
    values = json.loads(path.read_text())
    assert values["temporal_flickering"][0] == 0.97
    first = values["temporal_flickering"][1][0]
    assert first == {"video_path": "videos/dense/a-0.mp4", "video_results": 0.98}
    # Single videos of this dimension stand on 0 to 100.
    assert values["imaging_quality"][1][0]["video_results"] == pytest.approx(50)
    back = read_results(path)
    assert back["temporal_flickering"] == results["temporal_flickering"]
    assert back["imaging_quality"].videos == pytest.approx(results["imaging_quality"].videos)


def test_results_of_the_leaderboard_and_truths(tmp_path):
    path = tmp_path / "x_eval_results.json"
    path.write_text(
        '{"dynamic degree": [0.5, [{"video_path": "d/a-0.mp4", "video_results": true}, {"video_path": "b"}]]}'
    )
    assert read_results(path) == {"dynamic_degree": Scores(0.5, {"a-0.mp4": 1.0})}


@pytest.mark.parametrize("text", ["[]", "{", '{"color": 3}', '{"color": [NaN]}', '{"colour": [0.5]}'])
def test_wrong_results(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"x\.json"):
        read_results(path)


def test_full_info():
    entries = [
        {"prompt_en": "a", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
        {"prompt_en": "b", "dimension": ["scene"]},
    ]
    info = full_info(entries, {"a": [Path("v/a-0.mp4"), Path("v/a-1.mp4")]})
    assert info == [{**entries[0], "video_list": ["v/a-0.mp4", "v/a-1.mp4"]}]


FAKE = """#!{python}
# An interpreter with a vbench: the real runner meets a package of the same interface.
import importlib.metadata, json, runpy, sys, types
assert sys.argv[1] == "-I"
sys.argv = sys.argv[2:]
torch, vbench = types.ModuleType("torch"), types.ModuleType("vbench")
torch.device = str
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.out = device, output_path
    def build_full_info_json(self, *args, **options):
        raise SystemExit("it looked for videos by itself")
    def evaluate(self, videos_path, name, dimension_list):
        from torchvision.transforms import Compose
        if dimension_list == ["aesthetic_quality"]:
            Compose([])
        info = json.load(open(self.build_full_info_json()))
        videos = [v for entry in info if dimension_list[0] in entry["dimension"] for v in entry["video_list"]]
        rows = [{{"video_path": v, "video_results": 0.25 + 0.5 * i}} for i, v in enumerate(videos)]
        json.dump({{dimension_list[0]: [0.5, rows]}}, open(f"{{self.out}}/{{name}}_eval_results.json", "w"))
vbench.VBench = VBench
sys.modules.update(torch=torch, vbench=vbench)
importlib.metadata.version = lambda name: "0.1.5"
if "{tv}":
    tv, sub = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    def Compose(x): raise FileNotFoundError("weights of the aesthetic model")
    sub.Compose = Compose
    sys.modules.update({{"torchvision": tv, "torchvision.transforms": sub}})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(params=["", "yes"])
def interpreter(tmp_path, request):
    """With and without torchvision."""
    path = tmp_path / "python"
    path.write_text(FAKE.format(python=sys.executable, tv=request.param))
    path.chmod(0o755)
    return path, bool(request.param)


def test_running_the_package(tmp_path, interpreter):
    python, torchvision = interpreter
    info = tmp_path / "info.json"
    entries = [
        {"prompt_en": "a", "dimension": ["temporal_flickering"], "video_list": ["d/a-0.mp4", "d/a-1.mp4"]},
        {"prompt_en": "b", "dimension": ["aesthetic_quality"], "video_list": ["d/b-0.mp4"]},
    ]
    info.write_text(json.dumps(entries))
    options = {"device": "cpu", "log": tmp_path / "logs" / "x.log"}
    found, facts = vbench.run_official(python, "temporal_flickering", info, stand_in=not torchvision, **options)
    assert found == Scores(0.5, {"a-0.mp4": 0.25, "a-1.mp4": 0.75}) and facts["vbench"] == "0.1.5"
    assert facts["torchvision"] == ("0.1.5" if torchvision else "stand-in")
    with pytest.raises(DsattnError, match=r"could not compute aesthetic_quality: .*\(all of it: .*x\.log\)") as caught:
        vbench.run_official(python, "aesthetic_quality", info, **options)
    assert ("weights of the aesthetic model" if torchvision else "torchvision") in str(caught.value)
    with pytest.raises(UsageError, match="nothing can stand in"):
        vbench.run_official(python, "aesthetic_quality", info, stand_in=True, **options)


def test_no_such_interpreter(tmp_path):
    with pytest.raises(UsageError, match="--vbench-python .*nowhere cannot be run"):
        vbench.run_official(tmp_path / "nowhere", "color", tmp_path / "i.json", device="cpu", log=tmp_path / "x.log")


def test_the_stand_in_refuses_to_work():
    from dsattn.quality.vbench_runner import _Absent

    module = _Absent("torchvision.transforms")
    assert module.InterpolationMode.BICUBIC is not None
    with pytest.raises(RuntimeError, match=r"torchvision\.transforms\.Resize was called"):
        module.Resize(224)
