"""Load the small text-to-video models that ship with the package: no network, no pickle, checksums verified.

Both work in the latents of one codec, which lies with the first model's weights; the second model's checksums name it,
so that neither can be loaded with another.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dsattn.pipelines.tiny.codec import PatchCodec
from dsattn.pipelines.tiny.joint import JointCodec, TinyJointPipeline, build_joint_transformer
from dsattn.pipelines.tiny.model import (
    DEFAULTS,
    MAX_TEXT,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vocabulary,
)
from dsattn.presets import SHIPPED

WEIGHTS = Path(__file__).parent / "weights"
WEIGHTS_JOINT = Path(__file__).parent / "weights_joint"
FOLDERS = {"tiny": WEIGHTS, "tiny-joint": WEIGHTS_JOINT}
"""The shipped models by name, and where their weights are."""
CHECKSUMS = "checksums.json"
CODEC = "codec.safetensors"
_FILES = (CODEC, "text_encoder.safetensors", "transformer.safetensors", "config.json")
_SCALE = ".scale"


class TinyPipeline(WanPipeline):
    """WanPipeline with the small model's defaults: 256 x 256, 33 frames, 20 steps, its guidance scale."""

    dsattn_family = SHIPPED
    # WanPipeline checks height and width for Wan's own VAE and patches, whatever those of this model are.
    dsattn_size_multiple = 16

    def __call__(self, prompt: str | list[str] | None = None, **options: Any) -> Any:
        """Generate; every option of `WanPipeline.__call__` can be given."""
        defaults = DEFAULTS | {"max_sequence_length": self.tokenizer.model_max_length}
        return super().__call__(prompt, **(defaults | options))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _file(folder: Path, name: str) -> Path:
    """A weights file; the codec may also be the package's."""
    path = folder / name
    return WEIGHTS / name if name == CODEC and not path.is_file() else path


def verify(folder: Path) -> None:
    """Check every weights file against `checksums.json`; the codec is the package's where the folder has none.

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
        path = _file(folder, name)
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


def load_codec(folder: Path, cls: type[PatchCodec] = PatchCodec) -> PatchCodec:
    """The codec of a weights folder, in float32; `cls` is the class to make of it."""
    codec = cls(**json.loads((folder / "config.json").read_text())["codec"])
    codec.load_state_dict(load_file(_file(folder, CODEC)))
    return codec.eval()


def _load(folder: Path, name: str) -> dict[str, Tensor]:
    stored = load_file(folder / f"{name}.safetensors")
    return {n: _expand(t, stored.get(n + _SCALE)) for n, t in stored.items() if not n.endswith(_SCALE)}


def _parts(folder: Path, dtype: torch.dtype, codec: PatchCodec, transformer: nn.Module) -> dict[str, Any]:
    """Components of a pipeline, filled from `folder`."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = build_tokenizer(config["vocabulary"], config["max_text"])
    text_encoder = build_text_encoder(len(tokenizer))
    text = _load(folder, "text_encoder")
    text_encoder.load_state_dict(text | {"encoder.embed_tokens.weight": text["shared.weight"]})
    transformer.load_state_dict(_load(folder, "transformer"))
    return {
        "tokenizer": tokenizer,
        "text_encoder": _cast(text_encoder, dtype),
        "transformer": _cast(transformer, dtype),
        "vae": _cast(codec, dtype),
        "scheduler": build_scheduler(),
    }


def load_tiny(torch_dtype: torch.dtype = torch.float32, weights_dir: str | Path | None = None) -> TinyPipeline:
    """Build the pipeline of the first model from the packaged weights.

    Args:
        torch_dtype: dtype of the transformer, text encoder and codec.
        weights_dir: another folder with the same files (default: the one in the package).

    Raises:
        FileNotFoundError, ValueError: see `verify`.

    """
    folder = Path(weights_dir) if weights_dir is not None else WEIGHTS
    verify(folder)
    codec = load_codec(folder)
    return TinyPipeline(**_parts(folder, torch_dtype, codec, build_transformer(codec.config.z_dim)))


def load_tiny_joint(
    torch_dtype: torch.dtype = torch.float32, weights_dir: str | Path | None = None
) -> TinyJointPipeline:
    """Build the pipeline of the second model, with text in the self-attention; otherwise as `load_tiny`."""
    folder = Path(weights_dir) if weights_dir is not None else WEIGHTS_JOINT
    verify(folder)
    codec = load_codec(folder, JointCodec)
    return TinyJointPipeline(**_parts(folder, torch_dtype, codec, build_joint_transformer(codec.config.z_dim)))


def stored_kind(folder: Path) -> str:
    """Which of the two models a folder's weights are of, `tiny` or `tiny-joint`; raises as `verify` does."""
    verify(folder)
    with safe_open(folder / "transformer.safetensors", "pt") as stored:
        names = list(stored.keys())
    return "tiny" if "patch_embedding.weight" in names else "tiny-joint"


def load_shipped(
    name: str, torch_dtype: torch.dtype = torch.float32, weights_dir: str | Path | None = None
) -> TinyPipeline | TinyJointPipeline:
    """`load_tiny` or `load_tiny_joint` by the model's name.

    Raises:
        ValueError: there is no such model; otherwise as `load_tiny`.

    """
    if name not in FOLDERS:
        raise ValueError(f"the shipped models are {', '.join(FOLDERS)}; got {name!r}")
    return (load_tiny_joint if name == "tiny-joint" else load_tiny)(torch_dtype, weights_dir)


def _compact(tensor: Tensor, bits: int) -> dict[str, Tensor]:
    """How a tensor is stored, by suffix of its name: large ones in float16, or in 8 bits with a scale per row."""
    tensor = tensor.detach().float()
    if tensor.numel() <= (32768 if bits == 16 else 8192):
        return {"": tensor.contiguous()}
    if bits == 16:
        return {"": tensor.to(torch.float16).contiguous()}
    scale = tensor.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return {"": (tensor / scale).round().to(torch.int8).contiguous(), _SCALE: scale}


def _expand(tensor: Tensor, scale: Tensor | None) -> Tensor:
    return tensor.float() if scale is None else tensor.float() * scale


def export_weights(folder: Path, codec: PatchCodec, weights: dict[str, Tensor], kind: str = "tiny") -> None:
    """Write the files that the loader reads.

    Args:
        folder: made if need be.
        codec: of the latents the model was trained on. Written for `tiny`, and only named for `tiny-joint`, whose
            large matrices are stored in 8 bits: it has more of them, for text, and the package is to stay small.
        weights: with the prefixes `transformer.` and `text_encoder.`.
        kind: `tiny` or `tiny-joint`.

    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {CODEC: _codec_tensors(codec)}
    for part in ("transformer", "text_encoder"):
        file = tensors[f"{part}.safetensors"] = {}
        for name, tensor in weights.items():
            if name.startswith(f"{part}."):
                stored = _compact(tensor, 8 if kind == "tiny-joint" else 16)
                file |= {name.removeprefix(f"{part}.") + suffix: t for suffix, t in stored.items()}
    config = {"codec": _codec_config(codec), "vocabulary": build_vocabulary(), "max_text": MAX_TEXT}
    content = {name: save(file) for name, file in tensors.items()}
    content["config.json"] = _json(config)
    sums = {name: hashlib.sha256(content[name]).hexdigest() for name in _FILES}
    if kind == "tiny-joint":
        del content[CODEC]
    _write(folder, content | {CHECKSUMS: _json(sums)})


def replace_codec(folder: Path, codec: PatchCodec) -> None:
    """Put another decoder beside a model's weights: same latents, so the weights stay as they are."""
    config = json.loads((folder / "config.json").read_text()) | {"codec": _codec_config(codec)}
    content = {CODEC: save(_codec_tensors(codec)), "config.json": _json(config)}
    sums = json.loads((folder / CHECKSUMS).read_text())
    sums |= {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    if not (folder / CODEC).is_file():
        del content[CODEC]  # this model uses the codec of the first one
    _write(folder, content | {CHECKSUMS: _json(sums)})


def _codec_config(codec: PatchCodec) -> dict[str, Any]:
    return {k: v for k, v in codec.config.items() if not k.startswith("_") and k != "scaling_factor"}


def _codec_tensors(codec: PatchCodec) -> dict[str, Tensor]:
    return {name: _compact(tensor, 16)[""] for name, tensor in codec.state_dict().items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _write(folder: Path, content: dict[str, bytes]) -> None:
    """Write files one by one, each whole or not at all; the checksums come last."""
    for name, data in content.items():
        fresh = folder / f"{name}.tmp"
        fresh.write_bytes(data)
        fresh.replace(folder / name)
