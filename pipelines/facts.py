"""What a pipeline is made of, as far as a head profile depends on it: its video transformers and its noise schedule."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from dsattn.pipelines.registry import find_transformers

# Settings of diffusers' schedulers that move the noise level of a step; the rest changes how a step is taken.
_SCHEDULE = (
    "base_shift",
    "beta_end",
    "beta_schedule",
    "beta_start",
    "final_sigmas_type",
    "flow_shift",
    "invert_sigmas",
    "max_shift",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "shift",
    "shift_terminal",
    "snr_shift_scale",
    "time_shift_type",
    "timestep_spacing",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_flow_sigmas",
    "use_karras_sigmas",
)
# How weights are stored, not what the model is.
_STORAGE = ("quantization_config",)


def describe_pipeline(target: Any) -> dict[str, str]:
    """Facts about a pipeline or transformer, by component name; equal for equal architecture and noise schedule.

    Weights are not looked at: a fine-tuned model or a LoRA has the facts of its base model.

    Returns:
        ``{"transformer": "WanTransformer3DModel 0f3a…", "scheduler": "UniPCMultistepScheduler flow_shift=3.0, …"}``:
        the first 16 digits of the SHA-256 of a transformer's config, and the settings of the noise schedule.

    Raises:
        TypeError, ValueError: ``target`` has no transformer that dsattn knows.

    """
    facts = {name: f"{type(module).__name__} {_digest(module)}" for name, module in find_transformers(target).items()}
    scheduler = None if isinstance(target, nn.Module) else getattr(target, "scheduler", None)
    if scheduler is not None:
        config = dict(getattr(scheduler, "config", {}))
        settings = ", ".join(f"{name}={config[name]}" for name in _SCHEDULE if config.get(name) not in (None, False))
        facts["scheduler"] = f"{type(scheduler).__name__} {settings}".strip()
    return facts


def _digest(module: nn.Module) -> str:
    config: dict[str, Any] = dict(getattr(module, "config", {}))
    # Names with an underscore are diffusers' own notes: class, version, where it was loaded from.
    known = {name: value for name, value in config.items() if not name.startswith("_") and name not in _STORAGE}
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]
