"""What ``generate`` and ``compare`` do when neither a config file nor options say otherwise."""

from __future__ import annotations

from typing import Any

from dsattn.config import DEFAULT_METHOD

DEFAULTS: dict[str, Any] = {"method": DEFAULT_METHOD, "dense_steps": 0.17, "dense_layers": "", "refresh": 4}
FPS = 16.0
