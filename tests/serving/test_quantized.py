"""A QLoRA run over a base that is quantized as in training, in a batch with the base."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from serving_models import Asked

from trained import tiny_base, tiny_run
from tunesmith.config import QuantizationConfig
from tunesmith.models.generate import generate_greedy
from tunesmith.serving.adapter_bank import BASE
from tunesmith.serving.engine import Engine
from tunesmith.serving.templates import Templates
from tunesmith.workflows.load import load
from tunesmith.workflows.serve import AdapterReader, load_base

NF4 = QuantizationConfig(scheme="nf4")


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_base(tmp_path_factory, 64), tiny_run(tmp_path_factory, "qlora")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_qlora_adapter_answers_over_the_quantized_base_as_its_run_does(dtype: str, qlora: tuple[Path, Path]) -> None:
    """In bf16 up to near-ties, which a random model has: there the first token is looked at."""
    folder, run = qlora
    loaded = load_base(str(folder), dtype, "cpu", "nf4")
    templates = Templates()
    reader = AdapterReader(loaded, templates, NF4)
    read = reader.read(str(run))
    assert len(read.notes) == (dtype != "fp32")
    engine = Engine(loaded.forward, max_batch=4)
    engine.start()
    number = engine.between_steps(lambda: engine.bank.add(read.weights)).result(20)
    rng = random.Random(2)
    prompts = [[rng.randrange(256) for _ in range(rng.randrange(4, 40))] for _ in range(4)]
    rows = [(prompt, adapter) for prompt in prompts for adapter in (number, BASE)]
    length = 16 if dtype == "fp32" else 1
    found = [Asked(engine, loaded.tokenizer, prompt, adapter, max_tokens=length) for prompt, adapter in rows]
    texts = [one.answer()[0] for one in found]
    engine.stop()
    templates.close()
    tuned = load(run, dtype=dtype)
    for place, prompt in enumerate(prompts):
        ids = generate_greedy(tuned.forward, tuned.tokenizer, [prompt], length, 1)[0]
        assert texts[2 * place] == tuned.tokenizer.decode(ids, skip_special_tokens=True)
        assert dtype != "fp32" or texts[2 * place] != texts[2 * place + 1]
