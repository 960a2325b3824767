"""Files and lines that both commands write."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import typer

from dsattn.cli.options import Request
from dsattn.measure import Run
from dsattn.report import environment, json_text

RUN_SCHEMA = "dsattn.run/1"


def print_json(value: Any) -> None:
    """To standard output."""
    typer.echo(json_text(value))


def sidecar(path: Path) -> Path:
    """Where the description of a video stands: ``meta/<name>.json`` beside it."""
    return path.parent / "meta" / f"{path.stem}.json"


def describe(run: Run, request: Request, model: dict[str, Any]) -> dict[str, Any]:
    """What made a video, as plain values: model, shape, seed, method, times, density, fallbacks, versions."""
    if run.frames is None:
        raise ValueError("a run that was not decoded has no video to describe")
    frames, height, width = run.frames.shape[:3]
    summary = run.summary or {}
    job = request.job
    return {
        "schema": RUN_SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": request.command,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        "model": model,
        "shape": {
            "height": height,
            "width": width,
            "frames": frames,
            "fps": request.params["fps"],
            "steps": len(run.step_s),
            "guidance": run.guidance,
        },
        "method": summary.get("method", "dense"),
        "config": summary.get("config", {}),
        "times_s": {
            "e2e": run.e2e_s,
            "denoise": run.denoise_s,
            "text": run.text_s,
            "vae": run.vae_s,
            # Kernels of attention; the plain pipeline is not looked into.
            "compile": summary.get("compile_s"),
            "steps": run.step_s,
        },
        "peak_memory": run.memory,
        "density": {
            "all_calls": summary.get("density_all_calls", 1.0),
            "sparse_calls": summary.get("density_sparse_calls"),
        },
        "estimated_error": summary.get("estimated_error"),
        "calls": summary.get("calls", {}),
        "impls": summary.get("impls", {}),
        "fallbacks": [{"reason": why, "calls": n} for why, n in summary.get("fallbacks", {}).items()],
        "env": environment(),
    }
