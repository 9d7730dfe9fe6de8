"""A `Subject` as the language model that lm-evaluation-harness asks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluation.harness_tasks import check_greedy

if TYPE_CHECKING:
    from tunesmith.evaluation.subject import Subject


def language_model(subject: Subject, aloud: Callable[[], AbstractContextManager[None]]) -> Any:
    """`subject` as the harness's language model. Encodings follow lm_eval/models/huggingface.py, on one row at a time."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
        resolve_max_length,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class SubjectLM(TemplateLM):
        tokenizer = subject.tokenizer
        max_length: int = resolve_max_length(subject.forward.base.config, subject.tokenizer)
        tokenizer_name = str(subject.tokenizer.name_or_path).replace("/", "__")
        eot_token_id: int = subject.tokenizer.eos_token_id
        prefix_token_id: int = eot_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            if add_special_tokens is None:
                add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
            return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return list(super().loglikelihood(requests, disable_tqdm=True))

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            pairs = []
            for (_, continuation), context_ids, ids in requests:
                if not 0 < len(ids) <= self.max_length:
                    raise DataError(
                        f"a task scores {continuation[:80]!r}, which is {len(ids):,} tokens behind its context; the model takes 1 to "
                        f"{self.max_length:,}"
                    )
                # One more than the model reads: the last token is only predicted.
                kept = (context_ids + ids)[-(self.max_length + 1) :]
                pairs.append((kept[: -len(ids)], kept[-len(ids) :]))
            with aloud():
                found = subject.log_likelihoods(pairs, f"task choices of the {subject.name} model")
            return [(likelihood.total, likelihood.greedy) for likelihood in found]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            windows = []
            for number, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                rolled = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
                windows += [(number, make_disjoint_window(window)) for window in rolled]
            with aloud():
                stage = f"task texts of the {subject.name} model"
                found = subject.log_likelihoods([window for _, window in windows], stage)
            totals = [0.0] * len(requests)
            for (number, _), likelihood in zip(windows, found, strict=True):
                totals[number] += likelihood.total
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            asked: dict[int, list[tuple[int, list[int]]]] = {}  # by the limit of new tokens: row, prompt
            stops = []
            eos = self.tokenizer.decode([self.eot_token_id])
            for number, request in enumerate(requests):
                context, settings = request.args
                check_greedy(settings, request.task_name)
                wanted = normalize_gen_kwargs(settings)
                stops.append(handle_stop_sequences(wanted["until"], eos))
                limit = wanted["max_gen_toks"]
                if limit >= self.max_length:
                    raise ConfigError(
                        f"task {request.task_name} asks for answers of up to {limit:,} tokens; the model takes {self.max_length:,} with the "
                        "prompt: lower max_gen_toks in the task file"
                    )
                ids = self.tokenizer.encode(
                    context, add_special_tokens=not has_bos_prefix(context, self.tokenizer.bos_token)
                )
                asked.setdefault(limit, []).append((number, ids[-(self.max_length - limit) :]))
            answers = [""] * len(requests)
            for limit, rows in sorted(asked.items()):
                with aloud():
                    stage = f"task answers of the {subject.name} model"
                    found = subject.generate([ids for _, ids in rows], stage, limit)
                for (number, _), answer in zip(rows, found, strict=True):
                    answers[number] = postprocess_generated_text(answer, stops[number], None)
            return answers

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            import jinja2

            chat = subject.chat
            settings: dict[str, Any] = {
                "chat_template": chat.template,
                "tokenize": False,
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": not add_generation_prompt,
            }
            if chat.now is not None:
                settings["strftime_now"] = chat.now.strftime
            try:
                return str(self.tokenizer.apply_chat_template(chat_history, **settings))
            except jinja2.TemplateError:  # of templates without a system role, as in the harness
                turns = [turn for turn in chat_history if turn["role"] != "system"]
                return str(self.tokenizer.apply_chat_template(turns, **settings))

    return SubjectLM()
