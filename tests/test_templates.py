"""Stock chat templates, without generation markers: loss on what the assistant says and on the end of its turns."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import trl

from pipeline.data import render
from pipeline.data.tokens import Unrenderable, apply_template, stop_ids

FOLDER = Path(trl.__file__).parent / "chat_templates"
MARKS = r"<[|｜][^<>{}\s]+?[|｜]>|<(?:start|end)_of_turn>|<bos>|<[A-Z_]+_TOKEN>|</?think>|</?tool_call>"
WORDS = r"</?think>|</?tool_call>"
"""Marks that are tokens of their own but not special, so that they may stand in what is said."""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
]
TALK = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello, friend."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Two it is."},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
WORK = [
    {"role": "user", "content": "Add 2"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "4711"},
    {"role": "assistant", "content": "It is done."},
]
END = "<|im_end|>"
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
THOUGHT = "<think>\n\n</think>\n\n"
EOS = {"gptoss": "<|return|>", "deepseekv3": "<｜end▁of▁sentence｜>"}
"""Where the end-of-sequence token is another than the one of the tiny base."""
# What each family has the assistant say, turn by turn, as its template lays it down; None where it refuses tools.
FAMILIES: dict[str, tuple[list[str], list[str] | None]] = {
    "llama3": (["Hello, friend.<|eot_id|>", "Two it is.<|eot_id|>"], None),
    "llama3_1": (
        ["Hello, friend.<|eot_id|>", "Two it is.<|eot_id|>"],
        ['{"name": "add", "parameters": {"a": 2}}<|eot_id|>', "It is done.<|eot_id|>"],
    ),
    "qwen2_5": ([f"Hello, friend.{END}", f"Two it is.{END}"], [f"{QWEN_CALL}{END}", f"It is done.{END}"]),
    # Thoughts are left out of the history, so turns before the last one have none.
    "qwen3": (
        [f"Hello, friend.{END}", f"{THOUGHT}Two it is.{END}"],
        [f"{QWEN_CALL}{END}", f"{THOUGHT}It is done.{END}"],
    ),
    "qwen3_instruct_2507": ([f"Hello, friend.{END}", f"Two it is.{END}"], [f"{QWEN_CALL}{END}", f"It is done.{END}"]),
    "gemma3": (["Hello, friend.<end_of_turn>", "Two it is.<end_of_turn>"], None),
    "phi3": (["Hello, friend.<|end|>", f"Two it is.<|end|>\n{END}"], None),
    "cohere": (["Hello, friend.<|END_OF_TURN_TOKEN|>", "Two it is.<|END_OF_TURN_TOKEN|>"], None),
    "lfm2_v2": (
        [f"Hello, friend.{END}", f"Two it is.{END}"],
        [f"<|tool_call_start|>[add(a=2)]<|tool_call_end|>{END}", f"It is done.{END}"],
    ),
    "gptoss": (
        ["<|channel|>final<|message|>Hello, friend.<|end|>", "<|channel|>final<|message|>Two it is.<|return|>"],
        [
            ' to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>',
            "<|channel|>final<|message|>It is done.<|return|>",
        ],
    ),
    "deepseekv3": (
        ["Hello, friend.<｜end▁of▁sentence｜>", "Two it is.<｜end▁of▁sentence｜>"],
        [
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
            '{"a": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
            "It is done.<｜end▁of▁sentence｜>",
        ],
    ),
    "nemotron_3_nano": ([f"</think>Hello, friend.{END}", f"</think>Two it is.{END}"], None),
}


@pytest.fixture(scope="module")
def plain(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def of_family(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer as the families ship theirs: its marks special in tokenizer.json alone, while tokenizer_config.json
    names only bos, eos and pad; saved, and loaded as a user loads it."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import AutoTokenizer

    @functools.cache
    def shipped(name: str) -> Any:
        folder = tmp_path_factory.mktemp(name)
        template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        engine = Tokenizer.from_str(plain.backend_tokenizer.to_str())
        marks = ["<|begin_of_text|>", *sorted(set(re.findall(MARKS, template)))]
        words = [mark for mark in marks if re.fullmatch(WORDS, mark)]
        engine.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in words])
        special = [mark for mark in marks if mark not in words]
        engine.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in special])
        engine.save(str(folder / "tokenizer.json"))
        roles = {"bos_token": "<|begin_of_text|>", "eos_token": EOS.get(name, END), "pad_token": "<|endoftext|>"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)

    return shipped


def learnt(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    """What carries loss, one text for each unbroken run of tokens."""
    encoded = render.demonstration(tokenizer, row)
    assert (
        encoded.ids == tokenizer(apply_template(tokenizer, row["messages"], row), add_special_tokens=False)["input_ids"]
    )
    runs: list[list[int]] = []
    last = -2
    for place, label in enumerate(encoded.labels):
        if label != render.IGNORED:
            runs = runs if place == last + 1 else [*runs, []]
            runs[-1].append(label)
            last = place
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_learnt_is_what_the_assistant_says(of_family: Any, name: str) -> None:
    tokenizer = of_family(name)
    talk, work = FAMILIES[name]
    assert learnt(tokenizer, {"messages": TALK}) == talk
    if work is not None:
        assert learnt(tokenizer, {"messages": WORK, "tools": TOOLS}) == work


@pytest.mark.parametrize(
    "name", ["llama3", "llama3_1", "qwen2_5", "qwen3_instruct_2507", "gemma3", "cohere", "lfm2_v2"]
)
def test_masks_equal_prefix_differences(of_family: Any, name: str) -> None:
    """Where later turns change nothing of earlier ones: tokens of the prefix through a turn, less those before it."""
    tokenizer = of_family(name)

    def ids(messages: list[dict[str, Any]], ask: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    expected = [render.IGNORED] * len(ids(TALK, False))
    blank = set(tokenizer("\n", add_special_tokens=False)["input_ids"])
    for turn in (1, 3):
        before, through = ids(TALK[:turn], True), ids(TALK[: turn + 1], False)
        while through[-1] in blank:  # what lies between turns is the template's, not the assistant's
            through.pop()
        expected[len(before) : len(through)] = through[len(before) :]
    assert render.demonstration(tokenizer, {"messages": TALK}).labels == expected


@pytest.mark.parametrize("name", ["llama3", "phi3", "lfm2", "qwen2_5_vl"])
def test_a_template_without_words_for_tools_is_no_teacher_of_silence(of_family: Any, name: str) -> None:
    with pytest.raises(Unrenderable, match="leaves out the tool|template refuses"):
        render.demonstration(of_family(name), {"messages": WORK, "tools": TOOLS})


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("phi3", ["<|end|>"]),
        ("gemma3", ["<end_of_turn>"]),
        ("gptoss", ["<|return|>", "<|end|>", "<|call|>"]),
        ("llama3_1", ["<|eot_id|>"]),
    ],
)
def test_answers_stop_where_the_template_ends_a_turn(of_family: Any, name: str, marks: list[str]) -> None:
    tokenizer = of_family(name)
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert set(tokenizer.all_special_ids) == named  # the marks have no role and are registered nowhere
    wanted = tokenizer.convert_tokens_to_ids(marks)
    assert set(wanted) <= set(stop_ids(tokenizer)) <= {*wanted, tokenizer.eos_token_id}


UNCLOSED = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_a_template_that_closes_no_turn_is_refused_without_sft_too(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    from pipeline.errors import UserError
    from pipeline.recipe.recipe import build
    from pipeline.runs.stage import run_stage

    (tmp_path / "unclosed.jinja").write_text(UNCLOSED)
    row = {"prompt": TALK[:1], "chosen": TALK[1:2], "rejected": TALK[3:]}
    row = row if kind == "dpo" else {"prompt": TALK[:1], "answer": "2"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    paid = {} if kind == "dpo" else {"reward": "recipes/rewards/number.py:right"}
    recipe = build(
        {
            "name": "unclosed",
            "model": {"base": str(tiny_base), "chat_template": str(tmp_path / "unclosed.jinja")},
            "stages": {kind: {"data": {"path": str(tmp_path / "rows.jsonl")}, **paid}},
        }
    )
    with pytest.raises(
        UserError, match=r"without a token at which the model could stop|does not close .*(?s:.*)chat_template"
    ):
        run_stage(recipe, kind, tmp_path / "runs")


def test_what_a_template_throws_away_is_not_taught_as_silence(of_family: Any) -> None:
    thinking = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "all I say </think>"}, *TALK[:2]]
    with pytest.raises(Unrenderable, match="leaves out what the assistant says in turn 2"):
        render.demonstration(of_family("qwen3"), {"messages": thinking})
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    silent = [WORK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(Unrenderable, match="leaves out the tool call of turn 2"):
        render.demonstration(of_family("gemma3"), {"messages": silent})
