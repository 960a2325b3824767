"""Errors that carry what went wrong and the way out. The CLI turns each into one line and an exit code."""

from __future__ import annotations


class DsattnError(Exception):
    """Base of the errors dsattn raises on purpose."""


class UsageError(DsattnError, ValueError):
    """A value the user gave cannot be used."""


class ImplUnavailableError(DsattnError, RuntimeError):
    """An implementation that was asked for by name cannot run here."""


class StrictFallbackError(DsattnError, RuntimeError):
    """With ``strict=True``: a call that would have fallen back to dense attention."""
