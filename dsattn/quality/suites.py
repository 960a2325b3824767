"""What to generate: prompt suites, file names and seeds.

A suite is a list of entries in VBench's form: ``{"prompt_en": text, "dimension": [names], "auxiliary_info"?: {...}}``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsattn.config import require_choice
from dsattn.errors import UsageError
from dsattn.quality.vbench import QUALITY

Entry = dict[str, Any]

SUITES = ("smoke", "mini", "quality", "full")
SAMPLES = {"smoke": 1, "mini": 1, "quality": 1, "full": 5}
MINI_PER_GROUP = 6
FULL_INFO = "VBench_full_info.json"
NAME_BYTES = 240

# In the words of the shipped model; not VBench's.
_SMOKE = (
    "a large red circle moves left over a striped background",
    "a small blue square stays still over a checkered background",
    "a large yellow star slides up on a cloudy background",
    "a small green triangle drifts down in front of a dotted background",
)


@dataclass(frozen=True)
class Item:
    """One clip to make.

    Args:
        prompt: its text.
        index: which clip of the prompt, from 0.
        seed: of its initial noise, the same in every arm.

    """

    prompt: str
    index: int
    seed: int

    @property
    def name(self) -> str:
        """File name without its ending, as VBench looks for it."""
        return f"{self.prompt}-{self.index}"


def entries(suite: str, prompts: Path | None = None) -> list[Entry]:
    """Entries of a suite.

    ``smoke`` has four prompts of our own and needs no file. The others choose from VBench's: ``mini`` six prompts of
    each group of quality dimensions, evenly spread over the file; ``quality`` all prompts with a quality dimension;
    ``full`` all.

    Args:
        prompts: VBench's ``VBench_full_info.json``; None looks for an installed ``vbench``.

    Raises:
        UsageError: there is no such suite, or no such file, or it holds something else.

    """
    require_choice("suite", suite, SUITES)
    if suite == "smoke":
        return [{"prompt_en": text, "dimension": list(QUALITY)} for text in _SMOKE]
    everything = read_entries(prompts or _installed())
    if suite == "full":
        return everything
    rated = [entry for entry in everything if set(entry["dimension"]) & set(QUALITY)]
    if suite == "quality":
        return rated
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in rated:
        groups.setdefault(tuple(sorted(entry["dimension"])), []).append(entry)
    return [
        group[i * len(group) // MINI_PER_GROUP] for group in groups.values() for i in range(MINI_PER_GROUP) if group
    ]


def read_entries(path: Path) -> list[Entry]:
    """Entries of a file in VBench's form, with paths of videos taken off.

    Raises:
        UsageError: it cannot be read or has another form.

    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"prompt file {path} cannot be read: {error}; expected VBench's {FULL_INFO}") from error
    good = isinstance(values, list) and all(
        isinstance(value, dict) and isinstance(value.get("prompt_en"), str) and isinstance(value.get("dimension"), list)
        for value in values
    )
    if not good or not values:
        raise UsageError(
            f"prompt file {path} must hold a list of {{'prompt_en': text, 'dimension': [names]}}, as VBench's "
            f"{FULL_INFO} does"
        )
    return [{key: value for key, value in entry.items() if key != "video_list"} for entry in values]


def read_texts(path: Path, suite_entries: Sequence[Entry]) -> dict[str, str]:
    """Longer texts of a suite's prompts, from a JSON file ``{prompt: text}`` that may hold more.

    VBench names a video by its short prompt, whatever text it was generated from.

    Raises:
        UsageError: the file cannot be read, has another form, or lacks a prompt.

    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--augmented {path} cannot be read: {error}; expected JSON of {{prompt: text}}") from error
    if not isinstance(values, dict) or not all(isinstance(text, str) and text.strip() for text in values.values()):
        raise UsageError(f"--augmented {path} must hold one JSON object of {{prompt: text}}, with no text empty")
    prompts = dict.fromkeys(entry["prompt_en"] for entry in suite_entries)
    if missing := [prompt for prompt in prompts if prompt not in values]:
        raise UsageError(f"--augmented {path} lacks {len(missing)} prompts of the suite, such as {missing[0]!r}")
    return {prompt: values[prompt] for prompt in prompts}


def items(suite_entries: Sequence[Entry], samples: int, seed: int) -> list[Item]:
    """Clips of a suite, prompt by prompt; a prompt that stands in several entries is made once.

    Args:
        samples: clips per prompt, at least 1.
        seed: decides the seed of every clip together with its prompt and index, and nothing else does: shards, order
            and other prompts change none.

    Raises:
        UsageError: a prompt cannot be a file name.

    """
    if samples < 1:
        raise UsageError(f"samples must be at least 1, got {samples}")
    prompts = list(dict.fromkeys(entry["prompt_en"] for entry in suite_entries))
    for prompt in prompts:
        if not prompt or set(prompt) & set("/\0\n") or len(prompt.encode()) > NAME_BYTES:
            raise UsageError(
                f"prompt {prompt!r} cannot be the name of a file: expected 1 to {NAME_BYTES} bytes without '/' and "
                "line breaks, because VBench finds videos by prompt"
            )
    return [Item(prompt, index, item_seed(seed, prompt, index)) for prompt in prompts for index in range(samples)]


def item_seed(base: int, prompt: str, index: int) -> int:
    """Seed in [0, 2**63) of one clip: a hash, so that nobody picked it."""
    digest = hashlib.sha256(f"{base}/{index}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def parse_shard(text: str) -> tuple[int, int]:
    """``"i/n"`` with i from 0: this run makes every n-th clip, from the i-th on.

    Raises:
        UsageError: it is something else.

    """
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise UsageError(f"--shard must be i/n with 0 <= i < n, such as 0/8; got {text!r}")
    return int(first), int(second)


def _installed() -> Path:
    """The prompt file of an installed vbench, which is found without importing it."""
    package = importlib.util.find_spec("vbench")
    if package is None or package.origin is None or not (path := Path(package.origin).with_name(FULL_INFO)).is_file():
        raise UsageError(
            f"this suite needs VBench's prompts: name {FULL_INFO} of the package vbench with --prompts (it lies in "
            "the wheel: pip download --no-deps vbench==0.1.5), or take --suite smoke"
        )
    return path
