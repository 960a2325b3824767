"""Options that ``generate``, ``compare`` and ``profile`` share, and what they add up to."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dsattn.cli.defaults import DEFAULTS
from dsattn.config import QUANTIZATIONS, Config, load_config
from dsattn.engine import Engine
from dsattn.errors import UsageError
from dsattn.measure import Job
from dsattn.presets import PRESETS, SHIPPED_MODELS, over_preset, preset

Prompt = Annotated[
    str | None, typer.Argument(help="What the video shows; may be left out with a shipped model.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option(
        help=f"A shipped model ({', '.join(SHIPPED_MODELS)}), or folder or Hub id of a diffusers pipeline; "
        f"{SHIPPED_MODELS[0]} by default."
    ),
]
Method = Annotated[str | None, typer.Option(help=f"Name from 'dsattn methods'; {DEFAULTS['method']} by default.")]
ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file of options; flags go before it.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-O", metavar="NAME=VALUE", help="An option of method or engine.")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Frames = Annotated[int | None, typer.Option(help="Frames of the video.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial noise.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What the video should not show.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; bfloat16 on a GPU, else float32 by default.")
]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu ...; the first GPU if there is one.")]
DenseSteps = Annotated[str | None, typer.Option(help="First steps that stay dense: a count (3) or a share (0.2).")]
DenseLayers = Annotated[str | None, typer.Option(help="Layers that stay dense, such as 0-1,29.")]
Refresh = Annotated[int | None, typer.Option(help="Make a new plan every so many sparse steps.")]
Impl = Annotated[str | None, typer.Option(help="auto, triton, flex, torch or reference.")]
Quantization = Annotated[
    str | None, typer.Option(help=f"8-bit products on a GPU: {', '.join(QUANTIZATIONS)}; none by default.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail (exit code 3) instead of falling back to dense.")]
Fps = Annotated[float, typer.Option(help="Frames per second of the file.")]
Preset = Annotated[
    str | None, typer.Option(help=f"Error budget and schedule of the method auto in one word: {', '.join(PRESETS)}.")
]
Profile = Annotated[
    Path | None, typer.Option(help="JSON file of 'dsattn profile': use what it measured, with the method auto.")
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]

# (name, type, default) of the options behind a command's own; the prompt stands in front of them.
_SHARED: tuple[tuple[str, Any, Any], ...] = (
    ("model", Model, None),
    ("preset", Preset, None),
    ("config", ConfigFile, None),
    ("option", Options, None),
    ("steps", Steps, None),
    ("height", Height, None),
    ("width", Width, None),
    ("frames", Frames, None),
    ("guidance", Guidance, None),
    ("seed", Seed, 0),
    ("negative_prompt", NegativePrompt, None),
    ("dtype", Dtype, None),
    ("device", Device, None),
    ("dense_steps", DenseSteps, None),
    ("dense_layers", DenseLayers, None),
    ("refresh", Refresh, None),
    ("impl", Impl, None),
    ("quantization", Quantization, None),
    ("strict", Strict, False),
    ("json", Json, False),
    ("quiet", Quiet, False),
)
_ENGINE = ("method", "dense_steps", "dense_layers", "refresh", "impl", "quantization")


def with_shared(command: Callable[..., None]) -> Callable[..., None]:
    """Command line function that takes the shared options too; ``command`` gets a ``Request`` and its own options."""
    _, *own = inspect.signature(command, eval_str=True).parameters.values()

    def entry(context: typer.Context, **values: Any) -> None:
        command(Request.of(context), **{option.name: values[option.name] for option in own})

    def option(name: str, kind: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)

    own_options = [o.replace(kind=inspect.Parameter.KEYWORD_ONLY) for o in own]
    first = [option("context", typer.Context), option("prompt", Prompt, None)]
    everything = [*first, *own_options, *(option(*o) for o in _SHARED)]
    # Typer reads these two instead of the function's own.
    entry.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
    entry.__annotations__ = {o.name: o.annotation for o in everything}
    entry.__doc__ = command.__doc__
    return entry


@dataclass(frozen=True)
class Request:
    """A checked command line.

    Args:
        job: what to generate.
        config: of the engine.
        params: every option as parsed, by name.
        command: the command line itself.

    """

    job: Job
    config: Config
    params: Mapping[str, Any]
    command: str

    @classmethod
    def of(cls, context: typer.Context) -> Request:
        """From the parsed options of a command.

        Raises:
            UsageError: naming the option, what was expected and what came.

        """
        import shlex
        import sys

        params = context.params
        check_numbers(params)
        words = context.obj if isinstance(context.obj, list) else sys.argv[1:]
        names = ("seed", "negative_prompt", "height", "width", "frames", "steps", "guidance")
        job = Job(prompt=_prompt(params), **{name: params[name] for name in names})
        return cls(job, _config(params, None), params, shlex.join(["dsattn", *words]))

    def for_family(self, family: str | None) -> Request:
        """The same, with the preset's values for a model family."""
        return replace(self, config=_config(self.params, family))


def check_numbers(params: Mapping[str, Any]) -> None:
    """Ranges of the options that are numbers.

    Raises:
        UsageError: naming the option and what came.

    """
    for name in ("steps", "height", "width", "frames", "refresh", "repeats"):
        value = params.get(name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    for name in ("guidance", "fps", "min_psnr"):
        value = params.get(name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"--{name.replace('_', '-')} must be a number of at least 0, got {value}")
    if params.get("fps") == 0:
        raise UsageError("--fps must be above 0, got 0")
    if not 0 <= params["seed"] < 2**63:
        raise UsageError(f"--seed must be in [0, 2**63), got {params['seed']}")


def _prompt(params: Mapping[str, Any]) -> str:
    prompt: str | None = params["prompt"]
    if prompt is None:
        if params["model"] not in (None, *SHIPPED_MODELS):
            raise UsageError("PROMPT is missing: with --model, say in words what the video shows")
        from dsattn.pipelines.tiny.data import DEFAULT_PROMPT

        return str(DEFAULT_PROMPT)
    if not prompt.strip():
        raise UsageError("PROMPT is empty: expected words that say what the video shows")
    return prompt


def _config(params: Mapping[str, Any], family: str | None) -> Config:
    """Flags before ``-O`` before the config file or preset; without either, before the command line's defaults."""
    given: dict[str, Any] = {}
    for item in params["option"] or ():
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"-O must be name=value, got {item!r}; example: -O density=0.3")
        given[name.strip().replace("-", "_")] = parse_value(text)
    given |= {name: params[name] for name in _ENGINE if params.get(name) is not None}
    given |= {"strict": True} if params["strict"] else {}
    profile = params.get("profile")
    given |= {} if profile is None else {"profile": str(profile)}
    values = _below(params, given, family)
    needs_auto = "--profile" if profile is not None else "--preset" if params["preset"] is not None else None
    if needs_auto is not None and values["method"] != "auto":
        raise UsageError(f"{needs_auto} is of the method auto, got the method {values['method']!r} beside it")
    if isinstance(values["dense_steps"], str):
        values["dense_steps"] = parse_value(values["dense_steps"])
    config = Config.from_dict(values)
    # Refuses an unknown method, options it does not have, and a profile that cannot be read.
    engine = Engine(config)
    getattr(engine.method_config, "measured", None)
    return config


def _below(params: Mapping[str, Any], given: dict[str, Any], family: str | None) -> dict[str, Any]:
    """The options given, over the config file, the preset or the defaults."""
    if params["preset"] is not None:
        if params["config"] is not None:
            raise UsageError("give --preset or --config, not both; -O and flags may stand beside either")
        return over_preset(preset(params["preset"], family), given)
    if params["config"] is not None:
        return {**load_config(Path(params["config"])).to_dict(), **given}
    # `dsattn profile` has no --method.
    auto = {"method": "auto"} if params.get("profile") is not None or "method" not in params else {}
    return {**DEFAULTS, **auto, **given}


def parse_value(text: str) -> Any:
    """A number, true, false, null or a list as YAML reads it; else the text itself."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{text!r} is not a value: {' '.join(str(error).split())}") from error
    if isinstance(value, str):
        # YAML 1.1 takes 1e-3 for a text.
        try:
            return float(value)
        except ValueError:
            return value
    return value
