"""The GLU with LoRA's low-rank terms: kernels against fp64, the reference's backward against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_close_to_fp64

from tunesmith.kernels.glu import Activation, glu, glu_backward, glu_backward_ref, glu_ref

# tokens, features, slot, slots, slot of the down projection (0: none)
SIZES = [(1, 16, 16, 2, 16), (37, 40, 16, 2, 16), (70, 130, 32, 1, 16), (33, 257, 0, 2, 16), (65, 129, 16, 2, 0)]


def problem(
    tokens: int, features: int, slot: int, num_slots: int, down: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Random inputs; the buffer is wider than it must be, and so are the adapter's."""
    generator = torch.Generator().manual_seed(tokens * features)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

    width = 2 * features + num_slots * slot
    return {
        "buffer": draw(tokens, width + 8)[:, :width],
        "b": draw(2 * features, slot, scale=0.3) if slot else None,
        "dact": draw(tokens, features),
        "a_down": draw(down, features, scale=0.3) if down else None,
        "ds_down": draw(tokens, down + 8)[:, :down] if down else None,
    }


def double(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else value.double() for name, value in tensors.items()}


def clone(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(
    size: tuple[int, int, int, int, int], activation: Activation, dtype: torch.dtype, device: torch.device
) -> None:
    _, features, slot, num_slots, _ = size
    given = problem(*size, dtype, device)
    exact = double(given)
    ours = glu(given["buffer"], given["b"], features, slot, num_slots, activation)
    plain = glu_ref(given["buffer"], given["b"], features, slot, num_slots, activation)
    assert_close_to_fp64("y", ours, plain, glu_ref(exact["buffer"], exact["b"], features, slot, num_slots, activation))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backward(
    size: tuple[int, int, int, int, int], activation: Activation, dtype: torch.dtype, device: torch.device
) -> None:
    tokens, features, slot, num_slots, _ = size
    given = problem(*size, dtype, device)

    def backward(function: Any, tensors: dict[str, Any]) -> dict[str, torch.Tensor | None]:
        buffer = clone(tensors["buffer"])
        act = torch.full((tokens, features), float("nan"), dtype=buffer.dtype, device=device)
        db, da = function(
            tensors["dact"],
            buffer,
            tensors["b"],
            features,
            slot,
            num_slots,
            activation,
            tensors["a_down"],
            tensors["ds_down"],
            act,
        )
        return {"buffer": buffer, "act": act, "db": db, "da_down": da}

    ours, plain = backward(glu_backward, given), backward(glu_backward_ref, given)
    exact = backward(glu_backward_ref, double(given))
    for name, value in exact.items():
        if value is None:
            assert ours[name] is None
            continue
        result, reference = ours[name], plain[name]
        assert result is not None
        assert reference is not None
        if name == "buffer":  # gradients and dS have different sizes: each is held to its own
            for part, columns in (("dgate, dup", slice(0, 2 * features)), ("dS", slice(2 * features, None))):
                if value[:, columns].numel():
                    assert_close_to_fp64(part, result[:, columns], reference[:, columns], value[:, columns])
        else:
            # dB and dA come from sums over 16-bit values: compare in that type.
            assert_close_to_fp64(name, result.to(dtype), reference.to(dtype), value)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_references_backward_is_autograds(size: tuple[int, int, int, int, int], activation: Activation) -> None:
    tokens, features, slot, num_slots, down = size
    given = problem(*size, torch.float64, torch.device("cpu"))
    leaves = {
        name: given[name].clone().requires_grad_() for name in ("buffer", "b", "a_down") if given[name] is not None
    }
    y = glu_ref(leaves["buffer"], leaves.get("b"), features, slot, num_slots, activation)
    dy = given["dact"]
    if down:
        dy = dy + given["ds_down"] @ given["a_down"]
    y.backward(dy)
    buffer, act = given["buffer"].clone(), torch.empty(tokens, features, dtype=torch.float64)
    db, da = glu_backward_ref(
        given["dact"],
        buffer,
        given["b"],
        features,
        slot,
        num_slots,
        activation,
        given["a_down"],
        given["ds_down"],
        act,
    )
    torch.testing.assert_close(act, y.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(buffer, leaves["buffer"].grad, rtol=1e-10, atol=1e-10)
    if slot:
        torch.testing.assert_close(db, leaves["b"].grad, rtol=1e-10, atol=1e-10)
    if down:
        torch.testing.assert_close(da, given["ds_down"].T @ y.detach(), rtol=1e-10, atol=1e-10)


def test_what_the_kernels_cannot_add_is_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(slot: int) -> None:
        given = problem(4, 16, slot, 2, 0, torch.float32, device)
        glu(given["buffer"], given["b"], 16, slot, 2, "silu")

    def backward(slot: int, down: int) -> None:
        given = problem(4, 16, slot, 2, down, torch.float32, device)
        adapters = given["b"], 16, slot, 2, "silu", given["a_down"], given["ds_down"]
        glu_backward(given["dact"], given["buffer"], *adapters)

    with pytest.raises(ValueError, match="of b has depth 128, above 64: add it with addmm and pass b=None"):
        forward(128)
    for slot in (8, 48):
        with pytest.raises(ValueError, match=f"of b has depth {slot}: expected a power of two from 16 to 64; pad it"):
            forward(slot)
    with pytest.raises(ValueError, match="of b has depth 128, above 64"):
        backward(128, 0)
    with pytest.raises(ValueError, match="of a_down has depth 48: expected a power of two from 16 to 64"):
        backward(16, 48)
    monkeypatch.setattr("tunesmith.kernels.launch.has_tensor_cores", lambda device: False)
    with pytest.raises(ValueError, match="no tensor cores for the low-rank term of b: add it with addmm"):
        forward(16)
    with pytest.raises(ValueError, match=r"no tensor cores for the low-rank term of a_down: .* pass a_down=None"):
        backward(0, 16)
    forward(0)
