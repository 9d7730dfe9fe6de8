"""What stands beside a merged model's weights: written as training had it, read back, and refused where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_of import Kind, make_adapter
from command_line import tunesmith
from tiny import CHATML, IM_END, make_tiny_model, make_tokenizer
from trained import copy_run, tiny_base, tiny_run
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ModelError, VerificationError
from tunesmith.export.beside import generation_values, logits_of_whole, template_differences, tokenizer_differences
from tunesmith.export.tensors import Unstreamable
from tunesmith.runs import RunFolder
from tunesmith.workflows import merge as workflow
from tunesmith.workflows.merge import merge

KIND = Kind({"target_modules": ["q_proj"]})


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(tiny_run(tmp_path_factory), tmp_path / "run")


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(file: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


# -- what breaks is found ---------------------------------------------------------------------------------------------


def drop_added_token(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda value: value["added_tokens"].pop(0))


def rename_added_token(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda value: value["added_tokens"][0].update(content="<|other|>"))


def strip_spaces(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda value: value["added_tokens"][0].update(rstrip=True))


def add_prefix_space(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda value: value["pre_tokenizer"].update(add_prefix_space=True))


def other_end_token(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda value: value.update(eos_token="<|im_start|>"))


def alter_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "assistant "))


def drop_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def alter_eos(folder: Path) -> None:
    edit(folder / "generation_config.json", lambda value: value.update(eos_token_id=258))


def drop_eos(folder: Path) -> None:
    edit(folder / "generation_config.json", lambda value: value.pop("eos_token_id"))


def other_type(folder: Path) -> None:
    edit(folder / "config.json", lambda value: value.update(dtype="float16"))


def say_quantized(folder: Path) -> None:
    edit(folder / "config.json", lambda value: value.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))  # fmt: skip


BROKEN: dict[Callable[[Path], None], str] = {
    drop_added_token: "its tokenizer: '<|im_start|>' is ",
    rename_added_token: "its tokenizer: ",
    strip_spaces: "its tokenizer: '<|im_start|>' is cut out as AddedToken(",
    add_prefix_space: "its tokenizer: another pre_tokenizer",
    other_end_token: "its tokenizer: eos_token is '<|im_start|>' instead of '<|im_end|>'",
    alter_template: "its chat template renders ",
    drop_template: "it has no chat template",
    alter_eos: "generation_config.json: eos_token_id is 258 instead of 257",
    drop_eos: "generation_config.json: eos_token_id is None instead of 257",
    other_type: "config.json: dtype is torch.float16 instead of float32",
    say_quantized: "config.json has a quantization_config, and the weights are not quantized",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_what_was_written_wrong_exits_with_one_and_leaves_nothing(
    damage: Callable[[Path], None], run: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = workflow._write_beside

    def damaged(found: Any, folder: Path, *rest: Any) -> None:
        write(found, folder, *rest)
        damage(folder)

    monkeypatch.setattr(workflow, "_write_beside", damaged)
    before = left(run)
    result = tunesmith("merge", run)
    assert (result.code, len(result.problems)) == (1, 1), result.err
    assert BROKEN[damage] in result.problems[0]
    assert result.problems[0].endswith("; nothing was kept")
    assert left(run) == before


def test_what_transformers_loads_is_compared_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config whose rope is another one: the tensors are right, and the model that the folder is computes something else."""
    whole = logits_of_whole

    def changed(folder: Path, *rest: Any) -> torch.Tensor:
        edit(
            folder / "config.json",
            lambda value: value.update(rope_parameters={"rope_type": "default", "rope_theta": 3.0}),
        )
        return whole(folder, *rest)

    monkeypatch.setattr(workflow, "logits_of_whole", changed)
    before = left(run)
    with pytest.raises(VerificationError, match=r"^loaded by transformers, the merged model computes something else"):
        merge(run)
    assert left(run) == before


def test_tensors_that_transformers_finds_no_place_for(run: Path) -> None:
    merge(run)
    path = run / "merged" / "model.safetensors"
    save_file({**load_file(path), "extra": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"unexpected keys: extra; nothing was kept$"):
        logits_of_whole(run / "merged", [[1, 2]], "cpu")


# -- what is written --------------------------------------------------------------------------------------------------


def test_how_it_was_read_back_is_said(run: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = merge(run)
    assert (result["loaded_whole"], result["notes"][: 1 * (way == "streamed")]) == (True, [])
    assert result["bytes"] == sum(t.nbytes for t in load_file(run / "merged" / "model.safetensors").values())
    if way == "streamed":
        monkeypatch.setattr(workflow, "WHOLE_SHARE", 0.0)
        said = tunesmith("merge", run, "--out", run / "again")
        assert said.code == 0
        assert said.out.splitlines()[-1].startswith(
            "the folder was read tensor by tensor; tokenizer, chat template and"
        )
        assert "read back tensor by tensor, and not loaded whole through transformers: it has 0.0 GB" in said.err
        assert not merge(run, run / "third")["loaded_whole"]


@pytest.mark.parametrize(
    "values",
    [
        {"eos_token_id": [257, 258], "pad_token_id": 258, "temperature": 0.6, "do_sample": True, "top_p": 0.9},
        {"eos_token_id": 257, "temperature": 0.6, "top_p": 0.9, "do_sample": False},  # transformers refuses to save that
        {"eos_token_id": [257], "suppress_tokens": [1, 2], "of_its_makers": {"own": True}},
    ],
)  # fmt: skip
def test_the_generation_config_is_the_bases(values: dict[str, Any], way: str, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    base = make_tiny_model(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(values | {"transformers_version": "4.0"}))
    merge(make_adapter(base, tmp_path / "adapter", KIND), tmp_path / "out", dtype="fp32")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == values
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert {key: getattr(found, key) for key in values} == values


def test_without_a_generation_config_the_end_tokens_are_the_configs(way: str, tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", eos_token_id=[257, 256])
    (base / "generation_config.json").unlink()
    merge(make_adapter(base, tmp_path / "adapter", KIND), tmp_path / "out", dtype="fp32")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [257, 256]


def test_an_end_token_that_the_base_does_not_end_at_is_said(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", KIND)
    for ends, notes in ((257, 0), ([256, 257], 0), (258, 1), ([256], 1), (None, 1)):
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        result = merge(adapter, tmp_path / "out" / str(ends), dtype="fp32")
        assert len(result["notes"]) == notes, (ends, result["notes"])
        assert all("not at the tokenizer's end token '<|im_end|>' (257)" in note for note in result["notes"])


def test_a_qlora_run_in_memory_says_what_is_not_measured(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise Unstreamable("the test says so")

    monkeypatch.setattr(workflow, "refuse_unstreamable", refuse)
    run = copy_run(tiny_run(tmp_path_factory, "qlora"), tmp_path / "run")
    result = merge(run)
    assert "kl_of_trained" not in result
    assert any("is not measured: it was merged in memory" in note for note in result["notes"])
    assert "quantization_config" not in json.loads((run / "merged" / "config.json").read_text())


def test_a_generation_config_that_is_damaged_is_named(tmp_path: Path) -> None:
    for text, problem in (("{", "cannot be read"), ("[]", "expected a JSON object")):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ModelError, match=rf"generation_config.json: {problem}"):
            generation_values(tmp_path, None)


def test_new_tokens_go_along(way: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import AutoTokenizer

    run = copy_run(tiny_run(tmp_path_factory, "lora", **{"adapter.new_tokens": ["bin"]}), tmp_path / "run")
    merge(run)
    before, after = (AutoTokenizer.from_pretrained(run / name) for name in ("adapter", "merged"))
    assert before("Which bin?")["input_ids"] == after("Which bin?")["input_ids"]
    assert len(after("bin")["input_ids"]) == 1


def test_a_base_that_is_stored_quantized_is_merged_as_plain_weights(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = make_tiny_model(tmp_path / "plain", hidden=64)
    base = tmp_path / "base"
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, device_map={"": "cpu"}).save_pretrained(
        base
    )
    make_tokenizer().save_pretrained(base)
    adapter = make_adapter(plain, tmp_path / "adapter", KIND)
    result = merge(adapter, tmp_path / "out", model=base, dtype="fp32")
    assert any(note.startswith("its base is stored quantized: the adapter went into") for note in result["notes"])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        untuned: Any
        untuned, over = (AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}) for _ in range(2))
        bare = untuned(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(over, adapter).eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(input_ids=ids).logits
    # bitsandbytes computes in its own way on a CPU; the adapter itself moves the logits a lot further.
    assert (merged - tuned).norm() < 0.1 * (bare - tuned).norm()


# -- several adapters -------------------------------------------------------------------------------------------------


def with_tokens(adapter: Path, *tokens: str) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(adapter)
    return adapter


def test_adapters_of_other_tokenizers_do_not_merge(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", hidden=64)
    one, two, three = (
        make_adapter(base, tmp_path / name, KIND, seed) for seed, name in enumerate(("one", "two", "three"))
    )
    with_tokens(one, "bin", "paper")
    with_tokens(two, "paper", "glass")
    before = left(tmp_path)
    for other, said in (
        (
            two,
            "'bin' is absent instead of id 259, 'glass' is id 260 instead of absent, 'paper' is id 259 instead of id 260",
        ),
        (three, "'bin' is absent instead of id 259, 'paper' is absent instead of id 260"),
    ):
        result = tunesmith("merge", one, other, "--method", "svd", "--out", tmp_path / "out")
        assert (result.code, len(result.problems)) == (2, 1), result.err
        assert f"{other} was trained with another tokenizer than {one}: {said}. A merged" in result.problems[0]
    assert left(tmp_path) == before
    with_tokens(three, "bin", "paper")
    assert merge([one, three], tmp_path / "out", dtype="fp32", method="svd")["notes"] == []


def test_another_template_is_a_note(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", hidden=64)
    one, two = (make_adapter(base, tmp_path / name, KIND, seed) for seed, name in enumerate(("one", "two")))
    (two / "chat_template.jinja").write_text(CHATML.replace("assistant", "helper"))
    notes = merge([one, two], tmp_path / "out", dtype="fp32", method="svd")["notes"]
    assert notes == [f"{two} was trained with another chat template; the merged model has that of {one}"]


# -- the comparisons --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"merges": [("a", "b")]}, "another tokenizer model"),
        ({"adds_bos": True}, "'<|bos|>' is id 259 instead of absent"),
    ],
)
def test_what_tokenizers_differ_in(change: dict[str, Any], said: str) -> None:
    found = tokenizer_differences(make_tokenizer(), make_tokenizer(**change))
    assert any(said in text for text in found), found
    assert tokenizer_differences(make_tokenizer(**change), make_tokenizer(**change)) == []


def test_merges_in_another_order_are_another_model() -> None:
    pairs = [("a", "b"), ("b", "c")]
    one, other = make_tokenizer(merges=pairs), make_tokenizer(merges=[pairs[1], pairs[0]])
    assert tokenizer_differences(one, other) != []


def test_what_a_template_refuses_must_be_refused_again() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML
    chat = ChatFormat(make_tokenizer(chat_template=strict))
    assert template_differences(chat, make_tokenizer(chat_template=strict)) == []
    assert template_differences(chat, make_tokenizer()) == [
        "its chat template renders what the template of training refuses"
    ]
    assert template_differences(ChatFormat(make_tokenizer()), make_tokenizer(chat_template=strict)) == [
        "its chat template renders nothing, and refuses a conversation"
    ]


def test_a_template_that_treats_later_turns_otherwise_is_seen() -> None:
    later = CHATML.replace("message.content + ", "(message.content if loop.index < 4 else 'x') + ")
    (said,) = template_differences(ChatFormat(make_tokenizer()), make_tokenizer(chat_template=later))
    assert said.startswith("its chat template renders ")


def test_a_date_in_the_template_is_no_difference() -> None:
    dated = "{{ strftime_now('%H:%M:%S') }}" + CHATML
    assert (
        template_differences(ChatFormat(make_tokenizer(chat_template=dated)), make_tokenizer(chat_template=dated)) == []
    )


def test_settings_of_the_template_go_along(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`data.chat_template_kwargs` become the saved template's defaults: whoever loads the folder renders as in training."""
    from transformers import AutoTokenizer

    named = tmp_path / "named.jinja"
    named.write_text("{% if polite %}Please. {% endif %}" + CHATML)
    values = {"data.chat_template": str(named), "data.chat_template_kwargs": {"polite": True}}
    run = copy_run(tiny_run(tmp_path_factory, "lora", **values), tmp_path / "run")
    assert RunFolder.open(run).metadata["chat_template"]["variables"] == {"polite": True}
    merge(run)
    found = AutoTokenizer.from_pretrained(run / "merged").apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False
    )
    assert found == f"Please. <|im_start|>user\na{IM_END}\n"


def test_the_whole_model_is_computed_in_fp32(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two bf16 forwards differ by percents; weights of one module at a time become fp32, and bf16 again."""
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path_factory), dtype=torch.bfloat16)
    model.save_pretrained(base)
    ids = list(range(40))
    with torch.no_grad():
        expected = model.float().eval()(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of_whole(base, [ids], "cpu"), expected, rtol=1e-4, atol=1e-4)
