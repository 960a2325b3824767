"""LPIPS with AlexNet, from weights that lie on disk already; nothing is downloaded.

Source: Zhang et al. 2018 (arXiv 1801.03924), version 0.1 of the linear layers; AlexNet as in torchvision.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dsattn.errors import UsageError
from dsattn.metrics.fidelity import Fidelity
from dsattn.metrics.frames import Frames, check_frames, check_side

BACKBONE, HEADS = "alexnet-owt-7be5be79.pth", "alex.pth"
# AlexNet makes nothing of smaller frames after its strides.
LPIPS_SIDE = 63
# (name in torchvision's checkpoint, stride, padding); pooling stands before the second and the third.
_CONVOLUTIONS = (("0", 4, 2), ("3", 1, 2), ("6", 1, 1), ("8", 1, 1), ("10", 1, 1))
_POOLED = (1, 2)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Lpips:
    """Weights of the metric.

    Args:
        convolutions: five of ``(weight, bias)``.
        heads: five weights ``[1, channels, 1, 1]``, one per layer.

    """

    convolutions: tuple[tuple[Tensor, Tensor], ...]
    heads: tuple[Tensor, ...]

    def __call__(self, reference: Frames, other: Frames) -> Fidelity:
        """Distance of every frame, from 0 for equal ones; higher is worse, so ``worst`` of it is the best frame.

        Args:
            reference, other: ``[frames, height, width, 3]`` uint8, height and width at least 63.

        Raises:
            UsageError: shapes or dtypes differ, or frames are too small.

        """
        check_frames(reference, other)
        check_side(reference, LPIPS_SIDE, "LPIPS")
        with torch.no_grad():
            return Fidelity(tuple(self._distance(a, b) for a, b in zip(reference, other, strict=True)))

    def _distance(self, a: Frames, b: Frames) -> float:
        layers = zip(self._features(a), self._features(b), self.heads, strict=True)
        parts = [F.conv2d((_unit(one) - _unit(two)).square(), head).mean() for one, two, head in layers]
        return float(torch.stack(parts).sum())

    def _features(self, frame: Frames) -> list[Tensor]:
        """What the five ReLUs give for a frame ``[height, width, 3]``."""
        x = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].to(self.heads[0].device).float() / 127.5 - 1
        x = (x - x.new_tensor(_SHIFT).view(1, 3, 1, 1)) / x.new_tensor(_SCALE).view(1, 3, 1, 1)
        features = []
        for index, (weight, bias) in enumerate(self.convolutions):
            _, stride, padding = _CONVOLUTIONS[index]
            if index in _POOLED:
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            features.append(x)
        return features


def find_lpips(folder: Path | None = None, device: torch.device | str = "cpu") -> Lpips | str:
    """LPIPS with weights from disk, or in words why not and how to get them.

    Args:
        folder: holds ``alexnet-owt-7be5be79.pth`` and ``alex.pth``; None looks in torch.hub's checkpoints, and for the
            latter in an installed ``lpips`` package too.
        device: where to compute.

    Raises:
        UsageError: ``folder`` was given and lacks one, or holds other weights under their names.

    """
    folders = [Path(torch.hub.get_dir()) / "checkpoints"] if folder is None else [folder]
    backbone = next((at / BACKBONE for at in folders if (at / BACKBONE).is_file()), None)
    if folder is None and (package := importlib.util.find_spec("lpips")) is not None and package.origin:
        folders.append(Path(package.origin).parent / "weights" / "v0.1")
    heads = next((at / HEADS for at in folders if (at / HEADS).is_file()), None)
    if backbone is not None and heads is not None:
        return _load(backbone, heads, device)
    missing = " and ".join(name for name, path in ((BACKBONE, backbone), (HEADS, heads)) if path is None)
    text = (
        f"weights not found: {missing} in {', '.join(map(str, folders))}; {BACKBONE} comes from "
        f"https://download.pytorch.org/models/{BACKBONE}, {HEADS} from lpips/weights/v0.1 of the package lpips; put "
        "both in one folder and name it with --lpips-weights"
    )
    if folder is not None:
        raise UsageError(f"LPIPS: {text}")
    return text


def _load(backbone: Path, heads: Path, device: torch.device | str) -> Lpips:
    try:
        body = torch.load(backbone, map_location=device, weights_only=True)
        head = torch.load(heads, map_location=device, weights_only=True)
        convolutions = tuple(
            (body[f"features.{name}.weight"].float(), body[f"features.{name}.bias"].float())
            for name, *_ in _CONVOLUTIONS
        )
        weights = tuple(head[f"lin{index}.model.1.weight"].float() for index in range(len(_CONVOLUTIONS)))
    except Exception as error:  # A torn pickle raises anything.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"LPIPS weights in {backbone} and {heads} cannot be used: {first}; expected torchvision's AlexNet and the "
            "linear layers of lpips 0.1"
        ) from error
    return Lpips(convolutions, weights)


def _unit(features: Tensor) -> Tensor:
    """Every pixel's features at length 1."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
