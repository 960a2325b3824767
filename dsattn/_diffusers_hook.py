"""Temporary."""


def install() -> None:
    """Nothing."""
