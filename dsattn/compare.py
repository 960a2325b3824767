"""Run a pipeline dense and sparse with one seed, in turns, and measure what each run took.

Everything a run is timed by is put on the pipeline object for the length of the run and taken off again: the
pipeline's code, its scheduler and its models stay as they are.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsattn.config import Config
from dsattn.engine import DenseAttention, Engine
from dsattn.errors import DsattnError, ImplUnavailableError, UsageError
from dsattn.grid import Call
from dsattn.metrics import Clock, Frames, PeakMemory
from dsattn.video import to_uint8

# Another dense attention replaces the pipeline's own as the baseline from this gain on: less is noise.
CLEARLY_FASTER = 0.95
PROBE_ROUNDS = 3
# A backend this many times slower than the best in the first round is not timed again.
HOPELESS = 2

_ARGUMENTS = {
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}


class Watch:
    """Hears how a run goes; this one keeps silent."""

    def begin(self, label: str, steps: int | None) -> None:
        """A denoising loop starts."""

    def step(self) -> None:
        """A denoising step is done."""

    def end(self) -> None:
        """The denoising loop is done."""


@dataclass(frozen=True)
class Job:
    """What to generate; None leaves a value to the pipeline's own default.

    Args:
        prompt: text.
        seed: of the initial noise, drawn on the CPU so that every device starts from the same one.
        negative_prompt, height, width, frames, steps, guidance: pixels, pixels, frames, denoising steps, scale.

    """

    prompt: str
    seed: int = 0
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """Keyword arguments for the pipeline.

        Raises:
            UsageError: the pipeline does not take one of the values.

        """
        known = parameters(pipe)
        values = {name: getattr(self, name) for name in _ARGUMENTS if getattr(self, name) is not None}
        for name in values:
            if _ARGUMENTS[name] not in known:
                raise UsageError(f"{type(pipe).__name__} takes no {_ARGUMENTS[name]}; leave --{name} out")
        arguments = {_ARGUMENTS[name]: value for name, value in values.items()}
        return {"prompt": self.prompt, "generator": torch.Generator("cpu").manual_seed(self.seed), **arguments}


@dataclass(frozen=True)
class Baseline:
    """A dense attention: ``dense`` as in ``Config``, ``cudnn`` to prefer cuDNN inside the pipeline's SDPA."""

    name: str
    dense: str | None = None
    cudnn: bool = False


@dataclass
class Run:
    """What one run took and made. Times in seconds; None where the pipeline has no such part.

    Args:
        step_s: time of each denoising step.
        memory: peaks in bytes by name: ``allocated`` and ``reserved`` on a GPU, ``process_rss`` elsewhere.
        summary: the engine's; None for the plain pipeline.
        frames: ``[frames, height, width, 3]`` uint8 as decoded; None if not decoded.
        latents: after the last step, or what the decoder was given; see ``latents_from``.

    """

    e2e_s: float = 0.0
    denoise_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    text_s: float | None = None
    vae_s: float | None = None
    memory: dict[str, int] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    guidance: float | None = None
    frames: Frames | None = None
    latents: Tensor | None = None
    latents_from: str = ""


@dataclass
class Survey:
    """What one step of a job consists of, and how fast dense attention can be there.

    Args:
        call: the first attention call; ``qkv_shape`` is ``(batch, tokens, heads, head_dim)`` of its queries.
        pairs_per_step: (query, key) pairs of all self-attention calls in a step, over batch and heads.
        attention_flops: ``4 · head_dim`` per pair.
        other_flops: everything else the transformer computes in a step, counted by PyTorch.
        probe_ms: milliseconds of one dense attention call by backend; None where it cannot run.
        probe_why: reasons of those.
        baseline: the fastest.

    """

    call: Call
    qkv_shape: tuple[int, ...]
    pairs_per_step: int
    attention_flops: int
    other_flops: int
    probe_ms: dict[str, float | None]
    probe_why: dict[str, str]
    baseline: Baseline


@dataclass
class Comparison:
    """Result of :func:`compare`; lists are in the order the runs were made.

    Args:
        own: one run of the plain pipeline, where another dense attention was faster and became the baseline.
        instrumented: a run per mode with GPU events around attention; empty on a CPU, where every run carries timers.
        warmup_s: seconds of each mode's warm-up, compilation included.
        compiled_while_measuring: graphs compiled during measured runs; above 0 the times are too long.

    """

    config: Config
    survey: Survey
    dense: list[Run] = field(default_factory=list)
    sparse: list[Run] = field(default_factory=list)
    own: Run | None = None
    instrumented: dict[str, Run] = field(default_factory=dict)
    warmup_s: dict[str, float] = field(default_factory=dict)
    order: str = ""
    compiled_while_measuring: int = 0


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
        return generate(pipe, job, engine, cudnn=cudnn, watch=watch, label=label, steps=steps)

    warm, steps = _warmup(config)
    for name, settings in {"dense": modes["dense"], "sparse": warm}.items():
        count = steps if name == "sparse" else 1
        began = time.perf_counter()
        once(name, settings, f"warm-up {name}", count, baseline.cudnn)
        result.warmup_s[name] = time.perf_counter() - began

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


def generate(
    pipe: Any,
    job: Job,
    engine: Engine | None = None,
    *,
    cudnn: bool = False,
    watch: Watch | None = None,
    label: str = "",
    steps: int | None = None,
    decode: bool = True,
) -> Run:
    """One run of a pipeline, measured. Afterwards the pipeline is as it was.

    Args:
        engine: serves the pipeline's self-attention; None leaves the pipeline alone.
        cudnn: prefer cuDNN inside scaled dot product attention.
        steps: denoising steps, instead of the job's.
        decode: decode the latents to frames.

    Raises:
        UsageError: a value the pipeline cannot take, or a pipeline dsattn does not know.
        DsattnError: frames that are not finite.

    """
    run = Run()
    device = device_of(pipe)
    arguments = (job if steps is None else dataclasses.replace(job, steps=steps)).arguments(pipe)
    arguments["output_type"] = "np" if decode else "latent"
    if "callback_on_step_end" in parameters(pipe):
        arguments["callback_on_step_end"] = _keep_latents(run)
    clock = Clock(device)
    memory = PeakMemory(device)
    with ExitStack() as stack:
        stack.enter_context(_attached(pipe, engine))
        stack.enter_context(_timed_parts(pipe, run, clock, watch or Watch(), label))
        stack.enter_context(_prefer_cudnn() if cudnn else nullcontext())
        stack.enter_context(_input_errors(pipe))
        stack.enter_context(memory)
        began = clock.now()
        output = pipe(**arguments)
        run.e2e_s = clock.now() - began
    run.memory = memory.peaks
    run.summary = None if engine is None else engine.summary()
    run.guidance = getattr(pipe, "guidance_scale", None)
    if decode:
        run.frames = to_uint8(output.frames[0])
    return run


def survey(pipe: Any, job: Job, watch: Watch | None = None) -> Survey:
    """Run one step without self-attention to count its work, then time dense backends on its first queries and keys.

    Raises:
        UsageError: as :func:`generate`; also if the pipeline has no self-attention that dsattn reaches.

    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    engine = _Surveyor()

    def cross_attention(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
        return sdpa_flop_count(q, k, v)  # type: ignore[no-untyped-call]

    # PyTorch's own table leaves out the CPU kernel.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cross_attention}
    counter = FlopCounterMode(display=False, custom_mapping=on_cpu)
    with counter:
        generate(pipe, job, engine, watch=watch, label="counting work", steps=1, decode=False)
    if engine.first is None:
        raise UsageError(f"no self-attention call of {type(pipe).__name__} reached dsattn; nothing to compare")
    counts = counter.get_flop_counts()
    names = {type(part).__name__ for key, part in pipe.components.items() if key.startswith("transformer") and part}
    other = sum(sum(ops.values()) for name, ops in counts.items() if name in names)
    shape = tuple(engine.first.q.shape)
    times, why = _probe(engine.first)
    return Survey(
        call=engine.first.call,
        qkv_shape=shape,
        pairs_per_step=engine.pairs,
        attention_flops=4 * shape[-1] * engine.pairs,
        other_flops=int(other),
        probe_ms=times,
        probe_why=why,
        baseline=fastest(times),
    )


def fastest(times: Mapping[str, float | None]) -> Baseline:
    """The fastest dense attention; the pipeline's own unless another is clearly faster.

    Args:
        times: of one call by backend, None where it cannot run; ``"pipeline"`` is always there.

    """
    known = {name: time for name, time in times.items() if time is not None}
    name = min(known, key=lambda key: known[key])
    return BASELINES[name if known[name] < CLEARLY_FASTER * known["pipeline"] else "pipeline"]


def device_of(pipe: Any) -> torch.device:
    """Device the pipeline computes on."""
    return torch.device(getattr(pipe, "_execution_device", None) or pipe.device)


BASELINES = {
    "pipeline": Baseline("pipeline"),
    "cudnn": Baseline("cudnn", cudnn=True),
    "flex": Baseline("flex", dense="flex"),
    "xformers": Baseline("xformers", dense="xformers"),
}


@dataclass
class _FirstCall:
    q: Tensor
    k: Tensor
    v: Tensor
    call: Call
    options: dict[str, Any]

    def run(self, candidate: Baseline) -> None:
        with _prefer_cudnn() if candidate.cudnn else nullcontext():
            Engine("dense", dense=candidate.dense)(self.q, self.k, self.v, self.call, **self.options)


class _Surveyor(Engine):
    """Keeps the first call, counts pairs, and skips the attention itself."""

    def __init__(self) -> None:
        super().__init__("dense")
        self.first: _FirstCall | None = None
        self.pairs = 0

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: Call,
        *,
        dense: DenseAttention | None = None,
        key_lengths: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        if self.first is None:
            options = {"dense": dense, "key_lengths": key_lengths, "scale": scale}
            self.first = _FirstCall(q.detach(), k.detach(), v.detach(), call, options)
        self.pairs += q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
        return torch.zeros_like(q)


def _probe(first: _FirstCall) -> tuple[dict[str, float | None], dict[str, str]]:
    """Median milliseconds of each dense backend, rounds interleaved after one warm-up call, and reasons of failures."""
    on_gpu = first.q.device.type == "cuda"
    times: dict[str, list[float]] = {}
    why: dict[str, str] = {}
    clock = Clock(first.q.device)
    with torch.no_grad():
        for name in BASELINES if on_gpu else ("pipeline", "flex"):
            try:
                first.run(BASELINES[name])
                times[name] = []
            except (ImplUnavailableError, UsageError, RuntimeError) as error:
                if name == "pipeline" or isinstance(error, torch.OutOfMemoryError):
                    raise
                why[name] = str(error).strip().splitlines()[0]
        for _ in range(PROBE_ROUNDS):
            best = min((values[0] for values in times.values() if values), default=math.inf)
            for name, values in times.items():
                if values and values[0] > HOPELESS * best:
                    continue
                began = clock.now()
                first.run(BASELINES[name])
                values.append((clock.now() - began) * 1000)
    return {**{n: statistics.median(v) for n, v in times.items()}, **dict.fromkeys(why)}, why


def _warmup(config: Config) -> tuple[Config, int]:
    """The shortest run with every kind of step in it: dense, planning, reusing; and its number of steps."""
    dense = 1 if config.dense_steps else 0
    return dataclasses.replace(config, dense_steps=dense), dense + (2 if config.refresh > 1 else 1)


def _compiled_graphs() -> int:
    """Graphs torch.compile has made so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@contextmanager
def _attached(pipe: Any, engine: Engine | None) -> Iterator[None]:
    if engine is None:
        yield
        return
    from dsattn.pipelines.adapter import enable

    try:
        handle = enable(pipe, engine)
    except ValueError as error:
        raise UsageError(f"dsattn cannot be used on this {type(pipe).__name__}: {error}") from error
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _timed_parts(pipe: Any, run: Run, clock: Clock, watch: Watch, label: str) -> Iterator[None]:
    """Time text encoding, the denoising loop and its steps, and decoding."""
    with ExitStack() as stack:
        for owner, name, part in ((pipe, "encode_prompt", "text_s"), (getattr(pipe, "vae", None), "decode", "vae_s")):
            if callable(stock := getattr(owner, name, None)):
                stack.enter_context(_replaced(owner, name, _timing(stock, run, part, clock)))

        def progress_bar(iterable: Iterable[Any] | None = None, total: int | None = None) -> _Loop:
            return _Loop(iterable, total, run, clock, watch, label)

        if hasattr(pipe, "progress_bar"):
            stack.enter_context(_replaced(pipe, "progress_bar", progress_bar))
        yield


def _timing(stock: Callable[..., Any], run: Run, part: str, clock: Clock) -> Callable[..., Any]:
    setattr(run, part, 0.0)

    def timed(*args: Any, **kwargs: Any) -> Any:
        if part == "vae_s" and run.latents is None and args:
            run.latents, run.latents_from = args[0], "decoder input"
        began = clock.now()
        result = stock(*args, **kwargs)
        setattr(run, part, getattr(run, part) + clock.now() - began)
        return result

    return timed


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Attribute of one object for the length of a block."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


class _Loop:
    """Stands in for the pipeline's tqdm bar: it opens, is updated and closes exactly with the denoising loop."""

    def __init__(
        self, iterable: Iterable[Any] | None, total: int | None, run: Run, clock: Clock, watch: Watch, label: str
    ) -> None:
        items = None if iterable is None else list(iterable)
        self.items, self.run, self.clock, self.watch = items, run, clock, watch
        self.total, self.label = (total if items is None else len(items)), label

    def __enter__(self) -> _Loop:
        self.began = self.clock.now()
        self.marks = [self.clock.mark()]
        self.watch.begin(self.label, self.total)
        return self

    def __exit__(self, *error: object) -> None:
        self.watch.end()
        self.run.denoise_s += self.clock.now() - self.began
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        self.run.step_s += [self.clock.between(a, b) for a, b in pairs]

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.items or ():
                yield item
                self.update()

    def update(self, n: int = 1) -> None:
        """A step is done."""
        self.marks.append(self.clock.mark())
        self.watch.step()

    def close(self) -> None:
        """For pipelines that close their bar themselves."""

    def set_description(self, *args: Any, **kwargs: Any) -> None:
        """The label is ours."""

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        """The label is ours."""


def _keep_latents(run: Run) -> Callable[..., dict[str, Any]]:
    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        run.latents, run.latents_from = values["latents"], "last step"
        return values

    return keep


def _prefer_cudnn() -> AbstractContextManager[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ranked = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(ranked, set_priority=True)


def parameters(pipe: Any) -> set[str]:
    """Names the pipeline's ``__call__`` takes, through subclasses that pass keywords on."""
    names: set[str] = set()
    for cls in type(pipe).__mro__:
        if "__call__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__call__"]).parameters
        names |= set(parameters)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            break
    return names


@contextmanager
def _input_errors(pipe: Any) -> Iterator[None]:
    """What the pipeline's own input check refuses is the user's to correct."""
    try:
        yield
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, DsattnError) or not any(frame.name == "check_inputs" for frame in frames):
            raise
        raise UsageError(f"{type(pipe).__name__} refuses this input: {' '.join(str(error).split())}") from error
