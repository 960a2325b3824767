"""Training of the small models: chosen positions, attention, resumption, and the codec's decoder."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from dsattn.pipelines.tiny import batches, data, objective, trainable, training
from dsattn.pipelines.tiny.loader import WEIGHTS, WEIGHTS_JOINT, load_codec, load_tiny, load_tiny_joint
from dsattn.pipelines.tiny.model import build_tokenizer
from dsattn.pipelines.tiny.trainable import build_trainable, carry_words
from dsattn.pipelines.tiny.training import CpuTrainingProcessor
from tests.bench_scripts import SCRIPTS, run
from tests.test_tiny import script

# ---- models in training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "tiny-joint"])
def test_chosen_positions_are_the_stock_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainable, "mixed_precision", lambda device: nullcontext())  # some CPUs would take bfloat16
    model = build_trainable(kind, 32, 0, WEIGHTS).eval()
    stock = build_trainable(kind, 32, 0, WEIGHTS).eval()
    stock.transformer.rope = type(load_tiny().transformer.rope)(64, (1, 1, 1), 128) if kind == "tiny" else _joint_rope()
    generator = torch.Generator().manual_seed(0)
    grid = (3, 5, 7)
    noisy = torch.randn(2, 32, *grid, generator=generator)
    tokens = torch.randint(3, 60, (2, 12), generator=generator)
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    level = torch.tensor([0.5, 0.9])
    seen = []
    stock.transformer.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    positions = batches.pick_positions(np.random.default_rng(0), grid, 1000)
    with torch.no_grad():
        got = model(noisy.flatten(2), level, tokens, mask, positions)
        text = stock.text_encoder(tokens, mask).last_hidden_state * mask[..., None]
        if kind == "tiny":
            want = stock.transformer(noisy, level * 1000, text, return_dict=False)[0]
        else:
            pooled = text.sum(1) / mask.sum(1, keepdim=True)
            want = stock.transformer(noisy, level * 1000, text, mask, pooled, return_dict=False)[0]
    assert torch.allclose(got, want.flatten(2), atol=2e-5 * float(want.abs().max()))
    with pytest.raises(ValueError, match="105 positions were chosen for 6 tokens"):
        model.transformer.rope.positions = positions
        model.transformer.rope(torch.zeros(1, 32, 1, 1, 6))


def test_training_goes_on_from_weights_of_its_kind() -> None:
    model = build_trainable("tiny-joint", 32, 0, WEIGHTS_JOINT)
    stored = load_tiny_joint()
    for got, want in ((model.transformer, stored.transformer), (model.text_encoder, stored.text_encoder)):
        state = got.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in want.state_dict().items())
    with pytest.raises(ValueError, match="holds weights of tiny-joint"):
        build_trainable("tiny", 32, 0, WEIGHTS_JOINT)


def _joint_rope() -> torch.nn.Module:
    from dsattn.pipelines.tiny.joint import build_joint_transformer

    return build_joint_transformer(32).rope


def test_words_are_carried_by_spelling_and_kin() -> None:
    torch.manual_seed(0)
    source, target = (build_trainable("tiny", 32, seed).text_encoder for seed in (0, 1))
    now = build_tokenizer().get_vocab()
    old = {w: i for i, w in enumerate(reversed([w for w in now if w not in ("tiny", "disc", "shadow")]))}
    before = target.shared.weight[now["shadow"]].clone()
    carry_words(target, source, old)
    for word in ("red", "moves", "<pad>", "##a"):
        assert torch.equal(target.shared.weight[now[word]], source.shared.weight[old[word]])
    for word, kin in (("tiny", "small"), ("disc", "circle")):
        assert torch.equal(target.shared.weight[now[word]], source.shared.weight[old[kin]])
    assert torch.equal(target.shared.weight[now["shadow"]], before)
    assert torch.equal(
        target.encoder.block[0].layer[0].SelfAttention.q.weight, source.encoder.block[0].layer[0].SelfAttention.q.weight
    )


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_the_loss_of_pairs_weighs_what_they_differ_in(count: int, weight: float) -> None:
    error = torch.randn(count, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    one, other = error[: count // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
    shared, differing = (one + other) / 2, (one - other) / 2
    alone = error[count // 2 * 2 :].square().sum()
    wanted = (2 * (shared.square() + weight * differing.square()).sum() + alone) / error.numel()
    got, want = (torch.autograd.grad(x, error)[0] for x in (objective.pair_loss(error, weight), wanted))
    assert torch.allclose(got, want, atol=1e-6)
    if weight == 1:
        assert torch.allclose(got, torch.autograd.grad(error.square().mean(), error)[0], atol=1e-6)


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_at_power_two_the_loss_is_that_of_pixels(weight: float) -> None:
    codec = load_codec(WEIGHTS)
    error = torch.randn(4, 32, 5, generator=torch.Generator().manual_seed(2), requires_grad=True)
    scale = torch.tensor(codec.config.latents_std)
    pixels = error.movedim(1, 2) * scale @ codec.components  # of every token, but for one constant
    components = objective.component_weights(codec, 2.0)
    got, want = (
        torch.autograd.grad(objective.pair_loss(*args), error)[0]
        for args in ((error, weight, components), (pixels, weight))
    )
    want = want * (pixels[0, 0].numel() / 32) / scale.square().mean()
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))
    assert torch.equal(objective.component_weights(codec, 0.0), torch.ones(32, 1))


def test_the_rate_falls_over_the_share_it_is_told() -> None:
    rate = script("train_tiny").learning_rate
    assert rate(0.02, 1.0, 1.0) == pytest.approx(0.98) and rate(0.5, 1.0, 1.0) == pytest.approx(0.5)
    assert [rate(f, 1.0, 0.45) for f in (0.5, 0.55, 0.775, 1.0)] == pytest.approx([1.0, 1.0, 0.5, 0.02])
    assert rate(1.0, 1.0, 1.0) == pytest.approx(0.02)


def test_pairs_meet_across_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    want = torch.autograd.grad(objective.pair_loss(error, 3.0), error)[0]
    monkeypatch.setattr(objective.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(objective.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        objective.dist, "all_gather", lambda out, _: [o.copy_(error.detach()[i::2]) for i, o in enumerate(out)]
    )
    for rank in range(2):
        monkeypatch.setattr(objective.dist, "get_rank", lambda rank=rank: rank)
        mine = error.detach()[rank::2].requires_grad_()
        got = torch.autograd.grad(objective.pair_loss(mine, 3.0), mine)[0]
        assert torch.allclose(got / 2, want[rank::2], atol=1e-6)  # a worker's mean is over its half


def test_clips_grow_from_where_they_are_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = script("train_tiny")
    seen: list[float] = []
    draw = batches.Clips.batch
    monkeypatch.setattr(
        batches.Clips, "batch", lambda self, step, at: seen.append(at) or draw(self, step, at, grid=(1, 4, 4))
    )
    small = {"steps": 2, "threads": 1, "workers": 1, "codec_clips": 4, "held_out": 0, "tokens": 16}
    defaults = {"minutes": 0.0, "stop_after": 0, "peak": 1e-3, "seed": 0, "save_minutes": 60.0, "device": "cpu"}
    settings = trainer.Settings(run=tmp_path, export=None, grown=0.8, **defaults, **small)
    trainer.train(0, settings)
    assert seen == pytest.approx([0.8, 0.9])  # half of what is left after half of the budget


def test_training_resumes_equal(tmp_path: Path) -> None:
    training = script("train_tiny")

    def settings(name: str, stop_after: int) -> object:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return training.Settings(
            run=folder,
            minutes=0.0,
            steps=4,
            stop_after=stop_after,
            peak=2e-3,
            tokens=700,
            seed=3,
            threads=1,
            workers=1,
            save_minutes=60.0,
            export=folder / "export",
            device="cpu",
            codec_clips=8,
            held_out=1 if stop_after == 3 else 0,
        )

    training.train(0, settings("whole", 3))
    training.train(0, settings("halves", 2))
    training.train(0, settings("halves", 1))
    from safetensors.torch import load_file

    whole, halves = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, halves[name]), name
    assert json.loads((tmp_path / "halves" / "state.json").read_text())["step"] == 3
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "held_out" in line] == [0, 3]
    assert log[-1]["held_out"].keys() == {"0.5", "0.8", "0.9", "0.95"}
    exported = load_tiny(weights_dir=tmp_path / "whole" / "export")
    bias = exported.transformer.proj_out.bias
    assert torch.equal(bias, whole["ema/transformer.proj_out.bias"])


@pytest.mark.parametrize("fast", [True, False])
def test_training_attention_matches_the_stock_processor(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "has_fast_bfloat16", lambda device: fast)  # each has an attention of its own
    pipe = load_tiny()
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(1, pipe.vae.config.z_dim, 3, 5, 7, generator=generator)
    text = torch.randn(1, 6, 128, generator=generator)
    want = pipe.transformer(noisy, torch.tensor([500.0]), text, return_dict=False)[0]
    pipe.transformer.set_attn_processor(CpuTrainingProcessor())
    got = pipe.transformer(noisy, torch.tensor([500.0]), text, return_dict=False)[0]
    assert torch.allclose(got, want, atol=2e-4 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("supported", "seconds", "want"),
    [
        (True, {torch.bfloat16: 1.0, torch.float32: 2.0}, True),
        (True, {torch.bfloat16: 2.0, torch.float32: 1.0}, False),  # instructions that do not pay
        (False, {torch.bfloat16: 1.0, torch.float32: 2.0}, False),
    ],
)
def test_bfloat16_is_taken_where_it_is_faster(
    supported: bool, seconds: dict[torch.dtype, float], want: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(training, "_product_seconds", seconds.__getitem__)
    asked = training.has_fast_bfloat16.__wrapped__
    assert asked(torch.device("cpu")) is want and asked(torch.device("cuda")) is True


def test_a_product_takes_time() -> None:
    assert 0 < training._product_seconds(torch.float32) < 60


# ---- what captions mean to a model ---------------------------------------------------------------------------------


def test_the_classifier_knows_who_reads_captions() -> None:
    clips = batches.Clips(load_codec(WEIGHTS), seed=5, tokens_per_step=1500)
    classify = script("classify_tiny")
    asked = list(classify.questions(clips, 4, (3, 8, 8), (0.8,)))
    assert [question.word for question in asked] == ["shape", "motion"]
    for question in asked:
        own, other = question.own, question.other
        assert torch.equal(own.latents, other.latents) and torch.equal(own.noise, other.noise)
        assert (own.tokens != other.tokens).any(1).all()  # every caption differs
        target = own.noise - own.latents

        def reader(noisy, level, tokens, *rest, own=own, target=target):
            """Right where the caption is the clip's own."""
            return target + 0.1 * (tokens != own.tokens).any(1)[:, None, None]

        assert classify.answer(reader, question)["right"] == 1.0
        assert classify.answer(lambda noisy, *rest: 0 * noisy, question)["right"] == 0.0  # no caption is preferred


def test_weights_are_compared_by_what_captions_mean_to_them(tmp_path: Path) -> None:
    out, folders = tmp_path / "new" / "words.json", (str(WEIGHTS), str(WEIGHTS_JOINT))
    done = run(sys.executable, str(SCRIPTS / "classify_tiny.py"), *folders, "--clips", "2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["command"].endswith("--clips 2 --seed 0") and found["env"]["torch"] == torch.__version__
    weights = found["weights"]
    assert list(weights) == list(folders)
    for rows in weights.values():
        assert [(r["word"], r["level"]) for r in rows] == [(w, s) for w in ("shape", "motion") for s in (0.8, 0.92)]
        assert all(r["clips"] == 2 and r["right"] in (0.0, 0.5, 1.0) for r in rows)


# ---- the codec's decoder -------------------------------------------------------------------------------------------


def test_the_decoder_learns_and_latents_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = script("train_codec")
    one = data.sample_scene(np.random.default_rng(0))
    monkeypatch.setattr(training, "SIZES", ((9, 64, 96),))
    monkeypatch.setattr(training.data, "clips", lambda seed: iter(lambda: one, None))  # always the same clip
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    plain = training.with_refiner(load_codec(WEIGHTS), 0)
    codec = training.with_refiner(plain, 24)
    video = training.draw(iter([one]), (9, 64, 96))
    latents = plain.encode(video)
    assert torch.equal(codec.encode(video), latents)
    assert torch.equal(codec.decode(latents).sample, plain.decode(latents).sample)  # nothing is learnt yet
    log = training.train(codec, 0.0, 100, 0, 4e-3)
    assert [entry["step"] for entry in log] == [50, 100] and log[1]["loss"] < log[0]["loss"]
    errors = [(c.decode(latents).sample - video).square().mean().item() for c in (plain, codec)]
    assert errors[1] < 0.9 * errors[0]
    before = (tmp_path / "weights" / "transformer.safetensors").read_bytes()
    training.replace_codec(tmp_path / "weights", codec)
    assert (tmp_path / "weights" / "transformer.safetensors").read_bytes() == before
    stored = load_tiny(weights_dir=tmp_path / "weights").vae
    assert stored.config.refine_width == 24
    assert torch.allclose(stored.decode(latents).sample, codec.decode(latents).sample, atol=5e-3)


def test_both_models_get_the_codec_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = script("train_codec")
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in (WEIGHTS, WEIGHTS_JOINT)]
    monkeypatch.setattr(training, "SIZES", ((5, 64, 64),))
    scores = iter((30.0, 31.0))
    monkeypatch.setattr(training, "psnr", lambda codec: next(scores))
    options = {"minutes": 0.0, "steps": 1, "width": 16, "peak": 2e-3, "seed": 0, "threads": torch.get_num_threads()}
    bad = shutil.copytree(WEIGHTS_JOINT, tmp_path / "bad")
    (bad / "transformer.safetensors").unlink()
    before = (folders[0] / "checksums.json").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"transformer\.safetensors is missing"):
        training.main(weights=[folders[0], bad], **options)
    assert (folders[0] / "checksums.json").read_bytes() == before
    training.main(weights=folders, **options)
    for folder in folders:
        assert json.loads((folder / "config.json").read_text())["codec"]["refine_width"] == 16
    first, second = (json.loads((folder / "checksums.json").read_text()) for folder in folders)
    assert first["codec.safetensors"] == second["codec.safetensors"] and first != json.loads(before)
    assert not (folders[1] / "codec.safetensors").exists()


# ---- both models in one go -----------------------------------------------------------------------------------------


def test_the_gpu_script_trains_both_models(tmp_path: Path) -> None:
    done = run("bash", str(SCRIPTS / "gpu_train.sh"), "--tiny", PYTHON=sys.executable, OUT=str(tmp_path), WHEELS="none")
    assert done.returncode == 0, done.stdout + done.stderr
    for name, load in (("tiny", load_tiny), ("joint", load_tiny_joint)):
        assert load(weights_dir=tmp_path / name / "weights").vae.config.z_dim == 32
    refused = run("bash", str(SCRIPTS / "gpu_train.sh"), "--tinny", PYTHON=sys.executable)
    assert refused.returncode == 2 and "--tinny" in refused.stderr
