"""Where the tokens of one attention call sit: video grid, text, prefix.

Integers only. Everything that has to know "which frame is token 1234 in" asks this module.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoGrid:
    """Latent token grid of one attention call.

    Token order is ``[text][prefix][video]`` with ``text_first`` and ``[prefix][video][text]`` without;
    video tokens run frame by frame, row by row.

    Args:
        frames, height, width: latent tokens along each axis, each at least 1.
        text: text tokens that take part in the call (0 where text only enters through cross-attention).
        text_first: text stands before the video (CogVideoX) instead of after it (HunyuanVideo, Mochi).
        prefix: non-video, non-text tokens directly before the video (history, condition or reference tokens).

    """

    frames: int
    height: int
    width: int
    text: int = 0
    text_first: bool = False
    prefix: int = 0

    def __post_init__(self) -> None:
        for name, low in (("frames", 1), ("height", 1), ("width", 1), ("text", 0), ("prefix", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"VideoGrid.{name} must be an integer >= {low}, got {value!r}")

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        """Tokens of all latent frames."""
        return self.frames * self.frame_tokens

    @property
    def tokens(self) -> int:
        """Length of the sequence: video, prefix and text."""
        return self.video_tokens + self.prefix + self.text

    @property
    def video_start(self) -> int:
        """Index of the first video token."""
        return self.prefix + (self.text if self.text_first else 0)

    @property
    def video_end(self) -> int:
        """Index just behind the last video token."""
        return self.video_start + self.video_tokens

    @property
    def exact_segments(self) -> tuple[tuple[int, int], ...]:
        """Half-open token ranges that stay exact as rows and columns: text and prefix, empty ones left out."""
        head, tail = (0, self.video_start), (self.video_end, self.tokens)
        return tuple(segment for segment in (head, tail) if segment[1] > segment[0])


@dataclass(frozen=True)
class Call:
    """What the pipeline knows about one attention call.

    Args:
        layer: index of the attention layer within its transformer, by module name, not by call order.
        step: index of the denoising step in this run, counted over both transformers where there are two.
        grid: token grid of the whole call (the global one under context parallelism).
        num_layers: number of attention layers, if known.
        num_steps: number of denoising steps of the run, if known.
        branch: classifier-free guidance branch, ``"cond"``, ``"uncond"`` or ``"cond_uncond"`` (batched together).
        first_head: global index of the first head in this call (non-zero when heads are sharded).
        model: name of the transformer inside its pipeline, so that two transformers never share state.

    """

    layer: int
    step: int
    grid: VideoGrid
    num_layers: int | None = None
    num_steps: int | None = None
    branch: str = "cond"
    first_head: int = 0
    model: str = "transformer"

    def __post_init__(self) -> None:
        for name in ("layer", "step", "first_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"Call.{name} must be an integer >= 0, got {value!r}")
