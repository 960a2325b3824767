"""The command line on the shipped model: what it writes, what it says, and how it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

import dsattn
from dsattn.cli import models
from dsattn.cli.app import run
from dsattn.cli.defaults import DEFAULTS
from dsattn.cli.errors import FAILED, INTERRUPTED, MEMORY, QUALITY, STRICT, USAGE, explain
from dsattn.measure import Job
from dsattn.pipelines.registry import find_transformers
from dsattn.report_file import why_invalid
from dsattn.video import CAPTION_HEIGHT, read_mp4

from . import tiny_pipelines

PROMPT = "a large red circle moves left over a striped background"
SMALL = ["--height", "48", "--width", "64", "--frames", "5", "--steps", "2"]
SPARSE = ["--method", "topk", "--impl", "torch", "-O", "block_q=16", "-O", "block_k=16", "-O", "density=0.4"]
SCHEMA = json.loads(Path(dsattn.__file__).with_name("report.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_generate(tmp_path, capsys):
    assert run(["generate", PROMPT, *SMALL, *SPARSE, "--dense-steps", "1", "--seed", "5", "-o", "a/clip.mp4"]) == 0
    assert files(tmp_path) == ["a/clip.mp4", "a/meta/clip.json"]
    assert read_mp4(Path("a/clip.mp4")).shape == (5, 48, 64, 3)
    side = json.loads(Path("a/meta/clip.json").read_text())
    assert side["schema"] == "dsattn.run/1" and side["seed"] == 5 and side["prompt"] == PROMPT
    assert side["config"]["density"] == 0.4 and side["config"]["dense_steps"] == 1 and side["method"] == "topk"
    assert side["calls"] == {"dense": 12, "refresh": 12} and side["impls"] == {"pipeline": 12, "torch": 12}
    assert len(side["times_s"]["steps"]) == 2 and side["fallbacks"] == []
    assert side["times_s"]["compile"] == 0.0
    assert side["command"].startswith("dsattn generate 'a large red circle")
    out, err = capsys.readouterr()
    assert "saved" in out and "a/clip.mp4" in out and "density" in out and "torch 12" in out
    assert err == "", "no progress bar where nobody watches"


def test_generate_json_dense_and_default_prompt(capsys):
    assert run(["generate", *SMALL, "--method", "dense", "--json"]) == 0
    out, _ = capsys.readouterr()
    value = json.loads(out)
    assert value["prompt"] == PROMPT and value["method"] == "dense" and value["output"] == "out.mp4"
    assert Path("out.mp4").is_file() and value["density"] == {"all_calls": 1.0, "sparse_calls": None}


def test_config_file_and_what_goes_before_it(tmp_path, capsys):
    Path("c.yaml").write_text("method: topk\ndensity: 0.7\nblock_q: 16\nblock_k: 16\nrefresh: 3\nimpl: torch\n")
    command = ["generate", *SMALL, "--config", "c.yaml", "-O", "density=5e-1", "--refresh", "2", "--json"]
    assert run(command) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["density"], config["refresh"], config["block_q"]) == (0.5, 2, 16)
    assert config["dense_steps"] == 0, "a config file stands alone: the command line's own schedule is not mixed in"


def test_a_budget_that_changes_over_the_run(capsys):
    assert run(["generate", *SMALL, *SPARSE[:-1], "density=0:0.5,1:0.2", "--dense-steps", "0", "--json"]) == 0
    side = json.loads(capsys.readouterr().out)
    assert side["config"]["density"] == "0:0.5,1:0.2"
    assert run(["generate", *SMALL, *SPARSE[:-1], "density=0.5", "--dense-steps", "0", "--json"]) == 0
    constant = json.loads(capsys.readouterr().out)
    # The last of the two plans is not made anew: with the default schedule a plan lasts four steps.
    assert side["density"] == constant["density"]
    options = ["density=0:0.5,1:0.2", "--dense-steps", "0", "--refresh", "1", "--json"]
    assert run(["generate", *SMALL, *SPARSE[:-1], *options]) == 0
    assert json.loads(capsys.readouterr().out)["density"]["all_calls"] < constant["density"]["all_calls"] - 0.1


def test_default_schedule(capsys):
    assert run(["generate", *SMALL, "--impl", "torch", "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert config["method"] == DEFAULTS["method"] and config["dense_steps"] == DEFAULTS["dense_steps"]


def test_quantization_is_emulated_where_the_implementation_is_named(capsys):
    assert run(["generate", *SMALL, *SPARSE, "--quantization", "int8_qk_fp8_pv", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["quantization"] == "int8_qk_fp8_pv" and found["impls"]["torch"] > 0


def test_compare(tmp_path, capsys):
    command = ["compare", PROMPT, *SMALL, *SPARSE, "--dense-steps", "1", "--out", "r", "--min-psnr", "90", "--html"]
    assert run(command) == QUALITY
    assert files(tmp_path / "r") == [
        "dense.mp4",
        "masks.png",
        "meta/dense.json",
        "meta/sparse.json",
        "report.html",
        "report.json",
        "side_by_side.mp4",
        "sparse.mp4",
    ]
    report = json.loads(Path("r/report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["protocol"]["order"] == "DSDS" and report["fidelity"]["noise_floor"]["identical"]
    assert report["runs"]["sparse"]["calls"] == {"dense": 12, "refresh": 12}
    assert all((tmp_path / "r" / name).is_file() for name in [*report["files"].values()])
    panels = read_mp4(Path("r/side_by_side.mp4"))
    assert panels.shape == (5, 48 * 5 + CAPTION_HEIGHT, 3 * 64 * 5, 3)
    out, err = capsys.readouterr()
    for word in ("E2E", "denoise", "attention", "plan", "density", "PSNR", "SSIM", "FLOP bound", "baseline", "saved"):
        assert word in out
    assert report["speedup"]["headline"] in out
    page = Path("r/report.html").read_text(encoding="utf-8")
    assert page.count("data:video/mp4;base64,") == 2 and PROMPT in page and "r/report.html" in out
    assert report["maps"]["panels"][0]["kinds"] == ["DR"] * 6 and report["inputs"]["initial_latents"]
    assert err.strip().startswith("dsattn: error: mean PSNR against dense is") and err.count("\n") == 1


def test_compare_json_is_the_report(capsys):
    assert run(["compare", *SMALL, *SPARSE, "--repeats", "1", "--min-psnr", "1", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    jsonschema.validate(value, SCHEMA)
    assert value == json.loads(Path("out/report.json").read_text())
    assert value["fidelity"]["noise_floor"] is None


def test_a_saved_pipeline_can_be_named(tmp_path, capsys):
    pipe, _ = tiny_pipelines.wan()
    pipe.save_pretrained(tmp_path / "wan")
    size = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2"]
    assert run(["generate", "a cat", "--model", str(tmp_path / "wan"), *size, "--impl", "torch", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["model"]["pipeline"] == "WanPipeline" and value["calls"]["refresh"] > 0
    frames = ["--height", "32", "--width", "48", "--frames", "6"]
    assert run(["generate", "a cat", "--model", str(tmp_path / "wan"), *frames, "-o", "b.mp4"]) == USAGE
    assert "--frames must be 4n+1 for WanPipeline, got 6; try 5 or 9" in capsys.readouterr().err


AUTO = ["--height", "64", "--width", "64", "--frames", "9", "--steps", "4", "--impl", "torch", "-O", "rows=8"]
PROFILE_FILES = ["masks.png", "profile.json", "profile.safetensors", "report.html", "report.json"]
PICTURES = ["heads", "masks_cond", "masks_uncond", "recall_cond", "recall_uncond", "steps"]


def test_profile_and_its_use(tmp_path, capsys):
    arguments = [*AUTO, "--dense-steps", "1", "-O", "target_error=0.3"]
    assert run(["profile", PROMPT, *arguments, "--out", "p", "--html"]) == 0
    out, err = capsys.readouterr()
    names = sorted([*(f"{name}.png" for name in PICTURES), *PROFILE_FILES])
    assert files(tmp_path / "p") == names and err == ""
    for word in (
        "branch",
        "layer",
        "heads by method",
        "density",
        "estimated error",
        "uncond",
        "--profile p/profile.json",
    ):
        assert word in out
    assert sum(line.startswith(("cond", "uncond")) for line in out.splitlines()) == 12
    report = json.loads(Path("p/report.json").read_text())
    assert why_invalid(report, "profile_report.schema.json") is None
    assert report["schema"] == "dsattn.profile-report/2" and report["prompt"] == PROMPT and report["steps"] == 4
    assert report["config"]["target_error"] == 0.3 and report["config"]["dense_steps"] == 1
    assert "Candidates of every layer" in Path("p/report.html").read_text(encoding="utf-8")
    assert len(report["layers"]) == 12 and report["tokens"] == 3 * 8 * 8 and report["fallbacks"] == []

    old = {name: value for name, value in report.items() if name not in ("created", "curves", "maps")}
    Path("old.json").write_text(json.dumps({**old, "schema": "dsattn.profile-report/1"}))
    for name in ("old.json", "p/report.json"):
        assert run(["report", name, "--html", "page.html"]) == 0
        assert "heads by method" in capsys.readouterr().out
        assert ("Not recorded" in Path("page.html").read_text(encoding="utf-8")) == (name == "old.json")
    for name in ("old.json", "page.html"):
        Path(name).unlink()

    other = "a small blue square moves up over a plain background"
    assert run(["generate", other, *arguments, "--profile", "p/profile.json", "--json"]) == 0
    side = json.loads(capsys.readouterr().out)
    assert side["method"] == "auto" and side["config"]["profile"] == "p/profile.json"
    assert side["calls"]["refresh"] > 0
    command = ["compare", other, *arguments, "--profile", "p/profile.json", "--repeats", "1", "--out", "c", "--json"]
    assert run(command) == 0
    report = json.loads(capsys.readouterr().out)
    jsonschema.validate(report, SCHEMA)
    assert report["runs"]["sparse"]["config"]["profile"] == "p/profile.json"

    before = files(tmp_path)
    use = ["--profile", "p/profile.json", "-o", "no.mp4"]
    for arguments, words in (
        ([*AUTO, "--steps", "5"], ["number of steps 4", "5"]),
        ([*AUTO, "--height", "80"], ["grid", "height=8", "height=10"]),
        ([*AUTO, "--method", "topk"], ["--profile", "method auto", "'topk'"]),
        ([*AUTO, "-O", "method=radial"], ["--profile", "method auto", "'radial'"]),
    ):
        assert run(["generate", PROMPT, *arguments, *use]) == USAGE
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(word in err for word in words), err
    assert files(tmp_path) == before


def test_a_profile_of_another_model_is_refused(tmp_path, capsys):
    pipe, _ = tiny_pipelines.wan()
    pipe.save_pretrained(tmp_path / "wan")
    model = ["--model", str(tmp_path / "wan"), "--steps", "2", *AUTO[:6], "--impl", "torch"]
    assert run(["profile", "a cat", *model, "--preset", "fast", "--out", "p", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pipeline"]["transformer"].startswith("WanTransformer3DModel ")
    assert report["config"]["dense_layers"] == [0] and report["config"]["dense_steps"] == 0.12, "the family's own"
    assert {tuple(row["methods"]) for row in report["layers"] if row["layer"] == 0} == {("dense",)}
    assert run(["generate", PROMPT, *AUTO, "--profile", "p/profile.json"]) == USAGE
    err = capsys.readouterr().err
    assert "p/profile.json does not fit" in err and "made with transformer WanTransformer3DModel" in err
    assert not Path("out.mp4").exists()


def test_presets_and_what_goes_before_them(capsys):
    small = [*SMALL, "--impl", "torch", "-O", "rows=8", "--json"]
    assert run(["generate", *small, "--preset", "safe"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["method"], config["target_error"], config["refresh"]) == ("auto", 0.04, 2)
    assert config["dense_steps"] == 0.25 and config["dense_layers"] == []
    flags = ["--refresh", "3", "--dense-steps", "1", "-O", "cost=0.5"]
    assert run(["generate", *small, "--preset", "fast", *flags]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["target_error"], config["cost"], config["refresh"], config["dense_steps"]) == (None, 0.5, 3, 1)


def test_report_shows_a_report_again(tmp_path, capsys):
    assert run(["compare", *SMALL, *SPARSE, "--repeats", "1", "--out", "r"]) == 0
    first = capsys.readouterr().out
    assert run(["report", "r/report.json", "--html", "new/page.html"]) == 0
    again = capsys.readouterr().out
    assert again == first + "wrote new/page.html\n"
    assert Path("new/page.html").read_text(encoding="utf-8").count("data:video/mp4;base64,") == 2
    for name in ("dense.mp4", "side_by_side.mp4"):
        Path("r", name).unlink()
    before = Path("new/page.html").read_bytes()
    assert run(["report", "r/report.json"]) == 0
    assert "r/sparse.mp4" in (out := capsys.readouterr().out) and "r/dense.mp4" not in out
    assert Path("new/page.html").read_bytes() == before


def test_methods_and_doctor(capsys):
    assert run(["methods", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)
    assert set(methods) == set(dsattn.METHODS)
    assert methods["topk"]["options"]["block_q"] == 64 and methods["topk"]["source"]
    assert run(["methods"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in dsattn.METHODS) and "tail=pooled" in text
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"]["cpu"]["chosen"] in ("flex", "torch") and found["shipped_models"] == {
        "tiny": "intact",
        "tiny-joint": "intact",
    }
    assert set(found["devices"]["cpu"]["impls"]) == {"triton", "flex", "torch", "reference"}
    assert found["devices"]["cpu"]["impls"]["torch"] is None
    assert run(["doctor"]) == 0
    assert "dsattn chooses" in capsys.readouterr().out


BAD = [
    (["generate", PROMPT, "--method", "topc"], ["unknown method 'topc'", "topk"]),
    (["generate", PROMPT, "-O", "densty=0.3"], ["densty", "density"]),
    (["generate", PROMPT, "-O", "density"], ["name=value", "'density'"]),
    (["generate", PROMPT, "-O", "density=[1"], ["'[1'"]),
    (["generate", PROMPT, "-O", "density=2"], ["density", "[0, 1]", "2"]),
    (["generate", PROMPT, "-O", "density=0:0.3,1:x"], ["density", "'0:0.3,0.5:0.1'", "'0:0.3,1:x'", "'x'"]),
    (["generate", PROMPT, "--impl", "cuda"], ["impl", "triton, flex, torch", "cuda"]),
    (["generate", PROMPT, "--quantization", "int4"], ["quantization", "int8_qk, fp8_pv", "int4"]),
    (["generate", PROMPT, "--frames", "-4"], ["--frames must be at least 1", "-4"]),
    (["generate", PROMPT, "--dense-steps", "lots"], ["dense_steps", "'lots'"]),
    (["generate", PROMPT, "--dense-layers", "a-b"], ["dense_layers", "a-b"]),
    (["generate", PROMPT, "--steps", "0"], ["--steps", "0"]),
    (["generate", PROMPT, "--refresh", "0"], ["--refresh", "0"]),
    (["generate", PROMPT, "--seed", "-1"], ["--seed", "-1"]),
    (["generate", PROMPT, "--seed", str(2**63)], ["--seed", "2**63"]),
    (["generate", PROMPT, "--guidance", "nan"], ["--guidance", "nan"]),
    (["generate", PROMPT, "--fps", "0"], ["--fps"]),
    (["generate", PROMPT, "--stepz", "3"], ["--stepz", "--steps"]),
    (["generate", " "], ["PROMPT is empty"]),
    (["generate", PROMPT, "--config", "no.yaml"], ["no.yaml", "cannot be read"]),
    (["generate", PROMPT, "--config", "broken.yaml"], ["broken.yaml", "YAML"]),
    (["generate", PROMPT, "--config", "list.yaml"], ["list.yaml", "name: value"]),
    (["generate", PROMPT, "-o", "clip.gif"], [".mp4", "clip.gif"]),
    (["generate", PROMPT, "-o", "/proc/nowhere/clip.mp4"], ["/proc", "cannot be written"]),
    (["generate", PROMPT, "-o", "broken.yaml/clip.mp4"], ["broken.yaml is a file"]),
    (["generate", PROMPT, "--dtype", "int8"], ["--dtype", "float32, bfloat16, float16", "int8"]),
    (["generate", PROMPT, "--device", "abacus"], ["--device abacus"]),
    (["generate", PROMPT, "--device", "meta"], ["--device meta"]),
    (["generate", PROMPT, "--model", "./nowhere"], ["./nowhere", "does not exist"]),
    (["generate", PROMPT, "--model", "empty"], ["empty", "model_index.json"]),
    (["generate", PROMPT, "--model", "nobody/nothing"], ["nobody/nothing", "network"]),
    (["generate", "--model", "nobody/nothing"], ["PROMPT is missing"]),
    (["generate", PROMPT, "--frames", "6"], ["--frames must be 4n+1", "6", "5 or 9"]),
    (["generate", PROMPT, "--height", "70"], ["--height", "multiple of 16", "70", "64 or 80"]),
    (["generate", PROMPT, "--width", "104", "--frames", "5"], ["--width", "multiple of 16", "104", "96 or 112"]),
    (["generate", PROMPT, *SMALL, "--quantization", "int8_qk"], ["quantization='int8_qk'", "--impl torch"]),
    (["compare", PROMPT, "--method", "dense"], ["sparse method", "dense"]),
    (["compare", PROMPT, "--out", "broken.yaml"], ["broken.yaml is a file"]),
    (["compare", PROMPT, "--repeats", "0"], ["--repeats", "0"]),
    (["compare", PROMPT, "--min-psnr", "-3"], ["--min-psnr", "-3"]),
    (["generate", PROMPT, "--preset", "quick"], ["preset", "safe, balanced, fast", "'quick'"]),
    (["generate", PROMPT, "--preset", "safe", "--config", "list.yaml"], ["--preset or --config"]),
    (["compare", PROMPT, "--preset", "safe", "--method", "topk"], ["--preset", "method auto", "'topk'"]),
    (["generate", PROMPT, "--profile", "no.json"], ["no.json", "cannot be read"]),
    (["compare", PROMPT, "--profile", "list.yaml"], ["must end in .json", "list.yaml"]),
    (["generate", PROMPT, "--profile", "list.json"], ["list.json", "cannot be read"]),
    (["profile", PROMPT, "-O", "method=topk"], ["runs the method auto", "'topk'"]),
    (["profile", PROMPT, "-O", "profile=no.json"], ["no.json"]),
    (["profile", PROMPT, "-O", "density=0.3"], ["density", "auto"]),
    (["profile", PROMPT, "--method", "topk"], ["--method"]),
    (["profile", PROMPT, "--out", "broken.yaml"], ["broken.yaml is a file"]),
    (["profile", PROMPT, *SMALL, "--dense-steps", "9"], ["no head has been measured"]),
    (["compress"], ["compress", "compare"]),
    (["report", "no.json", "--html", "page.txt"], ["--html", ".html", "page.txt"]),
    (["report", "list.json", "--html", "empty"], ["--html", ".html", "empty"]),
    (["report", "list.json", "--html", "broken.yaml/a.html"], ["broken.yaml is a file"]),
    (["diff", "list.json"], ["B"]),
]


@pytest.mark.parametrize("name", ["wan", "wan_ti2v", "hunyuan", "hunyuan15", "cogvideox", "mochi", "ltx"])
def test_sizes_fill_whole_patches(name):
    """What the family runs with passes; two pixels more do not, and of what is named instead a patch is filled."""
    pipe, arguments = tiny_pipelines.BUILDERS[name]()
    height, width = (arguments.get(side, 64) for side in ("height", "width"))
    models.check_size(pipe, Job(PROMPT, height=height, width=width))
    with pytest.raises(dsattn.UsageError, match=r"--height must be a multiple of \d+ for .*, got .*; try") as refused:
        models.check_size(pipe, Job(PROMPT, height=height + 2, width=width))
    words = str(refused.value).replace(",", "").split()
    factor, offered = int(words[words.index("of") + 1]), [int(word) for word in words[words.index("try") + 1 :: 2]]
    patch = next(iter(find_transformers(pipe).values())).config.patch_size
    assert height in offered and all(size % factor == 0 for size in offered)
    assert factor % (patch if isinstance(patch, int) else patch[1]) == 0
    if name == "wan":
        assert factor == 16 and offered == [height, height + 16]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: " ".join(value)[-40:])
def test_bad_input_is_one_clear_line(arguments, words, tmp_path, capsys):
    Path("broken.yaml").write_text("a: [1\n b: }")
    Path("list.yaml").write_text("- 1\n- 2\n")
    Path("list.json").write_text("[1")
    Path("empty").mkdir()
    before = files(tmp_path)
    assert run(arguments) == USAGE
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dsattn: error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err
    assert files(tmp_path) == before, "nothing is written"


def test_out_of_memory(capsys):
    """More latents than the address space holds: the allocator says no at once."""
    size = ["--height", "160000", "--width", "160000", "--frames", "40001", "--steps", "1"]
    assert run(["generate", PROMPT, *size]) == MEMORY
    err = capsys.readouterr().err
    assert "out of memory" in err and "--height" in err and err.count("\n") == 1
    assert not Path("out.mp4").exists()


def test_exit_codes_of_errors():
    engine = dsattn.Engine("topk", strict=True)
    with pytest.raises(dsattn.StrictFallbackError) as caught:
        engine.fallback(None, "a mask", lambda: torch.zeros(1))
    code, line = explain(caught.value)
    assert code == STRICT and "a mask" in line
    assert explain(MemoryError())[0] == MEMORY
    assert explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))[0] == MEMORY
    assert explain(RuntimeError("shapes differ")) == (
        FAILED,
        "unexpected RuntimeError: shapes differ; run again with --debug for the traceback",
    )
    assert explain(OSError(28, "No space left on device", "a.mp4")) == (
        FAILED,
        "[Errno 28] No space left on device: 'a.mp4'",
    )
    assert explain(KeyboardInterrupt())[0] == INTERRUPTED
    assert explain(dsattn.DsattnError("two\nlines")) == (FAILED, "two lines")


def test_debug_shows_the_traceback(capsys):
    assert run(["generate", PROMPT, "--method", "nope", "--debug"]) == USAGE
    err = capsys.readouterr().err
    assert "Traceback" in err and err.strip().splitlines()[-1].startswith("dsattn: error: unknown method")


def test_unknown_words_are_pointed_out(capsys):
    assert run(["generate", "a red fox", *SMALL, "--method", "dense"]) == 0
    err = capsys.readouterr().err
    assert "fox" in err and "red" not in err.split("know:")[1].split(";")[0]


def test_same_seed_same_video(capsys):
    for name in ("a.mp4", "b.mp4"):
        assert run(["generate", *SMALL, *SPARSE, "-o", name]) == 0
    assert run(["generate", *SMALL, *SPARSE, "--seed", "1", "-o", "c.mp4"]) == 0
    a, b, c = (read_mp4(Path(name)) for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Without Triton's interpreter, which tests of kernels switch on for this process.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    call = [sys.executable, "-m", "dsattn", *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=False, env=env)


def test_as_a_process():
    done = command("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"dsattn {dsattn.__version__}")
    done = command("generate", "x", "--method", "nope")
    assert done.returncode == USAGE and "Traceback" not in done.stderr and done.stdout == ""
    done = command("generate", *SMALL, "--impl", "triton", "--device", "cpu")
    assert done.returncode == USAGE and "impl='triton' cannot run" in done.stderr, done.stderr
    assert files(Path()) == []


def test_help_imports_no_model_library():
    code = "import sys; from dsattn.cli.app import run; run(sys.argv[1:]); print(*sys.modules)"
    commands = ("compare", "profile", "report", "diff")
    for arguments in (["--help"], *([name, "--help"] for name in commands)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert "Usage: dsattn" in done.stdout
        loaded = set(done.stdout.splitlines()[-1].split())
        assert not loaded & {
            "diffusers",
            "transformers",
            "skimage",
            "sklearn",
            "imageio",
            "rich.table",
            "matplotlib",
            "jinja2",
        }
