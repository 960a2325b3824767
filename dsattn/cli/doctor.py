"""``dsattn doctor``: what runs here, and why the rest does not."""

from __future__ import annotations

import shutil
from typing import Any

import torch
import typer

from dsattn.cli.options import Json
from dsattn.cli.output import print_json
from dsattn.config import IMPLS
from dsattn.functional import choose_impl, why_not
from dsattn.presets import SHIPPED_MODELS
from dsattn.report import environment


def command(json: Json = False) -> None:
    """Show versions, devices, which kernels can run and why, and whether the shipped models are intact."""
    found = examine()
    if json:
        print_json(found)
        return
    env = found["env"]
    for name in ("dsattn", "git", "python", "torch", "triton", "diffusers", "transformers", "cuda", "driver", "os"):
        typer.echo(f"{name:<14}{env[name] or 'none'}")
    typer.echo(f"{'cpu':<14}{env['cpu']}, {env['threads']} threads")
    typer.echo(
        f"{'compiler':<14}{found['compiler'] or 'none found: install g++ or clang++ for compiled FlexAttention'}"
    )
    for name, state in found["shipped_models"].items():
        typer.echo(f"{name:<14}shipped model, {state}")
    for device, kernels in found["devices"].items():
        typer.echo(f"{device:<14}{kernels['name']}: dsattn chooses {kernels['chosen']} ({kernels['why']})")
        for impl, reason in kernels["impls"].items():
            typer.echo(f"{'':<14}  {impl:<10}{'usable' if reason is None else 'no: ' + reason}")


def examine() -> dict[str, Any]:
    """Everything ``doctor`` shows, as plain values; ``impls`` maps a name to the reason against it, null if none."""
    env = environment()
    names = {"cpu": env["cpu"], **{f"cuda:{i}": name for i, name in enumerate(env["gpu"])}}
    return {
        "env": env,
        "compiler": next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None),
        "shipped_models": {name: _shipped_model(name) for name in SHIPPED_MODELS},
        "devices": {device: _kernels(device, name) for device, name in names.items()},
    }


def _kernels(device: str, name: str) -> dict[str, Any]:
    q = torch.empty(1, 64, 1, 64, device=device)
    with torch.no_grad():
        chosen, why = choose_impl(q)
        reasons = {impl: why_not(q, impl) for impl in IMPLS if impl != "auto"}
    return {"name": name, "chosen": chosen, "why": why, "impls": reasons}


def _shipped_model(name: str) -> str:
    try:
        from dsattn.pipelines.tiny import loader

        loader.verify(loader.FOLDERS[name])
    except (ImportError, OSError, ValueError) as error:
        return f"not usable: {' '.join(str(error).split())}"
    return "intact"
