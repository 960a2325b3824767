"""Autotuning with a fake clock: what is timed, kept, ignored, and asked for by the launcher."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsattn import Engine, UsageError
from dsattn.kernels import block_sparse, block_sparse_tma, tuned_tiles, tuning
from dsattn.kernels.launch import Specialized, Tiles, backend, pick_tiles
from dsattn.verdict import VerdictRule

from .plans import check, random_case, random_shape

STATIC, FAST, SLOW = (128, 64, 8, 3), (128, 32, 4, 2), (64, 64, 4, 2)
SPACE = {"sm_90": {"block_sparse v": (STATIC, FAST, SLOW), "block_sparse w": (STATIC, FAST)}}
TIMES = {STATIC: 2.0, FAST: 1.0, SLOW: 3.0}


class Clock:
    """Times by tile shape; counts."""

    def __init__(self, times):
        self.times, self.timed = times, []

    def __call__(self, run):
        shape = run()
        self.timed.append(shape)
        if self.times[shape] is None:
            raise RuntimeError("out of resources")
        return self.times[shape]


def tuner(tmp_path, times=TIMES, **options):
    options = {"gpu": "NVIDIA Test 90", "target": "sm_90", "triton": "3.6.0", "space": SPACE} | options
    return tuning.Tuner(folder=tmp_path, clock=Clock(times), **options)


def request(variant="v", static=STATIC, source="abc"):
    return tuning.Request("block_sparse", variant, static, source, lambda: lambda shape: shape, lambda *_: True)


def test_measures_once_and_keeps_the_best(tmp_path):
    first = tuner(tmp_path)
    assert first.pick(request(), "measure") == FAST
    assert first.pick(request(), "measure") == FAST
    assert first.clock.timed == [STATIC, FAST, SLOW]
    assert first.history[0]["tuning_s"] >= 0 and first.history[0]["static_seconds"] == 2.0
    path = tmp_path / "nvidia-test-90" / "triton-3.6.0" / "block_sparse.json"
    assert first.file("block_sparse") == path and [p.name for p in path.parent.iterdir()] == [path.name]
    later = tuner(tmp_path)
    assert later.pick(request(), "cached") == FAST and later.pick(request(), "measure") == FAST
    assert later.clock.timed == [] and later.history == []


def test_modes(tmp_path):
    assert tuner(tmp_path).pick(request(), "cached") == STATIC
    tuner(tmp_path).pick(request(), "measure")
    assert tuner(tmp_path).pick(request(), "static") == STATIC


@pytest.mark.parametrize("options", [{"gpu": "Other"}, {"triton": "3.7.0"}], ids=["another GPU", "another Triton"])
def test_times_of_others_do_not_count(tmp_path, options):
    tuner(tmp_path).pick(request(), "measure")
    other = tuner(tmp_path, {**TIMES, SLOW: 0.5}, **options)
    assert other.pick(request(), "cached") == STATIC and other.pick(request(), "measure") == SLOW
    assert tuner(tmp_path).pick(request(), "cached") == FAST


def test_a_changed_kernel_is_measured_anew(tmp_path):
    tuner(tmp_path).pick(request(), "measure")
    assert tuner(tmp_path).pick(request(source="new"), "cached") == STATIC
    assert tuner(tmp_path, {**TIMES, SLOW: 0.5}).pick(request(source="new"), "measure") == SLOW
    assert tuner(tmp_path).pick(request(source="new"), "cached") == SLOW


def test_what_is_not_a_candidate_is_never_used(tmp_path):
    tuner(tmp_path).pick(request(), "measure")
    narrow = {"sm_90": {"block_sparse v": (STATIC, SLOW)}}
    assert tuner(tmp_path, space=narrow).pick(request(), "cached") == STATIC
    assert tuner(tmp_path, {**TIMES, SLOW: 0.5}, space=narrow).pick(request(), "measure") == SLOW
    # Nothing is known of this GPU or variant: nothing is timed.
    for options, asked in (({"target": "sm_75"}, {}), ({}, {"variant": "x"})):
        fresh = tuner(tmp_path / "none", **options)
        assert fresh.pick(request(**asked), "measure") == STATIC
        assert fresh.clock.timed == []


def test_the_static_shape_is_always_a_candidate(tmp_path):
    other = (16, 16, 4, 2)
    fresh = tuner(tmp_path, {**TIMES, other: 0.5})
    assert fresh.pick(request(static=other), "measure") == other and fresh.clock.timed == [other, STATIC, FAST, SLOW]
    many = {"sm_90": {"block_sparse v": tuple((16, 16, 4, n) for n in range(30))}}
    fresh = tuner(tmp_path / "many", {STATIC: 1.0} | {(16, 16, 4, n): 2.0 for n in range(30)}, space=many)
    assert fresh.pick(request(), "measure") == STATIC and len(fresh.clock.timed) == tuning.MOST_CANDIDATES


def test_noise_keeps_the_static_shape(tmp_path):
    assert tuner(tmp_path, {STATIC: 1.0, FAST: 0.99, SLOW: 2.0}).pick(request(), "measure") == STATIC


def test_a_shape_the_gpu_refuses_is_passed_over(tmp_path):
    with pytest.warns(UserWarning, match="out of resources"):
        assert tuner(tmp_path, {STATIC: 1.0, FAST: None, SLOW: 0.5}).pick(request(), "measure") == SLOW
    with pytest.raises(RuntimeError, match="out of resources"):  # a kernel that does not run at all
        tuner(tmp_path / "other", {STATIC: None, FAST: 1.0, SLOW: 1.0}).pick(request(), "measure")


def test_a_shape_with_another_result_is_passed_over(tmp_path):
    asked = replace(request(), agree=lambda got, wanted: wanted == STATIC and got != FAST)
    with pytest.warns(UserWarning, match="wrong result"):
        assert tuner(tmp_path, {**TIMES, SLOW: 1.5}).pick(asked, "measure") == SLOW
    exact = torch.randn(1, 50, 2, 8), torch.zeros(1, 2, 50)
    assert tuned_tiles.agree((exact[0] * (1 + 1e-7), exact[1]), exact)
    for wrong in (exact[0] * 1.01, torch.zeros_like(exact[0]), exact[0] * torch.nan):
        assert not tuned_tiles.agree((wrong, exact[1]), exact)


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", '{"source": "abc"}', '{"source": "abc", "variants": {"v": {"tiles": [1, 2.5]}}}',
        '{"source": "abc", "variants": {"v": {"tiles": "abcd"}}}', '{"source": "abc", "variants": [1]}',
        '{"source": "abc", "variants": {"v": 3}}',
    ],
)  # fmt: skip
def test_corrupt_files_are_ignored_and_replaced(tmp_path, content):
    path = tuner(tmp_path).file("block_sparse")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.warns(UserWarning, match="are ignored, they cannot be read"):
        assert tuner(tmp_path).pick(request(), "cached") == STATIC
    with pytest.warns(UserWarning):
        assert tuner(tmp_path).pick(request(), "measure") == FAST
    assert tuner(tmp_path).pick(request(), "cached") == FAST


def test_files_of_processes_that_tune_side_by_side_are_merged(tmp_path):
    one, two = tuner(tmp_path), tuner(tmp_path)
    assert (one.pick(request("v"), "cached"), two.pick(request("w"), "cached")) == (STATIC, STATIC)
    one.pick(request("v"), "measure")
    two.pick(request("w"), "measure")
    assert set(json.loads(one.file("block_sparse").read_text())["variants"]) == {"v", "w"}


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    blocked = tuner(tmp_path / "file")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert blocked.pick(request(), "measure") == FAST
    assert blocked.pick(request(), "measure") == FAST and len(blocked.clock.timed) == 3


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_folder() == tmp_path / "dsattn" / "tuning"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    assert tuning.cache_folder() == Path.home() / ".cache" / "dsattn" / "tuning"


# -- candidates -----------------------------------------------------------------------------------------------


def test_candidates_are_few_and_fit_the_blocks():
    assert {"sm_80", "sm_90"} <= set(tuning.load_space())
    for target, variants in tuning.load_space().items():
        for name, shapes in variants.items():
            kernel, dim, blocks, family = name.split()
            block_q, block_k = map(int, blocks.split("x"))
            assert kernel in ("block_sparse", "block_sparse_tma") and family in ("fixed", "clusters", "all")
            assert dim in ("d64", "d128"), (target, name)
            assert 1 <= len(shapes) == len(set(shapes)) <= tuning.MOST_CANDIDATES
            assert all(len(shape) == (5 if kernel == "block_sparse_tma" else 4) for shape in shapes)
            assert all(block_q % shape[0] == block_k % shape[1] == 0 for shape in shapes)


# -- launcher -------------------------------------------------------------------------------------------------


def a_case(**wanted):
    """Random values of a plan of equal blocks without order, tail or padding."""
    return random_case(random_shape(3)._replace(**PLAIN, **wanted), seed=1)


PLAIN = {"q_clusters": 0, "k_clusters": 0, "q_order": False, "k_order": False, "key_lengths": False, "tail": "none"}


def test_families():
    plain = a_case().plan
    assert tuned_tiles.family_of(plain, None) == "fixed"
    assert tuned_tiles.family_of(plain, VerdictRule(torch.zeros(1, 1))) is None
    assert tuned_tiles.family_of(replace(plain, tail="pooled"), None) is None
    order = torch.arange(plain.q_len)[None, None]
    assert tuned_tiles.family_of(replace(plain, q_order=order), None) is None
    for family in ("clusters", "all"):
        run = tuned_tiles.problem(family, 64, 64, 64, torch.float32, torch.device("cpu"), length=300, heads=2)
        plan = next(cell.cell_contents for cell in run.__closure__ if hasattr(cell.cell_contents, "block_mask"))
        plan.validate()
        assert tuned_tiles.family_of(plan, None) == family
        assert tuned_tiles.family_of(replace(plan, tail="pooled_block"), None) is None


@pytest.mark.skipif(backend() != "interpreter", reason="CPU tensors need the interpreter")
@pytest.mark.parametrize("family", ["fixed", "clusters", "all"])
def test_problems_run_with_any_shape(family):
    run = tuned_tiles.problem(family, 64, 64, 64, torch.float32, torch.device("cpu"), length=200, heads=2)
    one, other = run((64, 64, 1, 1))[0], run((32, 16, 1, 1))[0]
    assert one.isfinite().all() and torch.allclose(one, other, atol=1e-5)


@pytest.mark.skipif(backend() != "interpreter", reason="CPU tensors need the interpreter")
def test_launcher_takes_a_tile_shape():
    case = a_case(dtype=torch.float32, block_q=64, block_k=64)
    check(
        case,
        *block_sparse.block_sparse_attention(
            case.q, case.k, case.v, case.plan, scale=case.scale, tiles=Tiles(16, 32, 1, 1)
        ),
    )


@pytest.mark.skipif(backend() != "interpreter", reason="CPU tensors need the interpreter")
def test_launcher_asks_for_a_shape(monkeypatch):
    case = a_case(dtype=torch.float16, block_q=64, block_k=64, dim=64)
    asked = []

    def pick(request, device):
        asked.append((request.kernel, request.variant, request.static))
        return (32, 32, 1, 1)

    monkeypatch.setattr(tuning, "pick", pick)
    static = Tiles(64, 64, 4, 2)
    assert tuned_tiles.block_sparse(case.q, 64, case.plan, None, static) == Tiles(32, 32, 1, 1)
    assert asked == [("block_sparse", "d64 64x64 fixed", static)]
    # Not tuned: fp32, values of another size.
    assert tuned_tiles.block_sparse(case.q.float(), 64, case.plan, None, static) == static
    assert tuned_tiles.block_sparse(case.q, 32, case.plan, None, static) == static and len(asked) == 1
    # A call asks for what the table says.
    block_sparse.block_sparse_attention(case.q, case.k, case.v, case.plan, scale=case.scale)
    assert asked[1] == ("block_sparse", "d64 64x64 fixed", pick_tiles(64, 64, 64, torch.float16, "interpreter"))


@pytest.mark.skipif(backend() != "interpreter", reason="CPU tensors need the interpreter")
def test_the_kernel_with_descriptors_is_tuned_too(monkeypatch):
    """A shape of five numbers runs that kernel, and what was picked reaches it."""
    run = tuned_tiles.problem("fixed", 64, 32, 32, torch.float16, torch.device("cpu"), length=200, heads=2)
    plain, special = run((32, 16, 1, 1))[0], run((32, 16, 1, 1, 0))[0]
    assert special.isfinite().all() and torch.allclose(plain, special, atol=2e-3)
    used, launch = [], block_sparse_tma.block_sparse_attention

    def spy(*args, how, **options):
        used.append(how)
        return launch(*args, how=how, **options)

    static = Specialized(Tiles(32, 32, 1, 1), False)
    asked = []
    monkeypatch.setattr(block_sparse_tma, "block_sparse_attention", spy)
    monkeypatch.setattr(block_sparse, "pick_specialized", lambda *_, tail: static)
    monkeypatch.setattr(tuning, "pick", lambda request, device: asked.append(request) or (16, 16, 1, 1, 0))
    case = a_case(dtype=torch.float16, block_q=32, block_k=32, dim=64)
    check(case, *block_sparse.block_sparse_attention(case.q, case.k, case.v, case.plan, scale=case.scale))
    assert used == [Specialized(Tiles(16, 16, 1, 1), False)]
    assert [(r.kernel, r.variant, r.static) for r in asked] == [
        ("block_sparse_tma", "d64 32x32 fixed", (32, 32, 1, 1, 0))
    ]


def test_the_cpu_is_never_tuned():
    asked = replace(request(), problem=lambda: pytest.fail("timed"))
    with tuning.using("measure"):
        assert tuning.pick(asked, torch.device("cpu")) == STATIC


def test_engine_sets_the_mode(monkeypatch):
    modes = []
    monkeypatch.setattr("dsattn.engine.attend", lambda q, *rest, **options: modes.append(tuning._mode.get()) or q)
    from dsattn import Call, VideoGrid

    grid = VideoGrid(2, 8, 8)
    q = torch.randn(1, grid.tokens, 2, 32)
    for mode in ("static", "measure"):
        Engine("topk", impl="torch", autotune=mode)(q, q, q, Call(0, 0, grid))
    Engine("topk", impl="torch")(q, q, q, Call(0, 0, grid))
    assert modes == ["static", "measure", "cached"] and tuning._mode.get() == "cached"
    with pytest.raises(UsageError, match="autotune must be one of static, cached, measure; got 'on'"):
        Engine("topk", autotune="on")


def test_without_triton():
    code = "import sys; sys.modules['triton'] = None; import dsattn.kernels.tuning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
