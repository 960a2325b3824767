"""BlockPlan: what it says about pairs, and what it refuses."""

import pytest
import torch

from dsattn.block_plan import BlockPlan


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])[None, None]


def test_from_mask_lists_kept_blocks_in_ascending_order():
    plan = BlockPlan.from_mask(mask(".x.x", "x...", "xxxx"), 33, 55, batch=2, heads=3, block_q=16, block_k=16)
    assert plan.counts.tolist() == [[[2, 1, 4]]]
    assert plan.indices.tolist() == [[[[1, 3, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3]]]]
    assert torch.equal(plan.block_mask, mask(".x.x", "x...", "xxxx"))
    assert plan.validate() is plan


def test_density_counts_true_lengths():
    # Blocks of 16: queries 16, 16, 1; keys 16, 16, 16, 7.
    plan = BlockPlan.from_mask(mask(".x.x", "x...", "xxxx"), 33, 55, batch=2, heads=3, block_q=16, block_k=16)
    pairs = 16 * (16 + 7) + 16 * 16 + 1 * 55
    assert plan.density.shape == (2, 3)
    torch.testing.assert_close(plan.density, torch.full((2, 3), pairs / (33 * 55)))
    assert plan.to_dense().shape == (2, 3, 33, 55)
    assert int(plan.to_dense()[1, 2].sum()) == pairs


def test_density_with_padded_keys_counts_readable_keys_only():
    plan = BlockPlan.from_mask(mask(".x.x", "x...", "xxxx"), 33, 55, batch=2, heads=1, block_q=16, block_k=16)
    plan = plan.with_key_lengths(torch.tensor([55, 20], dtype=torch.int32))
    dense = plan.to_dense().double()
    expected = dense.sum((2, 3)) / (33 * torch.tensor([[55], [20]]))
    torch.testing.assert_close(plan.density, expected.float())


def test_to_dense_is_in_original_token_order():
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(10, generator=generator)[None, None]
    plan = BlockPlan.from_mask(
        mask("x.", ".x"), 10, 10, batch=1, heads=1, block_q=5, block_k=5, q_order=order, k_order=order
    ).validate()
    first = set(order[0, 0, :5].tolist())
    for a in range(10):
        for b in range(10):
            assert plan.to_dense()[0, 0, a, b] == ((a in first) == (b in first))


def test_variable_blocks_may_be_empty():
    starts = torch.tensor([[[0, 3, 3, 10]]], dtype=torch.int32)
    plan = BlockPlan.from_mask(
        mask("x..", "...", ".xx"), 10, 10, batch=1, heads=1, q_starts=starts, k_starts=starts
    ).validate()
    assert plan.q_sizes.tolist() == [[[3, 0, 7]]]
    assert plan.density.item() == pytest.approx((9 + 49) / 100)
    assert int(plan.to_dense().sum()) == 9 + 49


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.tensor([[[[5, 0, 0, 0]]]], dtype=torch.int32)}, r"indices must lie in \[0, 4\)"),
        (
            {
                "indices": torch.tensor([[[[1, 1, 0, 0]]]], dtype=torch.int32),
                "counts": torch.tensor([[[2]]], dtype=torch.int32),
            },
            "names the same key block twice",
        ),
        ({"counts": torch.tensor([[[0]]], dtype=torch.int32)}, "keeps no key"),
        ({"k_order": torch.zeros(1, 1, 55, dtype=torch.int64)}, "k_order must be a permutation"),
        ({"k_starts": torch.tensor([[[0, 9, 8, 55, 55]]], dtype=torch.int32)}, "k_starts must run from 0 to 55"),
        (
            {
                "key_lengths": torch.tensor([16, 16], dtype=torch.int32),
                "indices": torch.tensor([[[[1, 0, 0, 0]]]], dtype=torch.int32),
            },
            "keeps no key",
        ),
    ],
)
def test_validate_names_the_defect(change, message):
    values = {"counts": torch.tensor([[[1]]], dtype=torch.int32), "indices": torch.zeros(1, 1, 1, 4, dtype=torch.int32)}
    plan = BlockPlan(batch=2, heads=1, q_len=16, k_len=55, block_q=16, block_k=16, **{**values, **change})
    with pytest.raises(ValueError, match=message):
        plan.validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.ones(3, 1, 1, dtype=torch.int32)}, r"counts must be \[1 or 2, 1 or 1, Nq\]"),
        ({"counts": torch.ones(1, 1, 2, dtype=torch.int32)}, "counts must have 1 query blocks, got 2"),
        ({"indices": torch.zeros(1, 1, 4, dtype=torch.int32)}, "indices must be"),
        ({"q_order": torch.zeros(1, 1, 4, dtype=torch.int64)}, r"q_order must be \[b, h, 16\]"),
        ({"key_lengths": torch.ones(3, dtype=torch.int32)}, r"key_lengths must be \[2\]"),
        ({"tail": "linear"}, "tail must be one of none, pooled"),
    ],
)
def test_constructor_names_the_field(change, message):
    values = {"counts": torch.ones(1, 1, 1, dtype=torch.int32), "indices": torch.zeros(1, 1, 1, 4, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        BlockPlan(batch=2, heads=1, q_len=16, k_len=55, block_q=16, block_k=16, **{**values, **change})


@pytest.mark.parametrize("elements", [1, 40, 100, 400])
def test_lists_and_density_do_not_depend_on_the_chunks(elements, monkeypatch):
    """Made and read a few rows at a time, as large plans are."""
    draw = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 3, 7, 9, generator=draw) < 0.4
    mask[..., 2] = True
    sizes = {"q_len": 100, "k_len": 140, "batch": 2, "heads": 3, "block_q": 16, "block_k": 16}
    lengths = torch.tensor([50, 139], dtype=torch.int32)
    want = BlockPlan.from_mask(mask, **sizes, key_lengths=lengths)
    monkeypatch.setattr("dsattn.block_plan._CHUNK_ELEMENTS", elements)
    got = BlockPlan.from_mask(mask, **sizes, key_lengths=lengths)
    assert got.indices.dtype == torch.int16
    assert torch.equal(got.counts, want.counts) and torch.equal(got.indices, want.indices)
    assert torch.equal(got.block_mask, mask) and torch.equal(got.density, want.density)
    keys = got.to_dense().double().sum((-1, -2)) / (100 * lengths[:, None])
    torch.testing.assert_close(got.density.double(), keys, rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(got.key_lists, want.key_lists, strict=True))


def test_lists_of_very_many_blocks_take_four_bytes():
    mask = torch.zeros(1, 1, 1, 40_000, dtype=torch.bool)
    mask[..., 39_999] = True
    plan = BlockPlan.from_mask(mask, 16, 640_000, batch=1, heads=1, block_q=16, block_k=16)
    assert plan.indices.dtype == torch.int32 and int(plan.indices[0, 0, 0, 0]) == 39_999
