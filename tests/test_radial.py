"""radial: the published densities to four digits, and what the corrected form adds."""

import pytest
import torch

import dsattn
from dsattn.grid import Call, VideoGrid
from dsattn.methods.radial import RadialConfig, original_mask

CPU = torch.device("cpu")
# frames, tokens per frame, block, decay, sink, density, least kept blocks of a row where known
GOLDEN = [
    (18, 3840, 128, 0.2, True, 0.2871, 92),
    (18, 3840, 128, 1.0, True, 0.4309, None),
    (41, 3840, 128, 1.0, True, 0.2639, None),
    (41, 3840, 128, 0.2, True, 0.1816, None),
    (30, 3840, 128, 0.95, False, 0.2746, None),
    (64, 3840, 128, 1.0, False, 0.1841, None),
    (21, 3600, 128, 0.2, True, 0.2622, None),
    (21, 1560, 128, 0.2, True, 0.3387, None),
]


@pytest.mark.parametrize(("frames", "size", "block", "decay", "sink", "density", "least"), GOLDEN)
def test_golden_densities(frames, size, block, decay, sink, density, least):
    mask = original_mask(frames, size, RadialConfig(decay=decay, block=block, sink=sink, compat="original"), CPU)
    assert round(mask.double().mean().item(), 4) == density
    assert mask.shape == (frames * size // block,) * 2
    assert least is None or int(mask.sum(1).min()) == least


def test_golden_density_with_text():
    """HunyuanVideo, 253 frames and 256 text tokens behind them: every text row and column is kept."""
    mask = original_mask(64, 3840, RadialConfig(decay=1.0, block=128, sink=False, compat="original"), CPU)
    video = mask.shape[0]
    blocks = (64 * 3840 + 256) // 128
    kept = int(mask.sum()) + blocks**2 - video**2
    assert round(kept / blocks**2, 4) == 0.1858


def plan(grid: VideoGrid, **options) -> dsattn.BlockPlan:
    q = torch.zeros(1, grid.tokens, 2, 8)
    return dsattn.plan(q, q, q, Call(0, 0, grid), method="radial", **options).validate()


def test_forms_agree_where_blocks_fit_frames():
    grid = VideoGrid(9, 16, 32)
    for options in ({"decay": 0.2}, {"decay": 1.0, "sink": False}):
        original, corrected = (plan(grid, block=64, compat=c, **options) for c in ("original", "corrected"))
        assert torch.equal(original.block_mask, corrected.block_mask)


def brute_force(grid: VideoGrid, config: RadialConfig) -> torch.Tensor:
    """The corrected rule, token by token."""
    size, block, start = grid.frame_tokens, config.block, grid.video_start
    count = -(-grid.tokens // block)
    result = torch.zeros(count, count, dtype=torch.bool)
    power = 1
    while power <= size:
        power *= 2

    def allowed(a: int, b: int) -> bool:
        (i, k), (j, m) = divmod(a - start, size), divmod(b - start, size)
        distance = abs(i - j)
        if config.sink and j == 0:
            return True
        if distance <= 1:
            return True
        reach = power / 2 ** len(f"{distance:b}")
        if reach < 128 and distance % int(128 / reach):
            return False
        return abs(k - m) <= max(reach * config.decay, block)

    video = range(start, grid.video_end)
    for r in range(count):
        rows = range(r * block, min((r + 1) * block, grid.tokens))
        for c in range(count):
            columns = range(c * block, min((c + 1) * block, grid.tokens))
            shares = [sum(a in video and b in video and allowed(a, b) for a in rows) / len(rows) for b in columns]
            used = sum(s > 0 for s in shares)
            exact = any(t not in video for t in (*rows, *columns))
            result[r, c] = (used > 0 and sum(s > 1 / 3 for s in shares) > 0.6 * used) or exact or r == c
    return result


@pytest.mark.parametrize(
    "grid",
    [
        VideoGrid(4, 7, 11),
        VideoGrid(6, 5, 9, text=13),
        VideoGrid(5, 6, 7, text=13, text_first=True),
        VideoGrid(3, 3, 5),
        VideoGrid(9, 4, 4),
        # Frames of several blocks, so that most are judged by the table.
        VideoGrid(3, 9, 17),
        VideoGrid(4, 8, 16, text=5),
        VideoGrid(3, 11, 13, prefix=7),
    ],
)
@pytest.mark.parametrize("sink", [True, False])
def test_corrected_form_equals_its_rule_on_ugly_sizes(grid, sink):
    config = RadialConfig(decay=0.3, block=32, sink=sink)
    expected = brute_force(grid, config)
    assert torch.equal(plan(grid, decay=0.3, block=32, sink=sink).block_mask[0, 0], expected)


def test_density_grows_with_decay_and_every_row_keeps_its_own_block():
    grid = VideoGrid(13, 20, 31)
    densities = [plan(grid, decay=decay).density.mean().item() for decay in (0.1, 0.4, 1.0)]
    assert densities == sorted(densities)
    assert densities[0] < densities[-1] < 1
    assert bool(plan(grid, decay=0.1).block_mask[0, 0].diagonal().all())


def test_first_frame_is_read_by_all_with_a_sink():
    grid = VideoGrid(8, 16, 16)
    assert bool(plan(grid, decay=0.1, block=64).to_dense()[..., : grid.frame_tokens].all())
    assert not bool(plan(grid, decay=0.1, block=64, sink=False).to_dense()[..., : grid.frame_tokens].all())
