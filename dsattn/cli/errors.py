"""The one place where an exception becomes a line and an exit code."""

from __future__ import annotations

import torch

from dsattn.errors import DsattnError, ImplUnavailableError, StrictFallbackError, UsageError

FAILED, USAGE, STRICT, MEMORY, QUALITY, INTERRUPTED = 1, 2, 3, 4, 5, 130

# How PyTorch's CPU allocators say it: a plain RuntimeError with one of these in it.
_CPU_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_cpu")


class QualityGateError(DsattnError):
    """The video is further from the dense one than ``--min-psnr`` allows."""


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for an error."""
    line = " ".join(str(error).split())
    if isinstance(error, StrictFallbackError):
        return STRICT, line
    if isinstance(error, QualityGateError):
        return QUALITY, line
    if _is_out_of_memory(error):
        first = (str(error).strip() or "the allocation failed").splitlines()[0]
        return MEMORY, f"out of memory: {first}; use a smaller --height, --width or --frames, or --dtype bfloat16"
    if isinstance(error, (UsageError, ImplUnavailableError)):
        return USAGE, line
    if isinstance(error, (DsattnError, OSError)):
        return FAILED, line or type(error).__name__
    # Of the command line parser, whose classes Typer has moved between packages.
    if callable(describe := getattr(error, "format_message", None)):
        return USAGE, f"{' '.join(str(describe()).split())} See 'dsattn --help'."
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return INTERRUPTED, "interrupted"
    return (
        FAILED,
        f"unexpected {type(error).__name__}: {line or 'no message'}; run again with --debug for the traceback",
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _CPU_OUT_OF_MEMORY)
