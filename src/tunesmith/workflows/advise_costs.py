"""What each way costs over a year, with the prices that were given: training, labelling, serving. Prices are in one currency.

    hours of a run = tokens x epochs / (tokens/s) / 3600, of the rows that are trained on: neither held out nor dropped
    training       = hours x 5 to 10 runs x price of a card an hour x cards
    labelling      = examples x price of an example
    serving        = 365 x requests a day x (input x price + output x price) / 10^6, or a card that is always on:
                     8,760 hours x price an hour

Left out: people's time other than labelling, storage, the index of a retrieval system, and evaluation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from tunesmith.errors import ConfigError
from tunesmith.workflows.advise_data import DataFacts
from tunesmith.workflows.advise_settings import Plan

Way = Literal["prompt", "few_shot", "retrieval", "fine_tune", "retrieval_and_fine_tune"]

RUNS = (5, 10)
"""Runs until the settings are good: a first one, some rates, some epochs, one with mended data."""
HOURS_A_YEAR = 8760
DAYS_A_YEAR = 365

INSTRUCTION_TOKENS = 300
"""Of a prompt that says in words what training would have taught: about a page. A tuned model needs none."""
FEW_SHOT_EXAMPLES = 5
"""Of a few-shot prompt, or one for each label if there are more labels."""
RETRIEVED_TOKENS = 2000
"""Put into each prompt by retrieval: four passages of 500 tokens, a usual setting."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What the user said: prices in any one currency, None where not given.

    `per_hour` of one card of those that train, and of the one that serves what was tuned; tokens are those of a hosted model, by the million.
    """

    per_hour: float | None = None
    labelling_per_example: float | None = None
    requests_per_day: float | None = None
    per_million_input_tokens: float | None = None
    per_million_output_tokens: float | None = None

    @property
    def given(self) -> bool:
        """Whether there is any price."""
        prices = (
            self.per_hour,
            self.labelling_per_example,
            self.per_million_input_tokens,
            self.per_million_output_tokens,
        )
        return any(price is not None for price in prices)

    def check(self) -> None:
        """Raise ConfigError where one price or number does nothing without another."""
        problems = []
        if (self.per_million_input_tokens is None) != (self.per_million_output_tokens is None):
            problems.append(
                "--price-per-million-input-tokens and --price-per-million-output-tokens: only one is given; a request "
                "costs both, so give both, or neither"
            )
        has_tokens = None not in (self.per_million_input_tokens, self.per_million_output_tokens)
        if has_tokens and self.requests_per_day is None:
            problems.append("prices of tokens have no effect without a number of requests; add --requests-per-day N")
        if (
            self.requests_per_day is not None
            and self.per_million_input_tokens is self.per_million_output_tokens is None
        ):
            problems.append(
                "--requests-per-day has no effect without prices of tokens; add --price-per-million-input-tokens and "
                "--price-per-million-output-tokens, or remove it"
            )
        if problems:
            raise ConfigError(problems)


def few_shot_examples(facts: DataFacts) -> int:
    """Examples that a few-shot prompt shows."""
    return max(FEW_SHOT_EXAMPLES, len(facts.labels))


def few_shot_tokens(facts: DataFacts) -> float:
    """Tokens that they add to each prompt."""
    return few_shot_examples(facts) * facts.mean_row_tokens


def cost_model(facts: DataFacts, plan: Plan, prices: Prices) -> dict[str, Any] | None:
    """The costs of every way, with all that they were computed from; None without prices.

    What a missing price or speed leaves unknown is None; labelling without a price counts as done.

    `run`: `tokens`, `epochs`, `tokens_per_second`, `num_gpus`, `hours`, `cost` of one run, `search_hours`, `search_cost` of 5
    and of 10, and `unknown`: why there are no hours, or null. `ways`: for each, `input_tokens` and `output_tokens` of a request, `labelling`, `training` (of 5 and of 10 runs),
    `serving` and `first_year` (least and most; None where one of its parts is unknown). `formulas` has them in words.
    """
    if not prices.given:
        return None
    run = _run(facts, plan, prices)
    # A card that does not train the model is not the one that serves it.
    serving = prices if plan.trains else replace(prices, per_hour=None)
    return {
        "prices": asdict(prices),
        "assumptions": {
            "runs": list(RUNS),
            "instruction_tokens": INSTRUCTION_TOKENS,
            "few_shot_examples": few_shot_examples(facts),
            "retrieved_tokens": RETRIEVED_TOKENS,
            "question_tokens": round(facts.mean_prompt_tokens),
            "answer_tokens": round(facts.mean_answer_tokens),
        },
        "formulas": {
            "hours": "tokens x epochs / tokens_per_second / 3600",
            "training": "hours x 5 to 10 runs x price per hour x number of cards",
            "labelling": "examples x labelling cost per example: all rows where it is trained on, else those of the prompt",
            "serving": "365 x requests per day x (input tokens x price + output tokens x price) / 1,000,000; of what was "
            "tuned, with a price per hour: 8760 x price per hour (one card, always on)",
        },
        "run": run,
        "ways": [_way(way, facts, run, serving) for way in get_args(Way)],
    }


def _run(facts: DataFacts, plan: Plan, prices: Prices) -> dict[str, Any]:
    tokens = round(sum(plan.lengths) * (1 - plan.values.get("data.eval_fraction", 0.0)))
    speed = plan.fit.tokens_per_second if plan.fit and plan.trains else None
    cards = plan.fit.num_gpus if plan.fit else 1
    hours = tokens * plan.epochs / speed / 3600 if speed else None
    cost = hours * cards * prices.per_hour if hours is not None and prices.per_hour is not None else None
    unknown = None
    if not plan.trains:
        unknown = "it does not train on this card"
    elif hours is None:
        unknown = "no card is known that the speed could be predicted for"
    return {
        "tokens": tokens,
        "epochs": plan.epochs,
        "tokens_per_second": speed,
        "num_gpus": cards,
        "hours": hours,
        "cost": cost,
        "search_hours": [runs * hours for runs in RUNS] if hours is not None else None,
        "search_cost": [runs * cost for runs in RUNS] if cost is not None else None,
        "unknown": unknown,
    }


def _way(way: Way, facts: DataFacts, run: dict[str, Any], prices: Prices) -> dict[str, Any]:
    tuned = way in ("fine_tune", "retrieval_and_fine_tune")
    examples = facts.rows if tuned else few_shot_examples(facts) if way == "few_shot" else 0
    inputs = facts.mean_prompt_tokens
    inputs += 0 if tuned else INSTRUCTION_TOKENS
    inputs += few_shot_tokens(facts) if way == "few_shot" else 0
    inputs += RETRIEVED_TOKENS if way in ("retrieval", "retrieval_and_fine_tune") else 0
    per_example = prices.labelling_per_example
    labelling = 0.0 if not examples else examples * per_example if per_example is not None else None
    training = run["search_cost"] if tuned else [0.0, 0.0]
    serving = _serving(inputs, facts.mean_answer_tokens, prices, tuned)
    first_year = None
    if training is not None and serving is not None:
        first_year = [cost + (labelling or 0.0) + serving for cost in training]
    return {
        "way": way,
        "input_tokens": round(inputs),
        "output_tokens": round(facts.mean_answer_tokens),
        "labelling": labelling,
        "training": training,
        "serving": serving,
        "first_year": first_year,
    }


def _serving(inputs: float, outputs: float, prices: Prices, tuned: bool) -> float | None:
    """A year's. A tuned model is served on a card of one's own where that has a price, others where tokens have one."""
    by_token = None
    if prices.requests_per_day is not None:
        assert prices.per_million_input_tokens is not None  # Prices.check
        assert prices.per_million_output_tokens is not None
        request = inputs * prices.per_million_input_tokens + outputs * prices.per_million_output_tokens
        by_token = DAYS_A_YEAR * prices.requests_per_day * request / 1e6
    always_on = HOURS_A_YEAR * prices.per_hour if prices.per_hour is not None else None
    first, second = (always_on, by_token) if tuned else (by_token, always_on)
    return first if first is not None else second
