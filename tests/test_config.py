"""Config: flat names, ranges, files; every error names the thing and the way out."""

import pytest

from dsattn.config import Config, load_config, parse_layers
from dsattn.engine import Engine, as_engine
from dsattn.errors import UsageError


def test_flat_round_trip():
    config = Config.from_dict({"method": "radial", "decay": 0.5, "dense_steps": 0.2, "dense_layers": "0-1,-1"})
    assert config.options == {"decay": 0.5}
    assert config.dense_layers == (0, 1, -1)
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "layers"), [("", ()), ("3", (3,)), ("0-2, 5", (0, 1, 2, 5)), ("-1", (-1,)), ([0, 4], (0, 4)), (7, (7,))]
)
def test_layers(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dense_steps": 1.5}, r"fraction in \[0, 1\), got 1.5; use an int"),
        ({"dense_steps": -1}, "dense_steps must be"),
        ({"dense_layers": "a-b"}, "dense_layers must look like '0-1,29', got 'a-b'"),
        ({"refresh": 0}, "refresh must be an integer"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, flex, torch, reference; got 'cuda'"),
        ({"dense": "fa3"}, "dense must be one of sdpa, flex, xformers; got 'fa3'"),
        ({"strict": 1}, "strict must be true or false, got 1"),
    ],
)
def test_engine_option_errors(values, message):
    with pytest.raises(UsageError, match=message):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("radal", {}, "unknown method 'radal'; known: dense, radial"),
        ("radial", {"deacy": 1.0}, "method 'radial' has no option 'deacy'; did you mean 'decay'"),
        ("radial", {"decay": 2}, r"decay must be a number in \[0, 1\], got 2"),
        ("radial", {"block": 100}, "block must be one of 32, 64, 128; got 100"),
        ("radial", {"compat": "paper"}, "compat must be one of"),
        ("topk", {"density": 0.0}, "density must be above 0"),
        ("topk", {"density": 0.2, "top_p": 0.9}, "give only one of density, top_p"),
        ("topk", {"tail": "linear"}, "tail must be one of none, pooled; got 'linear'"),
        ("topk", {"dense_step": 1}, "did you mean 'dense_steps'"),
    ],
)
def test_method_option_errors(method, values, message):
    with pytest.raises(UsageError, match=message):
        Engine(method, **values)


def test_yaml_file(tmp_path):
    path = tmp_path / "fast.yaml"
    path.write_text("method: topk\ntop_p: 0.8\ndense_steps: 2\n")
    engine = as_engine(path, impl="torch")
    assert (engine.method_config.top_p, engine.config.dense_steps, engine.config.impl) == (0.8, 2, "torch")
    assert as_engine(str(path)).config.method == "topk"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"method: [topk", "is not valid YAML"),
        (b"- topk\n", "must hold 'name: value' lines, got list"),
        (b"\xff\xfe\x00", "cannot be read|not valid"),
    ],
)
def test_corrupt_file(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_config(path)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="none.yaml cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_engine_takes_no_second_configuration():
    engine = Engine("topk")
    assert as_engine(engine) is engine
    with pytest.raises(UsageError, match="already configured; got options density"):
        as_engine(engine, density=0.1)
