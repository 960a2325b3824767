"""Autotuning: which tile shape a kernel is launched with on this GPU.

A launcher asks `pick` with its static tile shape. Where the engine's ``autotune`` is ``"measure"``, the candidates of
``tuning_space.json`` are timed once per GPU, Triton version and kernel variant, on a problem of fixed size, whatever
the length of the call; the winner goes to a file in the user's cache folder. ``"cached"`` uses what such files hold and
times nothing, ``"static"`` ignores them. What cannot be read or written is a warning, never an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

# Queries, keys, warps, stages, and whatever else a kernel is compiled with.
Shape = tuple[int, ...]
MOST_CANDIDATES = 12
# A candidate must be faster than the static shape by this factor: less is noise.
GAIN = 1.02

_mode: ContextVar[str] = ContextVar("dsattn_autotune", default="cached")


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Let launches inside measure what is not known (``"measure"``), use what is (``"cached"``), or neither."""
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


@lru_cache(maxsize=1)
def load_space() -> Mapping[str, Mapping[str, tuple[Shape, ...]]]:
    """Candidates by target and ``"kernel variant"``, beside the static shape; none of them spills registers.

    Each is (queries, keys, warps, stages); of ``block_sparse_tma``, the fifth number says whether warps have roles.
    Written by ``scripts/tuning_space.py``.
    """
    table = json.loads(Path(__file__).with_name("tuning_space.json").read_text(encoding="utf-8"))
    return {
        target: {name: tuple(map(tuple, shapes)) for name, shapes in variants.items()}
        for target, variants in table.items()
    }


@dataclass(frozen=True)
class Request:
    """What a launcher asks for.

    kernel: name of the kernel.
    variant: what its speed depends on, beside the length: head_dim, block sizes, features.
    static: tile shape that is used where nothing was measured.
    source: fingerprint of the kernel; times of another one do not count.
    problem: builds inputs of fixed size and returns a function that launches the kernel on them with a tile shape.
    agree: whether the result of a shape is that of the static one, both as ``problem``'s function returns them.
    """

    kernel: str
    variant: str
    static: Shape
    source: str
    problem: Callable[[], Callable[[Shape], Any]]
    agree: Callable[[Any, Any], bool]


@dataclass
class Tuner:
    """Tile shapes of one GPU, in memory and in files.

    gpu: its name. target: its row in the table of candidates, such as ``"sm_90"``. triton: version.
    folder: of the files, one per kernel.
    clock: seconds that a call takes.
    space: candidates beside the static shape, by target and ``"kernel variant"``.
    history: one entry per variant timed in this process.
    """

    gpu: str
    target: str
    triton: str
    folder: Path
    clock: Callable[[Callable[[], Any]], float]
    space: Mapping[str, Mapping[str, tuple[Shape, ...]]] = field(default_factory=load_space)
    history: list[dict[str, Any]] = field(default_factory=list)
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def pick(self, request: Request, mode: str) -> Shape:
        """Tile shape to launch with."""
        others = self.space.get(self.target, {}).get(f"{request.kernel} {request.variant}", ())
        if mode == "static" or not others:
            return request.static
        shapes = tuple(dict.fromkeys((request.static, *others)))[:MOST_CANDIDATES]
        if request.kernel not in self._known:
            self._known[request.kernel] = self._read(request)
        known = self._known[request.kernel]
        # A shape that is no candidate (any more) may spill, or not fit.
        if tuple(known.get(request.variant, {}).get("tiles", ())) not in shapes:
            if mode != "measure":
                return request.static
            known[request.variant] = self._tune(request, shapes)
            self._write(request)
        return tuple(known[request.variant]["tiles"])

    def file(self, kernel: str) -> Path:
        """Where a kernel's shapes are kept."""
        name = "-".join("".join(c if c.isalnum() else " " for c in self.gpu.lower()).split())
        return self.folder / name / f"triton-{self.triton}" / f"{kernel}.json"

    def _tune(self, request: Request, shapes: tuple[Shape, ...]) -> dict[str, Any]:
        """Time the shapes, the static one first."""
        began = time.perf_counter()
        run, static = request.problem(), request.static
        wanted = run(static)
        times = {static: self.clock(partial(run, static))}
        for shape in shapes[1:]:
            # A shape that this GPU refuses, or that computes something else, is no candidate.
            try:
                times[shape] = self.clock(partial(run, shape)) if request.agree(run(shape), wanted) else math.inf
                reason = "wrong result"
            except Exception as error:  # noqa: BLE001
                times[shape], reason = math.inf, str(error)
            if times[shape] == math.inf:
                warnings.warn(f"autotuning {request.kernel} {request.variant}: {shape}: {reason}", stacklevel=2)
        best = min(times, key=lambda shape: times[shape])
        chosen = best if times[best] * GAIN < times[static] else static
        record = {
            "tiles": list(chosen),
            "seconds": times[chosen],
            "static_seconds": times[static],
            "timed": len(times),
        }
        took = {"kernel": request.kernel, "variant": request.variant, "tuning_s": time.perf_counter() - began}
        self.history.append(took | record)
        return record

    def _read(self, request: Request) -> dict[str, Any]:
        """Variants of the file that fit the kernel; nothing if there is none."""
        path = self.file(request.kernel)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            variants = content["variants"] if content["source"] == request.source else {}
            for record in variants.values():
                if not record["tiles"] or not all(type(x) is int for x in record["tiles"]):
                    raise ValueError(f"no tile shape: {record['tiles']!r}")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"tuned tile shapes in {path} are ignored, they cannot be read: {error!r}", stacklevel=2)
            return {}
        return dict(variants)

    def _write(self, request: Request) -> None:
        """Add what this process knows to the file; another process sees the old file or the new one, never a part."""
        path = self.file(request.kernel)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file that cannot be read has been complained about
            variants = self._read(request) | self._known[request.kernel]
        content = {"gpu": self.gpu, "triton": self.triton, "source": request.source, "variants": variants}
        partial = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(partial, path)
        except OSError as error:
            if partial is not None:
                Path(partial).unlink(missing_ok=True)
            warnings.warn(f"tuned tile shapes cannot be kept in {path}: {error}", stacklevel=2)


def pick(request: Request, device: torch.device) -> Shape:
    """Tile shape for a launch on a device, by the mode of ``using``."""
    mode = _mode.get()
    if mode == "static" or device.type != "cuda" or torch.version.hip:
        return request.static
    if mode == "measure" and torch.cuda.is_current_stream_capturing():
        mode = "cached"  # nothing can be timed while a graph is captured
    return _tuner(device.index if device.index is not None else torch.cuda.current_device()).pick(request, mode)


def history() -> list[dict[str, Any]]:
    """What was timed in this process: kernel, variant, tile shape, seconds of it and of the static one, tuning time."""
    tuners = [_tuner(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [entry for tuner in tuners for entry in tuner.history]


def fingerprint(*paths: str | Path) -> str:
    """Of the text of some files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/dsattn/tuning``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")  # noqa: TID251 - says where files go, not what is computed
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "dsattn" / "tuning"


@lru_cache(maxsize=16)
def _tuner(index: int) -> Tuner:
    import triton
    from triton.testing import do_bench

    major, minor = torch.cuda.get_device_capability(index)

    def clock(run: Callable[[], Any]) -> float:
        with torch.cuda.device(index):
            return float(do_bench(run, warmup=10, rep=40, return_mode="median")) / 1000

    return Tuner(
        torch.cuda.get_device_name(index), f"sm_{10 * major + minor}", str(triton.__version__), cache_folder(), clock
    )
