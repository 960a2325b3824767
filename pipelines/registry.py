"""The families dsattn knows, by the class name of their transformer."""

from __future__ import annotations

from typing import Any

from torch import nn

from dsattn.pipelines.allegro import ALLEGRO
from dsattn.pipelines.cogvideox import COGVIDEOX
from dsattn.pipelines.easyanimate import EASYANIMATE
from dsattn.pipelines.family import Family
from dsattn.pipelines.helios import HELIOS
from dsattn.pipelines.hunyuan_video import FRAMEPACK, HUNYUAN_VIDEO
from dsattn.pipelines.hunyuan_video15 import HUNYUAN_VIDEO_15
from dsattn.pipelines.kandinsky5 import KANDINSKY5
from dsattn.pipelines.ltx import LTX, LTX2
from dsattn.pipelines.mochi import MOCHI
from dsattn.pipelines.skyreels_v2 import SKYREELS_V2
from dsattn.pipelines.wan import WAN, WAN_ANIMATE

_ALL = (
    WAN,
    WAN_ANIMATE,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    FRAMEPACK,
    COGVIDEOX,
    MOCHI,
    LTX,
    LTX2,
    SKYREELS_V2,
    ALLEGRO,
    EASYANIMATE,
    KANDINSKY5,
    HELIOS,
)

FAMILIES: dict[str, Family] = {transformer: family for family in _ALL for transformer in family.transformers}


def family_of(module: Any) -> Family | None:
    """Family of a transformer by its class or a base class, None if dsattn does not know it."""
    return next((FAMILIES[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in FAMILIES), None)


def preset_family(target: Any) -> str:
    """Family of a pipeline or transformer as :mod:`dsattn.presets` knows it.

    Raises:
        TypeError, ValueError: as :func:`find_transformers`.

    """
    family = family_of(next(iter(find_transformers(target).values())))
    return str(getattr(target, "dsattn_family", family.name if family is not None else ""))


def find_transformers(target: Any) -> dict[str, nn.Module]:
    """Transformers that dsattn can speed up, by component name.

    Args:
        target: a diffusers pipeline (anything with ``components``) or a transformer; compiled ones are unwrapped.

    Raises:
        ValueError: there is none; the message names what was there and what is supported.

    """
    components = getattr(target, "components", None)
    if not isinstance(target, nn.Module) and not isinstance(components, dict):
        raise TypeError(f"expected a diffusers pipeline or a video transformer, got {type(target).__name__}")
    candidates = {"transformer": target} if isinstance(target, nn.Module) else components or {}
    modules = {name: _unwrap(module) for name, module in candidates.items() if isinstance(module, nn.Module)}
    found = {name: module for name, module in modules.items() if family_of(module) is not None}
    if not found:
        classes = ", ".join(sorted({type(module).__name__ for module in modules.values()})) or "no modules"
        raise ValueError(
            f"dsattn supports no transformer of {type(target).__name__} (it has {classes}). "
            f"Supported transformers: {', '.join(sorted(FAMILIES))}"
        )
    return found


def _unwrap(module: nn.Module) -> nn.Module:
    """The module behind torch.compile(...) or a data-parallel wrapper."""
    inner = getattr(module, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return _unwrap(inner)
    if type(module).__name__ in ("DistributedDataParallel", "DataParallel"):
        return _unwrap(module.module)  # type: ignore[arg-type]
    return module
