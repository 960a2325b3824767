"""Load the small text-to-video model that ships with the package: no network, no pickle, checksums verified."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsattn.pipelines.tiny.codec import PatchCodec
from dsattn.pipelines.tiny.model import (
    GUIDANCE,
    MAX_TEXT,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vocabulary,
)
from dsattn.presets import SHIPPED

WEIGHTS = Path(__file__).parent / "weights"
CHECKSUMS = "checksums.json"
_FILES = ("codec.safetensors", "text_encoder.safetensors", "transformer.safetensors", "config.json")


class TinyPipeline(WanPipeline):
    """WanPipeline with the small model's defaults: 256 x 256, 33 frames, 20 steps, its guidance scale."""

    dsattn_family = SHIPPED
    # WanPipeline checks height and width for Wan's own VAE and patches, whatever those of this model are.
    dsattn_size_multiple = 16

    def __call__(self, prompt: str | list[str] | None = None, **options: Any) -> Any:
        """Generate; every option of `WanPipeline.__call__` can be given."""
        defaults = {
            "height": 256,
            "width": 256,
            "num_frames": 33,
            "num_inference_steps": 20,
            "guidance_scale": GUIDANCE,
            "max_sequence_length": MAX_TEXT,
        }
        return super().__call__(prompt, **(defaults | options))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify(folder: Path) -> None:
    """Check every weights file against `checksums.json`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file's SHA-256 is not the committed one.

    """
    listing = folder / CHECKSUMS
    if not listing.is_file():
        raise FileNotFoundError(
            f"{listing} is missing: expected the small model's weights in {folder}; reinstall dsattn"
        )
    expected = json.loads(listing.read_text())
    for name in _FILES:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: expected the small model's weights; reinstall dsattn")
        got = _digest(path)
        if got != expected.get(name):
            raise ValueError(
                f"{path} is not the file that was committed: expected SHA-256 {expected.get(name)}, got {got}; "
                "reinstall dsattn or restore the file"
            )


def _cast(model: nn.Module, dtype: torch.dtype) -> Any:
    """Frozen model in `dtype`, except for the parts that diffusers keeps in float32 when it loads a checkpoint."""
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not keep & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)


def load_tiny(torch_dtype: torch.dtype = torch.float32, weights_dir: str | Path | None = None) -> TinyPipeline:
    """Build the pipeline from the packaged weights.

    Args:
        torch_dtype: dtype of the transformer, text encoder and codec.
        weights_dir: another folder with the same files (default: the one in the package).

    Raises:
        FileNotFoundError, ValueError: see `verify`.

    """
    folder = Path(weights_dir) if weights_dir is not None else WEIGHTS
    verify(folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = build_tokenizer(config["vocabulary"])
    codec = PatchCodec(**config["codec"])
    text_encoder = build_text_encoder(len(tokenizer))
    transformer = build_transformer(config["codec"]["z_dim"])
    codec.load_state_dict(load_file(folder / "codec.safetensors"))
    text = load_file(folder / "text_encoder.safetensors")
    text_encoder.load_state_dict(text | {"encoder.embed_tokens.weight": text["shared.weight"]})
    transformer.load_state_dict(load_file(folder / "transformer.safetensors"))
    return TinyPipeline(
        tokenizer=tokenizer,
        text_encoder=_cast(text_encoder, torch_dtype),
        transformer=_cast(transformer, torch_dtype),
        vae=_cast(codec, torch_dtype),
        scheduler=build_scheduler(),
    )


def _compact(tensor: Tensor) -> Tensor:
    """Large matrices are stored in float16 to halve the package, the rest in float32."""
    return tensor.detach().to(torch.float16 if tensor.numel() > 32768 else torch.float32).contiguous()


def export_weights(folder: Path, codec: PatchCodec, weights: dict[str, Tensor]) -> None:
    """Write the files that `load_tiny` reads. `weights` has the prefixes `transformer.` and `text_encoder.`."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Tensor]] = {"codec.safetensors": dict(codec.state_dict())}
    for part in ("transformer", "text_encoder"):
        files[f"{part}.safetensors"] = {
            n.removeprefix(f"{part}."): t for n, t in weights.items() if n.startswith(f"{part}.")
        }
    config = {
        "codec": {k: v for k, v in codec.config.items() if not k.startswith("_")},
        "vocabulary": build_vocabulary(),
    }
    fresh = {name: folder / f"{name}.tmp" for name in _FILES}
    for name, tensors in files.items():
        save_file({n: _compact(t) for n, t in tensors.items()}, fresh[name])
    fresh["config.json"].write_text(json.dumps(config, indent=1) + "\n")
    sums = {name: _digest(path) for name, path in fresh.items()}
    for name, path in fresh.items():
        path.chmod(0o644)
        path.replace(folder / name)
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
