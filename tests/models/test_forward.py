"""The model in two halves: hidden states, then logits, for every family that does something of its own to them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiny import make_tiny_model
from tunesmith.config import AdapterConfig, ModelConfig
from tunesmith.data.batches import make_batch
from tunesmith.errors import ModelError
from tunesmith.hardware import ComputeDType, probe
from tunesmith.models.adapters import add_adapter
from tunesmith.models.forward import ModelForward
from tunesmith.models.load import find_model, load_model
from tunesmith.training.prepare import check_forward, prepare
from tunesmith.types import Batch, MemoryPlan, TokenizedExample

CPU = probe("cpu")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # biases
    "qwen3": {},  # query and key norms
    "phi3": {},  # fused projections
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 1.0},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_tiny_model(root / name, family=name, **settings) for name, settings in FAMILIES.items()}


def forward_of(folder: Path, dtype: ComputeDType = "fp32", adapter: bool = False) -> ModelForward:
    config = ModelConfig(name=str(folder))
    model: Any = load_model(find_model(config), config, CPU, dtype)
    if adapter:
        model = add_adapter(model, AdapterConfig(r=4), "base")
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.eval()
    return ModelForward(model, "cpu", dtype)


def example(length: int, seed: int) -> TokenizedExample:
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenizedExample(tuple(ids), (True,) * length)


def packed(*examples: TokenizedExample) -> Batch:
    return make_batch(examples, True, 0, "cpu")


# -- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(folders: dict[str, Path], family: str, adapter: bool) -> None:
    forward = forward_of(folders[family], adapter=adapter)
    batch = packed(example(40, 0))
    with torch.no_grad():
        found = forward.logits(forward.hidden(batch))
        expected = forward.model(input_ids=batch.input_ids).logits
    assert torch.equal(found, expected)
    check_forward(forward, packing=True)


def test_the_scales_are_not_idle(folders: dict[str, Path]) -> None:
    """Were one of them ignored, the test above would have to fail."""
    batch = packed(example(40, 0))
    for family, changed in (("gemma2", {"softcap": None}), ("granite", {"scale": 1.0}), ("cohere", {"scale": 1.0})):
        forward = forward_of(folders[family])
        assert (forward.softcap, forward.scale) == {
            "gemma2": (1.0, 1.0),
            "granite": (None, 0.25),
            "cohere": (None, 0.25),
        }[family]
        vars(forward).update(changed)
        with torch.no_grad():
            expected = forward.model(input_ids=batch.input_ids).logits
            assert (forward.logits(forward.hidden(batch)) - expected).norm() > 0.05 * expected.norm()


def test_logits_are_fp32_whatever_the_compute_type(tiny_model: Path) -> None:
    forward = forward_of(tiny_model, "bf16")
    batch = packed(example(40, 0))
    with torch.no_grad(), forward.autocast():
        hidden = forward.hidden(batch)
        assert (forward.head(hidden).dtype, forward.logits(hidden).dtype) == (torch.bfloat16, torch.float32)
    exact = forward_of(tiny_model)
    with torch.no_grad():
        assert torch.is_autocast_enabled("cpu") is False
        expected = exact.logits(exact.hidden(batch))
        with forward.autocast():
            found = forward.logits(forward.hidden(batch))
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


# -- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_document_cannot_see_another(folders: dict[str, Path], family: str) -> None:
    forward = forward_of(folders[family])
    lengths = (13, 24, 7)
    documents = [example(length, seed) for seed, length in enumerate(lengths)]
    starts = (0, 13, 37)
    with torch.no_grad():
        before = forward.hidden(packed(*documents))[0]
        for place, length in enumerate(lengths):
            changed = list(documents)
            changed[place] = example(length, 100 + place)
            after = forward.hidden(packed(*changed))[0]
            same = (before == after).all(dim=-1)
            own = slice(starts[place], starts[place] + length)
            assert not same[own].any()
            same[own] = True
            assert same.all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_document_gives_the_states_it_gives_alone(folders: dict[str, Path], family: str) -> None:
    forward = forward_of(folders[family])
    documents = [example(13, 0), example(24, 1), example(7, 2)]
    with torch.no_grad():
        together = forward.hidden(packed(*documents))[0].split([13, 24, 7])
        alone = [forward.hidden(packed(document))[0] for document in documents]
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_give_the_states_of_packed_ones(folders: dict[str, Path], family: str) -> None:
    forward = forward_of(folders[family])
    documents = [example(13, 0), example(24, 1)]
    with torch.no_grad():
        first, second = forward.hidden(packed(*documents))[0].split([13, 24])
        padded = forward.hidden(make_batch(documents, False, 260, "cpu"))
    torch.testing.assert_close(padded[0, :13], first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded[1], second, rtol=1e-5, atol=1e-5)


# -- the check before training ----------------------------------------------------------------------------------------


class Leaky(torch.nn.Module):
    """A decoder that ignores positions: packed documents become one."""

    def __init__(self, decoder: torch.nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, position_ids: torch.Tensor, **inputs: Any) -> Any:
        return self.decoder(position_ids=torch.arange(position_ids.shape[1])[None], **inputs)


def test_a_model_that_leaks_between_documents_is_refused(tiny_model: Path) -> None:
    forward = forward_of(tiny_model)
    forward.decoder = Leaky(forward.decoder)
    with pytest.raises(ModelError) as caught:
        check_forward(forward, packing=True)
    assert str(caught.value) == (
        "LlamaForCausalLM lets packed documents see each other; set data.packing: false for this model"
    )
    check_forward(forward, packing=False)


def test_an_unknown_transform_of_the_logits_is_refused(tiny_model: Path) -> None:
    forward = forward_of(tiny_model)
    own = forward.base.forward
    forward.base.forward = lambda **inputs: SimpleNamespace(logits=1.5 * own(**inputs).logits)
    for packing in (True, False):
        with pytest.raises(ModelError) as caught:
            check_forward(forward, packing)
        assert str(caught.value) == (
            "LlamaForCausalLM does something to its logits that tunesmith does not know (its own differ by 33.3%); "
            "this architecture is not supported yet"
        )


def test_logits_that_are_not_numbers_are_refused(tiny_model: Path) -> None:
    forward = forward_of(tiny_model)
    forward.head.weight.data[5] = float("nan")
    with pytest.raises(ModelError, match="does something to its logits"):
        check_forward(forward, packing=True)


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_the_mode_as_it_was(tiny_model: Path, training: bool) -> None:
    forward = forward_of(tiny_model, adapter=True)
    forward.model.train(training)
    check_forward(forward, packing=True)
    assert forward.model.training is training


# -- recomputation ----------------------------------------------------------------------------------------------------


def plan(layers: int, of: int) -> MemoryPlan:
    return MemoryPlan("auto", layers, of, None, None, "test")


def gradients(forward: ModelForward) -> dict[str, torch.Tensor]:
    forward.model.train()
    forward.model.zero_grad()
    batch = packed(example(13, 0), example(24, 1))
    with forward.autocast():
        loss = torch.nn.functional.cross_entropy(forward.logits(forward.hidden(batch))[0], batch.labels[0])
    loss.backward()
    return {name: p.grad.clone() for name, p in forward.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", [True, False])
def test_recomputing_layers_changes_no_gradient(tmp_path: Path, adapter: bool, dtype: ComputeDType) -> None:
    forward = forward_of(make_tiny_model(tmp_path / "model", layers=3), dtype, adapter)
    layers = forward.decoder.layers
    prepare(forward.model, plan(0, 3))
    expected = gradients(forward)
    assert len(expected) == (3 * 7 * 2 if adapter else 30)
    for count in (1, 2, 3, 0):
        prepare(forward.model, plan(count, 3))
        assert [layer.gradient_checkpointing for layer in layers] == [index < count for index in range(3)]
        runs: list[torch.nn.Module] = []
        hooks = [layer.mlp.register_forward_pre_hook(lambda mlp, _, runs=runs: runs.append(mlp)) for layer in layers]
        found = gradients(forward)
        for hook in hooks:
            hook.remove()
        assert [runs.count(layer.mlp) for layer in layers] == [2 if index < count else 1 for index in range(3)]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
