"""Loading the pipeline a command runs."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from dsattn.cli.options import Request
from dsattn.errors import UsageError
from dsattn.functional import choose_impl
from dsattn.measure import Job
from dsattn.presets import SHIPPED, SHIPPED_MODELS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Loaded:
    """A pipeline on its device, what reports say about it, and the seconds it took to load."""

    pipe: Any
    info: dict[str, Any]
    load_s: float


def prepare(request: Request) -> tuple[Request, Loaded]:
    """Check what can be checked without a model, load it, check the sizes and fit the preset to it.

    Raises:
        UsageError: unknown dtype, unusable device, a model that cannot be loaded, or a size it cannot make.
        ImplUnavailableError: the kernel that was asked for cannot run here.

    """
    model: str | None = request.params["model"]
    device = _device(request.params["device"])
    name = request.params["dtype"] or ("bfloat16" if device.type == "cuda" else "float32")
    if name not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    example = torch.empty(1, 64, 1, 64, dtype=DTYPES[name], device=device)
    choose_impl(example, request.config.impl, quantization=request.config.quantization)
    note_unknown_words(model, request.job.prompt)
    loaded = load(model, name, device)
    check_size(loaded.pipe, request.job)
    if request.params["preset"] is not None:
        request = request.for_family(family_of(loaded.pipe))
    return request, loaded


def load(model: str | None, dtype: str, device: torch.device) -> Loaded:
    """Load a shipped model (None: the first), or a diffusers pipeline from a folder or the Hub.

    Raises:
        UsageError: it cannot be loaded.

    """
    began = time.perf_counter()
    if model is None or is_shipped(model):
        pipe, revision = _shipped(model or SHIPPED_MODELS[0], DTYPES[dtype])
    else:
        pipe, revision = _pretrained(model, DTYPES[dtype]), _revision(model)
    pipe = pipe.to(device)
    info = {
        "id": SHIPPED if model in (None, SHIPPED_MODELS[0]) else model,
        "revision": revision,
        "pipeline": type(pipe).__name__,
        "dtype": dtype,
        "device": str(device),
    }
    return Loaded(pipe, info, time.perf_counter() - began)


def is_shipped(model: str | None) -> bool:
    """Whether ``--model`` names a model inside the package; a folder of that name is given as ./NAME."""
    return model is None or model in SHIPPED_MODELS


def check_size(pipe: Any, job: Job) -> None:
    """Sizes that the pipeline's latents cannot express; diffusers would round some of them.

    Raises:
        UsageError: naming the nearest sizes that work.

    """
    spatial = _first(pipe, "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
    temporal = _first(pipe, "vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
    name = type(pipe).__name__
    for side, value, patch in zip(("--height", "--width"), (job.height, job.width), _patch(pipe), strict=True):
        # A latent that fills no patch is refused late, or dropped.
        factor = math.lcm(patch * (spatial or 1), getattr(pipe, "dsattn_size_multiple", 1))
        if value is not None and value % factor:
            raise UsageError(
                f"{side} must be a multiple of {factor} for {name}, got {value}; try {_near(value, factor, 0)}"
            )
    if job.frames is not None and temporal and (job.frames - 1) % temporal:
        raise UsageError(
            f"--frames must be {temporal}n+1 for {name}, got {job.frames}; try {_near(job.frames, temporal, 1)}"
        )


def note_unknown_words(model: str | None, prompt: str) -> None:
    """Say on standard error which words the shipped models were never taught."""
    if not is_shipped(model):
        return
    from dsattn.pipelines.tiny.data import DEFAULT_PROMPT, vocabulary

    words = {word.strip(".,;:!?\"'").lower() for word in prompt.split()}
    unknown = sorted(words - set(vocabulary()) - {""})
    if unknown:
        typer.echo(
            f"note: the shipped models draw coloured shapes and do not know: {', '.join(unknown)}; "
            f"it knows prompts like '{DEFAULT_PROMPT}'",
            err=True,
        )


def family_of(pipe: Any) -> str:
    """Name of the model family, by which presets choose their schedule.

    Raises:
        UsageError: dsattn does not know the pipeline.

    """
    from dsattn.pipelines.registry import preset_family

    try:
        return preset_family(pipe)
    except ValueError as error:
        raise UsageError(f"dsattn cannot be used on this {type(pipe).__name__}: {error}") from error


def _shipped(name: str, dtype: torch.dtype) -> tuple[Any, str | None]:
    from dsattn.pipelines.tiny import loader

    try:
        pipe = loader.load_shipped(name, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise UsageError(f"the shipped model {name} cannot be loaded: {error}") from error
    sums = json.loads((loader.FOLDERS[name] / loader.CHECKSUMS).read_text(encoding="utf-8"))
    return pipe, f"sha256:{sums['transformer.safetensors'][:16]}"


def _pretrained(model: str, dtype: torch.dtype) -> Any:
    folder = Path(model).expanduser()
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise UsageError(
                f"--model {model} is no diffusers pipeline: model_index.json is missing there; expected a folder made "
                "by save_pretrained, or a Hub id"
            )
        model = str(folder)
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UsageError(
            f"--model {model} does not exist; expected {', '.join(SHIPPED_MODELS)}, a folder, or a Hub id such as "
            "Owner/Name"
        )
    from dsattn.pipelines.load import from_pretrained

    try:
        return from_pretrained(model, dtype)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        # What follows in brackets speaks of options and tracebacks that are not the user's.
        first = (str(error).strip() or type(error).__name__).splitlines()[0].partition(" (")[0]
        raise UsageError(
            f"--model {model} cannot be loaded: {first} (a Hub id needs a network or an earlier download; leave "
            "--model out for the shipped model)"
        ) from error


def _revision(model: str) -> str | None:
    """Commit of a Hub download, None for a folder."""
    if Path(model).expanduser().exists():
        return None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model, "model_index.json")
    return Path(path).parent.name if isinstance(path, str) else None


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used: {first}") from error
    if device.type == "meta":
        raise UsageError("--device meta computes nothing; expected cpu, cuda or cuda:N")
    return device


def _patch(pipe: Any) -> tuple[int, int]:
    """Latent rows and columns that make one token; (1, 1) of a pipeline that dsattn does not know."""
    from dsattn.pipelines.registry import family_of, find_transformers

    try:
        transformer = next(iter(find_transformers(pipe).values()))
    except (TypeError, ValueError):
        return 1, 1
    family = family_of(transformer)
    return (1, 1) if family is None else family.patch(transformer.config)[1:]


def _first(pipe: Any, *names: str) -> int | None:
    return next((int(value) for name in names if isinstance(value := getattr(pipe, name, None), int)), None)


def _near(value: int, factor: int, offset: int) -> str:
    low = (value - offset) // factor * factor + offset
    return " or ".join(str(n) for n in (low, low + factor) if n > 0)
