"""What stands beside a model's weights, read back and compared: tokenizer, chat template, generation config, config.

A merged model whose weights are right still answers wrongly with a token that lost its id, a template that renders otherwise, or an end
token that is no longer one. Each is read from the written folder by transformers, and compared with what training used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.chat import ChatFormat
from tunesmith.errors import DataError, ModelError, VerificationError
from tunesmith.export.large import LookUp, in_rows, is_large_embedding, is_large_linear
from tunesmith.types import Message

GENERATION = "generation_config.json"

DIFFICULT = (
    "I'll, we'VE and they're — “naïve” café №½; 3.14159 + 1,000,000 = 2026年11月27日?\n\n\n"
    "\tdef f(x):\r\n        return x**2  # twice\t\t\n"
    "오늘 날씨가 어때요? 你好，世界！ Привет, мир! שלום नमस्ते ไทย\n"  # noqa: RUF001
    "🚀👩‍👩‍👧‍👦🏳️‍🌈 x\u00a0y\u200bz   end  "
)
"""Contractions in both cases, numbers, runs of spaces and line ends, scripts with and without spaces, joined emoji."""

NAMED = 5
"""How many differing tokens a message names."""


def refuse_unlike(folder: Path, tokenizer: Any, chat: ChatFormat, generation: Mapping[str, Any], dtype: str) -> None:
    """Raise VerificationError unless a written folder has this tokenizer, this chat template, these values for generation, and a config.json
    of weights in `dtype` that are not quantized.
    """
    from transformers import AutoConfig

    try:
        wrong = text_differences(folder, tokenizer, chat, generation)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(
            f"the merged model does not load back: {' '.join(str(error).split())}; nothing was kept"
        ) from error
    if str(config.dtype).removeprefix("torch.") != dtype:
        wrong.append(f"config.json: dtype is {config.dtype} instead of {dtype}")
    if getattr(config, "quantization_config", None) is not None:
        wrong.append("config.json has a quantization_config, and the weights are not quantized")
    if wrong:
        raise VerificationError(f"the merged model is not what was trained: {'; '.join(wrong)}; nothing was kept")


def text_differences(folder: Path, tokenizer: Any, chat: ChatFormat, generation: Mapping[str, Any]) -> list[str]:
    """What of a written folder is other than this tokenizer, this chat template and these values for generation. Raises what transformers does
    where they do not load.
    """
    from transformers import AutoTokenizer, GenerationConfig

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    written = GenerationConfig.from_pretrained(folder, local_files_only=True) if generation else None
    return [
        *(f"its tokenizer: {text}" for text in tokenizer_differences(tokenizer, found)),
        *template_differences(chat, found),
        *(
            f"{GENERATION}: {key} is {getattr(written, key, None)!r} instead of {value!r}"
            for key, value in generation.items()
            if getattr(written, key, None) != value
        ),
    ]


# -- tokenizers -------------------------------------------------------------------------------------------------------


def tokenizer_differences(expected: Any, found: Any) -> list[str]:
    """What `found` does otherwise than `expected`, one line each; none for tokenizers that give the same ids.

    Compared are the ids of all tokens, how the added ones are cut out, the special tokens by role, the steps between text and tokens
    (normalizer, merges and so on), and the ids of a difficult text, in which control tokens are themselves once and plain text once.
    """
    wrong = []
    ours, theirs = expected.get_vocab(), found.get_vocab()
    changed = [
        f"{token!r} is {_id(theirs, token)} instead of {_id(ours, token)}"
        for token in sorted({*ours, *theirs}, key=lambda token: (ours.get(token, theirs.get(token, 0)), token))
        if ours.get(token) != theirs.get(token)
    ]
    if changed:
        wrong.append(", ".join(changed[:NAMED]) + (f", and {len(changed) - NAMED} more" if changed[NAMED:] else ""))
    for number, token in expected.added_tokens_decoder.items():
        other = found.added_tokens_decoder.get(number)
        if other is not None and repr(other) != repr(token) and str(other) == str(token):
            wrong.append(f"{str(token)!r} is cut out as {other!r} instead of {token!r}")
        elif other is None and str(token) in theirs:
            wrong.append(f"{str(token)!r} is no added token any more")
    for role in sorted({*expected.special_tokens_map, *found.special_tokens_map}):
        one, other = expected.special_tokens_map.get(role), found.special_tokens_map.get(role)
        if one != other:
            wrong.append(f"{role} is {other!r} instead of {one!r}")
    steps, others = _steps(expected), _steps(found)
    wrong += [f"another {name}" for name in steps if steps[name] != others.get(name)]
    if not wrong:
        text = _difficult(expected)
        for options, what in (
            ({}, "control tokens as such"),
            ({"split_special_tokens": True}, "control tokens as text"),
        ):
            if expected(text, **options)["input_ids"] != found(text, **options)["input_ids"]:
                wrong.append(f"other ids for a difficult text ({what})")
    return wrong


def _id(vocabulary: Mapping[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "absent"


def _steps(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's steps by name, without its tokens and what one call changes (truncation, padding)."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = {name: state.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    return steps | {"tokenizer model": {key: value for key, value in state["model"].items() if key != "vocab"}}


def _difficult(tokenizer: Any) -> str:
    """The difficult text, and every added token: alone, between letters, and one after the other."""
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()][:1000]
    return "".join((DIFFICULT, *(f" {token}a{token} \n" for token in tokens), *tokens))


# -- templates --------------------------------------------------------------------------------------------------------


def template_differences(chat: ChatFormat, tokenizer: Any) -> list[str]:
    """Where the template of a written tokenizer renders otherwise than `chat`, or gives other prompts' ids. What both refuse is no difference."""
    if tokenizer.chat_template is None:
        return ["it has no chat template"]
    try:
        found = ChatFormat(tokenizer, "auto", None, chat.rendering.now)
    except (ModelError, DataError) as error:
        return [f"its chat template cannot be used: {error}"]
    for messages in conversations(chat):
        for prompt in (False, True):
            expected = _rendered(chat, messages, prompt)
            texts = [_rendered(found, messages, prompt)]
            if not chat.rendering.prints_date and expected is not None:  # the library's own clock goes on
                texts.append(_by_transformers(tokenizer, messages, prompt))
            for text in texts:
                if text != expected:
                    return [f"its chat template renders {_near(text, expected)}"]
        if messages[-1].role == "user" and _ids(found, messages) != _ids(chat, messages):
            return ["its prompts have other token ids"]
    return []


def conversations(chat: ChatFormat) -> Iterator[list[Message]]:
    """One turn, several, a system message, an answer at the end, texts that are hard to cut and that hold control tokens."""
    tokens = "".join(map(str, chat.tokenizer.all_special_tokens))
    user, answer = Message("user", "What is the capital of France?"), Message("assistant", "Paris.")
    yield [user]
    yield [user, answer]
    yield [Message("system", "You are brief."), user, answer, Message("user", DIFFICULT)]
    yield [user, answer, Message("user", f"What does {tokens} mean?"), Message("assistant", "Nothing <b>here</b>.\n")]
    yield [Message("user", f"  {tokens}a ")]


def _rendered(chat: ChatFormat, messages: Sequence[Message], prompt: bool) -> str | None:
    try:
        return chat.render(messages, prompt)
    except DataError:  # a template may refuse a system message, say
        return None


def _by_transformers(tokenizer: Any, messages: Sequence[Message], prompt: bool) -> str | None:
    from jinja2 import TemplateError

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
    except TemplateError:
        return None


def _ids(chat: ChatFormat, messages: Sequence[Message]) -> list[int] | None:
    try:
        return list(chat.encode_prompt(messages))
    except DataError:
        return None


def _near(text: str | None, expected: str | None) -> str:
    if text is None or expected is None:
        return "what the template of training refuses" if expected is None else "nothing, and refuses a conversation"
    at = next(
        (place for place, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b),
        min(len(text), len(expected)),
    )
    start = max(0, at - 20)
    return f"{text[start : at + 20]!r} instead of {expected[start : at + 20]!r}"


# -- generation -------------------------------------------------------------------------------------------------------


def generation_values(base: Path, config: Any) -> dict[str, Any]:
    """What a base says of generation, for the merged model: its generation_config.json, else the end tokens of its config.

    Raises ModelError for a file that is no JSON object.
    """
    path = base / GENERATION
    if not path.is_file():
        values = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {key: value for key, value in values.items() if value is not None}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return {key: value for key, value in found.items() if key not in ("transformers_version", "_from_model_config")}


# -- the whole model --------------------------------------------------------------------------------------------------


def logits_of_whole(folder: Path, prompts: Sequence[Sequence[int]], device: torch.device | str) -> torch.Tensor:
    """Logits (tokens, vocabulary) of a folder as transformers loads it, in the type that its config names, computed in fp32.

    Weights become fp32 while their module computes, so that memory holds them once. Raises VerificationError where tensors are missing, left over
    or of other shapes.
    """
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map={"": str(device)}, use_safetensors=True, local_files_only=True,
        attn_implementation="eager", output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[key]:
            names = ", ".join(sorted(map(str, report[key]))[:3])
            raise VerificationError(
                f"the merged model does not load back: {key.replace('_', ' ')}: {names}; nothing was kept"
            )
    handles = []
    for module in model.eval().modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        stored = [parameter.data for parameter in own]

        def widen(*_: Any, own: Any = own) -> None:
            for parameter in own:
                parameter.data = parameter.data.float()

        def back(*_: Any, own: Any = own, stored: Any = stored) -> None:
            for parameter, values in zip(own, stored, strict=True):
                parameter.data = values

        if is_large_embedding(module):
            look_up = LookUp(module, partial(getattr, module.weight, "data"), torch.device(device), torch.float32)
            handles += [
                module.register_forward_pre_hook(look_up.before),
                module.register_forward_hook(look_up.after, always_call=True),
            ]
        elif is_large_linear(module):
            module.forward = partial(in_rows, weight_VD=module.weight.data, bias_V=module.bias, dtype=torch.float32)
        elif own:
            handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(back, always_call=True)]
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            rows.append(model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits[0].float().cpu())
    return torch.cat(rows)
