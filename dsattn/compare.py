"""Run a pipeline dense and sparse with one seed, in turns."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dsattn.call_maps import CallMaps, call_maps
from dsattn.config import Config
from dsattn.engine import Engine
from dsattn.errors import UsageError
from dsattn.inputs import check_same
from dsattn.measure import Job, Run, Watch, device_of, generate
from dsattn.survey import Baseline, Survey, survey


@dataclass
class Comparison:
    """Result of :func:`compare`; lists are in the order the runs were made.

    Args:
        own: one run of the plain pipeline, where another dense attention was faster and became the baseline.
        instrumented: a run per mode with GPU events around attention; empty on a CPU, where every run carries timers.
        warmup_s: seconds of each mode's warm-up, compilation included.
        compile_s: seconds of these spent compiling kernels of attention; None where the plain pipeline ran.
        compiled_while_measuring: graphs compiled during measured runs; above 0 the times are too long.
        maps: what every call of the first sparse run did.

    """

    config: Config
    survey: Survey
    dense: list[Run] = field(default_factory=list)
    sparse: list[Run] = field(default_factory=list)
    own: Run | None = None
    instrumented: dict[str, Run] = field(default_factory=dict)
    warmup_s: dict[str, float] = field(default_factory=dict)
    compile_s: dict[str, float | None] = field(default_factory=dict)
    order: str = ""
    compiled_while_measuring: int = 0
    maps: CallMaps | None = None


def compare(
    pipe: Any,
    job: Job,
    config: Config,
    *,
    repeats: int = 2,
    baseline: Baseline | None = None,
    watch: Watch | None = None,
    finished: Callable[[str, Run], None] | None = None,
) -> Comparison:
    """Measure dense and sparse in turns (A B A B) after a warm-up of each at full shape.

    Args:
        pipe: a diffusers pipeline that dsattn supports, on its device.
        config: of the sparse runs. Unless it names a dense backend, their dense calls use the baseline's, so that
            both modes run the same dense attention.
        repeats: measured runs of each mode, at least 1.
        baseline: dense attention of the dense runs; None takes the fastest that :func:`survey` finds.
        finished: told ``("dense" | "sparse", run)`` as soon as a mode has its first video.

    Raises:
        UsageError: a value the pipeline cannot take, or a pipeline dsattn does not know.
        ArmsDifferError: two runs were given different seeds, prompts, sizes, schedules or latents.

    """
    if repeats < 1:
        raise UsageError(f"repeats must be at least 1, got {repeats}")
    if config.method == "dense":
        raise UsageError("compare needs a sparse method, got 'dense'; see 'dsattn methods'")
    watch = watch or Watch()
    device = device_of(pipe)
    found = survey(pipe, job, watch)
    if baseline is not None:
        found = dataclasses.replace(found, baseline=baseline)
    baseline = found.baseline
    on_cpu = device.type == "cpu"
    config = dataclasses.replace(config, dense=config.dense or baseline.dense, timing=on_cpu)
    timed_dense = Config("dense", dense=baseline.dense, timing=True)
    # Timers cost nothing on a CPU. On a GPU the pipeline runs plain where its own attention is the baseline.
    plain = dataclasses.replace(timed_dense, timing=False) if baseline.dense else None
    modes = {"dense": timed_dense if on_cpu else plain, "sparse": config}
    result = Comparison(config, found)

    def once(name: str, settings: Config | None, label: str, steps: int | None = None, cudnn: bool = False) -> Run:
        engine = None if settings is None else Engine(settings)
        wanted = name == "sparse" and result.dense and result.maps is None
        look = keep_maps if wanted else None
        run = generate(pipe, job, engine, cudnn=cudnn, watch=watch, label=label, steps=steps, look=look)
        if result.dense:
            check_same(result.dense[0].inputs, run.inputs, ("first dense", name))
        return run

    def keep_maps(engine: Engine) -> None:
        result.maps = call_maps(engine)

    warm, steps = _warmup(config)
    for name, settings in {"dense": modes["dense"], "sparse": warm}.items():
        count = steps if name == "sparse" else 1
        began = time.perf_counter()
        summary = once(name, settings, f"warm-up {name}", count, baseline.cudnn).summary
        result.warmup_s[name] = time.perf_counter() - began
        result.compile_s[name] = None if summary is None else summary["compile_s"]

    graphs = _compiled_graphs()
    for repeat in range(repeats):
        for name, runs in (("dense", result.dense), ("sparse", result.sparse)):
            run = once(name, modes[name], f"{name} {repeat + 1}/{repeats}", cudnn=baseline.cudnn)
            if finished is not None and repeat == 0:
                finished(name, run)
            if repeat > (name == "dense"):
                run.frames = run.latents = None
            runs.append(run)
            result.order += name[0].upper()
    if baseline.name != "pipeline":
        result.own = once("own", Config("dense", timing=True) if on_cpu else None, "the pipeline's own dense")
        result.own.frames = result.own.latents = None
    result.compiled_while_measuring = _compiled_graphs() - graphs
    if not on_cpu:
        for name, settings in {"dense": timed_dense, "sparse": dataclasses.replace(config, timing=True)}.items():
            gc.collect()
            torch.cuda.empty_cache()
            result.instrumented[name] = once(name, settings, f"{name} with timers", cudnn=baseline.cudnn)
            result.instrumented[name].frames = result.instrumented[name].latents = None
    return result


def _warmup(config: Config) -> tuple[Config, int]:
    """The shortest run with every kind of step in it: dense, planning, reusing; and its number of steps."""
    dense = 1 if config.dense_steps else 0
    # A head profile holds for the full number of steps; the same kernels run without it.
    options = {name: value for name, value in config.options.items() if name != "profile"}
    return dataclasses.replace(config, dense_steps=dense, options=options), dense + (2 if config.refresh > 1 else 1)


def _compiled_graphs() -> int:
    """Graphs torch.compile has made so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
