"""`tunesmith advise`: whether to fine-tune at all, and if so how. The decision that comes before training.

It looks at the data, asks what the data does not show, and answers with reasons of one line each. The rules:

- Facts, and whatever changes, are looked up: retrieval. Training on new facts works worse than retrieving them (Ovadia et
  al., arXiv 2312.05934) and makes a model invent more (Gekhman et al., arXiv 2405.05904).
- Style, format, labels and skills are trained, from about 500 examples on; with fewer, examples in the prompt come first.
- Both, where answers of a trained kind need facts that change.

Where "don't fine-tune" is the answer it says so, and still gives the settings, for who does it all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import DataConfig, RunConfig
from tunesmith.errors import ConfigError
from tunesmith.files import write_atomic
from tunesmith.types import Progress, no_progress
from tunesmith.workflows.advise_card import CardFit
from tunesmith.workflows.advise_costs import Prices, Way, cost_model, few_shot_examples, few_shot_tokens
from tunesmith.workflows.advise_data import DataFacts, is_or_are, read_facts
from tunesmith.workflows.advise_settings import Plan, choose_settings, run_config, run_yaml
from tunesmith.workflows.plan_options import METHOD_NAMES

FEW_EXAMPLES = 500
"""Below this, examples in the prompt come first: it is about where a trained model begins to beat them reliably."""
FEW_SHOT_LIMIT = 4000
"""Tokens. Examples that add more than this to every request are no cheap first try; instructions alone are."""
CORPUS_TOKENS = 1_000_000
"""Plain text of this size teaches a domain's language; a smaller one hardly moves it."""

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Question:
    """What the data does not show. Every question may be answered `unknown`."""

    key: str
    text: str
    allowed: tuple[str, ...]


QUESTIONS = (
    Question("goal", "What should get better?", ("facts", "style", "format", "classification", "skill", "several")),
    Question(
        "knowledge_changes",
        "How often does the knowledge behind the answers change?",
        ("never", "monthly", "weekly", "daily"),
    ),
    Question("metric", "Is there a number that says how good the answers are?", ("yes", "no")),
    Question("latency", "Must answers come fast?", ("no", "tight")),
    Question("output_format", "Must the output follow a strict format?", ("free", "strict")),
    Question("privacy", "Must the data stay on your machines?", ("no", "strict")),
    Question("tasks", "Is it one task?", ("one", "several_related", "several_unrelated")),
)

Ask = Callable[[Question, str], str]
"""Asks one question, given the answer that the data suggests; returns one of `allowed`, or `unknown`."""

KINDS = {
    "style": "a style is shown better than described, and costs no tokens in the prompt once it is trained",
    "format": "a format is learned exactly, and costs no tokens in the prompt once it is trained",
    "classification": "labels are learned well, and a small tuned model often beats a large prompted one",
    "skill": "a skill is learned from worked examples",
    "several": "several goals can be learned, each from rows enough of its own",
}
"""Why what is not facts is worth training, by `goal`."""

HEADLINES: dict[Way, str] = {
    "prompt": "Don't fine-tune: write better instructions first.",
    "few_shot": "Don't fine-tune yet: put examples into the prompt first.",
    "retrieval": "Don't fine-tune: look the facts up (retrieval).",
    "fine_tune": "Fine-tune.",
    "retrieval_and_fine_tune": "Fine-tune, and look the facts up: retrieval and fine-tuning together.",
}

ALTERNATIVES: dict[Way, tuple[tuple[Way, str], ...]] = {
    "prompt": (
        ("few_shot", "once short, typical examples can be picked"),
        ("fine_tune", f"with {FEW_EXAMPLES} examples and more, if instructions do not reach what you need"),
    ),
    "few_shot": (
        ("prompt", "if instructions alone are good enough: each request is shorter"),
        ("fine_tune", f"with {FEW_EXAMPLES} examples and more, or once the longer prompts cost more than training"),
    ),
    "retrieval": (
        ("few_shot", "if the facts fit into the prompt"),
        ("retrieval_and_fine_tune", "if retrieval finds the facts, and the answers still have the wrong form"),
    ),
    "fine_tune": (
        ("few_shot", "measure it first: it is the baseline that training has to beat"),
        ("retrieval_and_fine_tune", "if the answers turn out to need facts that change"),
    ),
    "retrieval_and_fine_tune": (
        ("retrieval", "measure it first: it is the baseline that training has to beat"),
        ("fine_tune", "if the facts no longer change"),
    ),
}

DECIDED = ("max_seq_length", "overlong", "eval_fraction", "mix")
"""`data` settings that are decided here (or, `mix`, say something else than one file)."""


def advise(
    config: RunConfig,
    answers: Mapping[str, str],
    *,
    fit: CardFit | None = None,
    prices: Prices | None = None,
    out: Path | None = None,
    ask: Ask | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Decide on `data.path` and `model.name`, and write the settings to `out` (also where the advice is not to train).

    `answers` by question; the others are asked with `ask`, or assumed: from the data where it shows them, else `unknown`.
    `fit` predicts memory and speed on the card (None: no card is known). Returns what --json prints:

    - `decision`: prompt, few_shot, retrieval, fine_tune or retrieval_and_fine_tune; `headline`, the same in words
      (with the reason, where it does not train on this card)
    - `instead`: what would train, one line each, where that is so
    - `reasons`: one line each, the deciding one first; `alternatives`: `{way, when}` each
    - `answers`: all of them; `assumed`: those that nobody gave
    - `data`: `file, form, rows, distinct_rows, tokens, supervised_tokens, estimated, labels, ...`
    - `settings`: by dotted key, as `load_config` takes them; `settings_reasons`: by the same keys
    - `run_yaml`: the path that was written, or null
    - `fits`: `method`, what `FitResult` has, `usable_gb`, and `tried` (the same by method); null without a card
    - `costs`: see `advise_costs.cost_model`; null without prices

    Raises ConfigError for answers, prices or settings that cannot be, and where `out` exists; DataError for rows with
    errors; ModelError.
    """
    prices = prices or Prices()
    prices.check()
    _refuse_decided(config)
    _check_answers(answers)
    if out is not None and out.exists():
        raise ConfigError(f"{out}: exists already, and is not overwritten; choose another --out, or remove it")
    facts = read_facts(config, progress)
    known, assumed = complete(answers, facts, ask)
    decision, reasons = decide(facts, known)
    reasons += [*_off_the_data(facts, assumed), *remarks(facts, known, decision)]
    plan = choose_settings(facts, config, fit)
    run_config(config, plan)  # raises ConfigError where what the user set contradicts the plan
    headline, instead = HEADLINES[decision], []
    if fit is not None and plan.fit is not None and not plan.trains:
        instead = fit.instead(plan)
        headline = _but_not_here(headline, fit, plan)
    if out is not None:
        write_atomic(out, run_yaml(config, plan, headline))
    return {
        "decision": decision,
        "headline": headline,
        "instead": instead,
        "reasons": reasons,
        "alternatives": [{"way": way, "when": when} for way, when in ALTERNATIVES[decision]],
        "answers": known,
        "assumed": assumed,
        "data": facts.summary(),
        "settings": plan.values,
        "settings_reasons": {setting.key: setting.reason for setting in plan.settings},
        "run_yaml": str(out) if out is not None else None,
        "fits": plan.fits(),
        "costs": cost_model(facts, plan, prices),
    }


def _but_not_here(headline: str, fit: CardFit, plan: Plan) -> str:
    """The headline where what is recommended does not fit the card."""
    assert plan.fit is not None
    method = METHOD_NAMES[plan.values["method"]]
    return f"{headline.rstrip('.')}; but {fit.model} does not train on {fit.target.label}: {method} takes {plan.fit.needs}."


def parse_answers(given: Sequence[str]) -> dict[str, str]:
    """`key=value` texts as answers. Raises ConfigError with one line for each that is none."""
    answers: dict[str, str] = {}
    problems = []
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            problems.append(f"--answers {text}: expected key=value, e.g. --answers goal=style")
        elif key in answers:
            problems.append(f"--answers {text}: `{key}` was answered before ({key}={answers[key]})")
        answers.setdefault(key, value)
    if problems:
        raise ConfigError(problems)
    _check_answers(answers)
    return answers


def _check_answers(answers: Mapping[str, str]) -> None:
    questions = {question.key: question for question in QUESTIONS}
    problems = []
    for key, value in answers.items():
        if key not in questions:
            problems.append(f"--answers {key}={value}: no such question; there are {', '.join(questions)}")
        elif value not in (*questions[key].allowed, UNKNOWN):
            allowed = ", ".join((*questions[key].allowed, UNKNOWN))
            problems.append(f"--answers {key}={value}: expected one of {allowed}")
    if problems:
        raise ConfigError(problems)


def _refuse_decided(config: RunConfig) -> None:
    """Raise ConfigError for settings that the advice is about, or that nothing here reads."""
    given = [key for key in config.model_dump(exclude_unset=True) if key not in ("model", "data")]
    given += [f"data.{name}" for name in DECIDED if name in config.data.model_fields_set]
    problems = [
        f"{key} is what advise decides; remove it, and change it in the run.yaml afterwards (allowed here: model.*, and "
        f"data.* but {', '.join(DECIDED)})"
        for key in given
    ]
    if config.data.max_rows != DataConfig().max_rows and not config.data.streaming:
        problems.append("data.max_rows has no effect on this command, which reads every row; remove it")
    if problems:
        raise ConfigError(problems)


def complete(answers: Mapping[str, str], facts: DataFacts, ask: Ask | None) -> tuple[dict[str, str], dict[str, str]]:
    """(all answers, those of them that were assumed): what was not given is asked, else taken from the data or `unknown`."""
    suggested = _suggested(facts)
    known: dict[str, str] = {}
    assumed: dict[str, str] = {}
    for question in QUESTIONS:
        key = question.key
        answer = answers.get(key)
        if answer is None and ask is not None:
            answer = ask(question, suggested.get(key, UNKNOWN))
        if answer is None or answer == UNKNOWN:
            assumed[key] = suggested.get(key, UNKNOWN)
        known[key] = assumed.get(key) or answer or UNKNOWN
    return known, assumed


def _suggested(facts: DataFacts) -> dict[str, str]:
    """What the rows say about the questions."""
    if facts.json_answers:
        return {"goal": "format", "output_format": "strict"}
    if len(facts.labels) > 1:
        return {"goal": "classification"}
    return {"goal": "facts"} if facts.plain_text else {}


def decide(facts: DataFacts, answers: Mapping[str, str]) -> tuple[Way, list[str]]:
    """The way to go, and why: the first reasons. `answers` has every question's."""
    goal, changes = answers["goal"], answers["knowledge_changes"]
    few = facts.examples < FEW_EXAMPLES
    moving = changes not in ("never", UNKNOWN)
    if goal == "facts":
        return _decide_facts(facts, answers, few, moving)
    if moving:
        why = f"the knowledge changes ({changes}): a trained model knows that of its last training, retrieval today's"
        if goal == UNKNOWN:
            return "retrieval", [why]
        if few:
            too_few = f"{facts.counted} {is_or_are(facts.examples)} too few to train on beside it"
            return "retrieval", [why, f"{too_few}: show some in the prompt"]
        return "retrieval_and_fine_tune", [why, f"{facts.counted} are enough to train the rest: {KINDS[goal]}"]
    if few:
        how_many = f"{facts.counted}: under about {FEW_EXAMPLES}, training seldom beats a good prompt"
        if too_long := _too_long(facts):
            return "prompt", [how_many, too_long]
        return "few_shot", [f"{how_many} with {few_shot_examples(facts)} examples in it"]
    why = "what should get better is not known: facts are better looked up (--answers goal=facts)"
    return "fine_tune", [f"{facts.counted}: enough to learn from", KINDS.get(goal, why)]


def _decide_facts(facts: DataFacts, answers: Mapping[str, str], few: bool, moving: bool) -> tuple[Way, list[str]]:
    changes = answers["knowledge_changes"]
    if changes == "never" and answers["latency"] == "tight" and not few:
        why = "the facts never change, and there is no time to look them up"
        return "fine_tune", [why, f"{facts.counted} to learn them from: test for invented ones (arXiv 2405.05904)"]
    reasons = []
    if moving:
        reasons.append(
            f"the facts change ({changes}): a trained model knows those of its last training, retrieval today's"
        )
    reasons.append(
        "looking facts up beats training on them (arXiv 2312.05934), which also makes a model invent (arXiv 2405.05904)"
    )
    if facts.plain_text and facts.total_tokens >= CORPUS_TOKENS:
        corpus = f"{facts.total_tokens:,} tokens of text"
        return "retrieval_and_fine_tune", [*reasons, f"{corpus} teach the domain's language: train on them beside it"]
    if answers["output_format"] == "strict" and not few:
        enough = f"{facts.counted} are enough to train the strict output format beside it"
        return "retrieval_and_fine_tune", [*reasons, enough]
    return "retrieval", reasons


def _off_the_data(facts: DataFacts, assumed: Mapping[str, str]) -> list[str]:
    """Where a goal that nobody gave comes from."""
    what = {
        "format": "every answer is JSON or a tool call",
        "classification": f"the answers are {len(facts.labels)} labels",
        "facts": "the rows are plain text, which mostly holds facts",
    }
    goal = assumed.get("goal", UNKNOWN)
    return [f"goal={goal} was read off the data: {what[goal]} (else --answers goal=...)"] if goal in what else []


def remarks(facts: DataFacts, answers: Mapping[str, str], decision: Way) -> list[str]:
    """Further reasons: what the other answers and the data's faults mean for this decision."""
    tuned = decision in ("fine_tune", "retrieval_and_fine_tune")
    found = []
    if answers["metric"] in ("no", UNKNOWN):
        found.append(
            "without a metric nobody sees whether it got better: keep 100 questions with right answers apart first"
        )
    if answers["tasks"] == "several_unrelated":
        found.append(
            "the tasks are unrelated: look at each on its own; train one adapter for each, over one base, not a mix"
        )
    elif answers["tasks"] == "several_related":
        found.append("related tasks help each other: one model for all, each with its own test questions")
    if answers["latency"] == "tight":
        found.append(
            "latency is tight: a tuned model needs no long prompt; merge the adapter before serving"
            if decision == "fine_tune"
            else "latency is tight: put what is the same in every prompt first, so that the server can cache it"
        )
    if answers["output_format"] == "strict":
        found.append(
            "a strict format: let a grammar constrain the decoding too; it guarantees the syntax, trained or not"
        )
    if answers["privacy"] == "strict":
        found.append("the data may not leave: compare with a model that you host, not with a hosted one")
    if repeated := facts.rows - facts.distinct_rows:
        repeat = "repeats another: it counts" if repeated == 1 else "repeat others: they count"
        found.append(f"{repeated:,} of {facts.rows:,} rows {repeat} once here")
    if facts.conflicts:
        give = "1 row gives" if facts.conflicts == 1 else f"{facts.conflicts:,} rows give"
        found.append(f"{give} a prompt of an earlier row another answer: settle which is right")
    rare = [label for label, count in facts.labels.items() if count < 5]
    if rare and tuned:
        have = f"{len(rare)} of {len(facts.labels)} labels {'has' if len(rare) == 1 else 'have'}"
        found.append(f"{have} fewer than 5 rows: too few to learn, or to measure")
    return found


def _too_long(facts: DataFacts) -> str | None:
    """Why examples do not go into the prompt, or None where they do."""
    tokens = few_shot_tokens(facts)
    limit = min(FEW_SHOT_LIMIT, (facts.context_length or 2 * FEW_SHOT_LIMIT) // 2)
    if tokens <= limit:
        return None
    return f"{few_shot_examples(facts)} examples would add about {tokens:,.0f} tokens to every request (sensible: {limit:,})"
