"""Arms of a run: attention settings that are compared, and the check that nothing else differs between them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsattn.cli.defaults import DEFAULTS
from dsattn.cli.options import parse_value
from dsattn.config import Config, load_config
from dsattn.engine import Engine
from dsattn.errors import DsattnError, UsageError
from dsattn.presets import PRESETS, over_preset, preset

DENSE = "dense"
_NAME = re.compile(r"[\w.+@=-]+")

# What two clips of one prompt and index must share, as paths into their sidecars.
ALIKE = (
    ("prompt",),
    ("negative_prompt",),
    ("index",),
    ("seed",),
    ("settings",),
    ("model", "id"),
    ("model", "revision"),
    ("model", "pipeline"),
    ("model", "dtype"),
    ("shape",),
    *(("env", name) for name in ("dsattn", "torch", "triton", "diffusers", "transformers", "cuda", "gpu")),
)


class ArmsDifferError(DsattnError):
    """Clips that are compared differ in something other than attention."""


@dataclass(frozen=True)
class Arm:
    """One setting of attention.

    Args:
        name: of its folder.
        config: of the engine; None leaves the pipeline alone.

    """

    name: str
    config: Config | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "config": None if self.config is None else self.config.to_dict()}


def parse_arm(text: str, family: str | None = None) -> Arm:
    """An arm from ``[NAME=]METHOD[:option=value,...]``; METHOD may be a preset or a YAML config file too.

    Without NAME the arm is called by its method. ``dense`` alone is the plain pipeline. Options of methods and presets
    stand over the command line's defaults.
    Values with commas in them need a config file.

    Args:
        family: model family, whose schedule a preset takes.

    Raises:
        UsageError: naming what cannot be used.

    """
    head, _, tail = text.partition(":")
    name, equals, method = head.rpartition("=")
    name = name if equals else Path(head).stem if _is_file(head) else head
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise UsageError(f"arm {text!r} needs a name to make a folder of: give NAME=METHOD, got {name!r}")
    given: dict[str, Any] = {}
    for part in filter(None, tail.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"arm {text!r}: options must be option=value, got {part!r}; lists need a config file")
        given[option.strip().replace("-", "_")] = parse_value(value)
    if method == DENSE and not given:
        return Arm(name, None)
    if _is_file(method):
        values = {**load_config(method).to_dict(), **given}
    elif method in PRESETS:
        values = over_preset(preset(method, family), given)
    else:
        values = {**DEFAULTS, "method": method, **given}
    config = Config.from_dict(values)
    # Refuses an unknown method and options it does not have.
    Engine(config)
    return Arm(name, config)


def parse_arms(texts: Sequence[str], family: str | None = None) -> list[Arm]:
    """Several arms with names of their own.

    Raises:
        UsageError: an arm cannot be used, or two have one name.

    """
    arms = [parse_arm(text, family) for text in texts]
    names = [arm.name for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two arms are called {', '.join(twice)}; give NAME=METHOD")
    return arms


def check_alike(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Two clips differ in attention only.

    Args:
        one, other: their sidecars.
        names: of their arms, for the message.

    Raises:
        ArmsDifferError: naming the first difference and both values.

    """
    for path in ALIKE:
        a, b = (_at(sidecar, path) for sidecar in (one, other))
        if a != b:
            raise ArmsDifferError(
                f"{one.get('prompt')!r}: the arms {names[0]} and {names[1]} must differ in attention only, but "
                f"{'.'.join(path)} is {a!r} and {b!r}; sample both again in one folder, with one environment"
            )


def _is_file(text: str) -> bool:
    return text.endswith((".yaml", ".yml"))


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
