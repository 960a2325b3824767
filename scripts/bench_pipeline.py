"""Times denoising steps of full-size video transformers with random weights, dense against sparse.

    python scripts/bench_pipeline.py --json pipeline.json --table pipeline.md

Width, heads and sequence are those of the released models, the number of layers what time and memory allow: times are
per layer of the given depth, nothing is extrapolated. Weights are random, so attention is diffuse and nothing is said
about quality; the error of the output only shows that the computation is sound. Methods are best given by density.
Needs diffusers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from bench_timing import Deadline, Stopwatch, free_memory, machine, ms, smi, table, write_json

import dsattn
from dsattn.errors import UsageError

REFRESH = 4
# One fresh plan, then whole cycles of one refresh and the reuses after it; dense steps before and after.
CYCLES, DENSE_STEPS = 2, 2


@dataclass(frozen=True)
class Model:
    """A transformer and the size of what it denoises.

    kind: "wan" or "hunyuan". config: of the transformer, layers left out. latent: frames, height, width. text: tokens.
    layers: of the released model. default: layers to build.
    """

    kind: str
    config: dict[str, Any]
    latent: tuple[int, int, int]
    text: int
    layers: int
    default: int


_WAN = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256, "qk_norm": "rms_norm_across_heads"}
_TINY = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64, "text_dim": 32, "rope_max_seq_len": 64}
_TINY_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_refiner_layers": 1,
    "text_embed_dim": 32,
    "rope_axes_dim": (8, 12, 12),
}
MODELS = {
    "tiny": Model("wan", _WAN | _TINY, (5, 24, 24), 8, 2, 2),
    "wan-1.3b": Model("wan", _WAN | {"num_attention_heads": 12, "ffn_dim": 8960}, (21, 60, 104), 512, 30, 6),
    "wan-14b": Model("wan", _WAN | {"num_attention_heads": 40, "ffn_dim": 13824}, (21, 90, 160), 512, 40, 2),
    # One layer of two streams for two of one, as released.
    "tiny-hunyuan": Model("hunyuan", _TINY_HUNYUAN, (3, 24, 24), 8, 3, 3),
    "hunyuan": Model("hunyuan", {}, (33, 90, 160), 256, 60, 3),
}


def build(model: Model, layers: int, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The transformer with random weights, made on the device."""
    with _defaults(device, dtype):
        torch.manual_seed(0)
        if model.kind == "wan":
            from diffusers import WanTransformer3DModel

            built = WanTransformer3DModel(num_layers=layers, **model.config)
        else:
            from diffusers import HunyuanVideoTransformer3DModel

            double = max(1, layers // 3)
            built = HunyuanVideoTransformer3DModel(
                num_layers=double, num_single_layers=max(1, layers - double), **model.config
            )
    # As released: what diffusers keeps in fp32 stays so.
    exact = set(built._keep_in_fp32_modules or ())
    for name, weight in built.named_parameters():
        if exact.intersection(name.split(".")):
            weight.data = weight.data.float()
    found: torch.nn.Module = built.eval()
    return found


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Any:
    """Parameters are made where and as they are needed, not in fp32 on the host first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def inputs(model: Model, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a forward pass but the timestep."""
    generator = torch.Generator(device).manual_seed(1)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    args: dict[str, Any] = {
        "hidden_states": draw(1, 16, *model.latent),
        "encoder_hidden_states": draw(1, model.text, _text_dim(model)),
        "return_dict": False,
    }
    if model.kind == "hunyuan":
        args["encoder_attention_mask"] = torch.ones(1, model.text, dtype=torch.long, device=device)
        args["pooled_projections"] = draw(1, 768)
        args["guidance"] = torch.full((1,), 6000.0, device=device, dtype=dtype)
    return args


def _text_dim(model: Model) -> int:
    return int(model.config.get("text_dim", model.config.get("text_embed_dim", 4096)))


class Bench:
    """One model; times its steps."""

    def __init__(self, model: Model, layers: int, watch: Stopwatch, dtype: torch.dtype) -> None:
        self.watch = watch
        self.transformer = build(model, layers, watch.device, dtype)
        self.args = inputs(model, watch.device, dtype)

    def step(self, index: int) -> tuple[float, torch.Tensor]:
        """Seconds and output of one forward pass; timesteps fall from step to step, as in a run."""
        # Float timesteps are what schedulers of these models give.
        timestep = torch.full((1,), 1000.0 - index, device=self.watch.device)
        result: list[torch.Tensor] = []
        took = self.watch.once(lambda: result.append(self.transformer(timestep=timestep, **self.args)[0]))
        return took, result[0]

    def dense(self, count: int) -> tuple[list[float], torch.Tensor]:
        """Steps of the model as it is."""
        found = [self.step(0) for _ in range(count)]
        return [took for took, _ in found], found[-1][1]

    def dense_attention(self) -> float:
        """Seconds that its self-attention takes in a step."""
        with dsattn.enabled(self.transformer, "dense", timing=True) as handle:
            self.step(0)
            return float(handle.summary()["attend_s"])

    def sparse(self, method: str, options: dict[str, Any], limit: Deadline) -> dict[str, Any]:
        """Steps of a method, by what its plans do: made anew from nothing, made from what is known, reused."""
        kinds: dict[str, list[dict[str, float]]] = {"fresh": [], "refresh": [], "reuse": []}
        engine = {"refresh": REFRESH, "monitor": 0, "timing": True, "strict": True}
        # One step before the run counts: it compiles.
        with dsattn.enabled(self.transformer, method, **(engine | options)):
            first, _ = self.watch.wall(lambda: self.step(0))
        with dsattn.enabled(self.transformer, method, **(engine | options)) as handle:
            for index in range(1 + CYCLES * REFRESH):
                before = _totals(handle.summary())
                took, out = self.step(index)
                after = handle.summary()
                kind = "reuse" if index % REFRESH else ("refresh" if index else "fresh")
                parts = {name: value - before[name] for name, value in _totals(after).items()}
                kinds[kind].append({"step_s": took, **parts})
                if limit.left() <= 0 and kinds["reuse"]:
                    break
        medians = {
            kind: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            for kind, runs in kinds.items()
            if runs
        }
        cycle = {kind: medians.get(kind, medians["fresh"]) for kind in ("refresh", "reuse")}
        return {
            "steps": medians,
            "mean_step_s": (cycle["refresh"]["step_s"] + (REFRESH - 1) * cycle["reuse"]["step_s"]) / REFRESH,
            "density": after["density_sparse_calls"],
            "impls": after["impls"],
            "fallbacks": after["fallbacks"],
            "plan_bytes": after["plan_bytes"],
            "first_step_s": first,
            "out": out,
        }


def _totals(summary: dict[str, Any]) -> dict[str, float]:
    return {name: float(summary[name]) for name in ("plan_s", "attend_s")}


def bench_model(
    name: str, layers: int | None, methods: dict[str, tuple[str, dict[str, Any]]], watch: Stopwatch,
    dtype: torch.dtype, seconds: float, log: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Dense steps, the methods, dense steps again (so that a drifting clock shows)."""
    model, limit = MODELS[name], Deadline(seconds)
    depth = layers or model.default
    row: dict[str, Any] = {"model": name, "layers": depth, "of_layers": model.layers, "methods": {}}
    began = time.perf_counter()
    bench = Bench(model, depth, watch, dtype)
    row["tokens"] = _tokens(model)
    row["build_s"] = time.perf_counter() - began
    log(f"{name}: {depth} layers, {row['tokens']:,} tokens, {seconds:.0f} s")
    bench.dense(1)
    with _peak(watch, row):
        times, exact = bench.dense(DENSE_STEPS)
    row["attend_s"] = bench.dense_attention()
    for label, (method, options) in methods.items():
        if limit.left() <= 0:
            row["methods"][label] = {"status": "late", "reason": f"the {seconds:.0f} s of the model were used up"}
            continue
        found: dict[str, Any] = {}
        try:
            with _peak(watch, found):
                found |= bench.sparse(method, options, limit)
        except (UsageError, torch.OutOfMemoryError, dsattn.ImplUnavailableError, RuntimeError) as error:
            found = {"status": "failed", "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        else:
            out = found.pop("out")
            error = float((out.float() - exact.float()).norm() / exact.float().norm())
            sound = torch.isfinite(out).all().item()
            found |= {"status": "ok", "output_error": error} if sound else {"status": "wrong", "reason": "not finite"}
        row["methods"][label] = found
        log(f"  {label}: {found['status']} {found.get('reason', '')}".rstrip())
    times += bench.dense(DENSE_STEPS)[0]
    row |= {"dense_step_s": statistics.median(times), "dense_runs": times}
    return row


def _tokens(model: Model) -> int:
    frames, height, width = model.latent
    return frames * (height // 2) * (width // 2) + (model.text if model.kind == "hunyuan" else 0)


@contextmanager
def _peak(watch: Stopwatch, row: dict[str, Any]) -> Any:
    """Largest memory allocated within, on a GPU."""
    on_gpu = watch.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(watch.device)
    yield
    row["peak_bytes"] = torch.cuda.max_memory_allocated(watch.device) if on_gpu else None


def markdown(report: dict[str, Any]) -> str:
    """One table per report: a line per model and way to attend."""
    facts = report["machine"]
    lines = [
        f"# Denoising steps on {report['device_name']}\n",
        f"Random weights, batch 1, {report['dtype']}, torch {facts['torch']}, diffusers {facts['diffusers']}, plans "
        f"serve {REFRESH} steps. Medians in ms over the layers named; mean: of a refresh and the reuses after it."
        + ("" if report["complete"] else " **The run was stopped early.**")
        + "\n",
    ]
    head = ("model", "density", "fresh", "refresh", "reuse", "mean", "speed-up", "plan (refresh)", "plan (reuse)",
            "attend", "peak GiB", "output error")  # fmt: skip
    cells = []
    for row in report["rows"]:
        label = f"{row['model']}, {row['layers']} of {row['of_layers']} layers, {row['tokens']:,} tokens"
        if "reason" in row:
            cells.append((label, row["reason"], *("–",) * (len(head) - 2)))
            continue
        dense = row["dense_step_s"]
        cells.append((f"{label}: dense", "1", "–", "–", "–", ms(dense), "1", "–", "–", ms(row["attend_s"]),
                      _gib(row["peak_bytes"]), "0"))  # fmt: skip
        for name, found in row["methods"].items():
            if found["status"] != "ok":
                cells.append((f"{row['model']}: {name}", f"{found['status']}: {found['reason']}", *("–",) * 10))
                continue
            steps = found["steps"]
            at = lambda kind, part, steps=steps: ms(steps[kind][part]) if kind in steps else "–"  # noqa: E731
            cells.append((
                f"{row['model']}: {name}", f"{found['density']:.3f}", at("fresh", "step_s"), at("refresh", "step_s"),
                at("reuse", "step_s"), ms(found["mean_step_s"]), f"{dense / found['mean_step_s']:.2f}",
                at("refresh", "plan_s"), at("reuse", "plan_s"), at("reuse", "attend_s"), _gib(found["peak_bytes"]),
                f"{found['output_error']:.2g}",
            ))  # fmt: skip
    return "\n".join([*lines, table(head, cells)])


def _gib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**30:.1f}"


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """``name:option=value,option=value``; values are read as YAML."""
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",") if part]
    return name, {key: yaml.safe_load(value) for key, _, value in pairs}


def main(
    models: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(MODELS)}.")] = "",
    layers: Annotated[int | None, typer.Option(help="Layers to build; by default a few, by model.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Method and options, as 'semantic:density=0.1'; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; by default the GPU if there is one.")] = "",
    seconds: Annotated[float, typer.Option(help="Time for all models together.")] = 120,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    table_path: Annotated[Path | None, typer.Option("--table", help="Write the table here.")] = None,
) -> None:
    """Time denoising steps of transformers with random weights; print a table."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"bench_pipeline.py needs diffusers ({error}): pip install diffusers") from error
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = where.type == "cuda"
    chosen = [part for part in models.split(",") if part] or (
        ["wan-14b", "wan-1.3b", "hunyuan"] if on_gpu else ["tiny"]
    )
    if unknown := set(chosen) - set(MODELS):
        raise typer.BadParameter(f"--models: {', '.join(sorted(unknown))} not known; known: {', '.join(MODELS)}")
    specs = method or ["semantic:density=0.1", "topk:density=0.1", "radial"]
    methods = {text: parse_method(text) for text in specs}
    watch, limit, facts = Stopwatch(where), Deadline(seconds), machine(where)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    report: dict[str, Any] = {
        "schema": 1, "complete": False, "device_name": facts["gpu"] if on_gpu else facts["cpu"], "machine": facts,
        "dtype": str(dtype).removeprefix("torch."), "refresh": REFRESH, "models": chosen, "methods": specs, "rows": [],
    }  # fmt: skip

    def save() -> None:
        if json_path is not None:
            write_json(json_path, report)
        if table_path is not None:
            table_path.parent.mkdir(parents=True, exist_ok=True)
            table_path.write_text(markdown(report), encoding="utf-8")

    log = lambda line: typer.echo(line, err=True)  # noqa: E731
    for done, name in enumerate(chosen):
        share = limit.left() / (len(chosen) - done)
        try:
            if share <= 0:
                raise TimeoutError("late: the time of the run was used up")
            with torch.no_grad():
                row = bench_model(name, layers, methods, watch, dtype, share, log)
        except (torch.OutOfMemoryError, TimeoutError) as error:
            free = f"; {free_memory(where) / 2**30:.1f} GiB are free" if not isinstance(error, TimeoutError) else ""
            model = MODELS[name]
            row = {"model": name, "layers": layers or model.default, "of_layers": model.layers,
                   "tokens": _tokens(model), "reason": f"{str(error).splitlines()[0]}{free}"}  # fmt: skip
        row["smi_after"] = smi(where.index or 0) if on_gpu else None
        report["rows"].append(row)
        save()
        if on_gpu:
            torch.cuda.empty_cache()
    report["complete"] = True
    save()
    print(markdown(report))


if __name__ == "__main__":
    typer.run(main)
