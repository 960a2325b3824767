"""Parts that every tiny pipeline shares: text encoders, schedulers, arguments, and an engine that keeps its calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from dsattn.engine import Engine
from dsattn.grid import Call

Pipe = tuple[Any, dict[str, Any]]

# Arguments for sequences of several 64-token blocks: 5 x 8 x 8 tokens for Wan.
LONGER = {"height": 128, "width": 128, "num_frames": 17}
# A sparse engine that needs no compilation.
SPARSE: dict[str, Any] = {"method": "topk", "density": 0.3, "impl": "torch"}


class Recorder(Engine):
    """An engine that also keeps the calls it was given and counts its resets."""

    def __init__(self, method: str = "topk", **options: Any) -> None:
        self.calls: list[Call] = []
        self.resets = 0
        super().__init__(method, **options)

    def __call__(self, q: Any, k: Any, v: Any, call: Call, **rest: Any) -> torch.Tensor:
        self.calls.append(call)
        return super().__call__(q, k, v, call, **rest)

    def reset(self) -> None:
        self.resets += 1
        super().reset()

    def steps(self) -> list[tuple[int, str, str]]:
        """Step, branch and model of the calls, repetitions over layers left out."""
        return list(dict.fromkeys((call.step, call.branch, call.model) for call in self.calls))


def recorder() -> Recorder:
    return Recorder(**SPARSE)


def seed(value: int = 0) -> None:
    torch.manual_seed(value)


def tokenizer(max_len: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with 259 tokens, made in memory."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_len
    )


_T5 = {
    "vocab_size": 259,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**_T5, feed_forward_proj="gated-gelu")).eval()


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(**_T5)).eval()


def image(size: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def flow(shift: float = 7.0) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


def call_args(**more: Any) -> dict[str, Any]:
    return {
        "prompt": "a red fox",
        "negative_prompt": "bad",
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 3,
        "max_sequence_length": 16,
        "output_type": "latent",
        **more,
    }


def run(pipe: Any, args: dict[str, Any], **more: Any) -> torch.Tensor:
    """Latents of one run with a fixed seed."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at this size more threads only wait for each other
    try:
        out = pipe(**{**args, **more}, generator=generator).frames
    finally:
        torch.set_num_threads(threads)
    return torch.as_tensor(out)
