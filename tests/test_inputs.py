"""Two runs that differ in more than their attention are refused."""

import dataclasses

import pytest
import torch

from dsattn import Config
from dsattn.compare import compare
from dsattn.inputs import ArmsDifferError, InputWatch, check_same, digest
from dsattn.measure import Job, Watch, generate
from dsattn.pipelines.tiny.loader import load_tiny
from dsattn.survey import BASELINES

from . import tiny_pipelines

JOB = Job("a small blue square moves up over a plain background", seed=3, height=48, width=64, frames=5, steps=2)
SPARSE = Config("topk", {"density": 0.5, "block_q": 16, "block_k": 16}, impl="torch")


@pytest.fixture
def pipe():
    return load_tiny()


def test_digest():
    a = torch.arange(6.0).reshape(2, 3)
    assert digest([]) is None and len(digest([a])) == 16
    assert digest([a]) == digest([a.clone().T.contiguous().T]), "values, not memory"
    others = [[a.half()], [a.reshape(3, 2)], [a + 1e-6], [a, a], [torch.tensor(1)]]
    assert len({digest(x) for x in ([a], *others)}) == 6
    assert digest([a.bfloat16()]) and digest([torch.tensor(True)])


def test_what_a_run_was_given(pipe):
    first = generate(pipe, JOB).inputs
    assert first == generate(pipe, JOB).inputs
    assert (first["height"], first["width"], first["frames"], first["steps"]) == (48, 64, 5, 2)
    assert first["guidance"] == pipe.guidance_scale and first["dtype"] == "float32" and first["seed"] == 3
    assert all(first[name] for name in ("scheduler", "schedule", "prompt_embeddings", "initial_latents"))
    for change, names in (
        ({"seed": 4}, {"seed", "initial_latents"}),
        ({"prompt": "a large red circle"}, {"prompt", "prompt_embeddings"}),
        ({"steps": 3}, {"steps", "schedule"}),
        ({"guidance": 2.0}, {"guidance"}),
        ({"height": 64}, {"height", "initial_latents"}),
    ):
        other = generate(pipe, dataclasses.replace(JOB, **change)).inputs
        assert {name for name in first if first[name] != other[name]} >= names, change


@pytest.mark.parametrize("name", ["ltx", "wan", "mochi"])
def test_other_families_show_them_too(name):
    pipe, arguments = tiny_pipelines.BUILDERS[name]()
    sizes = {key: arguments.get(key) for key in ("height", "width")}
    job = Job(arguments["prompt"], frames=arguments.get("num_frames", 9), steps=2, **sizes)
    found = generate(pipe, job, decode=False).inputs
    assert all(found[key] for key in ("schedule", "prompt_embeddings", "initial_latents")), found


class Meddler(Watch):
    """Changes something once the first dense run is through its steps."""

    def __init__(self, change):
        self.change, self.label = change, ""

    def begin(self, label, steps):
        self.label = label

    def end(self):
        if self.label == "dense 1/1":
            self.change()


@pytest.mark.parametrize("what", ["nothing", "prompt_embeddings", "initial_latents", "schedule"])
def test_a_comparison_of_different_things_fails_loudly(pipe, what, monkeypatch):
    kind, scheduler = type(pipe), pipe.scheduler
    encode, prepare = kind.encode_prompt, kind.prepare_latents

    def change():
        if what == "prompt_embeddings":
            monkeypatch.setattr(kind, "encode_prompt", lambda *a, **k: tuple(x * 1.01 for x in encode(*a, **k)))
        elif what == "initial_latents":
            monkeypatch.setattr(kind, "prepare_latents", lambda *a, **k: prepare(*a, **k) + 1e-6)
        elif what == "schedule":
            scheduler.set_shift(scheduler.shift + 1)

    def run():
        return compare(pipe, JOB, SPARSE, repeats=1, baseline=BASELINES["pipeline"], watch=Meddler(change))

    if what == "nothing":
        found = run()
        assert found.maps is not None and found.dense[0].inputs == found.sparse[0].inputs
        return
    with pytest.raises(ArmsDifferError, match=f"nothing is compared: .*{what} is .* in the first dense run and"):
        run()


def test_the_message_names_both_values():
    with pytest.raises(ArmsDifferError, match="seed is 1 in the dense run and 2 in the sparse run; steps is 5 in the"):
        check_same({"seed": 1, "steps": 5}, {"seed": 2}, ("dense", "sparse"))


def test_watching_leaves_nothing_behind(pipe):
    before = pipe.encode_prompt, pipe.scheduler.step
    generate(pipe, JOB)
    assert (pipe.encode_prompt, pipe.scheduler.step) == before
    assert "step" not in vars(pipe.scheduler) and "encode_prompt" not in vars(pipe)


def test_a_pipeline_that_shows_nothing():
    class Bare:
        pass

    assert InputWatch().facts(Bare()) == {
        "scheduler": None,
        "schedule": None,
        "dtype": "unknown",
        "prompt_embeddings": None,
        "initial_latents": None,
    }
