"""sparse_linear: classes of blocks, the linear branch in three scopes, its projections, gradients."""

import dataclasses

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import Tensor

import dsattn
from dsattn.block_plan import BlockPlan, LinearTail
from dsattn.grid import Call, VideoGrid
from dsattn.kernels import sparse_linear as kernels
from dsattn.methods.estimate import RowSample, relative_error, sample_rows
from dsattn.methods.projections import Projections
from dsattn.methods.sparse_linear import SparseLinearConfig, classify

from . import plans, test_block_sparse_backward
from .method_inputs import GRIDS, dense, tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCOPES = ("global", "complement", "marginal")
MAPS = ("softmax", "elu", "relu", "hedgehog")
GRID = VideoGrid(5, 9, 11, text=19)  # 514 tokens: nine blocks of 64, the last of 2
CALL = Call(0, 0, GRID)


def projection(dim: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Weight and bias with rows of sum about one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, dim, generator=generator) / dim, torch.randn(dim, generator=generator) / 4


@pytest.fixture
def weights(tmp_path):
    """Writes a weights file for layers 0 and 1 (or the given tensors) and returns its path."""

    def write(dim: int = 32, layers: dict[str, Tensor] | None = None) -> str:
        if layers is None:
            layers = {}
            for i in range(2):
                layers[f"layers.{i}.weight"], layers[f"layers.{i}.bias"] = projection(dim, seed=1 + i)
        save_file(layers, tmp_path / "sla.safetensors")
        return str(tmp_path / "sla.safetensors")

    return write


def plan(qkv, call: Call = CALL, **options) -> BlockPlan:
    return dsattn.plan(*qkv, call, method="sparse_linear", **options).validate()


# -- the oracle ---------------------------------------------------------------------------------------------


def phi(x: Tensor, name: str) -> Tensor:
    exponentials = x.exp()
    return {
        "softmax": lambda: exponentials / exponentials.sum(-1, keepdim=True),
        "elu": lambda: torch.where(x > 0, x + 1, exponentials),
        "relu": lambda: x * (x > 0),
        "hedgehog": lambda: (
            torch.cat([exponentials, 1 / exponentials], -1) / (exponentials + 1 / exponentials).sum(-1, keepdim=True)
        ),
    }[name]()


def oracle(q: Tensor, k: Tensor, v: Tensor, exact: Tensor, linear: Tensor, weight, bias, name: str) -> Tensor:
    """Softmax over the pairs ``exact``, feature products over ``linear``, both ``[.., S, S]``."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~exact, -torch.inf)
    products = (phi(q, name) @ phi(k, name).mT).masked_fill(~linear, 0)
    branch = products @ v / (products.sum(-1, keepdim=True) + 1e-5)
    return (logits.softmax(-1) @ v + branch @ weight.double().T + bias.double()).transpose(1, 2)


def classes(q: Tensor, k: Tensor, grid: VideoGrid, critical: float, negligible: float, block_q: int, block_k: int):
    """Critical and marginal pairs of tokens, ``[B, H, S, S]``, by a loop over rows of blocks in float64."""
    batch, length, heads, _ = q.shape
    keep, rest = (torch.zeros(batch, heads, length, length, dtype=torch.bool) for _ in range(2))
    q_runs = [range(i, min(i + block_q, length)) for i in range(0, length, block_q)]
    k_runs = [range(i, min(i + block_k, length)) for i in range(0, length, block_k)]
    special = {t for start, stop in grid.exact_segments for t in range(start, stop)}
    for b in range(batch):
        for h in range(heads):
            qh, kh = q[b, :, h].double(), k[b, :, h].double()
            for rows in q_runs:
                scores = [float(qh[list(rows)].mean(0) @ (kh[list(c)].mean(0) - kh.mean(0))) for c in k_runs]
                ranked = sorted(range(len(k_runs)), key=lambda j: -scores[j])
                best = set(ranked[: max(1, int(critical * len(k_runs)))])
                worst = set(ranked[len(k_runs) - int(negligible * len(k_runs)) :])
                for j, columns in enumerate(k_runs):
                    is_critical = j in best or not special.isdisjoint(rows) or not special.isdisjoint(columns)
                    keep[b, h, rows.start : rows.stop, columns.start : columns.stop] = is_critical
                    marginal = not is_critical and j not in worst
                    rest[b, h, rows.start : rows.stop, columns.start : columns.stop] = marginal
    return keep, rest


def linear_pairs(scope: str, critical: Tensor, marginal: Tensor) -> Tensor:
    return {"global": torch.ones_like(critical), "complement": ~critical, "marginal": marginal}[scope]


def check(out: Tensor, want: Tensor, v: Tensor) -> None:
    """Rounded are the softmax's weights and result and the sum; TF32 on a GPU holds as many digits as half precision.

    Softmax and linear attention are means of values, rows of the projection sum to about one: 4 max |v| bounds all.
    """
    unit = torch.finfo(out.dtype).eps / 2 + 64 * 2.0**-24
    allowed = unit * (4 * float(v.abs().max()) + float(want.abs().max()))
    error = float((out.cpu().double() - want).abs().max())
    assert out.dtype == v.dtype and error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


# -- classes of blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(64, 64), (16, 32), (128, 16)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_classes_against_a_loop(grid, blocks):
    q, k, _ = tensors(grid, batch=2)
    config = SparseLinearConfig(critical=0.3, negligible=0.4, block_q=blocks[0], block_k=blocks[1])
    made = plan((q, k, k), Call(0, 0, grid), **dataclasses.asdict(config))
    critical, marginal = classes(q, k, grid, 0.3, 0.4, *blocks)
    assert torch.equal(made.to_dense(), critical)
    found = classify(q, k, Call(0, 0, grid), config)
    for got, want in zip(found, (critical, marginal), strict=True):
        assert torch.equal(dataclasses.replace(made, counts=got.sum(-1).int(), indices=lists(got)).to_dense(), want)


def lists(mask: Tensor) -> Tensor:
    return (~mask).int().sort(dim=-1, stable=True).indices.int()


def test_a_shift_of_all_keys_changes_nothing():
    q, k, v = tensors(GRID)
    made, moved = plan((q, k, v), critical=0.4), plan((q, k + 50, v), critical=0.4)
    assert torch.equal(made.block_mask, moved.block_mask)


@pytest.mark.parametrize("grid", [VideoGrid(1, 1, 3), VideoGrid(2, 8, 8)])
def test_short_sequences_keep_one_block(grid):
    qkv = tensors(grid)
    made = plan(qkv, Call(0, 0, grid), critical=0.01)
    assert (made.counts == 1).all() and made.indices.shape[-1] == 1
    assert dsattn.attend(*qkv, made).isfinite().all()


@pytest.mark.parametrize("grid", [GRID, VideoGrid(4, 9, 11, text=70, text_first=True), VideoGrid(4, 9, 11, prefix=30)])
def test_text_and_prefix_are_exact(grid):
    pairs = plan(tensors(grid), Call(0, 0, grid), critical=0.05, block_q=32, block_k=16).to_dense()
    for start, stop in grid.exact_segments:
        assert bool(pairs[:, :, start:stop].all()) and bool(pairs[:, :, :, start:stop].all())
    assert not bool(pairs.all())


def test_batch_of_two_is_two_batches_of_one(weights):
    qkv = tensors(GRID, batch=2)
    options = {"critical": 0.2, "linear_scope": "marginal", "weights": weights()}
    out = dsattn.attend(*qkv, plan(qkv, **options))
    for row in range(2):
        single = [x[row : row + 1] for x in qkv]
        torch.testing.assert_close(out[row : row + 1], dsattn.attend(*single, plan(single, **options)))


# -- result -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", MAPS)
def test_scopes_and_feature_maps_against_the_oracle(name, scope, impl, weights):
    grid = VideoGrid(3, 7, 9, text=11)  # 200 tokens
    q, k, v = tensors(grid, batch=2)
    options = {"critical": 0.2, "negligible": 0.3, "block_q": 16, "block_k": 32}
    made = plan((q, k, v), Call(1, 0, grid), **options, feature_map=name, linear_scope=scope, weights=weights())
    out = attend_on_device((q, k, v), made, impl)
    critical, marginal = classes(q, k, grid, *options.values())
    want = oracle(q, k, v, critical, linear_pairs(scope, critical, marginal), *projection(32, seed=2), name)
    check(out, want, v)


def attend_on_device(qkv, made: BlockPlan, impl: str) -> Tensor:
    """Plans are made on the CPU here, so that selection is the oracle's; they run where Triton does."""
    device = DEVICE if impl == "triton" else "cpu"
    tail = made.linear
    if tail is not None:
        values = {f.name: getattr(tail, f.name) for f in dataclasses.fields(tail)}
        tail = LinearTail(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()})
    moved = dataclasses.replace(
        made, counts=made.counts.to(device), indices=made.indices.to(device), linear=tail,
        key_lengths=None if made.key_lengths is None else made.key_lengths.to(device),
    )  # fmt: skip
    return dsattn.attend(*(x.to(device) for x in qkv), moved, impl=impl)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, impl, weights):
    qkv = [x.to(dtype) for x in tensors(GRID)]
    made = plan(qkv, critical=0.3, weights=weights())
    critical, _ = classes(*qkv[:2], GRID, 0.3, 0.1, 64, 64)
    want = oracle(*qkv, critical, torch.ones_like(critical), *projection(32), "softmax")
    check(attend_on_device(qkv, made, impl), want, qkv[2])


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_head_dims_strides_and_padding(dim, impl, weights):
    """Views of a packed tensor; keys behind the length hold NaN and enter nowhere."""
    grid = VideoGrid(3, 5, 7)
    q, k, v = torch.randn(2, 105, 2, 3 * dim, generator=torch.Generator().manual_seed(0)).split(dim, -1)
    lengths = torch.tensor([100, 41], dtype=torch.int32)
    for scope in SCOPES:
        made = plan((q, k, v), Call(0, 0, grid), critical=0.4, block_k=32, linear_scope=scope, weights=weights(dim))
        made = made.with_key_lengths(lengths)
        # Every row reads a key: the first block is kept by all.
        mask = made.block_mask.clone()
        mask[..., 0] = True
        made = BlockPlan.from_mask(
            mask, 105, 105, batch=2, heads=2, block_k=32, key_lengths=lengths, linear=made.linear
        ).validate()
        critical, marginal = classes(q, k, grid, 0.4, 0.1, 64, 32)
        visible = (torch.arange(105) < lengths[:, None])[:, None, None]
        exact = made.to_dense()
        linear = linear_pairs(scope, critical, marginal) & visible
        want = oracle(q, k, v, exact, linear, *projection(dim), "softmax")
        dirty_k, dirty_v = k.clone(), v.clone()
        for x in (dirty_k, dirty_v):
            x[0, 100:], x[1, 41:] = torch.nan, torch.nan
        check(attend_on_device((q, dirty_k, dirty_v), made, impl), want, v)


def test_everything_critical_is_dense_attention_plus_the_linear_branch(weights):
    q, k, v = tensors(GRID)
    everything = torch.ones(1, 2, GRID.tokens, GRID.tokens, dtype=torch.bool)
    weight, bias = projection(32)
    for scope in SCOPES:
        made = plan((q, k, v), critical=1.0, linear_scope=scope, weights=weights())
        assert bool(made.block_mask.all())
        linear = everything if scope == "global" else ~everything
        want = oracle(q, k, v, everything, linear, weight, bias, "softmax")
        check(dsattn.attend(q, k, v, made), want, v)
        if scope != "global":
            torch.testing.assert_close(dsattn.attend(q, k, v, made), dense([q, k, v]) + bias)


def test_without_weights_or_with_zeros_it_is_the_sparse_path(weights):
    qkv = tensors(GRID)
    zeros = {f"layers.0.{part}": torch.zeros(shape) for part, shape in (("weight", (32, 32)), ("bias", (32,)))}
    for options in ({}, {"weights": weights(layers=zeros)}):
        made = plan(qkv, critical=0.2, **options)
        assert made.linear is None
        plain = BlockPlan.from_mask(made.block_mask, GRID.tokens, GRID.tokens, batch=1, heads=2)
        assert torch.equal(dsattn.attend(*qkv, made), dsattn.attend(*qkv, plain))
    # A projection of zeros that is computed all the same adds nothing.
    tail = LinearTail(torch.zeros(32, 32), torch.zeros(32))
    added = dsattn.attend(*qkv, dataclasses.replace(plain, linear=tail))
    assert torch.equal(added, dsattn.attend(*qkv, plain))


def test_lse_does_not_know_of_the_linear_branch(weights):
    qkv = tensors(GRID)
    made = plan(qkv, critical=0.2, weights=weights())
    _, lse = dsattn.attend(*qkv, made, return_lse=True)
    _, plain = dsattn.attend(*qkv, dataclasses.replace(made, linear=None), return_lse=True)
    assert torch.equal(lse, plain)


def test_heads_in_groups_give_the_same(monkeypatch, weights):
    qkv = tensors(GRID, heads=5)
    for scope in SCOPES:
        made = plan(qkv, critical=0.2, linear_scope=scope, weights=weights())
        whole = kernels.linear_attention(*qkv, made, made.linear)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "LIMIT", 1)
            torch.testing.assert_close(kernels.linear_attention(*qkv, made, made.linear), whole)


def test_long_sums_are_cut_into_slices(weights):
    """More tokens than one slice of the Triton kernel takes."""
    grid = VideoGrid(3, 25, 31)
    qkv = tensors(grid, heads=1)
    made = plan(qkv, Call(0, 0, grid), critical=0.05, block_q=128, weights=weights())
    out = attend_on_device(qkv, made, "triton")
    check(out, dsattn.attend(*(x.double() for x in qkv), made, impl="torch"), qkv[2])


# -- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["softmax", "elu", "hedgehog"])
def test_gradcheck(scope, name):
    """Of q, k, v, weight and bias; relu has a kink."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 11, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    weight, bias = (x.double() for x in projection(3))
    critical = torch.rand(1, 2, 3, 3, generator=generator) < 0.4
    critical[..., 0] = True
    marginal = ~critical & (torch.rand(1, 2, 3, 3, generator=generator) < 0.7)
    blocks = {"global": None, "complement": ~critical, "marginal": marginal}[scope]

    def run(q, k, v, weight, bias):
        tail = LinearTail(weight, bias, name, blocks)
        made = BlockPlan.from_mask(critical, 11, 11, batch=1, heads=2, block_q=4, block_k=4, linear=tail)
        return dsattn.attend(q, k, v, made, impl="torch")

    leaves = [x.requires_grad_() for x in (q, k, v, weight, bias)]
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_against_the_oracle(scope, impl):
    grid = VideoGrid(3, 5, 7)
    q, k, v = tensors(grid, batch=2)
    weight, bias = projection(32)
    critical, marginal = classify(q, k, Call(0, 0, grid), SparseLinearConfig(critical=0.4, block_q=32, block_k=16))
    blocks = {"global": None, "complement": ~critical, "marginal": marginal}[scope]
    options = {"batch": 2, "heads": 2, "block_q": 32, "block_k": 16}
    target = torch.randn(q.shape, generator=torch.Generator().manual_seed(5))

    def gradients(dtype, run, device="cpu"):
        leaves = [x.to(device=device, dtype=dtype, copy=True).requires_grad_() for x in (q, k, v, weight, bias)]
        return torch.autograd.grad((run(*leaves) * target.to(device)).sum(), leaves)

    device = DEVICE if impl == "triton" else "cpu"

    def sparse(q, k, v, weight, bias):
        tail = LinearTail(weight, bias, "softmax", None if blocks is None else blocks.to(device))
        made = BlockPlan.from_mask(critical.to(device), 105, 105, **options, linear=tail)
        return dsattn.attend(q, k, v, made, impl=impl)

    exact, linear = (BlockPlan.from_mask(x, 105, 105, **options).to_dense() for x in (critical, marginal))
    pairs = linear_pairs(scope, exact, linear)
    want = gradients(torch.float64, lambda *leaves: oracle(*leaves[:3], exact, pairs, *leaves[3:], "softmax"))
    for got, expected in zip(gradients(torch.float32, sparse, device), want, strict=True):
        # fp32 sums of up to 105 * 32 terms of both signs.
        error = float((got.cpu().double() - expected).abs().max())
        assert error <= 2.0**-24 * 64 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients(dtype, scope, impl):
    """The softmax's own budget, and two roundings each of what the linear branch adds and of their sum."""
    grid = VideoGrid(3, 5, 7)
    leaves = [x.to(dtype) for x in (*tensors(grid, batch=2), *projection(32))]
    critical, marginal = classify(
        *leaves[:2], Call(0, 0, grid), SparseLinearConfig(critical=0.4, block_q=32, block_k=16)
    )
    blocks = {"global": None, "complement": ~critical, "marginal": marginal}[scope]
    options = {"batch": 2, "heads": 2, "block_q": 32, "block_k": 16}
    target = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    plain = BlockPlan.from_mask(critical, 105, 105, **options)
    exact, linear = (BlockPlan.from_mask(x, 105, 105, **options).to_dense() for x in (critical, marginal))
    double = [x.double().requires_grad_() for x in leaves]
    result = oracle(*double[:3], exact, linear_pairs(scope, exact, linear), *double[3:], "softmax")
    want = torch.autograd.grad((result * target.double()).sum(), double)
    case = plans.Case("", *leaves[:3], plain, 32**-0.5)
    softmax, budget = test_block_sparse_backward.oracle(case, target, torch.zeros(2, 2, 105))
    zeros = [torch.zeros_like(x) for x in want[3:]]

    device = DEVICE if impl == "triton" else "cpu"
    own = [x.to(device).requires_grad_() for x in leaves]
    tail = LinearTail(*own[3:], "softmax", None if blocks is None else blocks.to(device))
    made = BlockPlan.from_mask(critical.to(device), 105, 105, **options, linear=tail)
    out = dsattn.attend(*own[:3], made, impl=impl)
    got = torch.autograd.grad(out, own, target.to(device))
    unit = torch.finfo(dtype).eps / 2
    everything = zip(got, want, [*softmax, *zeros], [*budget, *zeros], strict=True)
    for name, (found, expected, of_softmax, allowed) in zip(("q", "k", "v", "weight", "bias"), everything, strict=True):
        assert found.dtype == dtype
        added = (expected - of_softmax).abs()
        allowed = allowed + 2 * unit * (added + expected.abs()) + 2.0**-24 * 64 * max(1.0, float(expected.abs().max()))
        excess = float(((found.cpu().double() - expected).abs() - allowed).max())
        assert excess <= 0, f"gradient of {name} exceeds its budget by {excess:.3g}"


def test_linear_branch_keeps_only_its_inputs_for_the_backward_pass():
    """Features and sums are made anew: a training step holds no fp32 copies of q, k and v."""
    plan = BlockPlan.dense(1, 2, 64, 64, block_q=32, block_k=32)
    q, k, v = (torch.randn(1, 64, 2, 32, dtype=torch.float16).requires_grad_() for _ in range(3))
    tail = LinearTail(*projection(32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kernels.linear_attention(q, k, v, plan, tail).sum().backward()
    assert not any(x.dtype == torch.float32 and x.numel() >= q.numel() for x in kept)
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v))


def test_training_the_projection_lowers_the_error():
    grid = VideoGrid(3, 8, 8)
    qkv = [x * 0.5 for x in tensors(grid)]
    made, want = plan(qkv, Call(0, 0, grid), critical=0.3), dense(qkv)
    weight, bias = torch.zeros(32, 32, requires_grad=True), torch.zeros(32, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.02)
    errors = []
    for _ in range(40):
        out = dsattn.attend(*qkv, dataclasses.replace(made, linear=LinearTail(weight, bias)), impl="torch")
        errors.append((out - want).square().mean())
        optimizer.zero_grad()
        errors[-1].backward()
        optimizer.step()
    assert torch.isclose(errors[0], (dsattn.attend(*qkv, made, impl="torch") - want).square().mean())
    assert errors[-1] < 0.9 * errors[0]


# -- weights ------------------------------------------------------------------------------------------------


def test_file_is_read_once_and_placed_once(monkeypatch, weights):
    path, reads = weights(), []
    load = safetensors.torch.load_file
    monkeypatch.setattr(safetensors.torch, "load_file", lambda file: reads.append(file) or load(file))
    engine = dsattn.Engine("sparse_linear", critical=0.3, weights=path)
    qkv = tensors(GRID)
    for step in range(3):
        for layer in range(2):
            engine(*qkv, Call(layer, step, GRID))
    assert len(reads) == 1
    first, second = (engine.state.entries["transformer", layer, "cond"].plan.linear for layer in range(2))
    again = dsattn.methods.METHODS["sparse_linear"].plan(*qkv, CALL, engine.method_config, {}).linear
    assert again.weight is first.weight and not torch.equal(first.weight, second.weight)
    assert engine.summary()["config"]["weights"] == path


def test_second_transformer_may_have_its_own(weights):
    named = {}
    for seed, prefix in ((1, "layers.0"), (2, "transformer_2.layers.0")):
        named[f"{prefix}.weight"], named[f"{prefix}.bias"] = projection(32, seed)
    loaded = Projections.load(weights(layers=named))
    for seed, model in ((1, "transformer"), (2, "transformer_2")):
        weight, _ = loaded.find(Call(0, 0, GRID, model=model), 32, torch.device("cpu"))
        assert torch.equal(weight, projection(32, seed)[0])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"layers.0.bias": None}, r"lacks layers\.0\.bias; every layer needs"),
        (
            {"layers.0.weight": torch.zeros(32, 16)},
            r"layers\.0\.weight and \.bias must be .* got \[32, 16\] and \[32\]",
        ),
        ({"layers.0.bias": torch.full((32,), torch.nan)}, r"layers\.0 holds values that are not finite"),
        ({"proj_l.weight": torch.zeros(32, 32)}, r"layers\.\{i\}\.bias only, got 'proj_l\.weight'"),
        ({"layers.0.weight": None, "layers.0.bias": None}, "holds no layers"),
    ],
)
def test_bad_files_are_refused_at_once(change, said, weights):
    layers = dict(zip(("layers.0.weight", "layers.0.bias"), projection(32), strict=True)) | change
    path = weights(layers={name: x for name, x in layers.items() if x is not None})
    with pytest.raises(dsattn.UsageError, match=said):
        dsattn.Engine("sparse_linear", weights=path)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(dsattn.UsageError, match="there is no file nowhere"):
        dsattn.Engine("sparse_linear", weights="nowhere")
    (tmp_path / "x.pt").write_bytes(b"not a tensor file")
    with pytest.raises(dsattn.UsageError, match="is not a safetensors file"):
        dsattn.Engine("sparse_linear", weights=tmp_path / "x.pt")


def test_missing_layer_and_other_head_dim_are_refused(weights):
    path = weights()
    with pytest.raises(
        dsattn.UsageError, match=r"neither transformer\.layers\.7\.weight nor layers\.7\.weight; it has"
    ):
        plan(tensors(GRID), Call(7, 0, GRID), weights=path)
    with pytest.raises(dsattn.UsageError, match=r"must be \[64, 64\] for head_dim 64, got \[32, 32\]"):
        plan(tensors(GRID, dim=64), weights=path)


# -- options and engine -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"critical": 0}, "critical must be above 0, got 0"),
        ({"critical": 1.5}, r"critical must be a number in \[0, 1\], got 1.5"),
        ({"negligible": -0.1}, r"negligible must be a number in \[0, 1\]"),
        ({"block_q": 60}, "block_q must be one of 16, 32, 64, 128"),
        ({"feature_map": "exp"}, "feature_map must be one of softmax, elu, relu, hedgehog; got 'exp'"),
        ({"linear_scope": "local"}, "linear_scope must be one of global, complement, marginal; got 'local'"),
        ({"weights": 3}, "weights must be a text, got 3"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(dsattn.UsageError, match=said):
        SparseLinearConfig(**options)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_reused_plan_sums_the_current_keys(scope, weights):
    engine = dsattn.Engine("sparse_linear", critical=0.3, refresh=2, linear_scope=scope, weights=weights())
    engine(*tensors(GRID), CALL)
    later = tensors(GRID, seed=9)
    out = engine(*later, Call(0, 1, GRID))
    made = engine.state.entries["transformer", 0, "cond"].plan
    assert [record.kind for record in engine.stats.records] == ["refresh", "reuse"]
    torch.testing.assert_close(out, dsattn.attend(*later, made, impl="reference"))
    held = 4 * (32 * 32 + 32) + (0 if made.linear.blocks is None else made.linear.blocks.numel())
    assert engine.state.plan_bytes >= made.counts.nbytes + made.indices.nbytes + held


def test_key_lengths_reach_the_linear_branch(weights):
    engine = dsattn.Engine("sparse_linear", critical=0.3, weights=weights())
    q, k, v = tensors(GRID, batch=2)
    lengths = torch.tensor([GRID.tokens, GRID.tokens - 10])
    clean = engine(q, k, v, CALL, key_lengths=lengths)
    k[1, -10:], v[1, -10:] = 77.0, -77.0
    plan_before = engine.state.entries["transformer", 0, "cond"].plan
    torch.testing.assert_close(
        dsattn.attend(q, k, v, plan_before.with_key_lengths(lengths.int()), impl="reference"), clean
    )


def test_a_projection_for_another_head_dim_is_refused():
    q, k, v = tensors(GRID, dim=64)
    made = dataclasses.replace(plan((q, k, v)), linear=LinearTail(*projection(32)))
    with pytest.raises(dsattn.UsageError, match=r"linear\.weight must be \[64, 64\] on cpu .* got \[32, 32\] on cpu"):
        dsattn.attend(q, k, v, made)


def test_plans_check_their_linear_tail():
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    build = {"batch": 1, "heads": 1, "block_q": 16, "block_k": 16}
    weight, bias = torch.zeros(8, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"must be \[D, D\] and \[D\], got \(8, 4\) and \(8,\)"):
        LinearTail(torch.zeros(8, 4), bias)
    with pytest.raises(ValueError, match="feature_map must be one of softmax, elu, relu, hedgehog, got 'exp'"):
        LinearTail(weight, bias, "exp")
    with pytest.raises(ValueError, match=r"linear\.blocks must be \[b, h, 2, 2\] bool, got \(1, 1, 3, 2\)"):
        tail = LinearTail(weight, bias, blocks=torch.ones(1, 1, 3, 2, dtype=torch.bool))
        BlockPlan.from_mask(mask, 32, 32, **build, linear=tail)
    with pytest.raises(ValueError, match="needs blocks of equal size and no token order"):
        order = torch.arange(32)[None, None]
        BlockPlan.from_mask(mask, 32, 32, **build, k_order=order, linear=LinearTail(weight, bias, blocks=mask))


@pytest.mark.parametrize("scope", SCOPES)
def test_estimated_error_counts_the_linear_branch(scope, weights):
    q, k, v = tensors(GRID, batch=2)
    made = plan((q, k, v), critical=0.2, block_q=32, linear_scope=scope, weights=weights())
    rows = sample_rows(GRID, 40, seed=3)
    out = dsattn.attend(q, k, v, made, impl="reference")
    want = relative_error(*(x.transpose(1, 2)[:, :, rows] for x in (out, dense([q, k, v]))))
    torch.testing.assert_close(RowSample.of(q, k, v, rows).error(made), want, rtol=1e-4, atol=2e-6)
