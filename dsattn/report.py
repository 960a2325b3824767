"""The report of a comparison: everything needed to judge it and to repeat it, as plain values.

The form is fixed by ``report.schema.json`` (name ``dsattn.report/2``; the first version had no maps, timeline and
inputs, and is still read). Times are in seconds, memory in bytes, frames
in the order they are shown. A value that was not measured is null, and ``protocol.notes`` says why.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dsattn
from dsattn.compare import Comparison
from dsattn.measure import Job, Run
from dsattn.metrics import psnr, relative_l2, ssim
from dsattn.schedule import dense_step_count
from dsattn.survey import Survey
from dsattn.video import atomic

SCHEMA = "dsattn.report/2"
# Below this the sparse run counts as slower, within 2 % of 1 as equal.
EQUAL = 0.02
_NUMBER = r"(?:-?\d[-+.\deE]*|null)"
_NUMBERS = re.compile(rf"\[\n\s*{_NUMBER}(?:,\n\s*{_NUMBER})*\n\s*\]")


def build_report(
    result: Comparison,
    job: Job,
    *,
    model: dict[str, Any],
    fps: float,
    command: str,
    load_s: float | None = None,
    files: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Report of a comparison as plain values, ready for JSON.

    Args:
        model: ``id``, ``revision``, ``pipeline``, ``dtype``, ``device``.
        command: how to run it again.
        load_s: seconds it took to load the model.
        files: what is written beside the report, by name.

    """
    dense, sparse = (_mode(result, name) for name in ("dense", "sparse"))
    sparse.update(method=result.config.method, config=(result.sparse[0].summary or {}).get("config", {}))
    summary = result.sparse[0].summary or {}
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        "model": model,
        "shape": _shape(result, fps),
        "env": environment(),
        "protocol": _protocol(result, load_s),
        "runs": {"dense": dense, "sparse": sparse},
        "density": _density(summary),
        "estimated_error": _estimated_error(summary),
        "flops": _flops(result.survey, len(result.dense[0].step_s), summary.get("density_all_calls", 1.0)),
        "fidelity": _fidelity(result),
        "speedup": _speedup(dense, sparse, result.own),
        "inputs": result.dense[0].inputs,
        "timeline": _timeline(result, summary),
        "maps": None if result.maps is None else result.maps.describe((files or {}).get("masks", "masks.png")),
        "files": files or {},
    }
    report["speedup"].update(_verdict(report))
    return report


def write_json(path: Path, value: dict[str, Any] | list[Any]) -> None:
    """Write JSON atomically; not-a-number and infinity are refused, as JSON has neither.

    Raises:
        ValueError: a value has no place in JSON.

    """
    text = json_text(value)
    with atomic(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def json_text(value: Any) -> str:
    """JSON for people too: indented, a list of numbers on one line.

    Raises:
        ValueError: not-a-number, infinity, or a value that has no place in JSON.

    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    # No text of JSON holds the line break that the pattern asks for.
    return _NUMBERS.sub(lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text)


def environment() -> dict[str, Any]:
    """Versions and hardware a result depends on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "dsattn": dsattn.__version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version_of(name) for name in ("triton", "diffusers", "transformers")},
        "cuda": torch.version.cuda,
        "driver": _driver() if gpus else None,
        "gpu": gpus,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
    }


def version_of(package: str) -> str | None:
    """Installed version of a package, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, minimum and maximum; None of nothing."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _mode(result: Comparison, name: str) -> dict[str, Any]:
    """Times, memory and calls of one mode."""
    runs: list[Run] = getattr(result, name)
    timed = [result.instrumented[name]] if name in result.instrumented else runs
    summaries = [run.summary for run in timed if run.summary is not None]
    own = runs[0].summary or (summaries[0] if summaries else {})
    steps = len(runs[0].step_s)
    dense_steps = dense_step_count(result.config.dense_steps, steps) or 0 if name == "sparse" else steps
    return {
        **{part: [getattr(run, part) for run in runs] for part in ("e2e_s", "denoise_s", "text_s", "vae_s")},
        "attention_s": [float(s["attend_s"]) for s in summaries],
        # Estimating errors belongs to what sparse attention costs beside attending.
        "plan_s": [float(s["plan_s"] + s["monitor_s"]) for s in summaries],
        "e2e": spread([run.e2e_s for run in runs]),
        "denoise": spread([run.denoise_s for run in runs]),
        "dense_step": spread([t for run in runs for t in run.step_s[:dense_steps]]),
        "sparse_step": spread([t for run in runs for t in run.step_s[dense_steps:]]),
        "dense_steps": dense_steps,
        "warmup_s": result.warmup_s[name],
        "compile_s": result.compile_s[name],
        "peak_memory": {
            key: max(run.memory[key] for run in timed if key in run.memory)
            for key in sorted({key for run in timed for key in run.memory})
        },
        "calls": own.get("calls", {}),
        "impls": own.get("impls", {}),
        "dense_reasons": own.get("dense_reasons", {}),
        "fallbacks": [{"reason": why, "calls": n} for why, n in own.get("fallbacks", {}).items()],
    }


def _shape(result: Comparison, fps: float) -> dict[str, Any]:
    first, call = result.dense[0], result.survey.call
    frames, height, width = first.frames.shape[:3] if first.frames is not None else (0, 0, 0)
    batch, tokens, heads, head_dim = result.survey.qkv_shape
    grid = call.grid
    return {
        "height": height,
        "width": width,
        "frames": frames,
        "fps": fps,
        "steps": len(first.step_s),
        "guidance": first.guidance,
        "tokens": tokens,
        "latent_thw": [grid.frames, grid.height, grid.width],
        "text_tokens": grid.text,
        "batch": batch,
        "heads": heads,
        "head_dim": head_dim,
        "layers": call.num_layers,
    }


def _protocol(result: Comparison, load_s: float | None) -> dict[str, Any]:
    survey, on_cpu = result.survey, not result.instrumented
    notes = [
        "warm-up runs (full shape, few steps, every kind of step) hold all compilation and are not measured",
        "both modes: one process, one seed, interleaved",
        "PSNR and SSIM against the dense run measure fidelity to it, not quality in itself",
        "attention time includes token reordering; planning time is its own line",
        "attention FLOPs are 4 x head_dim per computed pair; planning and pooled tails are not counted",
    ]
    if on_cpu:
        notes.append("attention is timed in the measured runs: timers cost nothing on a CPU")
        notes.append("peak memory is the resident set of the whole process, which never shrinks back fully")
    else:
        notes.append("attention is timed in one separate run per mode, as GPU events add overhead")
    if survey.baseline.name != "pipeline":
        notes.append(f"dense calls of the sparse runs use the baseline's {survey.baseline.name} attention too")
    if result.compiled_while_measuring:
        notes.append(f"{result.compiled_while_measuring} graphs were compiled during measured runs: times are too long")
    elif late := sum(run.summary["compile_s"] for run in result.dense + result.sparse if run.summary is not None):
        notes.append(f"kernels were compiled for {late:.2f} s during measured runs: times are too long")
    if len(result.dense) == 1:
        notes.append("one run per mode: no spread and no noise floor; use --repeats 2 or more")
    return {
        "order": result.order,
        "repeats": len(result.dense),
        "timed": "the whole pipeline call, text encoding and decoding included; loading and saving not",
        "load_s": load_s,
        "baseline": survey.baseline.name,
        "dense_probe_ms": survey.probe_ms,
        "dense_probe_failures": survey.probe_why,
        "own_dense_e2e_s": result.own.e2e_s if result.own else None,
        "own_dense_denoise_s": result.own.denoise_s if result.own else None,
        "compiled_while_measuring": result.compiled_while_measuring,
        "notes": notes,
    }


def _timeline(result: Comparison, summary: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of every step of both modes, and why plans were made anew."""
    steps = {
        name: [statistics.median(times) for times in zip(*(run.step_s for run in runs), strict=True)]
        for name, runs in (("dense", result.dense), ("sparse", result.sparse))
    }
    return {
        **{f"{name}_step_s": values for name, values in steps.items()},
        "refresh_reasons": summary.get("refresh_reasons", {}),
    }


def _density(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "all_calls": summary.get("density_all_calls", 1.0),
        "sparse_calls": summary.get("density_sparse_calls"),
        **{
            f"by_{key}": [{key: k, "density": v} for k, v in summary.get(f"density_by_{key}", {}).items()]
            for key in ("layer", "step")
        },
        "plan_bytes": summary.get("plan_bytes", 0),
    }


def _estimated_error(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "overall": summary.get("estimated_error"),
        "rows": summary.get("config", {}).get("monitor", 0),
        **{
            f"by_{key}": [{key: k, "error": v} for k, v in summary.get(f"estimated_error_by_{key}", {}).items()]
            for key in ("layer", "step")
        },
    }


def _flops(survey: Survey, steps: int, density: float) -> dict[str, Any]:
    attention, other = survey.attention_flops * steps, survey.other_flops * steps
    dense, sparse = attention + other, round(attention * density) + other
    return {
        "dense": dense,
        "sparse": sparse,
        "attention_dense": attention,
        "other": other,
        "attention_share": attention / dense,
        "saved_share": 1 - sparse / dense,
        "bound": dense / sparse,
    }


def _fidelity(result: Comparison) -> dict[str, Any]:
    dense, sparse = result.dense[0], result.sparse[0]
    repeat = result.dense[1] if len(result.dense) > 1 else None
    if dense.frames is None or sparse.frames is None:
        raise ValueError("a comparison keeps the frames of the first run of each mode; got none")
    floor = None
    if repeat is not None and repeat.frames is not None:
        between = psnr(dense.frames, repeat.frames)
        floor = {"psnr": between.mean, "identical": between.identical}
    latent = None
    if dense.latents is not None and sparse.latents is not None:
        latent = relative_l2(dense.latents, sparse.latents)
    return {
        "on": "uint8 frames before encoding",
        "psnr": psnr(dense.frames, sparse.frames).to_dict(),
        "ssim": ssim(dense.frames, sparse.frames).to_dict(),
        "latent_relative_l2": latent if latent is None or math.isfinite(latent) else None,
        "latents_from": dense.latents_from or None,
        "noise_floor": floor,
    }


def _speedup(dense: dict[str, Any], sparse: dict[str, Any], own: Run | None) -> dict[str, Any]:
    whole, sparse_whole = _median(dense["e2e_s"]), _median(sparse["e2e_s"])
    attention, plan = _median(dense["attention_s"]), _median(sparse["plan_s"])
    sparse_attention = _median(sparse["attention_s"])
    planned = None if sparse_attention is None or plan is None else sparse_attention + plan
    share = attention / whole if attention is not None and whole else None
    return {
        "e2e": _ratio(whole, sparse_whole),
        "e2e_range": [min(dense["e2e_s"]) / max(sparse["e2e_s"]), max(dense["e2e_s"]) / min(sparse["e2e_s"])],
        "denoise": _ratio(_median(dense["denoise_s"]), _median(sparse["denoise_s"])),
        "attention": _ratio(attention, sparse_attention),
        "attention_with_plan": _ratio(attention, planned),
        "attention_share_of_dense_e2e": share,
        "ceiling": 1 / (1 - share) if share is not None and share < 1 else None,
        "e2e_over_own_dense": _ratio(own.e2e_s if own else None, sparse_whole),
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _ratio(dense: float | None, sparse: float | None) -> float | None:
    return dense / sparse if dense is not None and sparse else None


def _verdict(report: dict[str, Any]) -> dict[str, Any]:
    """Headline, and why there is not more where the sparse run is slower or gains little."""
    speed, runs, density = report["speedup"], report["runs"], report["density"]
    ratio = speed["e2e"]
    word = " (slower)" if ratio < 1 - EQUAL else " (no difference)" if ratio < 1 + EQUAL else ""
    reasons: list[str] = []
    share, ceiling = speed["attention_share_of_dense_e2e"], speed["ceiling"]
    if ratio < 1 + EQUAL:
        tokens = report["shape"]["tokens"]
        if share is not None and ceiling is not None and share < 0.5:
            reasons.append(
                f"too few tokens: attention is {share:.0%} of the dense run at {tokens:,} tokens, so free attention "
                f"would give {ceiling:.2f}x; more frames or pixels raise that"
            )
        if runs["sparse"]["plan_s"]:
            plan = statistics.median(runs["sparse"]["plan_s"]) / runs["sparse"]["e2e"]["median"]
            if plan > 0.03:
                reasons.append(f"planning is {plan:.0%} of the sparse run: a larger --refresh reuses plans")
        if density["all_calls"] > 0.6:
            reasons.append(f"{density['all_calls']:.0%} of the attention pairs were still computed")
        if speed["attention"] is not None and speed["attention"] * density["all_calls"] < 0.5:
            reasons.append("the sparse kernel handles fewer pairs per second than the dense one at this size")
        if runs["sparse"]["fallbacks"]:
            reasons.append(f"{sum(f['calls'] for f in runs['sparse']['fallbacks'])} calls fell back to dense")
        if report["protocol"]["compiled_while_measuring"]:
            reasons.append("graphs were compiled during measured runs")
        if not reasons:
            reasons.append("the parts outside attention took longer")
    slowest, fastest = speed["e2e_range"]
    if slowest < 1 < fastest and report["protocol"]["repeats"] > 1:
        reasons.append(
            f"the runs of both modes overlap ({slowest:.2f}x to {fastest:.2f}x): more --repeats or a quieter machine "
            "would tell them apart"
        )
    return {"headline": f"{ratio:.2f}x{word}", "reasons": reasons}


def _git_revision() -> str | None:
    """Commit of the checkout the package lies in, with ``-dirty`` where files differ from it; None outside one."""
    root = Path(dsattn.__file__).resolve().parents[1]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    return _output([git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])


def _driver() -> str | None:
    query = shutil.which("nvidia-smi")
    lines = _output([query, "--query-gpu=driver_version", "--format=csv,noheader"]) if query else None
    return lines.splitlines()[0] if lines else None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
