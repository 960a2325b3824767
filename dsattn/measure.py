"""Generate one clip and measure what it took.

Everything a run is timed by is put on the pipeline object for the length of the run and taken off again: the
pipeline's code, its scheduler and its models stay as they are.
"""

from __future__ import annotations

import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsattn.engine import Engine
from dsattn.errors import DsattnError, UsageError
from dsattn.inputs import InputWatch
from dsattn.metrics import Clock, Frames, PeakMemory
from dsattn.video import to_uint8

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


@dataclass
class Run:
    """What one run took and made. Times in seconds; None where the pipeline has no such part.

    Args:
        step_s: time of each denoising step.
        memory: peaks in bytes by name: ``allocated`` and ``reserved`` on a GPU, ``process_rss`` elsewhere.
        summary: the engine's; None for the plain pipeline.
        frames: ``[frames, height, width, 3]`` uint8 as decoded; None if not decoded.
        latents: after the last step, or what the decoder was given; see ``latents_from``.
        inputs: what the run was given besides its attention, see ``dsattn.inputs``.

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
    inputs: dict[str, Any] = field(default_factory=dict)


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
    look: Callable[[Engine], None] | None = None,
) -> Run:
    """One run of a pipeline, measured. Afterwards the pipeline is as it was.

    Args:
        engine: serves the pipeline's self-attention; None leaves the pipeline alone.
        cudnn: prefer cuDNN inside scaled dot product attention.
        steps: denoising steps, instead of the job's.
        decode: decode the latents to frames.
        look: called with the engine when the run is measured, and before its plans are let go.

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
    inputs = InputWatch()
    with ExitStack() as stack:
        stack.enter_context(_attached(pipe, engine, look))
        stack.enter_context(_watched(pipe, inputs))
        stack.enter_context(_timed_parts(pipe, run, clock, watch or Watch(), label))
        stack.enter_context(prefer_cudnn() if cudnn else nullcontext())
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
    run.inputs = _given(arguments, job.seed, run) | inputs.facts(pipe)
    return run


def _given(arguments: dict[str, Any], seed: int, run: Run) -> dict[str, Any]:
    """Arguments of a run by the names they have in a ``Job``, and what came of those that were left out."""
    given = {name: arguments.get(theirs) for name, theirs in _ARGUMENTS.items()}
    made = {} if run.frames is None else dict(zip(("frames", "height", "width"), run.frames.shape, strict=False))
    guidance = given["guidance"] if run.guidance is None else run.guidance
    return {
        "prompt": arguments["prompt"],
        "seed": seed,
        **given,
        **made,
        "steps": len(run.step_s) or given["steps"],
        "guidance": guidance,
    }


def device_of(pipe: Any) -> torch.device:
    """Device the pipeline computes on."""
    return torch.device(getattr(pipe, "_execution_device", None) or pipe.device)


@contextmanager
def _attached(pipe: Any, engine: Engine | None, look: Callable[[Engine], None] | None) -> Iterator[None]:
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
        if look is not None:
            look(engine)
    finally:
        handle.remove()


@contextmanager
def _watched(pipe: Any, inputs: InputWatch) -> Iterator[None]:
    """Let ``inputs`` see what passes through the pipeline."""
    scheduler = getattr(pipe, "scheduler", None)
    with ExitStack() as stack:
        for owner, name, watched in ((pipe, "encode_prompt", inputs.encoding), (scheduler, "step", inputs.stepping)):
            if callable(stock := getattr(owner, name, None)):
                stack.enter_context(_replaced(owner, name, watched(stock)))
        yield


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


def prefer_cudnn() -> AbstractContextManager[None]:
    """Let SDPA try cuDNN first, for the length of the block."""
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
