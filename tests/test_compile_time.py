"""Seconds spent compiling: counted where they are spent, once, and nowhere else."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dsattn import Call, Engine, VideoGrid
from dsattn.kernels import compile_time

GRID = VideoGrid(3, 4, 5)
COMPILE = """
import json
import triton
import triton.language as tl
from triton.compiler import ASTSource

heard = []
triton.knobs.compilation.always_compile = True
triton.knobs.compilation.listener = lambda **info: heard.append(info["times"].total / 1e6)
from dsattn.kernels import compile_time, launch

@triton.jit
def add(X, n: tl.constexpr):
    tl.store(X + tl.arange(0, n), tl.load(X + tl.arange(0, n)) + 1.0)

before = compile_time.seconds()
source = ASTSource(add, {"X": "*fp32", "n": "constexpr"}, {(1,): 64})
triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
print(json.dumps([before, compile_time.seconds(), heard]))
"""


@pytest.fixture
def counters(monkeypatch):
    """The process's counters, put back afterwards."""
    monkeypatch.setattr(compile_time, "_triton", [])


def engine_call(engine, step, dense=None):
    q, k, v = (torch.randn(1, GRID.tokens, 2, 32) for _ in range(3))
    return engine(q, k, v, Call(0, step, GRID), dense=dense)


@pytest.mark.parametrize("timing", [True, False])
def test_a_call_holds_what_was_compiled_in_it(counters, timing):
    engine = Engine("topk", density=0.5, block_q=16, block_k=16, dense_steps=1, impl="torch", timing=timing)

    def compiles():
        compile_time._add(2.5)
        return torch.zeros(1)

    engine_call(engine, 0, compiles)
    compile_time._add(1.0)  # between calls: somebody else's
    engine_call(engine, 1)
    assert [record.compile_s for record in engine.stats.records] == [2.5, 0.0]
    assert engine.summary()["compile_s"] == 2.5
    engine.reset()
    assert engine.summary()["compile_s"] == 0


def test_torch_compile_counts_and_what_triton_takes_inside_it_counts_once(counters):
    @torch.compile(backend=lambda graph, inputs: (compile_time._add(100.0), graph)[1], dynamic=False)
    def double(x):
        return x * 2

    before = compile_time.seconds()
    double(torch.ones(3))
    first = compile_time.seconds()
    assert 0 < first - before < 100
    double(torch.ones(3))
    assert compile_time.seconds() == first


def test_triton_is_listened_to_beside_others(tmp_path):
    script = tmp_path / "compiles.py"
    script.write_text(COMPILE)
    # The interpreter of the other tests compiles nothing.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, heard = json.loads(done.stdout)
    assert before == 0 and after > 0 and heard == [pytest.approx(after)]


def test_loading_a_kernel_counts(counters, monkeypatch):
    clock = iter((3.0, 3.25))
    monkeypatch.setattr(compile_time, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    load = compile_time._Load()
    load.start("module", "function", "name", {}, "hash")
    before = compile_time.seconds()
    load.end("module", "function", "name", {}, "hash")
    assert compile_time.seconds() - before == pytest.approx(0.25)
