"""What a report says, in the words that the terminal and the page show alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsattn.wording import counts, gibibytes, middle, percent, seconds, times

Pair = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One measured quantity of both modes.

    level: 1 for a part of the row above.
    pair: the two numbers, in one unit.
    brief: also in the terminal's short table.
    """

    name: str
    dense: str
    sparse: str
    ratio: str = ""
    note: str = ""
    level: int = 0
    pair: Pair | None = None
    brief: bool = True


def hardware(report: dict[str, Any]) -> str:
    """``1x NVIDIA H200``, or the processor and its threads."""
    env, device = report["env"], report["model"]["device"]
    if device.startswith("cuda") and env["gpu"]:
        names = dict.fromkeys(env["gpu"])
        return ", ".join(f"{env['gpu'].count(name)}x {name}" for name in names)
    return f"{env['cpu']}, {env['threads']} threads"


def title(report: dict[str, Any]) -> str:
    """One line: what ran, how large, on what."""
    shape, model = report["shape"], report["model"]
    return (
        f"dsattn compare   {model['id']} ({model['pipeline']})   {shape['width']}x{shape['height']}x{shape['frames']} "
        f"({shape['tokens']:,} tokens)   {shape['steps']} steps   seed {report['seed']}   {hardware(report)}   "
        f"{model['dtype']}   torch {report['env']['torch']}"
    )


def rows(report: dict[str, Any]) -> list[Row]:
    """Times, memory, density and floating point operations of both modes."""
    dense, sparse = report["runs"]["dense"], report["runs"]["sparse"]
    density, flops, error = report["density"], report["flops"], report["estimated_error"]
    share = "no sparse call" if density["sparse_calls"] is None else f"{density['sparse_calls']:.2f} of sparse calls"
    found = [*_times(report), *_memory(dense["peak_memory"], sparse["peak_memory"])]
    found.append(
        Row(
            "density",
            "1.00",
            f"{density['all_calls']:.2f} of all calls",
            "",
            f"{share}; FLOP bound {times(flops['bound'])}: attention is {flops['attention_share']:.0%} of the FLOPs",
            pair=(1.0, density["all_calls"]),
        )
    )
    if error["overall"] is not None:
        note = f"relative L2 of the attention output, estimated on {error['rows']} rows a head"
        found.append(Row("error", "0", percent(error["overall"]), "", note))
    note = "of the transformer; planning and pooled tails are not counted"
    both = (flops["dense"], flops["sparse"])
    found.append(Row("FLOPs", f"{both[0]:.2e}", f"{both[1]:.2e}", times(flops["bound"]), note, 0, both, brief=False))
    return found


def _times(report: dict[str, Any]) -> list[Row]:
    runs, speed, protocol = report["runs"], report["speedup"], report["protocol"]
    dense, sparse = runs["dense"], runs["sparse"]
    low, high = speed["e2e_range"]
    spread = f" (range {low:.2f}x-{high:.2f}x)" if protocol["repeats"] > 1 else ""
    layers = ", ".join(map(str, sparse["config"].get("dense_layers", ())))
    steps = f"first {sparse['dense_steps']} of {report['shape']['steps']} steps dense"
    attention = middle(dense["attention_s"]), middle(sparse["attention_s"])
    plan = middle(sparse["plan_s"])
    whole = None if attention[1] is None or plan is None else attention[1] + plan
    parts = [
        (
            "E2E",
            "e2e",
            speed["headline"],
            f"median of {protocol['repeats']}{spread}, in turns {protocol['order']}; warm-up excluded",
        ),
        ("denoise", "denoise", times(speed["denoise"]), f"{steps}{', layers ' + layers + ' too' if layers else ''}"),
    ]
    found = [
        Row(
            name,
            seconds(dense[key]["median"]),
            seconds(sparse[key]["median"]),
            ratio,
            note,
            int(key == "denoise"),
            (dense[key]["median"], sparse[key]["median"]),
        )
        for name, key, ratio, note in parts
    ]
    both = None if attention[0] is None or whole is None else (attention[0], whole)
    text = f"{seconds(attention[1])} + plan {seconds(plan)}"
    note = f"kernels: {counts(sparse['impls'])} calls"
    found.append(Row("attention", seconds(attention[0]), text, times(speed["attention_with_plan"]), note, 1, both))
    for name, key in (("text", "text_s"), ("decode", "vae_s")):
        found.append(_plain(name, middle(dense[key]), middle(sparse[key]), ""))
    found.append(_plain("warm-up", dense["warmup_s"], sparse["warmup_s"], "compilation included; in no other row", 0))
    found.append(
        _plain("compiling", dense.get("compile_s"), sparse.get("compile_s"), "kernels of attention, in warm-up")
    )
    return found


def _plain(name: str, dense: float | None, sparse: float | None, note: str, level: int = 1) -> Row:
    pair = None if dense is None or sparse is None else (dense, sparse)
    return Row(name, seconds(dense), seconds(sparse), "", note, level, pair, brief=False)


def _memory(dense: dict[str, int], sparse: dict[str, int]) -> list[Row]:
    notes = {"allocated": "GPU, allocated", "reserved": "GPU, reserved"}
    return [
        Row(
            "peak memory",
            gibibytes(dense[key]),
            gibibytes(sparse[key]),
            f"{(sparse[key] - dense[key]) / 2**30:+.2f} GiB",
            notes.get(key, "resident set of the whole process"),
            pair=(dense[key], sparse[key]),
            brief=key != "reserved",
        )
        for key in sorted(dense.keys() & sparse.keys())
    ]


def fidelity(report: dict[str, Any]) -> str:
    """PSNR, SSIM, distance of latents, and what two dense runs differ by."""
    found = report["fidelity"]
    psnr, ssim, floor = found["psnr"], found["ssim"], found["noise_floor"]
    text = "identical to dense"
    if not psnr["identical"]:
        text = f"PSNR {psnr['mean']:.1f} dB (worst frame {psnr['worst']:.1f})"
        text += f"   SSIM {ssim['mean']:.3f} (worst {ssim['worst']:.3f})"
    if found["latent_relative_l2"] is not None:
        text += f"   latents rel. L2 {found['latent_relative_l2']:.3f}"
    return f"{text}   [dense against dense: {noise_floor(floor)}]"


def noise_floor(floor: dict[str, Any] | None) -> str:
    """What two dense runs differ by."""
    return "not measured" if floor is None else "identical" if floor["identical"] else f"{floor['psnr']:.1f} dB"


def baseline(report: dict[str, Any]) -> str:
    """Which dense attention the dense runs used, and what others took."""
    protocol, speed = report["protocol"], report["speedup"]
    probes = ", ".join(
        f"{name} {ms:.1f} ms" if ms is not None else f"{name} not available"
        for name, ms in protocol["dense_probe_ms"].items()
    )
    text = f"{protocol['baseline']}, the fastest dense attention here (one call: {probes})"
    if protocol["own_dense_e2e_s"] is not None:
        text += (
            f"; with the pipeline's own: E2E {seconds(protocol['own_dense_e2e_s'])}, "
            f"{times(speed['e2e_over_own_dense'])} over it (one run)"
        )
    return text


def apart(report: dict[str, Any]) -> str:
    """What is in no row of the short table."""
    dense, sparse = report["runs"]["dense"], report["runs"]["sparse"]
    text = f"warm-up and compilation {seconds(dense['warmup_s'])} dense, {seconds(sparse['warmup_s'])} sparse"
    if sparse.get("compile_s"):
        text += f" ({seconds(sparse['compile_s'])} of it compiling attention)"
    for name, key in (("text", "text_s"), ("decode", "vae_s")):
        if (value := middle(sparse[key])) is not None:
            text += f"; {name} {seconds(value)}"
    return text


def fallbacks(report: dict[str, Any]) -> list[str]:
    """Dense calls that were not scheduled, each with its reason."""
    found = report["runs"]["sparse"]["fallbacks"] if "runs" in report else report["fallbacks"]
    return [f"{fallback['calls']:,} calls ran dense: {fallback['reason']}" for fallback in found]
