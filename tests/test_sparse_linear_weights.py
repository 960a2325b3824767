"""sparse_linear: weights files and options, good and bad."""

from functools import partial

import pytest
import safetensors.torch
import torch

import dsattn
from dsattn.grid import Call
from dsattn.methods.projections import Projections
from dsattn.methods.sparse_linear import SparseLinearConfig

from .method_inputs import tensors
from .sparse_linear_parts import CALL, GRID, plan, projection, write_weights


@pytest.fixture
def weights(tmp_path):
    """Writes a weights file and returns its path."""
    return partial(write_weights, tmp_path)


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
