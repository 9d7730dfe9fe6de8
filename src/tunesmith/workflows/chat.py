"""Talk to a model: one reply at a time, streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tunesmith.types import Message
from tunesmith.workflows.load import LoadedModel


def trained_system(loaded: LoadedModel) -> str | None:
    """The system message that a run's training rows shared: the tuned model expects it. None where there was none."""
    system = loaded.run.metadata["data"].get("system") if loaded.run else None
    return str(system) if system else None


def reply(
    loaded: LoadedModel,
    history: Sequence[Message],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    on_text: Callable[[str], None] = lambda text: None,
) -> str:
    """The model's answer to `history` (which ends with a user message). Greedy at temperature 0, else sampled.

    `on_text` gets the answer piece by piece as it is generated. Raises DataError if the history cannot be rendered.
    """
    import torch
    from transformers import TextStreamer

    from tunesmith.models.generate import end_tokens

    pieces: list[str] = []

    class Stream(TextStreamer):
        def put(self, value: torch.Tensor) -> None:
            if self.next_tokens_are_prompt or int(value[-1]) not in ends:  # the end token need not be a special one
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            on_text(text)

    forward, tokenizer = loaded.forward, loaded.tokenizer
    ids = torch.tensor([loaded.chat.encode_prompt(history)], device=forward.device)
    ends = end_tokens(forward.base, tokenizer)
    sampling = (
        {"do_sample": True, "temperature": temperature}
        if temperature > 0
        else {"do_sample": False, "temperature": None}
    )
    with torch.no_grad(), forward.autocast():
        forward.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,  # the model's own (Qwen2 has 1.05) would make it answer otherwise than in evaluation
            pad_token_id=ends[0],
            eos_token_id=ends,
            streamer=Stream(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
    return "".join(pieces)
