"""Modules that train in full beside the adapter, and new tokens: all the way, on models with tied and with own heads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny import chat_rows, make_tiny_model, write_jsonl
from tunesmith.config import RunConfig
from tunesmith.errors import ConfigError, ModelError
from tunesmith.runs import RunFolder
from tunesmith.workflows.evaluate import evaluate
from tunesmith.workflows.load import load
from tunesmith.workflows.merge import merge
from tunesmith.workflows.train import TrainingSession, restart, start

Configure = Callable[..., RunConfig]

BOTH = "adapter.modules_to_save=[lm_head, embed_tokens]"
TOKENS = "adapter.new_tokens=['<|tool|>', '<|call|>']"
VOCABULARY = 259
"""Tokens of the tiny tokenizer: 256 bytes and three control tokens."""

KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "both": ({}, (BOTH,)),
    "both, fused": ({}, (BOTH, "model.engine=fused")),
    "head": ({}, ("adapter.modules_to_save=[lm_head]",)),
    "embeddings, fused": ({}, ("adapter.modules_to_save=[embed_tokens]", "model.engine=fused")),
    "tied": ({"tie_word_embeddings": True}, ("adapter.modules_to_save=[lm_head]",)),
    "tied, by its embeddings, fused": (
        {"tie_word_embeddings": True},
        ("adapter.modules_to_save=[embed_tokens]", "model.engine=fused"),
    ),
    "Gemma 3, tied, fused": (
        {"family": "gemma3_text", "tie_word_embeddings": True, "num_key_value_heads": 2},
        (BOTH, "model.engine=fused"),
    ),
    "norms": ({}, ("adapter.modules_to_save=[norm, input_layernorm]",)),
    "norms, fused": ({}, ("adapter.modules_to_save=[norm, input_layernorm]", "model.engine=fused")),
    "a projection": (
        {},
        ("adapter.modules_to_save=[layers.0.mlp.down_proj]", "adapter.target_modules=attention"),
    ),
    "both, qlora": ({"hidden": 64}, (BOTH, "method=qlora")),
    "tokens": ({}, (TOKENS,)),
    "tokens, fused": ({}, (TOKENS, "model.engine=fused")),
    "tokens without room": ({"vocab": VOCABULARY}, (TOKENS,)),
    "tokens without room, tied": ({"vocab": VOCABULARY, "tie_word_embeddings": True}, (TOKENS,)),
    "tokens, Gemma 3": (
        {"family": "gemma3_text", "tie_word_embeddings": True, "num_key_value_heads": 2},
        (TOKENS, "model.engine=fused"),
    ),
    "tokens and the head": ({"vocab": VOCABULARY}, (TOKENS, "adapter.modules_to_save=[lm_head]")),
    "tokens and both, tied": ({"vocab": VOCABULARY, "tie_word_embeddings": True}, (TOKENS, BOTH)),
    "tokens, qlora": ({"hidden": 64}, (TOKENS, "method=qlora")),
}


class Crash(Exception):
    """Ends a run in the middle of a step's report."""


def tool_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Chats whose questions hold the new tokens, one of them in two, and whose answers hold one."""
    rows = chat_rows(n, seed)
    for number, row in enumerate(rows):
        question, answer = row["messages"]
        question["content"] = f"<|tool|>{question['content']}" if number % 2 else f"<|call|>{question['content']}"
        answer["content"] = f"<|call|>{answer['content']}"
    return rows


@pytest.fixture
def ready(configure: Configure, tmp_path: Path) -> Callable[..., tuple[RunConfig, Path]]:
    def make(kind: str, *more: str) -> tuple[RunConfig, Path]:
        settings, overrides = KINDS[kind]
        base = make_tiny_model(tmp_path / "base", **settings)
        data = write_jsonl(tmp_path / "tools.jsonl", tool_rows(24, seed=1))
        common = ("adapter.r=8", "training.epochs=6", "training.save_every=4", "optimizer.lr=5e-3", f"data.path={data}")
        return configure(*common, *overrides, *more, model=base), base

    return make


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.events() if event["event"] == "step"]


def reloaded(base: Path, adapter: Path, rows: int) -> Any:
    """Base and adapter in transformers and PEFT alone, the base resized as PEFT's documentation says."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if model.get_input_embeddings().num_embeddings < rows:
        model.resize_token_embeddings(rows)
    return PeftModel.from_pretrained(model, adapter).eval()


def logits_of(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 261)[None] % model.config.vocab_size).logits


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_resumes_and_reloads_and_merges(
    ready: Callable[..., tuple[RunConfig, Path]], tmp_path: Path, kind: str
) -> None:
    config, base = ready(kind)
    session = start(config, tmp_path / "whole")
    before = {n: p.detach().clone() for n, p in session.forward.model.named_parameters()}
    session.train()
    run = session.run
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    assert session.plan.memory.engine == ("fused" if "fused" in kind or "Gemma" in kind else "reference")
    trained = {n: p for n, p in session.forward.model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    for name, parameter in session.forward.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name

    crashed = start(config, tmp_path / "crashed")

    def crash(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 6:
            raise Crash

    with pytest.raises(Crash):
        crashed.train(crash)
    restart(tmp_path / "crashed").train()
    assert losses(crashed.run) == losses(run)
    saved, again = (load_file(each.adapter_path / "adapter_model.safetensors") for each in (run, crashed.run))
    assert saved.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in saved.items())

    rows = session.forward.base.config.vocab_size
    ours = logits_of(session.forward.model)
    if config.method == "lora":
        torch.testing.assert_close(logits_of(reloaded(base, run.adapter_path, rows)), ours, rtol=1e-4, atol=1e-4)
    loaded = load(run.path)
    torch.testing.assert_close(logits_of(loaded.forward.model), ours, rtol=1e-4, atol=1e-4)
    merged = merge(run.path)
    assert merged["difference"] < 1e-4
    if config.method == "lora":
        from transformers import AutoModelForCausalLM

        plain: Any = AutoModelForCausalLM.from_pretrained(merged["path"], dtype=torch.float32)
        torch.testing.assert_close(logits_of(plain), ours, rtol=1e-4, atol=1e-4)
        tied = json.loads((base / "config.json").read_text()).get("tie_word_embeddings", False)
        assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    "kind", ["both", "head", "tied", "norms", "Gemma 3, tied, fused", "tokens", "tokens without room, tied"]
)
@pytest.mark.parametrize("packing", [False, True])
def test_both_engines_and_plain_autograd_have_the_same_gradients(
    ready: Callable[..., tuple[RunConfig, Path]], tmp_path: Path, kind: str, packing: bool
) -> None:
    """Of the run's own loss; beside it a cross-entropy of the model's own logits, without our head or layers."""
    from tunesmith.data.batches import make_batch

    found = {}
    for engine in ("reference", "fused"):
        config, _ = ready(kind, f"model.engine={engine}", f"data.packing={packing}")
        session = start(config, tmp_path / engine)
        batch = make_batch(session.data.train[:4], packing, 0, "cpu")
        session.forward.model.train()
        (term,) = session.objective.terms(session.forward, batch)
        term.sum.backward()
        found[engine] = (term.sum.detach(), gradients(session))
    loss, theirs = found["reference"]
    session = start(ready(kind)[0], tmp_path / "plain")
    total = torch.zeros(())
    for example in session.data.train[:4]:
        batch = make_batch([example], False, 0, "cpu")
        logits = session.forward.model(input_ids=batch.input_ids).logits
        total = total + torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="sum")
    total.backward()
    plain = gradients(session)
    torch.testing.assert_close(loss, total.detach(), rtol=1e-5, atol=0)
    assert plain.keys() == theirs.keys() == found["fused"][1].keys()
    assert any(".lora_" not in name for name in plain)
    for name, gradient in plain.items():
        for ours in (theirs[name], found["fused"][1][name]):
            assert (ours - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name
        assert gradient.norm() > 0 or ".lora_A." in name, name


def gradients(session: TrainingSession) -> dict[str, torch.Tensor]:
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad.clone())
        for name, p in session.forward.model.named_parameters()
        if p.requires_grad
    }


def test_a_tied_head_stays_tied_and_is_counted_once(
    ready: Callable[..., tuple[RunConfig, Path]], tmp_path: Path
) -> None:
    session = start(ready("tied")[0], tmp_path / "run")
    base = session.forward.base
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    lora = sum(p.numel() for n, p in session.forward.model.named_parameters() if ".lora_" in n)
    assert session.run.metadata["trainable_parameters"] == lora + 320 * 32
    config = json.loads((session.train() and session.run.adapter_path / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is True


@pytest.mark.parametrize("kind", ["both", "tied", "tokens", "tokens without room, tied"])
def test_the_loss_multiplies_by_the_head_in_use(
    ready: Callable[..., tuple[RunConfig, Path]], tmp_path: Path, kind: str
) -> None:
    """Ours, without all logits at once (kernels/linear_cross_entropy.py); with the adapter off, the base's."""
    session = start(ready(kind)[0], tmp_path / "run")
    head = session.forward.head
    with torch.no_grad():
        for parameter in session.forward.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    x = torch.eye(32)
    for kind_of in ("on", "off"):
        if kind_of == "off":
            session.forward.model.base_model.disable_adapter_layers()
        matrix = session.forward.head_matrix()
        assert matrix is not None
        assert matrix[1] is None
        assert torch.equal(matrix[0].T, head(x))
    own = load_file(tmp_path / "base" / "model.safetensors")
    name = "lm_head.weight" if "lm_head.weight" in own else "model.embed_tokens.weight"
    assert torch.equal(matrix[0][:VOCABULARY], own[name][:VOCABULARY])


def test_names_mean_whole_endings(ready: Callable[..., tuple[RunConfig, Path]], tmp_path: Path) -> None:
    """To PEFT `norm` is every name that ends in it."""
    config, _ = ready("both", "adapter.modules_to_save=[norm]")
    session = start(config, tmp_path / "run")
    names = [n for n, p in session.forward.model.named_parameters() if p.requires_grad and ".lora_" not in n]
    assert names == ["base_model.model.model.norm.modules_to_save.default.weight"]


def test_weight_decay_is_for_matrices(ready: Callable[..., tuple[RunConfig, Path]], tmp_path: Path) -> None:
    config, _ = ready("both", "adapter.modules_to_save=[norm, lm_head]", "optimizer.weight_decay=0.1")
    session = start(config, tmp_path / "run")
    base = session.forward.base
    decay = {id(p): g["weight_decay"] for g in session.optimizer.param_groups for p in g["params"]}
    assert decay[id(base.lm_head.modules_to_save["default"].weight)] == 0.1
    assert decay[id(base.model.norm.modules_to_save["default"].weight)] == 0.0
    assert len(decay) == 3, "LoRA's tensors lie end to end, what is beside them does not"


def test_new_tokens_begin_as_the_mean_and_nothing_else_moves(
    ready: Callable[..., tuple[RunConfig, Path]], tmp_path: Path
) -> None:
    config, base = ready("tokens without room")
    plain = load(base, dtype="fp32").forward.base
    session = start(config, tmp_path / "run")
    ours = session.forward.base
    assert ours.config.vocab_size == VOCABULARY + 2
    for end in ("get_input_embeddings", "get_output_embeddings"):
        weight, own = getattr(ours, end)().weight.cpu(), getattr(plain, end)().weight.cpu()
        torch.testing.assert_close(weight[VOCABULARY:], own.mean(0).expand(2, -1))
        assert torch.equal(weight[:VOCABULARY], own)
    names = [n for n, p in session.forward.model.named_parameters() if p.requires_grad and ".lora_" not in n]
    assert [name.rpartition(".model.")[2] for name in names] == [
        "embed_tokens.token_adapter.trainable_tokens_delta.default",
        "lm_head.token_adapter.trainable_tokens_delta.default",
    ]
    session.train()
    weight = ours.get_input_embeddings().weight.cpu()
    assert torch.equal(weight[:VOCABULARY], plain.get_input_embeddings().weight.cpu())
    assert (weight[VOCABULARY:] - weight[:VOCABULARY].mean(0)).abs().max() > 1e-3


def test_new_tokens_are_in_the_data_the_adapter_and_the_merged_model(
    ready: Callable[..., tuple[RunConfig, Path]], tmp_path: Path, tiny_model: Path
) -> None:
    from transformers import AutoTokenizer

    config, _ = ready("tokens")
    session = start(config, tmp_path / "run")
    seen = [set(example.input_ids.tolist()) for example in session.data.train]
    assert all(VOCABULARY + 1 in ids for ids in seen)
    assert sum(VOCABULARY in ids for ids in seen) == 12
    session.train()
    merged = merge(session.run.path)
    text = "a<|tool|>b<|call|>"
    for folder in (session.run.adapter_path, Path(merged["path"])):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text)["input_ids"]
        assert [i for i in ids if i >= VOCABULARY] == [VOCABULARY, VOCABULARY + 1]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert "<|tool|>" not in AutoTokenizer.from_pretrained(tiny_model).get_vocab()
    assert evaluate(session.run.path, config.data.path)["n"] == 24
    further = start(load_further(config, f"adapter.init_from={session.run.adapter_path}"), tmp_path / "further")
    assert any(VOCABULARY in example.input_ids for example in further.data.train)
    further.train()
    assert (further.run.adapter_path / "tokenizer.json").is_file()


def load_further(config: RunConfig, override: str) -> RunConfig:
    from tunesmith.config import load_config

    values = {
        "model.name": config.model.name,
        "model.dtype": "fp32",
        "model.device": "cpu",
        "data.path": config.data.path,
    }
    return load_config(None, [override, "training.max_steps=2", "training.batch_size=8"], values)


def test_a_token_that_the_data_lacks_is_warned_of(ready: Callable[..., tuple[RunConfig, Path]], tmp_path: Path) -> None:
    session = start(ready("tokens", "adapter.new_tokens=['<|tool|>', '<|none|>']")[0], tmp_path / "run")
    assert (
        "adapter.new_tokens: no training example holds '<|none|>'; nothing teaches what they mean" in session.data.notes
    )


def test_tokens_that_the_data_never_holds_are_refused(
    ready: Callable[..., tuple[RunConfig, Path]], tmp_path: Path
) -> None:
    config, _ = ready("tokens", "adapter.new_tokens=['<|one|>', '<|two|>']")
    with pytest.raises(ConfigError) as caught:
        start(config, tmp_path / "run")
    assert str(caught.value) == (
        "adapter.new_tokens: no training example holds '<|one|>', '<|two|>', so that nothing would be learnt of them; write them "
        "into the data as they are here, or remove the setting"
    )


ENDINGS = (
    "down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, post_attention_layernorm, q_proj, "
    "up_proj, v_proj"
)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            ("adapter.modules_to_save=[head]",),
            f"adapter.modules_to_save: head matches no module of this model that has weights itself; it has {ENDINGS}",
        ),
        (
            ("adapter.modules_to_save=[mlp]",),
            f"adapter.modules_to_save: mlp matches no module of this model that has weights itself; it has {ENDINGS}",
        ),
        (
            ("adapter.modules_to_save=[layers.1.self_attn.q_proj]", "adapter.target_modules=qv"),
            "adapter.modules_to_save: layers.1.self_attn.q_proj is among adapter.target_modules too "
            "(model.layers.1.self_attn.q_proj); it can train in full or through the adapter: take it out of one of the two (here "
            "target_modules means q_proj, v_proj)",
        ),
        (
            ("adapter.modules_to_save=[down_proj]", "adapter.target_modules=qv", "method=qlora"),
            "adapter.modules_to_save: down_proj is quantized (torch.uint8), and cannot train in full; take it out, or set "
            "method: lora",
        ),
        (
            ("adapter.new_tokens=['<|im_end|>']",),
            "adapter.new_tokens: '<|im_end|>' is a token of this model already (id 257); remove it",
        ),
        (("adapter.new_tokens=[a]",), "adapter.new_tokens: 'a' is a token of this model already (id 64); remove it"),
        (("adapter.new_tokens=[ab, ab]",), "adapter.new_tokens: 'ab' is named twice; remove one of them"),
    ],
)
def test_what_cannot_be_is_refused(
    ready: Callable[..., tuple[RunConfig, Path]], tmp_path: Path, settings: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(ModelError) as caught:
        start(ready("both, qlora", "method=lora", "adapter.modules_to_save=[]", *settings)[0], tmp_path / "run")
    assert str(caught.value) == problem


@pytest.mark.parametrize("setting", [BOTH, TOKENS])
def test_what_does_not_go_with_a_beginning_in_the_weights(configure: Configure, setting: str) -> None:
    name = setting.partition("=")[0]
    with pytest.raises(
        ConfigError, match=re.escape(f"{name} cannot be written as a plain adapter with init_lora_weights")
    ):
        configure(setting, "adapter.init_lora_weights=olora")
