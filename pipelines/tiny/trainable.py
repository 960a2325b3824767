"""The two small models as training sees them: text encoder and transformer together, from tokens to a velocity."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.joint import ROPE_AXES, ROPE_THETA, build_joint_transformer, encode_text
from dsattn.pipelines.tiny.loader import load_shipped, stored_kind
from dsattn.pipelines.tiny.model import build_text_encoder, build_tokenizer, build_transformer
from dsattn.pipelines.tiny.training import (
    ChosenPositions,
    CpuTrainingProcessor,
    JointTrainingProcessor,
    has_fast_bfloat16,
)
from dsattn.pipelines.tiny.warm_start import warm_start


def mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast to bfloat16 where that is faster than float32."""
    return torch.autocast(device.type, torch.bfloat16) if has_fast_bfloat16(device) else nullcontext()


class Trainable(nn.Module):
    """A text encoder and a transformer that can be given any tokens of a grid.

    Parameters are named `text_encoder.*` and `transformer.*`, as `export_weights` takes them.
    """

    def __init__(self, build: Callable[[int], Any], z_dim: int, four_dims: bool) -> None:
        """`build`: makes the transformer. `four_dims`: the shape of rotary tables, see `ChosenPositions`."""
        super().__init__()
        self.text_encoder: Any = build_text_encoder(len(build_tokenizer()))
        self.transformer: Any = build(z_dim)
        nn.init.zeros_(self.transformer.proj_out.weight)
        self.transformer.rope = ChosenPositions(ROPE_AXES, ROPE_THETA, four_dims)


class TrainableTiny(Trainable):
    """The first model."""

    def __init__(self, z_dim: int) -> None:
        super().__init__(build_transformer, z_dim, four_dims=True)

    def forward(self, noisy: Tensor, level: Tensor, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Velocity `[B, z, n]` of noisy latents at `positions` `[n, 3]`.

        `level` `[B]` is the noise level in (0, 1); text comes as tokens and mask `[B, T]`.
        """
        text = self.text_encoder(tokens, mask).last_hidden_state * mask[..., None]
        self.transformer.rope.positions = positions
        with mixed_precision(noisy.device):
            out: Tensor = self.transformer(noisy[:, :, None, None], level * 1000, text, return_dict=False)[0]
        return out[:, :, 0, 0].float()

    def use_training_attention(self) -> None:
        """Attention that is faster than the stock one with gradients on a CPU."""
        self.transformer.set_attn_processor(CpuTrainingProcessor())


class TrainableJoint(Trainable):
    """The second model, with the same names and the same call."""

    def __init__(self, z_dim: int) -> None:
        super().__init__(build_joint_transformer, z_dim, four_dims=False)

    def forward(self, noisy: Tensor, level: Tensor, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """As `TrainableTiny.forward`. What is padding in every row is cut off: masked keys change nothing but time."""
        length = int(mask.sum(1).max())
        tokens, mask = tokens[:, :length], mask[:, :length]
        text, pooled = encode_text(self.text_encoder, tokens, mask)
        self.transformer.rope.positions = positions
        with mixed_precision(noisy.device):
            out: Tensor = self.transformer(
                noisy[:, :, None, None], level * 1000, text, mask, pooled, return_dict=False
            )[0]
        return out[:, :, 0, 0].float()

    def use_training_attention(self) -> None:
        """As `TrainableTiny.use_training_attention`; the text refiner keeps its own processors."""
        blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
        for block in blocks:
            block.attn.set_processor(JointTrainingProcessor())


KINDS: dict[str, type[TrainableTiny] | type[TrainableJoint]] = {"tiny": TrainableTiny, "tiny-joint": TrainableJoint}


def build_trainable(kind: str, z_dim: int, seed: int, init: Path | None = None) -> TrainableTiny | TrainableJoint:
    """A model to train.

    Args:
        kind: `tiny` or `tiny-joint`.
        z_dim: latent channels.
        seed: of what starts at random.
        init: folder with trained weights to start from, of `tiny` or of the same kind; None starts from nothing.

    Raises:
        ValueError: an unknown kind, or weights that do not fit; also FileNotFoundError, see `load_tiny`.

    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        model = KINDS[kind](z_dim)
    if init is not None:
        stored = stored_kind(init)
        if stored not in ("tiny", kind):
            raise ValueError(f"{kind} starts from weights of tiny or its own; {init} holds weights of {stored}")
        source = load_shipped(stored, weights_dir=init)
        carry_words(model.text_encoder, source.text_encoder, source.tokenizer.get_vocab())
        if stored == kind:
            model.transformer.load_state_dict(source.transformer.state_dict())
        else:
            warm_start(model.transformer, source.transformer)
    return model


@torch.no_grad()
def carry_words(target: Any, source: Any, vocab: dict[str, int]) -> None:
    """Copy a text encoder into one of today's vocabulary, word by word; `vocab` is the source's.

    A word that the source does not know starts as the first word of its group in the grammar that it does know (tiny
    as small, disc as circle), any other at random.
    """
    groups = (
        data.SIZE_WORDS,
        data.SHAPE_WORDS,
        data.TURN_WORDS,
        {"": ("background", "backdrop")},
        {"": ("up", "upper")},
    )
    kin = {word: words for table in groups for words in table.values() for word in words}
    weights = {n: t for n, t in source.state_dict().items() if "embed_tokens" not in n and n != "shared.weight"}
    missing = target.load_state_dict(weights, strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"the text encoder to start from has other layers: {', '.join(missing.unexpected_keys)}")
    for word, index in build_tokenizer().get_vocab().items():
        known = next((w for w in (word, *kin.get(word, ())) if w in vocab), None)
        if known is not None:
            target.shared.weight[index] = source.shared.weight[vocab[known]]
