"""How much a method keeps: budgets that may change over the run."""

from __future__ import annotations

import math
from functools import lru_cache

from dsattn.errors import UsageError
from dsattn.grid import Call

# A number, or a table over the run: "start:value" pairs, such as "0:0.3,0.5:0.1". A start with a decimal point is a
# share of all denoising steps, dense ones included; one without is the number of a step. Each value holds from its
# start until the next: there is no interpolation. The first start is 0, and they rise.
Table = float | str


def at_step(value: Table, call: Call) -> float:
    """Value of a number or table at a call's step; a plan that is reused keeps the value it was made with.

    Raises:
        UsageError: the table counts in shares of a run whose number of steps is unknown.

    """
    if not isinstance(value, str):
        return value
    current = 0.0
    for start, number in _parse(value):
        if isinstance(start, float):
            if call.num_steps is None:
                raise UsageError(
                    f"the table {value!r} counts in shares of the run, and the number of steps is unknown here; "
                    "write its starts as numbers of steps, or give Call(num_steps=...)"
                )
            start = math.floor(start * call.num_steps + 1e-9)
        if call.step >= start:
            current = number
    return current


def require_table(name: str, value: Table, low: float, high: float) -> None:
    """Check a number or table, all values in the closed range ``[low, high]``.

    Raises:
        UsageError: naming the option, what was expected and what came.

    """
    wanted = f"{name} must be a number or a table such as '0:0.3,0.5:0.1' (step or share of the run : value)"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UsageError(f"{wanted}; got {value!r}")
    try:
        numbers = _numbers(value)
    except ValueError as error:
        raise UsageError(f"{wanted}; got {value!r}: {error}") from None
    for number in numbers:
        if not low <= number <= high:
            where = f" in {value!r}" if isinstance(value, str) else ""
            raise UsageError(f"{name} must be a number in [{low}, {high}], got {number!r}{where}")


def require_shares(**budgets: Table | None) -> bool:
    """Check budgets that are shares, numbers or tables in (0, 1]; True if one is given at all.

    Raises:
        UsageError: naming the budget, what was expected and what came.

    """
    given = {name: value for name, value in budgets.items() if value is not None}
    for name, value in given.items():
        require_table(name, value, 0, 1)
        if not all(_numbers(value)):
            raise UsageError(f"{name} must be above 0, got {value!r}")
    return bool(given)


@lru_cache(maxsize=256)
def _parse(text: str) -> tuple[tuple[int | float, float], ...]:
    """Pairs of a table.

    Raises:
        ValueError: saying what is wrong.

    """
    pairs: list[tuple[int | float, float]] = []
    for item in text.split(","):
        start, colon, number = (part.strip() for part in item.partition(":"))
        if not colon:
            raise ValueError(f"{item.strip()!r} is no start:value pair")
        pairs.append((int(start) if start.isdigit() else float(start), float(number)))
    starts = [start for start, _ in pairs]
    if starts[0] != 0:
        raise ValueError("the first start must be 0")
    if any(isinstance(start, float) and not 0 <= start < 1 for start in starts):
        raise ValueError("shares of the run lie in [0, 1)")
    if len({type(start) for start in starts if start != 0}) > 1:
        raise ValueError("starts are numbers of steps or shares of the run, not both")
    if any(a >= b for a, b in zip(starts[:-1], starts[1:], strict=True)):
        raise ValueError("starts must rise")
    return tuple((0 if start == 0 else start, value) for start, value in pairs)


def _numbers(value: Table) -> list[float]:
    """All values of a number or table."""
    return [number for _, number in _parse(value)] if isinstance(value, str) else [value]
