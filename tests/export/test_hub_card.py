"""The card through the hub's own card classes: the header is what was meant, and nothing in it is evaluated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from export.test_hub_card_text import HOSTILE, recorded
from hub_runs import NAME
from tunesmith.export.card import CardRequest, plain, write_card
from tunesmith.export.package import Kind

KINDS: dict[Kind, dict[str, Any]] = {
    "adapter": {"relation": "adapter", "library": "peft", "says": ["PeftModel.from_pretrained(model, adapter)"]},
    "merged": {"relation": "finetune", "library": "transformers", "says": [f"vllm serve {NAME}"]},
    "quantized": {"relation": "quantized", "library": "transformers", "says": [f"vllm serve {NAME}"]},
    "gguf": {"relation": "quantized", "library": "gguf", "says": [f"llama-cli --hf-repo {NAME} --hf-file m.gguf"]},
    "gguf-lora": {"relation": "adapter", "library": "gguf", "says": ["--lora m.gguf"]},
}


def request(kind: Kind, **values: Any) -> CardRequest:
    files = ["m.gguf"] if kind.startswith("gguf") else ["model.safetensors"]
    quantized = {"method": "gptq"} if kind == "quantized" else {}
    return CardRequest(NAME, kind, files, "org/base", "mit", quantized=quantized, **values)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hubs_classes_read_what_was_meant(kind: Kind) -> None:
    card = ModelCard(write_card(request(kind), **recorded()))
    card.data.to_dict()
    assert (card.data.base_model, card.data.license, card.data.pipeline_tag) == ("org/base", "mit", "text-generation")
    assert card.data.library_name == KINDS[kind]["library"]
    assert card.data.to_dict()["base_model_relation"] == KINDS[kind]["relation"]
    assert card.data.tags[:3] == ["tunesmith", "lora", "sft"]
    for text in KINDS[kind]["says"]:
        assert text in card.text
    others = {said for other in KINDS.values() for said in other["says"]} - set(KINDS[kind]["says"])
    assert not [said for said in others if said in card.text]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_a_value_in_the_header(kind: Kind, text: str) -> None:
    values = copy.deepcopy(recorded())
    values["metadata"]["method"] = values["metadata"]["objective"] = text
    values["metadata"]["data"]["path"] = values["metadata"]["model"]["name"] = text
    content = write_card(request(kind), **values)
    card = ModelCard(content)
    assert card.content == content  # nothing was rendered
    assert card.data.to_dict() == yaml.safe_load(content.split("---\n")[1])
    assert plain(text) in card.data.tags
    assert card.data.license == "mit"
    assert "49" not in card.text


def test_of_a_revision_the_commands_name_it() -> None:
    for kind, says in (
        ("adapter", f"hf download {NAME} --revision v2 --local-dir adapter"),
        ("merged", "--revision v2"),
    ):
        assert says in write_card(request(kind, revision="v2"), **recorded())  # type: ignore[arg-type]
    body = write_card(request("gguf", revision="v2", gguf_type="Q8_0"), **recorded())
    assert f"hf download {NAME} m.gguf --revision v2 --local-dir ." in body.splitlines()
    assert "ollama" not in body  # it has no way to name a branch
