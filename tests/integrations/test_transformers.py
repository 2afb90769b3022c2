"""Models of transformers after patch and register: results, gradients, tokens, shares, masks."""

import contextlib

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import pygpt
from bench.families import __main__ as tables
from bench.families import parallel, ways
from bench.families.models import FAMILIES, Size, batch_of, copied, drawn, quiet, served
from bench.families.results import errors, greedy, in_float64, share, step
from pygpt.functional import scaled_dot_product_attention
from pygpt.integrations import rotary
from pygpt.integrations import transformers as integration
from pygpt.integrations.transformers import Causal, attention, mask
from pygpt.verify import allowance

SMALL = Size()
TEXT = [name for name, family in FAMILIES.items() if family.inputs in ("tokens", "two texts")]
GENERATING = [name for name, family in FAMILIES.items() if family.generates]
WINDOWED = ["Gemma2", "Gemma3", "Mistral"]
DRAWS = 12


@pytest.fixture(autouse=True)
def without_remarks():
    with quiet():
        yield


def hold_to_float64(name, generator, padding="", loss=False, of_step=step):
    """Our errors are at most twice PyTorch's, as medians over as many draws as it takes.

    The largest would be a matter of luck: a gradient may cancel, and ReLU's jumps where an input rounds past 0.
    """
    draws: dict[str, list] = {}
    for _ in range(DRAWS):
        model = drawn(name, SMALL, generator)
        batch = batch_of(name, SMALL, generator, padding)
        exact = in_float64(copied(name, SMALL, model), batch)
        found = errors(exact, of_step(model, batch), of_step(served(name, SMALL, model, loss), batch))
        for result, pair in found.items():
            draws.setdefault(result, []).append(torch.tensor(pair, dtype=torch.float64))
        typical = {result: torch.stack(pairs).quantile(0.5, 0).tolist() for result, pairs in draws.items()}
        dtype = torch.float32 if of_step is step else torch.bfloat16
        wrong = {n: e for n, e in typical.items() if not e[0] <= 2 * e[1] + allowance(dtype)}
        if not wrong:
            return found
    raise AssertionError(wrong)


@pytest.mark.parametrize("name", FAMILIES)
def test_results_and_gradients(name, generator):
    found = hold_to_float64(name, generator)
    assert {"logits", "loss"} <= found.keys() and len(found) > 10


@pytest.mark.parametrize("name", TEXT)
def test_padding(name, generator):
    """On the left. With a loss head, it is on the right."""
    hold_to_float64(name, generator, "left")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.loss_head])
def test_loss_head(name, generator):
    found = hold_to_float64(name, generator, "right" if name in TEXT else "", loss=True)
    assert "loss" in found and "logits" not in found


@pytest.mark.parametrize("name", FAMILIES)
def test_share(name, generator):
    """Not a FLOP of a training step's products is torch's."""
    model = drawn(name, SMALL, generator)
    batch = batch_of(name, SMALL, generator, "left")
    assert share(model, served(name, SMALL, model), batch) == 1.0


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_tokens(name, generator):
    """Of three random models at most two may have tokens of almost the same logit, between which rounding decides."""
    equal = []
    while len(equal) < 3 and equal.count(True) == 0:
        model, batch = drawn(name, SMALL, generator), batch_of(name, SMALL, generator, "left")
        ours = served(name, SMALL, model, loss=FAMILIES[name].loss_head)
        theirs, ours = greedy(model, batch, 12), greedy(ours, batch, 12)
        assert theirs.shape == ours.shape and theirs.shape[1] >= 12
        equal.append(theirs.equal(ours))
    assert equal[-1]


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3"])
def test_static_cache(name, generator):
    model, batch = drawn(name, SMALL, generator), batch_of(name, SMALL, generator, "left")
    ours = served(name, SMALL, model)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 6}
    given |= {"do_sample": False, "cache_implementation": "static", "disable_compile": True}
    assert model.generate(**given).equal(ours.generate(**given))


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Qwen3", *WINDOWED])
def test_chunks_of_a_prompt(name, generator):
    """Tokens that follow a cache see what they would see in one call."""
    model, batch = drawn(name, SMALL, generator).eval(), batch_of(name, SMALL, generator)
    ours = served(name, SMALL, model).eval()
    ids = batch["input_ids"]
    with torch.no_grad():
        first = ours(ids[:, :10], use_cache=True)
        cache = {"cache": first.cache} if hasattr(first, "cache") else {"past_key_values": first.past_key_values}
        second = ours(ids[:, 10:], use_cache=True, **cache).logits
        torch.testing.assert_close(second, model(ids).logits[:, 10:])


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma3", "Phi3", "T5"])
def test_bfloat16_autocast(name, generator):
    def in_autocast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            results = step(model, batch)
        return results

    hold_to_float64(name, generator, of_step=in_autocast)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, generator):
    model, batch = drawn("Mistral", SMALL, generator), batch_of("Mistral", SMALL, generator, "right")
    ours = served("Mistral", SMALL, model).train()
    plain = {name: t.clone() for name, t in step(ours, batch).items()}
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, t in step(ours, batch).items():
        assert t.equal(plain[name]), name


def test_training_goes_as_before(generator):
    """Ten steps of AdamW end at the same loss, up to rounding."""
    losses = []
    model = drawn("GPT-2", SMALL, generator)
    batch = batch_of("GPT-2", SMALL, generator)
    for trained in (copied("GPT-2", SMALL, model), served("GPT-2", SMALL, model, loss=True)):
        optimizer = torch.optim.AdamW(trained.train().parameters(), lr=1e-3)
        for _ in range(10):
            loss = step(trained, batch)["loss"]
            optimizer.step()
        losses.append(loss)
    torch.testing.assert_close(*losses)


def test_the_tables(monkeypatch, tmp_path, capsys, generator):
    """bench.families writes what it prints, and what nothing serves has a share of 0."""
    model = drawn("nanoGPT", SMALL, generator)
    assert share(model, model, batch_of("nanoGPT", SMALL, generator)) == 0.0
    page, old = tmp_path / "models.md", tables.PAGE.read_text(encoding="utf-8")
    page.write_text(old, encoding="utf-8")
    monkeypatch.setattr(tables, "PAGE", page)
    argv = ["families", "--families", "nanoGPT", "--seconds", "0", "--tables", "speed", "--write"]
    monkeypatch.setattr("sys.argv", argv)
    tables.main()
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.startswith("| nanoGPT"))
    assert [cell.strip() for cell in line.split("|")][2:5] == ["100.0%", "", ""] and line.endswith("| yes |")
    new = page.read_text(encoding="utf-8")
    assert printed.strip() in new and new.count("| Llama") == old.count("| Llama") - 1
    with pytest.raises(ValueError, match="has no place for the table speed"):
        tables.with_table("no table", "speed", "")


# ------------------------------------------------------------------------------- ways to train
def hold(ratio):
    """The largest error of a few random models may be ours by luck, but not three times."""
    assert any(ratio() <= 2.0 for _ in range(3))


@pytest.mark.parametrize("way", [name for name in ways.WAYS if name not in ("padding", "torch.compile")])
@pytest.mark.parametrize("name", FAMILIES)
def test_ways_to_train(way, name, generator):
    """Autocast, checkpointing and LoRA, each as exact as PyTorch in the same way of training."""
    hold(lambda: float(ways.cell(ways.WAYS[way], name, SMALL, generator) or 0.0))


@pytest.mark.slow  # a minute a family
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_by_inductor(name, generator):
    def ratio():
        error, graphs = ways.cell(ways.WAYS["torch.compile"], name, SMALL, generator).split(", graphs ")
        ours, theirs = map(int, graphs.split(" / "))
        assert ours <= theirs
        return float(error)

    hold(ratio)


@pytest.mark.parametrize("name, count", [("Llama", 2), ("T5", 4), ("Whisper", 4), ("nanoGPT", 2)])
def test_the_layers_that_are_sharded(name, count, generator):
    """Those of the encoder and of the decoder, not what lists of modules in them hold."""
    found = [type(layer).__name__ for layer in parallel._layers(drawn(name, SMALL, generator))]
    assert len(found) == count and all("Block" in name or "Layer" in name for name in found)


@pytest.mark.parametrize("how", parallel.WRAPPERS)
def test_two_processes(how):
    """DDP and FSDP2 train to the same loss as PyTorch, with no more memory, and with DDP without that of the logits."""
    run = parallel.run(how, "Llama", Size(vocabulary=4096, length=64), steps=3)
    torch.testing.assert_close(*map(torch.tensor, run.losses))
    theirs, ours = run.bytes
    assert 0 < ours < theirs * {"DDP": 0.9, "FSDP2": 1.1}[how]


# ------------------------------------------------------------------------------- files, adapters, the report
def test_save_pretrained(tmp_path, generator):
    """The files are those of the model as it was."""
    from transformers import AutoModelForCausalLM

    model, batch = drawn("Llama", SMALL, generator).eval(), batch_of("Llama", SMALL, generator)
    served("Llama", SMALL, model, loss=True).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "LlamaForCausalLM" in text and "pygpt" not in text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded(**batch).logits.equal(model(**batch).logits)


def test_adapters(generator):
    """LoRA on Conv1D before and after patch; merged, the adapters give what they gave beside the weights."""
    from peft import LoraConfig, get_peft_model

    model, batch = drawn("GPT-2", SMALL, generator).eval(), batch_of("GPT-2", SMALL, generator)
    config = {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    results = []
    for first in (False, True):
        torch.manual_seed(0)
        ours = copied("GPT-2", SMALL, model)
        if first:
            pygpt.patch(ours)
        ours = get_peft_model(ours, LoraConfig(**config)).eval()
        for name, p in ours.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(p, std=0.1)
        assert "linear" in pygpt.patch(ours).served.values()
        ours(**batch).loss.backward()
        assert all((p.grad is not None) == ("lora" in name) for name, p in ours.named_parameters())
        results += [ours(**batch).logits, ours.merge_and_unload()(**batch).logits]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_the_report_names_torchs_attention(generator):
    model = drawn("Whisper", SMALL, generator)
    report = pygpt.patch(model)
    assert 'not the model: attention runs on "sdpa"; after pygpt.integrations.transformers.register()' in str(report)
    assert sum("attention runs" in reason for reason in report.left.values()) == 1
    integration.register()
    model.set_attn_implementation("pygpt")
    assert "attention runs" not in str(pygpt.patch(model))


def test_the_loss_of_other_models_is_refused(generator):
    for name, family in FAMILIES.items():
        if not family.loss_head:
            model = drawn(name, SMALL, generator)
            classes = [type(m) for m in model.modules()]
            with pytest.raises(ValueError, match="leave out loss=True"):
                pygpt.patch(model, loss=True)
            assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(
    "other", [{"logits_to_keep": 2}, {"return_dict": False}, {"loss_function": True}, {"num_items_in_batch": 7}]
)
def test_calls_of_a_loss_head(other, generator):
    """What the fused loss does not have gets logits, and the sum over a number of items has none."""
    model, batch = drawn("Llama", SMALL, generator), batch_of("Llama", SMALL, generator)
    ours = served("Llama", SMALL, model, loss=True)
    if other.pop("loss_function", False):
        ours.loss_function = model.loss_function
    else:
        batch |= other
    if "logits_to_keep" in batch:
        batch["shift_labels"] = batch.pop("labels")[:, -2:].contiguous()
        batch["labels"] = batch["shift_labels"]
    got, wanted = ours(**batch), model(**batch)
    torch.testing.assert_close(got[0], wanted[0])
    assert got[1].shape == wanted[1].shape if "num_items_in_batch" not in batch else got.logits is None


# ------------------------------------------------------------------------------- pygpt's own GPT
def test_from_hf(generator):
    """A GPT2LMHeadModel with another eps and another width, and its logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 50, "n_positions": 16, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_inner": 48}
    model = GPT2LMHeadModel(GPT2Config(**sizes, layer_norm_epsilon=1e-2, activation_function="gelu_fast")).eval()
    ids = torch.randint(50, (2, 12), generator=generator)
    copy = pygpt.GPT.from_hf(model).eval()
    assert (copy.config.norm_eps, copy.config.hidden_dim) == (1e-2, 48)
    torch.testing.assert_close(copy(ids, ids)[0], model(ids).logits)


# ------------------------------------------------------------------------------- compile
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_compile_without_graph_breaks(name, generator):
    size = Size(layers=1)
    batch = batch_of(name, size, generator, "left")
    ours = served(name, size, drawn(name, size, generator), loss=True)
    eager = step(ours, batch)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    ours.zero_grad()
    loss = compiled(**batch, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), eager["loss"])
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, eager[f"d{name}"])


# ------------------------------------------------------------------------------- rotary positions
ROTARY = ["Llama", "Qwen3", "Gemma2", "Gemma3", "Mistral", "Phi3", "GPT-NeoX"]


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_positions_are_served(name, generator, monkeypatch):
    """In the patched model only."""
    calls = []
    monkeypatch.setattr(rotary, "rope", lambda *args: calls.append(args) or pygpt.functional.rope(*args))
    model, batch = drawn(name, SMALL, generator), batch_of(name, SMALL, generator)
    ours = served(name, SMALL, model)
    step(model, batch)
    assert calls == []
    step(ours, batch)
    assert len(calls) == SMALL.layers
    pygpt.unpatch(ours)
    step(ours, batch)
    assert len(calls) == SMALL.layers


def test_tables_with_different_halves_are_left_alone(generator):
    model = drawn("Llama", SMALL, generator)

    class InterleavedRotaryEmbedding(torch.nn.Module):
        def forward(self, x, position_ids):
            angles = position_ids[..., None] * torch.linspace(0.1, 1.0, 16)
            return angles.cos(), angles.sin()

    model.model.rotary_emb = InterleavedRotaryEmbedding()
    assert "rope" not in pygpt.patch(model).served.values()


@pytest.mark.parametrize("changes", [{"unsqueeze_dim": 2}, {"wide": True}])
def test_other_calls_of_the_rotary_function_are_theirs(changes, generator):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = (torch.randn(2, 4, 4, 8, generator=generator) for _ in range(2))
    cos, sin = torch.randn(2, 1, 4, 8, generator=generator).repeat(1, 2, 1, 1)
    if changes.pop("wide", False):
        q, k = q.bfloat16(), k.bfloat16()
    wanted = apply_rotary_pos_emb(q, k, cos, sin, **changes)
    for got, of_wanted in zip(
        rotary._ours(apply_rotary_pos_emb, False)(q, k, cos, sin, **changes), wanted, strict=True
    ):
        assert got.dtype == of_wanted.dtype and got.equal(of_wanted)


# ------------------------------------------------------------------------------- masks
CONFIG = {"sliding_window": 4}


def asked(generator=None, **arguments):
    config = type("Config", (), {**CONFIG, **arguments.pop("config", {})})()
    return mask(**{"batch_size": 2, "q_length": 9, "kv_length": 9, "config": config, **arguments})


def padded(S, hidden=3):
    keys = torch.ones(2, S, dtype=torch.bool)
    keys[0, :hidden] = False
    return keys


def test_plain_masks_are_no_tensors():
    window = {"local_size": 4, "mask_function": lambda b, h, q, k: (k <= q) & (k > q - 4)}
    assert asked() is None
    assert asked(attention_mask=torch.ones(2, 9, dtype=torch.bool)) is None
    assert asked(q_length=1, q_offset=8) is None
    assert asked(q_length=3, q_offset=6) == Causal()
    assert asked(**window) == Causal(3) == asked(q_length=3, q_offset=6, **window)
    assert asked(kv_length=4, q_length=4, **window) is None
    found = asked(attention_mask=padded(9), **window)
    assert found.window == 3 and found.keys.equal(padded(9))
    assert asked(attention_mask=padded(9)).window is None


def test_other_patterns_are_tensors():
    chunks = {"local_size": 3, "mask_function": lambda b, h, q, k: (k <= q) & (k // 3 == q // 3)}
    packed = {"allow_is_causal_skip": False, "mask_function": lambda b, h, q, k: (k <= q) & (q // 5 == k // 5)}
    for arguments in (chunks, packed, {"q_length": 3, "q_offset": torch.tensor(6)}, {"q_length": 3, "q_offset": 2}):
        assert isinstance(asked(**arguments), torch.Tensor)
    both = {
        "local_size": 4,
        "config": {"attention_chunk_size": 4},
        "mask_function": lambda b, h, q, k: k // 4 == q // 4,
    }
    assert isinstance(asked(**both), torch.Tensor)
    assert isinstance(asked(q_length=3, q_offset=6, attention_mask=padded(9)), torch.Tensor)


@pytest.mark.parametrize("L", [1, 4, 9])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_means_what_the_mask_says(L, window, hidden, bias, generator):
    """By brute force over the positions."""
    S = 9
    q, k, v = (torch.randn(2, 4 if n == L else 2, n, 8, generator=generator) for n in (L, S, S))
    q, k, v = torch.randn(2, 4, L, 8, generator=generator), k[:, :2], v[:, :2]
    own = torch.arange(S - L, S)[:, None]
    seen = (torch.arange(S) <= own) & (torch.arange(S) >= own - (S if window is None else window))
    keys = padded(S, hidden) if hidden else None
    seen = seen[None, None] if keys is None else seen & keys[:, None, None]
    position_bias = torch.randn(1, 4, L, S, generator=generator) if bias else None
    added = torch.where(seen, 0.0 if position_bias is None else position_bias, -torch.inf)
    module = torch.nn.Module()
    got, _ = attention(module, q, k, v, Causal(window, keys), position_bias=position_bias, scaling=0.3)
    wanted = scaled_dot_product_attention(q, k, v, added.expand(2, 4, L, S), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, wanted.transpose(1, 2))


def test_attention_has_sinks_and_softcap(generator):
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=generator)
    sinks = torch.randn(4, generator=generator)
    got, _ = attention(torch.nn.Module(), q, k, v, None, softcap=2.0, s_aux=sinks, is_causal=False)
    wanted = scaled_dot_product_attention(q, k, v, softcap=2.0, sink=sinks)
    assert got.equal(wanted.transpose(1, 2))


def test_a_causal_flag_without_a_mask_starts_at_the_first_key(generator):
    """As "sdpa" has it: a static cache of which the first L positions are filled."""
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=generator)
    got, _ = attention(torch.nn.Module(), q[:, :, :4], k, v, None)
    wanted = scaled_dot_product_attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], is_causal=True)
    assert got.equal(wanted.transpose(1, 2))


def test_register_twice():
    with contextlib.suppress(KeyError):
        integration.register()
    integration.register()
    from transformers import AttentionInterface, AttentionMaskInterface

    assert AttentionInterface()["pygpt"] is attention and AttentionMaskInterface()["pygpt"] is mask
