"""Text, batches, schedule, optimiser, checkpoints, and resuming bit for bit."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pygpt
from pygpt import checkpoint, cli, demo, train
from pygpt.data import Chars, Corpus, UsageError, read_text
from pygpt.files import LOCK, locked
from pygpt.train import PRESETS, Settings, Trainer

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "eval_iters": 2, "warmup": 3}
FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"line %d of a text, squared %d\n" % (i, i * i) for i in range(200)))
    return path


@pytest.fixture
def corpus(text):
    return Corpus.load(str(text), "byte", 16)


def pygpt_process(*arguments, **options):
    root = Path(pygpt.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "pygpt", *map(str, arguments)], env=env, **options)


# ------------------------------------------------------------------------------- text and batches
def test_default_corpus_is_the_standard_library():
    data = read_text(None)
    assert 2_000_000 < len(data) <= 12_000_000 and data.endswith(b"\n")
    assert data == read_text(None)
    assert Path(json.__file__).read_bytes() in data
    assert Path(pytest.__file__).read_bytes() not in data


def test_folder_in_sorted_order_without_binaries(tmp_path):
    for name, content in (
        ("b.txt", b"B"),
        ("a/z.md", b"Z"),
        ("a/x.py", b"X"),
        (".git/config", b"hidden"),
        ("c.bin", b"\0"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read_text(str(tmp_path)) == b"XZB"


def test_split_and_digest(text, corpus):
    data = text.read_bytes()
    assert bytes(corpus.train.tolist()) + bytes(corpus.val.tolist()) == data
    assert len(corpus.train) == len(data) * 9 // 10
    assert Corpus.load(str(text), "byte", 16).digest == corpus.digest
    text.write_bytes(data + b".")
    assert Corpus.load(str(text), "byte", 16).digest != corpus.digest


def test_characters():
    chars = Chars("aeé")
    assert chars.encode("éa".encode()).tolist() == [2, 0]
    assert chars.decode([2, 0, 99]) == "éa?".encode()
    with pytest.raises(UsageError, match="'x' is not in the model's vocabulary"):
        chars.encode(b"x")


def test_batches_are_a_function_of_their_key(corpus):
    x, y = corpus.batch("train", 4, 16, 1, 2, 3)
    assert x.shape == y.shape == (4, 16) and x.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])
    torch.manual_seed(7)
    again = corpus.batch("train", 4, 16, 1, 2, 3)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    for other in ((1, 2, 4), (1, 3, 3), (0, 2, 3)):
        assert not torch.equal(x, corpus.batch("train", 4, 16, *other)[0])
    offsets = {int(corpus.batch("val", 1, len(corpus.val) - 2, i)[0][0, 0]) for i in range(20)}
    assert offsets == {int(corpus.val[0]), int(corpus.val[1])}  # every offset that fits, no other


# ------------------------------------------------------------------------------- one step
def test_schedule():
    s = Settings(learning_rate=1e-3, min_lr=1e-4, warmup=100, steps=2000)
    assert s.rate(0) == pytest.approx(1e-3 / 101) and s.rate(99) == pytest.approx(1e-3 * 100 / 101)
    assert s.rate(100) == pytest.approx(1e-3) and s.rate(1050) == pytest.approx(5.5e-4)
    assert s.rate(2000) == pytest.approx(1e-4) == s.rate(5000)


def test_presets():
    shakespeare = Settings(**PRESETS["shakespeare-char-cpu"])
    expected = {
        "eval_iters": 20, "block_size": 64, "batch_size": 12, "n_layer": 4, "n_head": 4, "n_embd": 128, "steps": 2000,
        "decay_steps": 2000, "dropout": 0.0, "learning_rate": 1e-3, "min_lr": 1e-4, "beta1": 0.9, "beta2": 0.99,
        "eval_interval": 250, "weight_decay": 0.1, "grad_clip": 1.0, "grad_accum": 1, "bias": False, "tokens": "char",
        "warmup": 100,
    }  # fmt: skip
    assert {k: getattr(shakespeare, k) for k in expected} == expected
    gpt2 = Settings(**PRESETS["gpt2"])
    assert (gpt2.n_layer, gpt2.n_head, gpt2.n_embd, gpt2.block_size, gpt2.vocab_size) == (12, 12, 768, 1024, 50304)
    assert gpt2.tokens_per_step == 12 * 40 * 1024
    assert Settings(**PRESETS["demo"]) == Settings()


def test_step_is_a_plain_training_step(corpus):
    """Accumulation, clipping, decay of matrices alone, the schedule: against a loop in plain PyTorch."""
    s = Settings(**TINY, bias=True, grad_accum=3, grad_clip=0.5, dtype="float64", backend="torch", learning_rate=1e-2)
    trainer, other = Trainer(s, corpus), Trainer(s, corpus)
    model = other.model
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.99)
    )
    for step in range(5):
        loss = trainer.step()
        batches = [corpus.batch("train", 4, 16, s.seed, step, micro) for micro in range(3)]
        expected = sum(model(*batch)[1] for batch in batches) / 3
        expected.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, 0.5 / norm)
        for group in adamw.param_groups:
            group["lr"] = s.rate(step)
        adamw.step()
        adamw.zero_grad()
        assert loss == pytest.approx(expected.item(), rel=1e-7)
    for (name, a), b in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_learns_in_every_dtype(dtype, corpus, backend):
    trainer = Trainer(Settings(**TINY, dtype=dtype, backend=backend, learning_rate=1e-2), corpus)
    before = trainer.evaluate()
    for _ in range(30):
        trainer.step()
    after = trainer.evaluate()
    assert all(after[k] < before[k] - 0.5 for k in before)
    wanted = torch.float64 if dtype == "float64" else torch.float32
    assert {p.dtype for p in trainer.model.parameters()} == {wanted}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_autocasts(dtype, corpus):
    """The loss is autocast's in the dtype that was asked for. float16 alone has its gradients scaled."""
    s = Settings(**TINY, dtype=dtype, backend="torch")
    trainer, batch = Trainer(s, corpus), corpus.batch("train", s.batch_size, s.block_size, s.seed, 0, 0)
    with torch.autocast("cpu", getattr(torch, dtype)), pygpt.backend("torch"):
        loss = trainer.model(*batch)[1].item()
    assert trainer.step() == loss and trainer.scaler.is_enabled() == (dtype == "float16")


def test_dropout_differs_from_step_to_step(corpus, monkeypatch):
    """The same batch and the same weights give another loss. The same step gives the same."""
    s = Settings(**TINY, dropout=0.5, learning_rate=0.0, min_lr=0.0)
    batch = corpus.batch("train", s.batch_size, s.block_size, 0)
    monkeypatch.setattr(corpus, "batch", lambda *_: batch)
    losses = [[trainer.step() for _ in range(3)] for trainer in (Trainer(s, corpus), Trainer(s, corpus))]
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


def test_evaluation_changes_nothing(corpus):
    s = Settings(**TINY, dropout=0.2)
    a, b = Trainer(s, corpus), Trainer(s, corpus)
    assert a.evaluate() == a.evaluate()
    assert [a.step() for _ in range(3)] == [b.step() for _ in range(3)]


# ------------------------------------------------------------------------------- checkpoints
def entries(out):
    lines = (out / "log.jsonl").read_bytes().split(b"\n")[:-1]  # without one that a kill cut short
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "float16"}, {"dtype": "bfloat16"}, {"dropout": 0.1, "grad_accum": 2}]
)
def test_resumes_bit_exactly(options, corpus, tmp_path):
    s = Settings(**TINY, **options)
    through, first = Trainer(s, corpus), Trainer(s, corpus)
    expected = [through.step() for _ in range(8)]
    losses = [first.step() for _ in range(4)]
    first.save(tmp_path / "c.safetensors")
    torch.rand(10)
    second = Trainer(s, corpus)
    second.load(tmp_path / "c.safetensors")
    losses += [second.step() for _ in range(4)]
    assert losses == expected
    for name, p in through.named.items():
        assert torch.equal(p, second.named[name]), name


def overflow(trainer, steps):
    """Makes the gradients of these steps infinite, as a scale that is too large does."""
    parameter = trainer.named["transformer.wpe.weight"]
    parameter.register_hook(lambda grad: grad * math.inf if trainer.done in steps else grad)


@pytest.mark.parametrize("steps", [(0, 1, 2), (0, 2), (6,), ()], ids=str)
def test_the_gradient_scaler_is_resumed(steps, corpus, tmp_path):
    """Its scale and the steps since it last changed; also where every step so far overflowed."""
    s = Settings(**TINY, dtype="float16")
    through, first, second = (Trainer(s, corpus) for _ in range(3))
    for trainer in (through, first, second):
        trainer.scaler.set_growth_interval(5)
        overflow(trainer, steps)
    for _ in range(8):
        through.step()
    for _ in range(3):
        first.step()
    first.save(tmp_path / "c.safetensors")
    assert first.scaler.state_dict() != second.scaler.state_dict()
    second.load(tmp_path / "c.safetensors")
    assert first.scaler.state_dict() == second.scaler.state_dict()
    for _ in range(5):
        second.step()
    state = second.scaler.state_dict()
    assert state == through.scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == {
        (0, 1, 2): (2.0**14, 0), (0, 2): (2.0**15, 0), (6,): (2.0**16, 1), (): (2.0**17, 3)
    }[steps]  # fmt: skip
    for name, p in through.named.items():
        assert torch.equal(p, second.named[name]), name


def test_resumes_bit_exactly_after_kill_9(text, tmp_path):
    """The killed and resumed run ends with the same checkpoint file, byte for byte, and the same log."""
    command = [
        "train",
        "--data",
        text,
        *FLAGS,
        "--steps=150",
        "--eval-interval=50",
        "--checkpoint-interval=7",
        "--dropout=0.1",
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = pygpt_process(*command, "--out", killed, stdout=subprocess.DEVNULL)
    while not (killed / "log.jsonl").exists() or len((killed / "log.jsonl").read_text().splitlines()) < 40:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    _, metadata = checkpoint.load(killed / "checkpoint.safetensors")
    assert 0 < metadata["step"] < 150
    with open(killed / "log.jsonl", "a") as log:
        log.write('{"step": 9')  # a line cut short by the kill
    assert cli.main(["train", "--out", str(killed), "--resume"]) == 0
    assert cli.main([*map(str, command), "--out", str(whole)]) == 0
    assert (killed / "checkpoint.safetensors").read_bytes() == (whole / "checkpoint.safetensors").read_bytes()
    assert entries(killed) == entries(whole)
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_run_in_the_same_folder_is_refused(text, tmp_path, capsys):
    """And the first goes on undisturbed. Its death frees the folder."""
    out = tmp_path / "run"
    command = ["train", "--data", text, *FLAGS, "--steps=100000", "--checkpoint-interval=3", "--out", out]
    with pygpt_process(*command, stdout=subprocess.DEVNULL) as first:
        while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_bytes().splitlines()) < 20:
            assert first.poll() is None
            time.sleep(0.005)
        long = text.with_name("long.txt")
        long.write_bytes(text.read_bytes() * 10)
        for second in ("train", "--resume"), [*command, "--force"], ("demo", "--steps=3", "--data", long):
            assert cli.main([*map(str, second), "--out", str(out)]) == 2
            assert capsys.readouterr() == ("", f"pygpt: error: another run is writing to {out}\n")
        assert first.poll() is None
        first.kill()
    steps = [entry["step"] for entry in entries(out) if "loss" in entry]
    assert steps == list(range(1, len(steps) + 1))
    done = checkpoint.load(out / "checkpoint.safetensors")[1]["step"]
    assert cli.main(["train", "--resume", "--out", str(out), f"--steps={done + 2}"]) == 0


def test_ctrl_c_while_evaluating_keeps_a_checkpoint(corpus, tmp_path, monkeypatch):
    trainer = Trainer(Settings(**TINY, eval_interval=3, checkpoint_interval=1000), corpus)

    def evaluate():
        if trainer.done:
            os.kill(os.getpid(), signal.SIGINT)
        return {"train_loss": 0.0, "val_loss": 0.0}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        train.fit(trainer, tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")[1]["step"] == 3


def test_a_crash_while_saving_leaves_the_old_checkpoint(corpus, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    trainer = Trainer(Settings(**TINY), corpus)
    trainer.save(path)
    old = path.read_bytes()
    trainer.step()
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError("disk full")))
            trainer.save(path)
        assert path.read_bytes() == old and os.listdir(tmp_path).count("c.safetensors") == 1
        assert not list(tmp_path.glob(".*"))
    child = os.fork()
    if child == 0:  # dies between writing and renaming
        os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        trainer.save(path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == old
    (left,) = tmp_path.glob(".*")
    with locked(tmp_path):
        trainer.save(path)
    assert checkpoint.load(path)[1]["step"] == 1 and not left.exists()
    assert set(os.listdir(tmp_path)) == {"text.txt", "c.safetensors", LOCK}


def test_checkpoint_holds_nanogpt_names(corpus, tmp_path):
    from safetensors.torch import load_file

    trainer = Trainer(Settings(**TINY), corpus)
    trainer.save(tmp_path / "c.safetensors")
    state = load_file(tmp_path / "c.safetensors")
    assert set(state) == set(trainer.model.state_dict()) - {"lm_head.weight"}
    model, tokenizer, _ = train.open_checkpoint(tmp_path / "c.safetensors")
    assert not model.training and tokenizer.size == 256
    mode = (tmp_path / "c.safetensors").stat().st_mode
    assert mode == (tmp_path / "text.txt").stat().st_mode


def test_a_checkpoint_that_does_not_fit_changes_nothing(corpus, tmp_path):
    path = tmp_path / "c.safetensors"
    trainer = Trainer(Settings(**TINY), corpus)
    trainer.step()
    trainer.save(path)
    tensors, metadata = checkpoint.load(path)
    names = [name for name in tensors if name.startswith("adamw.exp_avg_sq.")]
    checkpoint.save(path, tensors | {names[-1]: torch.zeros(3)}, metadata)
    other = Trainer(Settings(**TINY, seed=2), corpus)
    before = {name: p.clone() for name, p in other.named.items()}
    with pytest.raises(UsageError, match=rf"does not fit the model: {names[-1]} must be .*, found \(3,\)"):
        other.load(path)
    assert all(torch.equal(p, before[name]) for name, p in other.named.items())
    assert other.done == 0 and not other.optimizer.state


def test_resume_refuses_another_text_and_another_model(corpus, text, tmp_path):
    path = tmp_path / "c.safetensors"
    settings = Settings(**TINY)
    Trainer(settings, corpus).save(path)
    with pytest.raises(UsageError, match="does not fit the model"):
        Trainer(dataclasses.replace(settings, n_embd=32), corpus).load(path)
    text.write_bytes(text.read_bytes() + b"more")
    with pytest.raises(UsageError, match="another text"):
        Trainer(settings, Corpus.load(str(text), "byte", 16)).load(path)


# ------------------------------------------------------------------------------- demo
def test_demo(text, tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--steps=3", "--sample=5", "--data", str(text.with_name("long.txt"))]) == 2
    text.with_name("long.txt").write_bytes(text.read_bytes() * 10)
    capsys.readouterr()
    assert (
        cli.main(["demo", "--steps=3", "--sample=5", "--data", str(text.with_name("long.txt")), "--out", str(out)]) == 0
    )
    shown = capsys.readouterr().out
    assert "3/3" in shown and "tokens/s" in shown and "0:00 left" in shown
    gap = float(shown.split("largest difference of the two loss curves: ")[1].split()[0])
    assert gap < 1e-4 and 'speed of "cpp" relative to "torch"' in shown
    assert {f.name for f in out.iterdir()} == {"checkpoint.safetensors", "loss.png", LOCK}
    assert cli.main(["generate", str(out), "--max-new-tokens=3"]) == 0


@pytest.mark.parametrize("busy", [0.7, pytest.param(0.8, marks=pytest.mark.slow)])
def test_demo_trains_on_alone(text, tmp_path, capsys, monkeypatch, busy):
    """By a clock that advances by 0.05 s each time it is read: 2.05 s for 10 steps of each, which leaves 0.45 s.

    In all, it is read 46 times from the first step on, and the main thread has a core for some of that time.
    """
    ticks, computed = itertools.count(), iter((0.0, 46 * 0.05 * busy))
    clocks = SimpleNamespace(perf_counter=lambda: next(ticks) * 0.05, thread_time=lambda: next(computed))
    monkeypatch.setattr(demo, "time", clocks)
    text.with_name("long.txt").write_bytes(text.read_bytes() * 10)
    arguments = ["--seconds=2.5", "--sample=5", f"--data={text.with_name('long.txt')}", f"--out={tmp_path / 'demo'}"]
    assert cli.main(["demo", *arguments]) == 0
    shown = capsys.readouterr().out
    assert ("training computed for only 70% of this time" in shown) == (busy < demo.UNDISTURBED)
    assert '11 steps of each backend, taking turns, then 6 of "cpp" alone' in shown and "6/6" in shown
    assert checkpoint.load(tmp_path / "demo" / "checkpoint.safetensors")[1]["step"] == 17
    assert f"loss chart  {tmp_path / 'demo' / 'loss.png'}" in shown
