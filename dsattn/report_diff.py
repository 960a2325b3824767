"""Two reports of ``dsattn compare`` beside each other: what was set differently, and what came of it.

Numbers are set against each other only where that means something: speed on one machine with one set of versions and
the same work, fidelity to the same dense video. Where it does not, the reasons are given instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dsattn.errors import UsageError
from dsattn.report_file import kind
from dsattn.report_view import hardware
from dsattn.wording import gibibytes, middle, percent, seconds, times

SCHEMA = "dsattn.diff/1"
_MACHINE = ("gpu", "cpu", "threads", "os", "driver", "cuda", "python", "torch", "triton", "diffusers", "transformers")
_MODEL = ("id", "revision", "pipeline", "dtype", "device")
_SHAPE = ("height", "width", "frames", "steps", "guidance", "tokens", "batch")
_Differences = list[tuple[str, Any, Any]]
_Look = Callable[[dict[str, Any]], "float | None"]
_CLIP = ("prompt", "negative_prompt", "seed")
# Dense runs further apart than this say that the machine was not in the same state.
STEADY = 0.05


def diff_reports(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """What two reports differ in, as plain values; ``a`` is the first, ``b`` the second.

    Args:
        first, second: valid reports of comparisons, see ``dsattn.report_file``.

    Returns:
        ``settings`` (``name``, ``a``, ``b``), ``results`` (``part``, ``name``, ``a``, ``b``, ``change``),
        ``against_speed`` and ``against_fidelity``: reasons against comparing, empty if none;
        ``notes``.

    Raises:
        UsageError: a report is not of a comparison.

    """
    for report in (first, second):
        why = {
            "profile": "a profile has no dense run to be measured against",
            "quality": "a suite has many clips: put the arms into one folder, vbench_eval.py compares them",
        }.get(kind(report))
        if why is not None:
            raise UsageError(f"'dsattn diff' compares reports of 'dsattn compare', got a {report['schema']}; {why}")
    speed, fidelity = _against_speed(first, second), _against_fidelity(first, second)
    return {
        "schema": SCHEMA,
        "a": _about(first),
        "b": _about(second),
        "settings": _settings(first, second),
        "results": _results(first, second, not speed, not fidelity),
        "against_speed": speed,
        "against_fidelity": fidelity,
        "notes": _notes(first, second) if not speed else [],
    }


def _about(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": report["runs"]["sparse"]["method"],
        "created": report["created"],
        "hardware": hardware(report),
        "headline": report["speedup"]["headline"],
        "command": report["command"],
    }


def _differing(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, ...]) -> _Differences:
    return [(name, first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)]


def _say(found: _Differences) -> list[str]:
    return [f"{name}: {_word(a)} against {_word(b)}" for name, a, b in found]


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_word, value)) or "none"
    return "none" if value is None else str(value)


def _against_speed(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    found = _differing(first["env"], second["env"], _MACHINE)
    found += _differing(first["model"], second["model"], _MODEL)
    found += _differing(first["shape"], second["shape"], _SHAPE)
    found += [
        (f"dense baseline ({name})", a, b)
        for name, a, b in _differing(first["protocol"], second["protocol"], ("baseline",))
    ]
    return _say(found)


def _against_fidelity(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Fidelity is to the dense video: it must be the same one."""
    found = _differing(first, second, _CLIP) + _differing(first["model"], second["model"], ("id", "revision", "dtype"))
    found += _differing(first["shape"], second["shape"], _SHAPE)
    return _say(found)


def _notes(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    a, b = (report["runs"]["dense"]["e2e"]["median"] for report in (first, second))
    notes = []
    if _differing(first["env"], second["env"], ("dsattn", "git")):
        notes.append("dsattn itself differs: what changed may be its code rather than the settings")
    if abs(a / b - 1) > STEADY:
        notes.append(
            f"the dense runs took {seconds(a)} and {seconds(b)} ({abs(a / b - 1):.0%} apart) though they did the same: "
            "the machine was not in one state, so compare speedups rather than seconds"
        )
    if min(report["protocol"]["repeats"] for report in (first, second)) == 1:
        notes.append("one run of each mode in a report: differences of a few percent may be chance")
    ranges = [report["speedup"]["e2e_range"] for report in (first, second)]
    if ranges[0] != ranges[1] and max(r[0] for r in ranges) <= min(r[1] for r in ranges):
        notes.append("the ranges of both speedups overlap: they may be equal")
    return notes


def _settings(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    sparse = [report["runs"]["sparse"] for report in (first, second)]
    config = [{"method": run["method"], **run["config"]} for run in sparse]
    clip = [{name: report[name] for name in _CLIP} for report in (first, second)]
    protocol = [{name: report["protocol"][name] for name in ("baseline", "repeats")} for report in (first, second)]
    groups: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("", clip[0], clip[1]),
        ("", config[0], config[1]),
        ("model ", first["model"], second["model"]),
        ("", first["shape"], second["shape"]),
        ("protocol ", protocol[0], protocol[1]),
        ("", first["env"], second["env"]),
    ]
    return [
        {"name": f"{prefix}{name}", "a": x, "b": y}
        for prefix, a, b in groups
        for name, x, y in _differing(a, b, tuple(dict.fromkeys([*a, *b])))
    ]


def _results(first: dict[str, Any], second: dict[str, Any], speed: bool, fidelity: bool) -> list[dict[str, Any]]:
    ratio: list[tuple[str, _Look]] = [
        ("E2E speedup", lambda r: r["speedup"]["e2e"]),
        ("denoise speedup", lambda r: r["speedup"]["denoise"]),
        ("attention speedup, with planning", lambda r: r["speedup"]["attention_with_plan"]),
    ]
    time: list[tuple[str, _Look]] = [
        ("E2E dense", lambda r: r["runs"]["dense"]["e2e"]["median"]),
        ("E2E sparse", lambda r: r["runs"]["sparse"]["e2e"]["median"]),
        ("attention sparse", lambda r: middle(r["runs"]["sparse"]["attention_s"])),
        ("planning", lambda r: middle(r["runs"]["sparse"]["plan_s"])),
    ]
    memory: list[tuple[str, _Look]] = [
        ("peak memory sparse", lambda r: max(r["runs"]["sparse"]["peak_memory"].values(), default=None))
    ]
    share: list[tuple[str, _Look]] = [
        ("density, all calls", lambda r: r["density"]["all_calls"]),
        ("density, sparse calls", lambda r: r["density"]["sparse_calls"]),
        ("estimated error", lambda r: r["estimated_error"]["overall"]),
    ]
    quality: list[tuple[str, _Look]] = [
        ("PSNR, mean", lambda r: r["fidelity"]["psnr"]["mean"]),
        ("PSNR, worst frame", lambda r: r["fidelity"]["psnr"]["worst"]),
        ("SSIM, mean", lambda r: r["fidelity"]["ssim"]["mean"]),
        ("latents, relative L2", lambda r: r["fidelity"]["latent_relative_l2"]),
    ]
    groups = [
        ("speed", ratio, times, speed, _factor),
        ("speed", time, seconds, speed, _factor),
        ("memory", memory, _memory, speed, _factor),
        ("density", share, percent, True, _points),
        ("fidelity", quality, _plain, fidelity, _delta),
    ]
    return [
        {"part": part, "name": name, "a": say(a), "b": say(b), "change": change(a, b) if comparable else None}
        for part, looks, say, comparable, change in groups
        for name, look in looks
        for a, b in [(look(first), look(second))]
    ]


def _memory(value: float | None) -> str:
    return "n/a" if value is None else gibibytes(int(value))


def _plain(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f} dB" if value > 2 else f"{value:.3f}"


def _factor(a: float | None, b: float | None) -> str | None:
    return None if not a or b is None else f"{b / a:.2f}x"


def _points(a: float | None, b: float | None) -> str | None:
    return None if a is None or b is None else f"{100 * (b - a):+.1f} points"


def _delta(a: float | None, b: float | None) -> str | None:
    return None if a is None or b is None else f"{b - a:+.3f}" if max(abs(a), abs(b)) <= 2 else f"{b - a:+.1f} dB"
