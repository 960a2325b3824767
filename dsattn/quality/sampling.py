"""Generate a suite with several arms into one folder: resumable at any moment, in shards if wanted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from dsattn.cli import models
from dsattn.cli.options import Request
from dsattn.cli.output import describe
from dsattn.cli.progress import watching
from dsattn.config import Config
from dsattn.engine import Engine
from dsattn.errors import UsageError
from dsattn.measure import Job, Watch, generate
from dsattn.metrics import Frames
from dsattn.quality.arms import Arm, check_alike, parse_arms
from dsattn.quality.folder import Folder
from dsattn.quality.suites import Entry, Item, items

Make = Callable[[Arm, Item], tuple[Frames, dict[str, Any]]]
WEIGHTS_LOOKED_AT = 16


def _silent(line: str) -> None:
    """Say nothing."""


def _say(line: str) -> None:
    typer.echo(line, err=True)


@dataclass
class Done:
    """What a run did: clips made, and clips that were there."""

    made: int = 0
    found: int = 0


@dataclass(frozen=True)
class Plan:
    """What to sample.

    Args:
        suite: its name.
        entries: prompts in VBench's form.
        samples: clips per prompt.
        seed: decides the seeds of all clips.
        job: shape and guidance of every clip; its prompt and seed are not used.
        fps: frames per second of the files.
        texts: what to generate from instead of a prompt, by prompt.

    """

    suite: str
    entries: Sequence[Entry]
    samples: int
    seed: int
    job: Job
    fps: float
    texts: Mapping[str, str] = field(default_factory=dict)

    def settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """What every arm of a run shares, as plain values.

        Args:
            model: what is to be the same in every run into a folder.

        """
        return {
            "suite": self.suite,
            "samples": self.samples,
            "seed": self.seed,
            "job": {k: v for k, v in dataclasses.asdict(self.job).items() if k not in ("prompt", "seed")},
            "fps": self.fps,
            "model": dict(model),
            "texts": dict(self.texts),
            "entries": list(self.entries),
        }


def sample(
    folder: Folder,
    plan: Plan,
    arms: Sequence[Arm],
    model: Mapping[str, Any],
    make: Make,
    *,
    shard: tuple[int, int] = (0, 1),
    keep_frames: bool = False,
    told: Callable[[str], None] = _silent,
) -> Done:
    """Make every clip of a shard that is not there yet.

    Args:
        make: frames and sidecar of one clip.
        shard: (i, n): every n-th item from the i-th on, with all its arms.
        keep_frames: keep frames as they were before encoding.
        told: hears a line per clip.

    Raises:
        UsageError: the folder holds another run, or another process works on the shard.
        ArmsDifferError: clips of one item differ in something other than attention.

    """
    settings = plan.settings(model)
    folder.open(settings, list(arms))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    wanted = items(plan.entries, plan.samples, plan.seed)[shard[0] :: shard[1]]
    done = Done()
    with folder.workplace(shard) as tmp:
        for number, item in enumerate(wanted, 1):
            others = {name: found for name in folder.arms() if (found := folder.finished(name, item)) is not None}
            for arm in arms:
                if arm.name in others:
                    done.found += 1
                    continue
                told(f"{number}/{len(wanted)}  {arm.name}  {item.name}")
                frames, sidecar = make(arm, item)
                sidecar = {**sidecar, "arm": arm.name, "index": item.index, "settings": digest}
                # As it will be read back, so that it can be compared with what was.
                sidecar = json.loads(json.dumps(sidecar))
                for name, other in others.items():
                    check_alike(other, sidecar, (name, arm.name))
                folder.save(arm.name, item, frames, sidecar, tmp, keep=keep_frames)
                others[arm.name] = sidecar
                done.made += 1
    return done


class Pipeline:
    """Makes clips with one loaded pipeline; the arms share it.

    Args:
        loaded: the pipeline.
        plan: shape, guidance and rate of the clips.
        command: how to run this again, for the sidecars.
        watch: hears of denoising steps.

    """

    def __init__(self, loaded: models.Loaded, plan: Plan, command: str, watch: Watch) -> None:
        self.loaded, self.plan, self.command, self.watch = loaded, plan, command, watch

    def __call__(self, arm: Arm, item: Item) -> tuple[Frames, dict[str, Any]]:
        """Frames and sidecar of one clip."""
        job = dataclasses.replace(self.plan.job, prompt=self.plan.texts.get(item.prompt, item.prompt), seed=item.seed)
        engine = None if arm.config is None else Engine(arm.config)
        run = generate(self.loaded.pipe, job, engine, watch=self.watch, label=f"{arm.name} {item.name}"[:60])
        request = Request(job, arm.config or Config("dense"), {"fps": self.plan.fps}, self.command)
        sidecar = describe(run, request, self.loaded.info)
        assert run.frames is not None  # noqa: S101 - describe has seen them
        return run.frames, sidecar

    def facts(self) -> dict[str, Any]:
        """What must be the same in every run into one folder: the model, its scheduler and its weights."""
        pipe, info = self.loaded.pipe, self.loaded.info
        scheduler = getattr(pipe, "scheduler", None)
        config = {k: v for k, v in dict(getattr(scheduler, "config", {})).items() if not k.startswith("_")}
        return {
            **{name: info[name] for name in ("id", "revision", "pipeline", "dtype")},
            "device": info["device"].partition(":")[0],
            "scheduler": {"class": type(scheduler).__name__, "config": json.loads(json.dumps(config, default=str))},
            "weights": fingerprint(pipe),
        }


def fingerprint(pipe: Any) -> str:
    """Digest of names, shapes and first values of all parameters: another checkpoint or a fused LoRA changes it."""
    digest = hashlib.sha256()
    for name, part in sorted(getattr(pipe, "components", {}).items()):
        if not callable(getattr(part, "named_parameters", None)):
            continue
        for parameter, value in part.named_parameters():
            first = value.detach().reshape(-1)[:WEIGHTS_LOOKED_AT].float().cpu().numpy().tobytes()
            digest.update(f"{name}.{parameter}{tuple(value.shape)}".encode() + first)
    return digest.hexdigest()


def sample_with_pipeline(
    out: Path,
    plan: Plan,
    arms: Sequence[str],
    params: Mapping[str, Any],
    command: str,
    *,
    shard: tuple[int, int] = (0, 1),
    keep_frames: bool = False,
) -> tuple[Folder, Done]:
    """Load a pipeline and sample with it, as the scripts do.

    Args:
        arms: see :func:`dsattn.quality.arms.parse_arm`.
        params: ``model``, ``device``, ``dtype``, ``fps`` and ``quiet`` as on the command line.
        command: how to run this again, for the sidecars.

    """
    folder = out_folder(out)
    first = parse_arms(arms)
    loaded = load(plan, first, params, command)
    # Presets take their schedule from the family, which is known now.
    known = parse_arms(arms, models.family_of(loaded.pipe)) if any(arm.config for arm in first) else first
    with watching(params["quiet"]) as watch:
        pipeline = Pipeline(loaded, plan, command, watch)
        told = _silent if params["quiet"] else _say
        options: dict[str, Any] = {"shard": shard, "keep_frames": keep_frames, "told": told}
        return folder, sample(folder, plan, known, pipeline.facts(), pipeline, **options)


def load(plan: Plan, arms: Sequence[Arm], params: Mapping[str, Any], command: str) -> models.Loaded:
    """Load the pipeline for a plan, and check what can be checked before the first clip.

    Args:
        params: ``model``, ``device`` and ``dtype`` as on the command line.

    Raises:
        UsageError: the model cannot be loaded, or cannot make this shape.
        ImplUnavailableError: a kernel that an arm asks for cannot run here.

    """
    if not arms:
        raise UsageError("there is no arm to sample: give --arm dense and a sparse one")
    first = dataclasses.replace(plan.job, prompt=plan.entries[0]["prompt_en"])
    config = next((arm.config for arm in arms if arm.config is not None), Config("dense"))
    _, loaded = models.prepare(Request(first, config, {"preset": None, **params}, command))
    return loaded


def out_folder(path: Path) -> Folder:
    """The folder of a run, to be made if it is not there.

    Raises:
        UsageError: it is a file, or holds something else.

    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out {path} is a file, expected a folder")
    # A run that was killed at once leaves an unfinished run.json.
    others = path.is_dir() and any(not entry.name.startswith(".run.") for entry in path.iterdir())
    if others and not (path / "run.json").is_file():
        raise UsageError(f"--out {path} holds other files and no run.json; use an empty folder or that of a run")
    return Folder(path)
