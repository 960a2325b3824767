"""Configuration values: what an engine is told, checked once, never changed.

Every option has a flat name, so that Python keywords, YAML files and the command line agree.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dsattn.errors import UsageError

DEFAULT_METHOD = "semantic"
IMPLS = ("auto", "triton", "flex", "torch", "reference")
DENSE_BACKENDS = ("sdpa", "flex", "xformers")
# Products of block-sparse attention that run in 8 bits: (queries and keys in INT8, weights and values in FP8).
QUANTIZATIONS = {"int8_qk": (True, False), "fp8_pv": (False, True), "int8_qk_fp8_pv": (True, True)}
AUTOTUNE = ("static", "cached", "measure")

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """Options of an engine; those of the method stand in ``options``.

    Args:
        method: name in ``dsattn.METHODS``.
        options: options of that method, checked against its own config class.
        dense_steps: first denoising steps that stay dense; a count (int) or a fraction of the run (float in [0, 1)).
        dense_layers: layers that stay dense: indices, or a text such as ``"0-1,29"``. Negative counts from the end.
        refresh: a plan is made anew every ``refresh`` sparse steps, and reused in between; at least 1.
        drift: make a plan anew before its time when the estimated error of its last use is more than ``drift`` times
            that of its first; above 1, None never does.
        monitor: query rows per head on which the error of the output is estimated: at a plan's last use before its
            refresh, with ``drift`` at every use; 0 estimates nothing.
        impl: implementation of block-sparse attention, see ``dsattn.attend``.
        quantization: 8-bit products in block-sparse attention, ``"int8_qk"``, ``"fp8_pv"`` or ``"int8_qk_fp8_pv"``, see
            ``dsattn.attend``; None is full precision.
        dense: backend of dense attention; None runs the pipeline's own.
        strict: raise instead of falling back to dense attention.
        timing: measure planning and attention time per call (on a GPU this adds events to the stream).
        autotune: tile shapes of Triton kernels: ``"static"`` ones, those ``"cached"`` for this GPU by an earlier run
            that measured, or ``"measure"`` once what is not cached (some seconds per kernel, see ``kernels.tuning``).

    Raises:
        UsageError: a value out of range, naming the option, what was expected and what came.

    """

    method: str = DEFAULT_METHOD
    options: Mapping[str, Any] = field(default_factory=dict)
    dense_steps: int | float = 0
    dense_layers: tuple[int, ...] = ()
    refresh: int = 1
    drift: float | None = None
    monitor: int = 16
    impl: str = "auto"
    quantization: str | None = None
    dense: str | None = None
    strict: bool = False
    timing: bool = False
    autotune: str = "cached"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", parse_layers(self.dense_layers))
        object.__setattr__(self, "options", dict(self.options))
        steps = self.dense_steps
        if isinstance(steps, bool) or not isinstance(steps, (int, float)) or steps < 0:
            raise UsageError(f"dense_steps must be a count >= 0 or a fraction in [0, 1), got {steps!r}")
        if isinstance(steps, float) and not steps < 1:
            raise UsageError(
                f"dense_steps given as a float is a fraction in [0, 1), got {steps!r}; use an int for a count"
            )
        require("refresh", self.refresh, int, low=1)
        require("monitor", self.monitor, int, low=0)
        if self.drift is not None:
            require("drift", self.drift, (int, float), low=1)
            if self.monitor == 0:
                raise UsageError("drift needs estimated errors: monitor must be at least 1, got 0")
        require_choice("impl", self.impl, IMPLS)
        if self.quantization is not None:
            require_choice("quantization", self.quantization, tuple(QUANTIZATIONS))
        if self.dense is not None:
            require_choice("dense", self.dense, DENSE_BACKENDS)
        require("strict", self.strict, bool)
        require("timing", self.timing, bool)
        require_choice("autotune", self.autotune, AUTOTUNE)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Config from flat names; names that are not the engine's are the method's (checked by the engine)."""
        known = {f.name for f in dataclasses.fields(cls)} - {"options"}
        own = {key: value for key, value in values.items() if key in known}
        rest = {key: value for key, value in values.items() if key not in known and key != "options"}
        return cls(**own, options={**values.get("options", {}), **rest})

    def to_dict(self) -> dict[str, Any]:
        """Flat names and plain values; ``from_dict`` of it gives an equal config."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "options"}
        return {**own, "dense_layers": list(self.dense_layers), **self.options}


def load_config(path: str | Path) -> Config:
    """Config from a YAML file of flat names.

    Raises:
        UsageError: the file is missing, is not YAML, or does not hold a mapping of names.

    """
    import yaml

    file = Path(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"config file {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"config file {file} must hold 'name: value' lines, got {type(values).__name__}")
    return Config.from_dict(values)


def parse_layers(value: Iterable[int] | str | int) -> tuple[int, ...]:
    """Layer indices from a sequence, one index, or a text such as ``"0-1,29"``."""
    if isinstance(value, str):
        try:
            layers: list[int] = []
            for part in filter(None, (p.strip() for p in value.split(","))):
                first, dash, last = part.partition("-") if not part.startswith("-") else (part, "", "")
                layers += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError:
            raise UsageError(f"dense_layers must look like '0-1,29', got {value!r}") from None
        return tuple(layers)
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    layers = [value] if isinstance(value, bool) else list(value)
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise UsageError(f"dense_layers must be layer indices, got {value!r}")
    return tuple(layers)


def build(cls: type[T], values: Mapping[str, Any], owner: str, also_known: Iterable[str] = ()) -> T:
    """Instance of a frozen dataclass; an unknown name is an error that lists the known ones."""
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            names = [*known, *also_known]
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UsageError(
                f"{owner} has no option {key!r}{hint} Known: {', '.join(names)}".replace("' Known", "'. Known")
            )
    return cls(**values)


def require(
    name: str, value: Any, kind: type | tuple[type, ...], low: float | None = None, high: float | None = None
) -> None:
    """Check type and closed range of an option.

    Raises:
        UsageError: naming the option, what was expected and what came.

    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wrong_type = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
    if wrong_type or (low is not None and value < low) or (high is not None and value > high):
        words = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
        expected = "a number" if float in kinds else words[kinds[0]]
        if low is not None or high is not None:
            expected += f" in [{'-inf' if low is None else low}, {'inf' if high is None else high}]"
        raise UsageError(f"{name} must be {expected}, got {value!r}")


def require_budget(default: float, **budgets: float | None) -> float | None:
    """Check the ways to say how much a method keeps; returns ``density``, ``default`` if no budget is given.

    Raises:
        UsageError: more than one is given, or one is not in (0, 1].

    """
    given = require_one_of(**budgets)
    for name, value in given.items():
        require(name, value, (int, float), low=0, high=1)
        if value == 0:
            raise UsageError(f"{name} must be above 0, got {value!r}")
    return budgets.get("density") if given else default


def require_one_of(**options: T | None) -> dict[str, T]:
    """Check that at most one of some options is given (not None); returns those that are.

    Raises:
        UsageError: naming the options and what came.

    """
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) > 1:
        came = " and ".join(f"{name}={value}" for name, value in given.items())
        raise UsageError(f"give only one of {', '.join(options)}; got {came}")
    return given


def require_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Check that an option is one of a few values.

    Raises:
        UsageError: naming the option, the choices and what came.

    """
    choices = tuple(choices)
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")
