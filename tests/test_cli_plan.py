"""`tunesmith plan` as people run it: what is printed, what --json and --plot hold, and every input that is refused."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole
from rich.text import Text

from command_line import Result, tunesmith
from tiny import chat_rows, write_jsonl
from tunesmith.cli.plan import _hours, _recompute, _verdict, options_table
from tunesmith.config import RunConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.data.formats import read_examples
from tunesmith.data.lengths import recommended_max_seq_length
from tunesmith.data.tokens import tokenize
from tunesmith.measurements import Measurement, record
from tunesmith.models.load import find_model, load_tokenizer
from tunesmith.report.memory_plot import KINDS
from tunesmith.types import Example
from tunesmith.version import __version__
from tunesmith.workflows.plan import rounded
from tunesmith.workflows.plan_data import read_data

QWEN = "qwen2.5-7b"
T4 = ("--model", QWEN, "--gpu", "T4")


@pytest.fixture(autouse=True)
def no_local_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have a card, and something measured on it."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """300 rows of about 1,000 and of about 100 tokens."""
    texts = ["word " * 600, "word " * 60]
    found = [{"prompt": f"question {i}?", "completion": f"{i} {texts[i % 2]}"} for i in range(300)]
    return write_jsonl(tmp_path / "rows.jsonl", found)


def planned(*arguments: str | Path) -> Result:
    return tunesmith("plan", *arguments)


def printed(*arguments: str | Path) -> list[str]:
    """The lines of a plan that fits."""
    result = planned(*arguments)
    assert (result.code, result.problems) == (0, [])
    return result.out.splitlines()


def as_json(*arguments: str | Path) -> dict[str, Any]:
    """What --json prints; nothing else may stand on stdout."""
    result = planned(*arguments, "--json")
    assert (result.code, result.problems) == (0, [])
    value, end = json.JSONDecoder().raw_decode(result.out)
    assert result.out[end:] == "\n"
    assert isinstance(value, dict)
    return value


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def table(lines: list[str]) -> list[list[str]]:
    """The cells of a printed table's rows."""
    return [cells(line) for line in lines if line.startswith("│")]


# -- what is printed --------------------------------------------------------------------------------------------------


def test_the_answer_comes_first() -> None:
    lines, result = printed(*T4), as_json(*T4)
    advice = [f"  {line}" for line in result["advice"]]
    assert len(advice) == 3
    assert lines[: 2 + len(advice)] == [result["answer"], *advice, ""]
    assert lines[0].startswith("Qwen2.5-7B on a T4: QLoRA, micro-batch ")
    parts = ", ".join(f"{name[:-3]} {gb:.2f}" for name, gb in result["breakdown"].items() if gb >= 0.005)
    assert lines[-4:] == [
        "",
        f"peak: {parts} GB (context is the driver's)",
        f"memory: {result['basis']['memory']}",
        f"speed: {result['basis']['speed']}",
    ]


def test_the_table_holds_every_option() -> None:
    lines, result = printed(*T4), as_json(*T4)
    heading = next(line for line in lines if line.startswith("┃"))
    assert cells(heading) == [
        *("method", "tokens", "micro x acc.", "memory", "optimizer", "recompute", "peak GB", "tokens/s", "fits"),
    ]
    assert "Qwen2.5-7B on T4, 14.6 GB" in [line.strip() for line in lines]
    found = table(lines)
    assert len(found) == len(result["options"])
    for row, option in zip(found, result["options"], strict=True):
        label = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}[option["method"]]
        label += " (int8)" if option["scheme"] == "int8" else ""
        assert row[0] == label + (" *" if option == result["recommended"] else "")
        assert row[1:6] == [
            f"{option['max_seq_length']:,}",
            f"{option['micro_batch_size']} x {option['gradient_accumulation_steps']}",
            option["memory_mode"],
            option["optimizer"],
            _recompute(option["recompute"]),
        ]
        held = option["peak_gb"] + option["graphs_gb"]
        tight = "tight" if held > 0.8 * 14.58 else "yes"
        assert row[6:] == [
            f"{held:.1f}",
            rounded(option["tokens_per_second"]),
            tight if option["fits"] else "no",
        ]
    assert {row[-1] for row in found} == {"no", "tight", "yes"}
    assert sum(row[0].endswith("*") for row in found) == 1
    assert "host N: all layers recomputed, the inputs of N of them wait in host memory" in "\n".join(lines)


def test_what_graphs_hold_is_part_of_what_is_shown() -> None:
    arguments = ("--model", "qwen2.5-0.5b", "--gpu", "H100", "--method", "lora", "--max-seq-length", "512")
    lines, chosen = printed(*arguments), as_json(*arguments)["recommended"]
    held = chosen["peak_gb"] + chosen["graphs_gb"]
    assert 0.1 < chosen["graphs_gb"] < 0.3
    assert f" {held:.1f} of 79.2 GB" in lines[0]
    assert table(lines)[0][6] == f"{held:.1f}"
    assert f", CUDA graphs {chosen['graphs_gb']:.2f} GB (context and graphs are the driver's)" in lines[-3]
    # What is tight is so with them.
    result = as_json(*arguments)
    result["options"] = [chosen | {"peak_gb": 40.0, "graphs_gb": 30.0}]
    assert "tight" in coloured(options_table(result))


@pytest.mark.parametrize(
    ("words", "cell"),
    [
        ("none", "none"),
        ("19 of 28 layers", "19 of 28"),
        ("all 28 layers, inputs in host memory", "host 28"),
        ("all 28 layers, inputs of 15 in host memory", "host 15"),
    ],
)
def test_recomputation_in_few_words(words: str, cell: str) -> None:
    assert _recompute(words) == cell


class Terminal(io.StringIO):
    """A stdout that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> list[str]:
    """What a terminal of `width` columns shows, without colours."""
    with monkeypatch.context() as patch:
        patch.setattr("command_line.io.StringIO", Terminal)
        patch.setenv("COLUMNS", str(width))
        out = planned(*arguments).out
    return Text.from_ansi(out).plain.splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seventy = ("--model", "llama-3.1-70b", "--gpu", "H200")
    for arguments in (T4, (*T4, "--set", "data.packing=true"), ("--gpu", "T4"), (*seventy, "--rank", "64,128,1024")):
        lines = on_a_terminal(width, monkeypatch, *arguments)
        rows = lines[next(i for i, line in enumerate(lines) if line.startswith(("━", "─", "┡"))) :]
        rows = [row for row in rows if not row.startswith(("peak: ", "memory: ", "speed: ", "plot: "))]
        assert "…" not in "\n".join(lines)
        assert max(map(len, rows)) <= width
    options = [" ".join(line.split()) for line in on_a_terminal(width, monkeypatch, *T4)]
    result = as_json(*T4)
    for option in result["options"]:
        assert any(
            f"{option['max_seq_length']:,}" in line and rounded(option["tokens_per_second"]) in line for line in options
        )
    if width == 80:
        assert "method tokens micro mode optimizer recompute GB tok/s fits" in options
        assert any(line.startswith("QLoRA 2,048 1 x 16 auto paged 8-bit none ") for line in options)
    models = "\n".join(on_a_terminal(width, monkeypatch, "--gpu", "T4"))
    for row in as_json("--gpu", "T4")["models"]:
        assert row["model"].rpartition("/")[2] in models
    ranks = on_a_terminal(width, monkeypatch, *seventy, "--rank", "64,128,1024")
    assert any(line.strip().startswith("host N: ") for line in ranks)
    for row in as_json(*seventy, "--rank", "64,128,1024")["ranks"]:
        assert any(f"{row['parameters']:,}" in line and rounded(row["tokens_per_second"]) in line for line in ranks)


def test_cells_go_on_in_the_next_line_where_nothing_else_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "…" not in "\n".join(on_a_terminal(40, monkeypatch, *T4, "--set", "data.packing=true"))


def coloured(found: Any) -> str:
    out = io.StringIO()
    RichConsole(file=out, force_terminal=True, color_system="standard", width=200).print(found)
    return out.getvalue()


def test_colours_say_what_fits() -> None:
    text = coloured(options_table(as_json(*T4)))
    for word, code in (("yes", "32"), ("tight", "33"), ("no", "31")):
        assert re.search(rf"\x1b\[[\d;]*{code}m *{word}", text), word
    assert "\x1b[" not in "\n".join(printed(*T4))  # not into a pipe


def test_names_are_not_taken_for_markup(tmp_path: Path) -> None:
    result = as_json(*T4) | {"model": "[red]odd", "gpu": "a[b]"}
    assert "[red]odd on a[b], 14.6 GB" in Text.from_ansi(coloured(options_table(result))).plain


@pytest.mark.parametrize(
    ("option", "fits", "words"), [(11.6, True, "yes"), (11.7, True, "tight"), (11.7, False, "no"), (99.0, False, "no")]
)
def test_tight_is_more_than_four_fifths_of_the_card(option: float, fits: bool, words: str) -> None:
    assert _verdict(option, fits, 14.58)[0] == words


def test_packed_micro_batches_are_in_tokens() -> None:
    lines = printed(*T4, "--set", "data.packing=true")
    assert " micro-batch 2,048 tokens x 16, 2,048 tokens, " in lines[0]
    assert "2,048 tokens x 16" in {row[2] for row in table(lines)}


def test_methods_are_only_those_that_are_asked_for() -> None:
    assert {o["method"] for o in as_json(*T4, "--method", "qlora")["options"]} == {"qlora"}
    both = as_json("--model", QWEN, "--gpu", "H200", "--method", "full", "--method", "lora")
    assert {o["method"] for o in both["options"][:2]} == {"full", "lora"}
    # Settings of a method that is asked for are no contradiction.
    found = as_json(*T4, "--method", "qlora", "--set", "quantization.scheme=fp4")
    assert {o["scheme"] for o in found["options"]} == {"fp4"}
    assert {o["method"] for o in as_json(*T4, "--set", "method=qlora")["options"]} == {"qlora"}


def test_several_cards_and_any_memory() -> None:
    assert printed("--model", QWEN, "--gpu", "4xH100")[0].startswith("Qwen2.5-7B on 4 H100: LoRA, ")
    assert as_json("--model", QWEN, "--gpu", "H100", "--num-gpus", "4")["num_gpus"] == 4
    lines = printed("--model", QWEN, "--memory", "24")
    assert lines[0].startswith("Qwen2.5-7B on 24 GB of GPU memory: ")
    assert "Qwen2.5-7B on 24 GB of GPU memory" in [line.strip() for line in lines]
    assert lines[-1] == "speed: unknown: no card was named"
    assert {row[-2] for row in table(lines)} == {"-"}
    assert as_json(*T4, "--memory", "12")["memory_gb"] == 12


def test_a_model_folder(tiny_model: Path) -> None:
    result = as_json("--model", tiny_model, "--gpu", "T4")
    assert (result["model"], result["parameters"] > 10_000) == ("tiny-llama", True)
    assert result["recommended"]["method"] == "lora"


# -- data, hours, cost ------------------------------------------------------------------------------------------------


def test_hours_for_the_data(rows: Path) -> None:
    arguments = (*T4, "--data", rows, "--set", "training.epochs=2")
    result = as_json(*arguments, "--price-per-hour", "0.5")
    data, chosen = result["data"], result["recommended"]
    assert data["rows"] == 300
    assert 150 * 700 < data["tokens"] < 150 * 1500
    assert chosen["max_seq_length"] == data["longest"] < 1500
    assert chosen["hours"] == pytest.approx(2 * data["tokens"] / chosen["tokens_per_second"] / 3600)
    assert chosen["cost"] == pytest.approx(0.5 * chosen["hours"])
    lines = printed(*arguments, "--price-per-hour", "0.5")
    minutes = f"{60 * chosen['hours']:.0f} minutes"
    assert (data["estimated"], data["epochs"]) == (True, 2)
    expected = f"300 rows, about {data['tokens']:,} tokens: about {minutes} for 2 epochs"
    assert lines[1] == f"{expected}, {chosen['cost']:,.2f} at the price given"
    assert printed(*arguments)[1] == expected
    # A run that its steps end is shorter: 10 steps of 16 rows.
    short = as_json(*arguments, "--set", "training.max_steps=10")
    assert short["data"]["epochs"] == pytest.approx(160 / 300, rel=1e-5)
    assert printed(*arguments, "--set", "training.max_steps=10")[1].endswith(" for 0.533 epochs")
    assert printed(*arguments, "--set", "training.epochs=1")[1].endswith(" for 1 epoch")


def test_the_price_is_of_one_card(rows: Path) -> None:
    arguments = ("--model", QWEN, "--data", rows, "--price-per-hour", "2")
    four = as_json(*arguments, "--gpu", "4xH100")["recommended"]
    assert four["cost"] == pytest.approx(4 * 2 * four["hours"])


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (0.001, "less than a minute"),
        (0.017, "about 1 minute"),
        (0.25, "about 15 minutes"),
        (0.99, "about 59 minutes"),
        (0.995, "about 1.0 hours"),
        (30.26, "about 30.3 hours"),
    ],
)
def test_hours_in_words(hours: float, said: str) -> None:
    assert _hours(hours) == said


def test_rows_are_fitted_as_training_fits_them(rows: Path, tmp_path: Path) -> None:
    whole = as_json(*T4, "--data", rows)["data"]
    for limit in (("--max-seq-length", "256"), ("--set", "data.max_seq_length=256")):
        cut = as_json(*T4, "--data", rows, *limit, "--set", "data.overlong=truncate")
        assert cut["data"]["longest"] == cut["recommended"]["max_seq_length"] == 256
        assert 150 * 256 < cut["data"]["tokens"] < whole["tokens"] / 2
        # Half of the rows are longer.
        dropped = as_json(*T4, "--data", rows, *limit, "--set", "data.overlong=drop")["data"]
        assert (dropped["rows"], dropped["longest"] < 256) == (150, True)
        for overlong in ("auto", "error"):
            result = planned(*T4, "--data", rows, *limit, "--set", f"data.overlong={overlong}")
            problem = (
                f"{rows}: about 150 of 300 rows are longer than data.max_seq_length 256 (the longest has about "
                f"{whole['longest']:,} tokens), and training would refuse them; raise it (--max-seq-length), or set "
                "data.overlong to truncate, split or drop"
            )
            assert (result.code, result.out, result.problems) == (2, "", [f"tunesmith: {problem}"])
        assert as_json(*T4, "--data", rows, *limit, "--set", "data.skip_bad_rows=true")["data"] == dropped
    none = planned(*T4, "--data", rows, "--max-seq-length", "8", "--set", "data.overlong=drop")
    assert (none.code, none.problems) == (2, [f"tunesmith: {rows}: no row is left; all are longer than 8 tokens"])


def test_plain_text_is_split(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("some words of a long book. " * 4000)
    long = as_json(*T4, "--data", text, "--max-seq-length", "100000")["data"]
    split = as_json(*T4, "--data", text)["data"]
    assert (long["rows"], split["longest"], split["rows"]) == (1, 2048, -(-(long["tokens"] - 1) // 2047))
    assert split["tokens"] == long["tokens"] + split["rows"] - 1 > 20_000  # each begins with the last token before it
    kept = as_json(*T4, "--data", text, "--set", "data.overlong=truncate")["data"]
    assert (kept["rows"], kept["tokens"]) == (1, 2048)


def test_auto_is_what_training_makes_of_it(rows: Path) -> None:
    lengths = [*[as_json(*T4, "--data", rows)["data"]["longest"]] * 150, *[100] * 150]
    auto = ("--data", rows, "--set", "data.max_seq_length=auto")
    limit = recommended_max_seq_length(lengths, None)
    packed = as_json(*T4, *auto, "--set", "data.packing=true")["recommended"]
    assert packed["micro_batch_size"] % limit == 0 < limit < 2048  # the budget is of what `auto` came to
    # A micro-batch's tokens are a limit too: longer rows are for data.overlong.
    few = ("--set", "training.micro_batch_tokens=512", "--set", "data.packing=true")
    assert planned(*T4, *auto, *few).problems[0].startswith(f"tunesmith: {rows}: about 150 of 300 rows are longer than")
    assert as_json(*T4, *auto, *few, "--set", "data.overlong=truncate")["data"]["longest"] == 512


def test_rows_beyond_the_models_context_are_refused(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "say it", "completion": "word " * 6000}])
    arguments = ("--model", "01-ai/Yi-6B", "--gpu", "H100", "--data", data)
    problem = "tunesmith: --max-seq-length is 8,192, but the model takes at most 4,096 tokens"
    assert planned(*arguments, "--max-seq-length", "8192").problems == [problem]
    result = planned(*arguments, "--set", "data.max_seq_length=8192")
    assert re.fullmatch(
        rf"tunesmith: {data}: rows of up to 7,\d\d\d tokens, but the model takes at most 4,096; pass "
        "--max-seq-length 4096",
        result.problems[0],
    )
    assert result.code == 2
    cut = as_json(*arguments, "--max-seq-length", "4096", "--set", "data.overlong=truncate")
    assert cut["recommended"]["max_seq_length"] == 4096


@pytest.mark.parametrize("overlong", ["truncate", "drop", "split"])
def test_lengths_are_those_of_the_tokens_that_training_makes(overlong: str, tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "a" * (10 * i)} for i in range(1, 40)])
    settings = {"path": str(data), "overlong": overlong, "max_seq_length": 100, "cache": False}
    config = RunConfig.model_validate({"model": {"name": str(tiny_model)}, "data": settings})
    rows = [row for row in read_examples(config.data).examples if isinstance(row, Example)]
    chat = ChatFormat(load_tokenizer(find_model(config.model), config.model))
    expected = tokenize(chat, rows, config.data).examples.lengths.tolist()
    found, estimated = read_data(config, None)
    assert (list(found.lengths), estimated) == (expected, False)


def test_a_models_own_tokenizer_counts(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "bins.jsonl", chat_rows(16))
    result = as_json("--model", tiny_model, "--gpu", "T4", "--data", data)
    assert result["data"]["tokens"] > 16 * 40  # bytes
    assert result["data"]["estimated"] is False
    assert (
        f"16 rows, {result['data']['tokens']:,} tokens: "
        in planned("--model", tiny_model, "--gpu", "T4", "--data", data).out
    )
    assert result["recommended"]["hours"] is not None


def test_rows_of_a_mix_and_without_those_held_out(rows: Path) -> None:
    mix = f"data.mix=[{{path: {rows}, weight: 1}}]"
    whole = as_json(*T4, "--data", rows)["data"]
    assert as_json(*T4, "--set", mix)["data"] == whole
    held = as_json(*T4, "--set", mix, "--set", "data.eval_fraction=0.1", "--price-per-hour", "2")
    assert held["data"]["rows"] == 270
    assert held["recommended"]["cost"] == pytest.approx(2 * held["recommended"]["hours"])


def test_data_without_a_model_folder_is_planned_without_pytorch(rows: Path) -> None:
    script = (
        "import sys; sys.argv[0] = 'tunesmith'\n"
        "from tunesmith.cli import main\n"
        "try: main()\n"
        "except SystemExit as exit_: print(exit_.code, file=sys.stderr)\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, "plan", *T4, "--data", str(rows)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.stderr.splitlines()[-2:] == ["0", "False"]


# -- RUN.yaml and --set -----------------------------------------------------------------------------------------------


def test_a_run_file_says_what_is_planned(tmp_path: Path, rows: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        f"method: qlora\nmodel: {{name: {QWEN}}}\ndata: {{path: {rows}}}\nadapter: {{r: 64}}\n"
        "training: {batch_size: 8, epochs: 1}\n"
    )
    result = as_json(run, "--gpu", "T4")
    assert {option["method"] for option in result["options"]} == {"qlora"}
    chosen = result["recommended"]
    assert (chosen["micro_batch_unit"], chosen["micro_batch_size"]) == ("tokens", 2048), "rows differ in length"
    padded = as_json(run, "--gpu", "T4", "--set", "data.packing=false")["recommended"]
    assert padded["micro_batch_size"] * padded["gradient_accumulation_steps"] == 8
    assert padded["tokens_per_second"] < chosen["tokens_per_second"]
    assert chosen["adapter_parameters"] == 64 * 28 * (2 * 7168 + 2 * 4096 + 3 * 22528)
    assert result["data"]["rows"] == 300
    assert chosen["hours"] == pytest.approx(result["data"]["tokens"] / chosen["tokens_per_second"] / 3600)
    # The command line comes after the file.
    other = as_json(run, "--gpu", "A10", "--set", "adapter.r=8", "--set", "training.batch_size=4", "--method", "lora")
    assert {option["method"] for option in other["options"]} == {"lora"}
    assert other["options"][0]["adapter_parameters"] == chosen["adapter_parameters"] / 8
    assert as_json(run, "--gpu", "T4", "--model", "qwen2.5-0.5b")["model"] == "Qwen2.5-0.5B"


def test_settings_change_the_plan() -> None:
    least = as_json(*T4, "--set", "memory.mode=min")["recommended"]
    assert (least["memory_mode"], least["recompute_layers"]) == ("min", 28)
    assert as_json(*T4, "--set", "training.micro_batch_size=2")["recommended"]["micro_batch_size"] == 2
    assert as_json(*T4, "--set", "optimizer.name=adamw_8bit")["recommended"]["optimizer"] == "adamw_8bit"


# -- the other questions ----------------------------------------------------------------------------------------------


def test_what_trains_on_a_card() -> None:
    lines, result = printed("--gpu", "T4"), as_json("--gpu", "T4")
    assert lines[0].strip() == "What trains on a T4 (14.6 GB), 2,048 tokens"
    assert (result["gpu"], result["memory_gb"]) == ("T4", 14.58)
    found = {row[0]: row for row in table(lines)}
    models = {row["model"]: row for row in result["models"]}
    assert list(found) == list(models)
    qwen = models["Qwen/Qwen2.5-7B"]["methods"]
    speed = rounded(qwen["qlora"]["tokens_per_second"])
    full = qwen["full"]
    assert full["least_gb"] < 0.9 * full["peak_gb"]
    assert 0.9 * qwen["lora"]["peak_gb"] < qwen["lora"]["least_gb"]
    assert found["Qwen/Qwen2.5-7B"][1:] == [
        "7.6B",
        f"no: {full['peak_gb']:.0f} GB, 8-bit {full['least_gb']:.1f} GB",  # above and below 100
        f"no: {qwen['lora']['peak_gb']:.1f} GB",
        f"tight: {qwen['qlora']['peak_gb']:.1f} GB, {speed}/s",
    ]
    said = "memory: arithmetic on each model's config.json; speed: "
    assert lines[-1] == f"{said}arithmetic on the card's data sheet"
    assert printed("--memory", "8")[-1] == f"{said}unknown: no card was named"
    assert lines[-2] == "no: the least that these settings need; 8-bit: with optimizer.name adamw_8bit"
    assert printed("--gpu", "T4", "--method", "qlora")[-2] == "no: the least that these settings need"
    # Models that take fewer tokens than were asked for say so.
    long = printed("--gpu", "T4", "--method", "qlora", "--max-seq-length", "8192")
    assert long[-2] == "tokens beside a model's name: all that it takes, less than 8,192"
    names = [row[0] for row in table(long)]
    assert "TinyLlama/TinyLlama-1.1B-Chat-v1.0 (2,048)" in names
    assert "Qwen/Qwen2.5-7B" in names
    shorter = printed("--gpu", "T4", "--method", "qlora", "--set", "data.max_seq_length=512")
    assert shorter[0].strip() == "What trains on a T4 (14.6 GB), 512 tokens"
    assert {len(row) for row in table(shorter)} == {3}
    assert printed("--memory", "8", "--max-seq-length", "640")[0].strip() == (
        "What trains on 8 GB of GPU memory, 640 tokens"
    )


def test_where_a_model_trains() -> None:
    lines, result = printed("--model", QWEN), as_json("--model", QWEN)
    assert lines[0].strip() == "Where Qwen2.5-7B trains, 2,048 tokens an example"
    assert result["model"] == "Qwen2.5-7B"
    found = {row[0]: row for row in table(lines)}
    cards = {row["gpu"]: row for row in result["gpus"]}
    assert list(found) == list(cards)
    assert lines[-1] == "memory: arithmetic on the model's config.json; speed: arithmetic on the card's data sheet"
    lora = cards["H100"]["methods"]["lora"]
    # What is tight is so for each card's own memory.
    assert found["H100"][3] == f"yes: {lora['peak_gb']:.1f} GB, {rounded(lora['tokens_per_second'])}/s"
    assert (found["T4"][1], found["T4"][4].partition(":")[0]) == ("14.6", "tight")
    assert {len(row) for row in table(printed("--model", QWEN, "--method", "lora"))} == {3}
    short = printed("--model", "01-ai/Yi-6B", "--method", "lora", "--max-seq-length", "8192")
    assert short[0].strip() == "Where Yi-6B trains, 4,096 tokens an example"


def test_ranks() -> None:
    arguments = ("--model", QWEN, "--gpu", "H100", "--rank", "8,16,128")
    lines, result = printed(*arguments), as_json(*arguments)
    size = result["ranks"][0]["micro_batch_size"]
    assert lines[0].strip() == f"qwen2.5-7b, LoRA, on an H100 (79.2 GB), micro-batch {size} x 2,048 tokens"
    assert lines[-1] == "memory: arithmetic on the model's config.json; speed: arithmetic on the card's data sheet"
    assert (result["model"], result["gpu"], result["method"]) == (QWEN, "H100", "lora")
    assert [row["rank"] for row in result["ranks"]] == [8, 16, 128]
    one = result["ranks"][1]
    assert table(lines)[1] == [
        "16",
        "40,370,176",
        "0.53%",
        "154.0",
        "none",
        f"{one['peak_gb'] + one['graphs_gb']:.2f}",
        rounded(one["tokens_per_second"]),
        "yes",
    ]
    by_tokens = printed(*arguments, "--set", "training.micro_batch_tokens=4096")[0].strip()
    assert by_tokens == "qwen2.5-7b, LoRA, on an H100 (79.2 GB), micro-batch 4,096 tokens"
    assert as_json(*T4, "--rank", "8", "--method", "qlora")["method"] == "qlora"
    assert table(printed(*T4, "--rank", "8"))[0][-1] == "no"
    tight = ("--model", QWEN, "--gpu", "RTX4090", "--rank", "8")
    assert as_json(*tight)["ranks"][0]["peak_gb"] > 0.8 * 23.5
    assert table(printed(*tight))[0][-1] == "tight"
    assert printed(*T4, "--rank", "8", "--set", "data.packing=true")[0].strip() == (
        "qwen2.5-7b, LoRA, on a T4 (14.6 GB), micro-batch 2,048 tokens"
    )
    assert printed("--model", QWEN, "--memory", "40", "--rank", "8")[-1] == (
        "memory: arithmetic on the model's config.json; speed: unknown: no card was named"
    )


# -- calibrated -------------------------------------------------------------------------------------------------------


def test_speeds_that_runs_calibrated() -> None:
    arguments = ("--model", QWEN, "--gpu", "H100", "--method", "lora")
    ranks = (*arguments, "--rank", "8")
    before = as_json(*arguments)["recommended"]["tokens_per_second"]
    slow = as_json(*ranks)["ranks"][0]["tokens_per_second"]
    figures = {"predicted_peak_gb": 20.0, "measured_peak_gb": 19.6, "predicted_tokens_per_second": 1000.0, "steps": 90}
    record(
        Measurement(
            time=1.0, version=__version__, card="H100", engine="fused", method="lora", scheme=None, model_type="llama",
            parameters=8 * 10**9, host=1.0, tokens_per_second=500.0, **figures,
        )
    )  # fmt: skip
    chosen = as_json(*arguments)["recommended"]
    assert chosen["tokens_per_second"] == 0.5 * before
    assert chosen["basis"] == {"memory": "arithmetic", "speed": "calibrated", "runs": 1}
    lines = printed(*arguments)
    assert lines[0].endswith(f", about {rounded(0.5 * before)} tokens/s")
    assert lines[-2].endswith("; 1 run on this card measured 98% of it")
    assert lines[-1] == "speed: calibrated on this card: LoRA by 1 run (0.50 of the arithmetic)"
    # Lists say it of each speed.
    calibrated = "speed: arithmetic on the card's data sheet, calibrated by runs on this card where it says so"
    for other in (ranks, ("--gpu", "H100", "--method", "lora"), ("--model", QWEN, "--method", "lora")):
        assert printed(*other)[-1].endswith(f"; {calibrated}")
    assert table(printed(*ranks))[0][6] == f"{rounded(0.5 * slow)} (calibrated)"
    found = {row[0]: row[2] for row in table(printed("--gpu", "H100", "--method", "lora"))}
    assert found["Qwen/Qwen2.5-7B"].endswith(f", {rounded(0.5 * before)}/s (calibrated)")
    assert found["HuggingFaceTB/SmolLM2-135M"].endswith("/s")
    cards = {row[0]: row[2] for row in table(printed("--model", QWEN, "--method", "lora"))}
    assert [name for name, cell in cards.items() if "calibrated" in cell] == ["H100"]


# -- the plot ---------------------------------------------------------------------------------------------------------


def texts_of(svg: Path) -> list[str]:
    """What an SVG says. matplotlib draws text as shapes, and leaves each one in a comment."""
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    root = ET.parse(svg, parser).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    said = [(element.text or "") for element in root.iter()]
    return [text.strip() for text in said if text.strip()]


def test_an_svg_of_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "plan.svg"
    lines = printed(*T4, "--plot", file)
    assert lines[-1] == f"plot: {file}"
    said, result = texts_of(file), as_json(*T4)
    assert "Qwen2.5-7B on T4: predicted memory, with CUDA's context" in said
    assert "the card: 14.6 GB" in said
    assert "what a plan may fill: 13.2 GB" in said  # 90% of what the context leaves, and the context
    assert {label for label, _ in KINDS.values()} <= set(said)
    for option in result["options"]:
        method = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}[option["method"]]
        method += " (int8)" if option["scheme"] == "int8" else ""
        label = (
            f"{method}, {option['micro_batch_size']} x {option['max_seq_length']:,}, {option['memory_mode']}, "
            f"{option['optimizer']}"
        )
        assert label + (" *" if option == result["recommended"] else "") in said
        total = option["peak_gb"] + option["graphs_gb"] + option["breakdown"]["context_gb"]
        assert f"{total:,.1f}" + (" …" if total > 2 * 14.58 else "") in said


def test_a_png_of_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "plan.png"
    assert as_json(*T4, "--plot", file)["plot"] == str(file)
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
    assert (width, height) == (9 * 150, int((1.9 + 0.42 * 14) * 150))
    assert len(content) > 20_000


def bars_of(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    from tunesmith.report.memory_plot import _bars

    axes = Figure().add_subplot()
    _bars(axes, result["options"], result["memory_gb"])
    return axes


def test_the_bars_stand_end_to_end() -> None:
    result = as_json(*T4)
    axes = bars_of(result)
    for number, option in enumerate(result["options"]):
        bars = [container[number] for container in axes.containers]
        end = 0.0
        for key, bar in zip(KINDS, bars, strict=True):
            part = option["graphs_gb"] if key == "graphs_gb" else option["breakdown"][key]
            assert (bar.get_x(), bar.get_width()) == pytest.approx((end, part))
            end += part
    assert axes.get_xlim() == (0, pytest.approx(2 * 14.58))  # full fine-tuning would need 114 GB
    lines = sorted(line.get_xdata()[0] for line in axes.lines)
    assert lines == pytest.approx([0.85 + 0.9 * (14.58 - 0.85), 14.58])
    # The numbers stand beside the axes, where no line runs through them.
    assert {text.get_position()[0] for text in axes.texts} == {1.01}


def test_bars_are_whole_where_nothing_fits() -> None:
    seventy = planned("--model", "llama-3.1-70b", "--gpu", "T4", "--json")
    axes = bars_of(json.loads(seventy.out))
    totals = [float(text.get_text().replace(",", "")) for text in axes.texts]  # none with an ellipsis
    assert axes.get_xlim()[1] == pytest.approx(1.05 * max(totals), rel=1e-3)
    assert max(totals) > 1000


def test_a_plot_of_what_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "plan.svg"
    assert planned("--model", "llama-3.1-70b", "--gpu", "T4", "--plot", file).code == 3
    assert "full, 16 x 2,048, auto, adamw" in texts_of(file)


def test_a_plot_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    file = tmp_path / "file" / "plan.png"
    result = planned(*T4, "--plot", file)
    problem = f"tunesmith: {file}: cannot be written (File exists); choose another folder"
    assert (result.code, result.out, result.problems) == (2, "", [problem])


# -- nothing fits -----------------------------------------------------------------------------------------------------


def test_an_impossible_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--model", QWEN, "--memory", "3")
    result = planned(*arguments)
    answer, *rest = result.out.splitlines()
    assert answer.startswith("Qwen2.5-7B does not train on 3 GB of GPU memory (3.0 GB): full needs ")
    assert rest[0].startswith("  card: QLoRA of Qwen2.5-7B needs ")
    assert {row[-1] for row in table(rest)} == {"no"}
    assert (result.code, result.problems) == (3, [f"tunesmith: {answer}"])
    # In a terminal the answer stands there once.
    with monkeypatch.context() as patch:
        patch.setattr("command_line.io.StringIO", Terminal)
        shown = planned(*arguments)
    assert (shown.code, shown.out.splitlines()[0], shown.problems) == (3, answer, [])
    result = planned(*arguments, "--json")
    value = json.loads(result.out)
    assert (value["recommended"], value["breakdown"], value["answer"]) == (None, None, answer)
    assert (result.code, result.problems) == (3, [f"tunesmith: {line}" for line in (answer, *value["advice"])])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ("--model", "qwen9", "--gpu", "T4"),
            "qwen9: no such model folder and no known model (a hub id looks like org/model); known models like it: "
            "Qwen/Qwen3-8B, Qwen/Qwen3-4B, Qwen/Qwen2-7B",
        ),
        (
            ("--model", QWEN, "--gpu", "RTX 4099"),
            "no card is called 'RTX 4099': the nearest are RTX 4090, L40, A40; name one of them, or give --memory GB "
            "(where there is no GPU, `tunesmith plan --model NAME` lists all)",
        ),
        (("--model", QWEN, "--gpu", "A100"), "A100 comes with 40 and 80 GB; say A100-40 or A100-80"),
        (
            ("--model", QWEN, "--gpu", "A10,T4"),
            "--gpu names unequal cards (A10, T4): each would hold the whole model and wait for the slowest; plan for the "
            "smaller ones, e.g. --gpu 2xT4",
        ),
        (("--model", QWEN, "--memory", "-3"), "--memory is -3: expected GB above 0"),
        (("--model", QWEN, "--memory", "nan"), "--memory is nan: expected GB above 0"),
        (
            ("--model", QWEN, "--memory", "lots"),
            "Invalid value for '--memory': Input should be a valid number, unable to parse string as a number "
            "(see --help)",
        ),
        (("--model", QWEN, "--num-gpus", "0", "--gpu", "T4"), "--num-gpus is 0: expected at least 1"),
        (
            ("--model", QWEN, "--num-gpus", "2", "--gpu", "4xT4"),
            "--gpu names 4 cards and --num-gpus is 2: leave --num-gpus out",
        ),
        ((*T4, "--method", "dora"), "--method is 'dora': expected lora, qlora or full"),
        ((*T4, "--rank", "abc"), "--rank is 'abc': expected numbers, e.g. 8,16,64"),
        ((*T4, "--rank", ""), "--rank is '': expected numbers, e.g. 8,16,64"),
        ((*T4, "--rank", "8,0"), "--rank 0: expected 1 to 4096"),
        (
            (*T4, "--rank", "8", "--method", "full"),
            "--rank has no effect with method: full, which has no adapter; use --method lora or qlora",
        ),
        (
            (*T4, "--rank", "8", "--method", "lora", "--method", "qlora"),
            "--rank is for one method: pass --method lora or qlora, not both",
        ),
        (
            (*T4, "--max-seq-length", "200000"),
            "--max-seq-length is 200,000, but the model takes at most 131,072 tokens",
        ),
        ((*T4, "--plot", "plan.jpg"), "--plot plan.jpg: expected a name that ends in .png or .svg"),
        ((*T4, "--plot", "plan"), "--plot plan: expected a name that ends in .png or .svg"),
        # Options without an effect.
        (
            ("--gpu", "T4", "--data", "rows.jsonl", "--rank", "8", "--price-per-hour", "1", "--plot", "plan.png"),
            "--data, --rank, --price-per-hour, --plot have no effect without --model",
        ),
        (
            ("--model", QWEN, "--rank", "8"),
            "--rank has no effect without --gpu or --memory",
        ),
        (
            ("--model", QWEN, "--num-gpus", "4"),
            "--num-gpus has no effect without --gpu or --memory",
        ),
        (
            (*T4, "--rank", "8", "--plot", "plan.png"),
            "--plot has no effect with --rank",
        ),
        (
            (*T4, "--price-per-hour", "1"),
            "--price-per-hour has no effect without --data and --gpu, which say for how many hours",
        ),
        ((), "no model and no card: pass --model, --gpu or --memory"),
        (
            (*T4, "--set", "adapter.rank=8"),
            "--set adapter.rank=8: unknown key `adapter.rank`; did you mean `adapter.r`?",
        ),
        (
            (*T4, "--method", "full", "--set", "adapter.r=8"),
            "--set adapter.r=8: adapter.r has no effect with method: full; remove it, or set method: lora",
        ),
        ((*T4, "--data", "missing.jsonl"), "missing.jsonl: no such file"),
        (("missing.yaml", "--gpu", "T4"), "missing.yaml: no such file"),
        (
            ("--model", "./missing", "--gpu", "T4"),
            "./missing: no such model folder and no known model (a hub id looks like org/model)",
        ),
    ],
)
def test_input_that_is_refused(
    arguments: tuple[str, ...], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = planned(*arguments)
    assert result.problems == [f"tunesmith: {problem}"]
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_model_folder_that_is_none(tmp_path: Path) -> None:
    result = planned("--model", tmp_path, "--gpu", "T4")
    assert (result.code, result.problems) == (
        2,
        [f"tunesmith: {tmp_path}: not a model folder (it has no config.json)"],
    )


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(repo: str, file: str) -> str:
        raise OSError(f"{repo}/{file} is gated")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    result = planned("--model", "someone/zzzzz", "--gpu", "T4")
    problem = "someone/zzzzz: its config.json cannot be fetched from the hub (someone/zzzzz/config.json is gated)"
    assert (result.code, result.out, result.problems) == (2, "", [f"tunesmith: {problem}"])


def test_help_names_the_options() -> None:
    result = planned("--help")
    assert result.code == 0
    for name in ("--model", "--gpu", "--memory", "--num-gpus", "--method", "--data", "--rank", "--plot", "--json"):
        assert name in result.out
