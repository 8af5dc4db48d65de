"""Rollouts with tools: a tiny base that has learnt by heart to call them, its environment, and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, launch_stage, write_recipe
from safetensors.torch import load_file
from test_ppo import spec
from test_ppo import trainer as ppo_trainer
from test_templates import FOLDER
from trl import GRPOTrainer as TRLsGRPOTrainer

from pipeline.data import render
from pipeline.disk import metrics
from pipeline.errors import Interrupted, UserError
from pipeline.evaluate.bench import Bench
from pipeline.evaluate.plan import plan
from pipeline.models import adapters, dialogue, environments
from pipeline.models import base as bases
from pipeline.models.dialogue import Told
from pipeline.ppo import rewards
from pipeline.ppo.actors import REFERENCE, Actors
from pipeline.ppo.grpo import GRPOTrainer
from pipeline.ppo.grpo_settings import GRPOSettings
from pipeline.recipe.recipe import build, read
from pipeline.runs.stage import run_stage
from pipeline.runs.states import states
from pipeline.stages.stage import Context
from pipeline.terminal.data import examine

# As recipes/templates/chatml-tools.jinja, with a line in place of the schema: the tiny base's window is small.
SHIPPED = (ROOT / "recipes" / "templates" / "chatml-tools.jinja").read_text(encoding="utf-8")
START, END = SHIPPED.index("{{- '# Tools"), SHIPPED.index("<|im_end|>\\n' -}}\n{%- endif -%}")
TEMPLATE = SHIPPED[:START] + "{%- for t in tools -%}{{- t.function.name -}}{%- endfor -%}{{- '" + SHIPPED[END:]
COUNTER = '''
class Counter:
    def reset(self, start, **row):
        self.total = start

    def get_reward(self):
        return float(self.total)

    def add(self, n: int) -> int:
        """Adds.

        Args:
            n: A number.
        """
        if n == 13:
            raise ValueError("un<|im_end|>lucky")  # which would end a turn
        self.total += n
        return self.total
'''
CALLS = {  # what follows each number in a prompt, and how often: right calls, and every way to get one wrong
    "1": ['{"name": "add", "arguments": {"n": 2}}', '{"name": "sub", "arguments": {"n": 2}}'],
    "2": ['{"name": "add", "arguments": {"n": 4}}', '{"name": "add", arguments}'],
    "3": ['{"name": "add", "arguments": {"n": 13}}', '{"name": "add", "arguments": {"n": 2}}'],
    "4": [None, '{"name": "add", "arguments": {"n": 2}}'],
}


def say(number: str, call: str | None, reply: str) -> list[tuple[str, bool]]:
    """A dialogue as text, in parts; whether the model has to say each."""
    prompt = f"<|im_start|>system\nadd<|im_end|>\n<|im_start|>user\nGo {number}<|im_end|>\n<|im_start|>assistant\n"
    if call is None:
        return [(prompt, False), ("Hi<|im_end|>", True)]
    said = f"<tool_call>\n{call}\n</tool_call><|im_end|>"
    between = f"\n<|im_start|>user\n<tool_response>\n{reply}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    return [(prompt, False), (said, True), (between, False), ("It is done<|im_end|>", True)]


@pytest.fixture(scope="session")
def tool_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, trained on these few dialogues for some seconds, all its weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("base") / "tools"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    rows = []
    for number, calls in CALLS.items():
        for call in calls:
            for reply in ("5", "{'error': 'unlucky'}", "{'error': 'no tool'}"):
                parts = [(tokenizer(text)["input_ids"], own) for text, own in say(number, call, reply)]
                rows.append(
                    ([i for ids, _ in parts for i in ids], [i if own else -100 for ids, own in parts for i in ids])
                )
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [2] * (width - len(ids)) for ids, _ in rows])
    labels_BT = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(120):
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def counter(tmp_path: Path) -> str:
    (tmp_path / "counter.py").write_text(COUNTER)
    return f"{tmp_path}/counter.py:Counter"


def rows_of(environment: str) -> list[dict[str, Any]]:
    rows = [
        {"prompt": [{"role": "user", "content": f"Go {number}"}], "start": 10, "_place": f"p.jsonl:{number}"}
        for number in CALLS
    ]
    return environments.with_tools(rows, environment)


def trainer(base: Path, environment: str, reward: Any, **settings: Any) -> GRPOTrainer:
    """Around a policy that has moved away from its reference."""
    torch.manual_seed(0)
    model_spec = spec(base, "float32", "none")
    tokenizer = bases.load_tokenizer(model_spec)
    model = adapters.fresh(bases.load_base(model_spec, tokenizer), model_spec.lora)
    adapters.twin(model, REFERENCE)
    with torch.no_grad():
        for name, weight in adapters.trainable(model).items():
            if "lora_B" in name:
                weight.add_(torch.randn_like(weight) * 0.01)
    fixed = {"max_completion_length": 160, "gradient_checkpointing": False, "num_generations": 4}
    chosen = GRPOSettings(**{**fixed, "generation_batch_size": 16, **settings})
    actors = Actors(model, tokenizer.pad_token_id, chosen.temperature, chosen.critic, {})
    source = rewards.Source("test.py:reward", 1.0, function=reward)
    return GRPOTrainer(actors, tokenizer, rows_of(environment), [source], chosen, 3)


def between(reply: str) -> str:
    """What stands between a call and what the model says next, written out."""
    opening = "\n<|im_start|>user\n<tool_response>\n"
    return f"{opening}{reply}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def said_by_the_model(one: Told, tokenizer: Any) -> list[int]:
    """The places of what was sampled, by the dialogue's marks: a call through its end, and what follows the opening of
    the turn after a reply."""
    ids, end, places, at = one.episode.answer_ids, tokenizer.eos_token_id, list[int](), 0
    while at < len(ids):
        stop = ids.index(end, at) + 1 if end in ids[at:] else len(ids)
        places += range(at, stop)
        if stop == len(ids):
            break
        at = ids.index(end, stop) + 1 + len(tokenizer("\n<|im_start|>assistant\n")["input_ids"])
    return places


def work_out(call: str) -> tuple[str, str]:
    """What becomes of a call and what is replied to it, as a reader would say."""
    try:
        said = json.loads(call)
    except ValueError:
        return "unread", "{'error': 'The tool call is not JSON'}"
    if said["name"] != "add":
        return "unknown", str({"error": f"There is no tool {said['name']!r}. There is: add"})
    number = said["arguments"]["n"]
    return ("raised", "{'error': 'unlucky'}") if number == 13 else ("right", str(10 + number))


def test_calls_are_run_and_their_replies_put_in_behind_the_sampled_tokens(tool_base: Path, counter: str) -> None:
    """Against the replies that a reader of the sampled text would give, a template written out by hand, and the
    log-probabilities of one plain pass over each dialogue."""
    grpo = trainer(tool_base, counter, lambda **_: [], generation_batch_size=32, num_generations=8)
    tokenizer, actors = grpo.tokenizer, grpo.actors
    told = grpo.rollout(0).told
    seen = {"right": 0, "unread": 0, "unknown": 0, "raised": 0, "none": 0, "as rendered": 0}
    for one in told:
        episode, whole = one.episode, tokenizer.decode(one.episode.answer_ids)
        said, *rest = whole.split("\n<|im_start|>user\n<tool_response>\n")
        if "<tool_call>" not in said or not rest:
            seen["none"] += "<tool_call>" not in said
            assert not rest and episode.ended <= ("<tool_call>" not in said), "a call without a reply has not ended"
            continue
        try:
            (call,) = re.findall(r"<tool_call>(.*?)(?:</tool_call>|<.im_end.>)", said, re.DOTALL)
            kind, reply = work_out(call)
        except (ValueError, KeyError, TypeError):
            continue  # the tiny model has made something odd
        if one.calls > 1:
            continue
        seen[kind] += 1
        total = int(reply) if kind == "right" else 10
        assert (one.calls, one.failures, one.world.total) == (1, kind != "right", total)
        at = [place for place, own in enumerate(episode.tool_mask) if not own]
        assert at == list(range(at[0], at[-1] + 1))
        put_in = episode.answer_ids[at[0] : at[-1] + 1]
        assert put_in == tokenizer(between(reply))["input_ids"]
        assert tokenizer.decode(episode.answer_ids[: at[0]]) == said and said.endswith("<|im_end|>")
        if episode.ended and said == f"<tool_call>\n{call.strip()}\n</tool_call><|im_end|>" and kind != "unread":
            seen["as rendered"] += 1
            turns: Any = [*one.row["prompt"], *one.turns]
            rendered = tokenizer.apply_chat_template(turns, tools=one.row["tools"], tokenize=False)
            assert rendered.startswith(tokenizer.decode(episode.prompt_ids + episode.answer_ids))
            assert one.turns[-1] == {"role": "assistant", "content": one.text}
        with torch.no_grad():
            logits_TV = actors.model(input_ids=torch.tensor([episode.prompt_ids + episode.answer_ids])).logits[0]
        own = torch.log_softmax(logits_TV.float(), -1)[len(episode.prompt_ids) - 1 : -1]
        wanted = [own[i, episode.answer_ids[i]].item() for i, mine in enumerate(episode.tool_mask) if mine]
        assert episode.logp == pytest.approx(wanted, abs=1e-4)
    assert all(seen.values()), seen
    # A reward sees the instances, and one that they give themselves needs no function.
    grpo.sources = [rewards.source(counter, 1.0)]
    assert grpo.ask_sources(grpo.rollout(0))[counter] == [one.world.total for one in told]
    numbers = next(grpo.steps())
    assert numbers["tools/call_frequency"] == sum(one.calls for one in told) / len(told)
    assert numbers["tools/failure_frequency"] == sum(o.failures for o in told) / sum(o.calls for o in told)


def test_replies_carry_no_loss_and_the_rest_the_loss_of_plain_passes(tool_base: Path, counter: str) -> None:
    grpo = trainer(tool_base, counter, lambda environments, **_: [e.total for e in environments], beta=0.2)
    rollout = grpo.rollout(0)
    paid = rewards.total(grpo.sources, grpo.ask_sources(rollout))
    scored = grpo.score(rollout.episodes, paid)
    batch, numbers = grpo.take_advantages(rollout.episodes, scored)
    model = grpo.actors.model
    grpo.run_backward(list(batch), 1.0)
    found = {name: weight.grad.clone() for name, weight in grpo.actors.trained("policy").items()}  # type: ignore[union-attr]
    model.zero_grad()

    def log_probs(one: Told, adapter: str) -> torch.Tensor:
        grpo.actors.act_as(adapter)
        ids = torch.tensor([one.episode.prompt_ids + one.episode.answer_ids])
        logits = type(model.get_base_model()).forward(model.get_base_model(), input_ids=ids).logits[0]
        logp = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        first = len(one.episode.prompt_ids) - 1
        return logp[[first + place for place in said_by_the_model(one, grpo.tokenizer)]]

    with torch.no_grad():
        references = [log_probs(one, REFERENCE) for one in rollout.told]
    count, loss = 0, torch.zeros(())
    for place, (one, reference) in enumerate(zip(rollout.told, references, strict=True)):
        group, policy = paid[place - place % 4 : place - place % 4 + 4], log_probs(one, "default")
        gain = (paid[place] - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        each = -gain * torch.exp(policy - policy.detach())
        each = each + 0.2 * (torch.exp(reference - policy) - (reference - policy) - 1)
        loss, count = loss + each.sum(), count + len(policy)
    assert count < sum(len(one.episode.answer_ids) for one in rollout.told)
    (loss / count).backward()
    assert numbers["answer_length"] == count / len(rollout.told)
    for name, weight in grpo.actors.trained("policy").items():
        assert torch.allclose(found[name], weight.grad, rtol=1e-3, atol=2e-5), name  # type: ignore[arg-type]


def test_ppo_sees_the_first_token_after_a_reply_as_the_next_action(tool_base: Path, counter: str) -> None:
    """Values and log-probabilities of the sampled tokens, one behind the other, by plain passes."""
    ppo = ppo_trainer(
        tool_base, lambda **_: [0.0] * 8, quantize="none", batch_size=8, mini_batch_size=4, response_length=160
    )
    ppo.rows = rows_of(counter)
    with torch.no_grad():
        ppo.actors.value_head.weight.normal_(generator=torch.Generator().manual_seed(4))
        rollout = ppo.rollout(0)
        assert any(one.calls for one in rollout.told)
        for one in ppo.score(rollout.episodes, [0.0] * 8):
            for line, row in enumerate(one.pack.rows):
                episode = rollout.episodes[row]
                own = [i for i, mine in enumerate(episode.tool_mask or episode.logp) if mine]
                ids = torch.tensor([episode.prompt_ids + episode.answer_ids])
                out, first = ppo.actors.model(input_ids=ids, output_hidden_states=True), len(episode.prompt_ids)
                values = ppo.actors.value_head(out.hidden_states[-1][0].float())[:, 0]
                logps = torch.log_softmax(out.logits[0].float(), -1)
                assert one.values_BG is not None
                for column, place in enumerate(own):
                    state = first + place - 1
                    assert abs(one.values_BG[line, column] - values[state]) < 1e-3
                    assert abs(one.logp_BG[line, column] - logps[state, episode.answer_ids[place]]) < 1e-4
                assert one.pack.mask_BG[line].tolist() == [1.0] * len(own) + [0.0] * (
                    one.pack.mask_BG.shape[1] - len(own)
                )


def test_class_and_static_methods_are_tools_too(tmp_path: Path) -> None:
    method = '() -> str:\n        """Say it."""\n        return "said"\n'
    kinds = "    @classmethod\n    def a" + method.replace("(", "(cls", 1) + "    @staticmethod\n    def b" + method
    (tmp_path / "kinds.py").write_text("class Kinds:\n    def reset(self, **row): pass\n" + kinds)
    row = {"environment": f"{tmp_path}/kinds.py:Kinds", "_place": "p.jsonl:1"}
    assert [tool["function"]["name"] for tool in environments.load(row["environment"]).tools] == ["a", "b"]
    world, _ = environments.begin(row, 1.0)
    for name in ("a", "b"):
        assert environments.call_tool(world, environments.Call(name, {}), row, 1.0) == ("said", False)


def test_a_call_or_a_reply_that_cannot_be_written_down_is_told_to_the_model(tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text(
        "class Large:\n    def reset(self, **row): pass\n    def count(self, n: int) -> int:\n"
        '        """Count.\n\n        Args:\n            n: how far\n        """\n        return 10**n\n'
    )
    row = {"environment": f"{tmp_path}/large.py:Large", "_place": "p.jsonl:1"}
    world, _ = environments.begin(row, 1.0)
    for brackets in (70, 400, 100_000):
        nested = "[" * brackets + "]" * brackets
        (call,) = environments.parse_calls(
            f'<tool_call>{{"name": "count", "arguments": {{"n": {nested}}}}}</tool_call>'
        )
        reply, failed = environments.call_tool(world, call, row, 1.0)
        assert failed and ("nested more than" in reply or "not JSON" in reply)
    assert environments.call_tool(world, environments.Call("count", {"n": 2}), row, 1.0) == ("100", False)
    reply, failed = environments.call_tool(world, environments.Call("count", {"n": 5000}), row, 1.0)
    assert failed and "4300 digits" in reply


def test_limits_of_turns_and_of_length_leave_an_answer_that_has_not_ended(tool_base: Path, counter: str) -> None:
    grpo = trainer(tool_base, counter, lambda **_: [])
    for options in ({"new_tokens": 160, "iterations": 0}, {"new_tokens": 70}):
        more: Any = {**options, "generator": torch.Generator(), "temperature": 0, "stops": grpo.stops}
        told = dialogue.answer(grpo.actors, grpo.tokenizer, grpo.rows, **more)
        for one in told:
            assert one.episode.ended == ("<tool_call>" not in one.text)
            assert len(one.turns) == 1 and 0 not in one.episode.tool_mask
        assert not all(one.episode.ended for one in told)


def test_replies_are_put_in_as_trl_does(tool_base: Path, counter: str) -> None:
    """For TRL's templates for training with tools that are read here, and for ours."""
    tokenizer = bases.load_tokenizer(spec(tool_base))
    templates = [FOLDER / f"{name}.jinja" for name in ("qwen2_5", "qwen3_training", "qwen3_instruct_2507")]
    for template in [*templates, ROOT / "recipes" / "templates" / "chatml-tools.jinja"]:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
        dialogue.check_template(tokenizer, counter)
        trl: Any = SimpleNamespace(
            processing_class=tokenizer, _tokenizer=tokenizer, _is_vlm=False, chat_template=None, chat_template_kwargs={}
        )
        replies = [{"role": "tool", "name": "add", "content": text} for text in ("12", "{'error': 'unlucky'}")]
        for some in (replies[:1], replies):
            ours = tokenizer(dialogue.render_replies(tokenizer, {}, some))["input_ids"]
            assert ours == TRLsGRPOTrainer._get_tool_suffix_ids(trl, some)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("qwen3", "renders earlier turns differently"), ("llama3_1", "closes a turn that calls a tool without"),
        ("lfm2_v2", "does not write a call as <tool_call>"), ("phi3", "does not tell the model of the tool 'add'"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_fit_is_refused(tool_base: Path, counter: str, template: str, why: str) -> None:
    tokenizer = bases.load_tokenizer(spec(tool_base))
    tokenizer.chat_template = (FOLDER / f"{template}.jinja").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=f"model.chat_template.*{re.escape(why)}"):
        dialogue.check_template(tokenizer, counter)


def test_loss_of_a_tool_dialogue_falls_on_the_assistants_turns(tool_base: Path, counter: str) -> None:
    tokenizer = bases.load_tokenizer(spec(tool_base))
    tokenizer.chat_template = SHIPPED
    call = {"type": "function", "function": {"name": "add", "arguments": {"n": 2}}}
    messages = [
        {"role": "user", "content": "Go"}, {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "12"}, {"role": "tool", "content": "14"}, {"role": "assistant", "content": "Done."},
    ]  # fmt: skip
    (row,) = environments.with_tools([{"messages": messages, "_place": "d.jsonl:1"}], counter)
    encoded = render.demonstration(tokenizer, row)
    assert '"description": "A number."' in tokenizer.decode(encoded.ids)
    said = '<tool_call>\n{"name": "add", "arguments": {"n": 2}}\n</tool_call>'
    learnt = tokenizer.decode([label for label in encoded.labels if label != -100])
    assert learnt == f"{said}\n{said}<|im_end|>Done.<|im_end|>"


def tools_tree(base: Path, environment: str, folder: Path) -> dict[str, Any]:
    rows = [{key: value for key, value in row.items() if key in ("prompt", "start")} for row in rows_of(environment)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "q.jsonl").write_text(
        json.dumps({"prompt": rows[0]["prompt"], "answer": "It is done", "start": 1}) + "\n"
    )
    train = {
        "max_steps": 2, "num_generations": 4, "generation_batch_size": 8, "per_device_train_batch_size": 4,
        "max_completion_length": 160, "learning_rate": 1e-3, "save_steps": 1, "gradient_checkpointing": False,
    }  # fmt: skip
    stage = {
        "kind": "grpo", "environment": environment, "reward": environment,
        "data": {"path": str(folder / "p.jsonl")}, "questions": str(folder / "q.jsonl"), "train": train,
    }  # fmt: skip
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    model = {"base": str(base), "dtype": "float32", "quantize": "none", "lora": lora}
    return {"name": "tools", "seed": 7, "model": model, "stages": {"whole": stage, "stopped": stage, "two": stage}}


def test_a_stopped_run_and_two_processes_end_as_an_unbroken_one(
    tool_base: Path, counter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tools_tree(tool_base, counter, tmp_path), tmp_path / "recipe.yaml")
    recipe, runs, log = read(path), tmp_path / "runs", Context.log
    threads = torch.get_num_threads()  # one, as each of two processes has: sums of two threads are rounded otherwise
    torch.set_num_threads(1)

    def stop(self: Context, step: int, values: dict[str, Any]) -> None:
        log(self, step, values)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    run_stage(recipe, "whole", runs)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Context, "log", stop)
        run_stage(recipe, "stopped", runs)
    run_stage(recipe, "stopped", runs)
    torch.set_num_threads(threads)
    whole, stopped = (recipe.artifact(name, runs) for name in ("whole", "stopped"))
    assert stopped.finished().files == whole.finished().files
    launch_stage(2, path, "two", runs)
    assert whole.finished().before["question_accuracy"] == 1.0, "what is said after the tool's reply"
    names = ("tools/call_frequency", "tools/failure_frequency", "answer_length", "reward")
    ours, theirs = (
        [[step[n] for n in names] for step in metrics.read(recipe.artifact(s, runs).metrics)] for s in ("whole", "two")
    )
    assert ours[0][0] > 0
    assert [pytest.approx(step, rel=1e-4) for step in ours] == theirs
    one, two = (load_file(recipe.artifact(s, runs).adapter / "adapter_model.safetensors") for s in ("whole", "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5

    # An evaluation asks with the tools at hand too.
    taken = {}
    for measure in (measure for measure in plan(recipe, runs) if measure.subject == "whole"):
        bench = Bench(recipe.spec.model, {"whole": measure.folders["whole"]}, {}, 1.0)
        with bench.ready():
            taken[measure.name] = measure.take(bench)
    assert taken["questions"]["text"] == ["It is done"]
    assert taken["answers"]["scores"][counter][0][0] in (1.0, 3.0), "what the row starts with, and what was added"

    # What the tools do is part of what was learnt; how long they may take is not.
    slower = read(path, "stages.whole.train.tool_timeout=99")
    assert slower.parts()["whole"] == recipe.parts()["whole"]
    (tmp_path / "counter.py").write_text(COUNTER.replace("lucky", "luck"))
    (state, *_) = states(read(path), runs)
    assert (state.word, state.why) == (
        "stale",
        "counter.py, which the environment reads, has changed; counter.py, which the reward reads, has changed",
    )


SWALLOWS = """try:
            while True: pass
        except Exception: pass"""
WRONG = {
    "raises": ("self.total = start", "raise KeyError('colour')", "failed to reset: KeyError: 'colour'"),
    "hangs": ("self.total = start", "while True: pass", "took more than 0.2 s to reset"),
    "number": ("self.total = start", "return 3", "returned a int from reset: expected a text or None"),
    "luck": ("self.total = start", "import random; return str(random.random())", "began differently for two answers"),
    "tool hangs": ("self.total += n", "while True: pass", "the tool 'add' of .* took more than 0.2 s"),
    "hides": ("self.total += n", SWALLOWS, "the tool 'add' of .* took more than 0.2 s"),
    "list": ("return self.total\n", "return [n]\n", "the tool 'add' of .* returned a list: expected a text"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_environment_that_fails_is_named(tool_base: Path, tmp_path: Path, case: str) -> None:
    there, instead, why = WRONG[case]
    assert there in COUNTER
    (tmp_path / "wrong.py").write_text(
        COUNTER.replace(there, instead, 1)
        if case != "list"
        else COUNTER[::-1].replace(there[::-1], instead[::-1], 1)[::-1]
    )
    grpo = trainer(tool_base, f"{tmp_path}/wrong.py:Counter", lambda **_: [], tool_timeout=0.2)
    with pytest.raises(UserError, match=why) as said:
        grpo.rollout(0)
    assert "p.jsonl:" in str(said.value)


@pytest.mark.parametrize(
    ("there", "instead", "why"),
    [
        ("def reset", "def begin", "has no method reset"), ("def add", "def _add", "has no tool: a method"),
        ("n: int", "n", "the tool 'add' of .* cannot be described to the model"),
        ("def add", "async def add", "is async"), ("class Counter", "class Other", "defines no 'Counter'"),
    ],
)  # fmt: skip
def test_a_class_that_is_no_environment_is_named(tmp_path: Path, there: str, instead: str, why: str) -> None:
    (tmp_path / "wrong.py").write_text(COUNTER.replace(there, instead))
    with pytest.raises(UserError, match=why):
        environments.load(f"{tmp_path}/wrong.py:Counter")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"environment": "none.py:Counter"}, "environment: no such file: none.py"),
        ({"environment": "recipes/environments/calculator.py:Counter"}, "defines no 'Counter'"),
        ({"environment": None}, "train.max_tool_calling_iterations: is for a stage with an environment"),
        ({"kind": "rejection_sampling", "train": {}}, "environment: rejection sampling keeps answers of one turn only"),
    ],
)
def test_what_makes_no_sense_in_a_recipe_is_named(
    tool_base: Path, counter: str, tmp_path: Path, change: Any, why: str
) -> None:
    tree = tools_tree(tool_base, counter, tmp_path)
    tree["stages"]["two"]["train"]["max_tool_calling_iterations"] = 2
    tree["stages"]["two"] = {**tree["stages"]["two"], **change}
    with pytest.raises(UserError, match=re.escape(why)):
        build(tree)


def test_the_data_are_examined_with_what_the_template_tells_of_tools(
    tool_base: Path, counter: str, tmp_path: Path
) -> None:
    tree = tools_tree(tool_base, counter, tmp_path)
    recipe = build({**tree, "stages": {"whole": tree["stages"]["whole"]}})
    ids = len(render.prompt(bases.load_tokenizer(recipe.spec.model), rows_of(counter)[0]))
    figures = examine(recipe, ["whole"])["stages"]["whole"]
    assert f'"max": {ids}' in json.dumps(figures["tokens"])


def test_rows_that_do_not_go_with_an_environment_are_named(counter: str) -> None:
    for row, why in (
        ({"prompt": "Go"}, "'prompt' is text"),
        ({"messages": [], "tools": [{"a": 1}]}, "names other tools"),
    ):
        with pytest.raises(UserError, match=f"d.jsonl:3: .*{why}"):
            environments.with_tools([{**row, "_place": "d.jsonl:3"}], counter)


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("347*89 - 12", "30871"), ("(2 + 3) ** 2 / 4", "6.25"), ("-7 // 2", "-4"), (" 1 / 3", "0.333333"),
        ("__import__('os')", ValueError), ("2 ** 99999999", ValueError), ("9**9**9", ValueError), ("x", ValueError),
        ("1 +", SyntaxError), ("1 / 0", ZeroDivisionError), ("(-8) ** 0.5", ValueError), ("'a' * 9", ValueError),
    ],
)  # fmt: skip
def test_the_calculator_does_arithmetic_and_nothing_else(expression: str, result: Any) -> None:
    calculator = environments.load("recipes/environments/calculator.py:Calculator").make()
    if isinstance(result, str):
        assert calculator.calculate(expression) == result
    else:
        with pytest.raises(result):
            calculator.calculate(expression)


def test_the_search_ranks_documents_as_bm25_does() -> None:
    """By Lucene's formula written out (k1 = 1.5, b = 0.75), which bm25s takes unless it is told otherwise."""
    pytest.importorskip("bm25s")
    environment = environments.load("recipes/environments/search.py:Search")
    texts = [json.loads(line)["text"] for line in (ROOT / "data" / "corpus.jsonl").read_text().splitlines()]
    words = [re.findall(r"\b\w\w+\b", text.lower()) for text in texts]
    mean = statistics.mean(map(len, words))
    search = environment.make()
    search.reset()
    for query in ("lighthouse of Isket", "pigs goats"):
        scores = [0.0] * len(texts)
        for word in query.lower().split():
            holding = sum(word in some for some in words)
            idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            for place, some in enumerate(words):
                count = some.count(word)
                scores[place] += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(some) / mean))
        first, second = sorted(range(len(texts)), key=lambda place: -scores[place])[:2]
        assert search.search(query) == f"{texts[first]}\n\n{texts[second]}"
    assert search.search("xyzzy") == "Nothing was found."
