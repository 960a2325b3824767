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
        ("semantic", {"density": 0.2, "target_error": 0.1}, "give only one of density, target_error"),
        ("sol", {"density": 0.2, "tau": 1.0}, "give only one of tau, density; got tau=1.0 and density=0.2"),
        ("sol", {"tau": 11}, r"tau must be a number in \[-10, 10\], got 11"),
        ("topk", {"tail": "best"}, "tail must be one of none, pooled.*; got 'best'"),
        ("topk", {"density": {0: 0.2}}, "density must be a number or a table .*; got {0: 0.2}"),
        ("topk", {"density": "0:nan"}, r"density must be a number in \[0, 1\], got nan in '0:nan'"),
        ("topk", {"density": "0.2"}, "density must be a number or a table such as '0:0.3,0.5:0.1'.*no start:value"),
        ("topk", {"density": "0:0.3,0.5:x"}, "got '0:0.3,0.5:x': could not convert string to float: 'x'"),
        ("topk", {"top_p": "0:0.9,0.5:1.2"}, r"top_p must be a number in \[0, 1\], got 1.2 in '0:0.9,0.5:1.2'"),
        ("topk", {"top_p": "0:0.9,0.5:0"}, "top_p must be above 0"),
        ("semantic", {"density": "0.1:0.3"}, "the first start must be 0"),
        ("semantic", {"density": "0:0.3,0.5:0.2,0.4:0.1"}, "starts must rise"),
        ("semantic", {"density": "0:0.3,1.5:0.2"}, r"shares of the run lie in \[0, 1\)"),
        ("semantic", {"target_error": "0:0.3,3:0.2,0.5:0.1"}, "numbers of steps or shares of the run, not both"),
        ("topk", {"density": float("nan")}, r"density must be a number in \[0, 1\], got nan"),
        ("topk", {"routing_noise": -1}, r"routing_noise must be a number in \[0, 10\], got -1"),
        ("topk", {"dense_step": 1}, "did you mean 'dense_steps'"),
    ],
)
def test_method_option_errors(method, values, message):
    with pytest.raises(UsageError, match=message):
        Engine(method, **values)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("topk", {"density": "0:0.3,0.5:0.1", "top_p": 0.9}),
        ("semantic", {"target_error": "0:0.05,10:0.1", "routing_noise": 0.2}),
        ("sol", {"tau": "0:1.3,0.2:1.0,0.6:0.8", "tail": "pooled_block"}),
    ],
)
def test_tables_round_trip_and_hash(method, values, tmp_path):
    engine = Engine(method, **values)
    assert Config.from_dict(engine.config.to_dict()) == engine.config
    assert hash(engine.method_config) == hash(Engine(method, **engine.config.options).method_config)
    path = tmp_path / "table.yaml"
    path.write_text(f"method: {method}\n" + "".join(f"{name}: {value}\n" for name, value in values.items()))
    assert as_engine(path).method_config == engine.method_config


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
