"""What is published answers as what was trained; whatever does not is refused by its name, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from publish_run import BASE_ID, DECODING, finished_run, having_pulled, with_decoding_words
from safetensors.torch import load_file, save_file

from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import Json
from pipeline.errors import UserError
from pipeline.publish import adapter, gate, merged
from pipeline.publish.publishing import publish
from pipeline.publish.sealed import Sealed, read_sealed
from pipeline.recipe.recipe import Recipe, build

Run = tuple[Recipe, Path]


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    runs = tmp_path_factory.mktemp("runs")
    base = with_decoding_words(tiny_base, tmp_path_factory.mktemp("base") / "tiny")
    yield finished_run(base, runs, "pretrain", "sft", "reward"), runs


@pytest.fixture(scope="module")
def published(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sft stage as an adapter and as whole weights, the reward stage as an adapter."""
    folder = tmp_path_factory.mktemp("published")
    publish(run[0], "sft", str(folder / "adapter"), runs=run[1])
    publish(run[0], "sft", str(folder / "merged"), "merged", runs=run[1])
    publish(run[0], "reward", str(folder / "reward"), runs=run[1])
    return folder


@pytest.fixture(autouse=True)
def _trained_is_asked_once(monkeypatch: pytest.MonkeyPatch, run: Run, answers: dict[str, Json]) -> None:
    """The trained model's answers do not depend on what was written, so the tests share them."""
    ask = gate._run

    def once(who: str, job: Json, out: Path) -> Json:
        if who != "trained":
            return ask(who, job, out)
        key = json.dumps([job[word] for word in ("model", "adapter", "float32", "num_labels", "rows")])
        if key not in answers:
            answers[key] = ask(who, job, out)
        return answers[key]

    monkeypatch.setattr(gate, "_run", once)


@pytest.fixture(scope="module")
def answers() -> dict[str, Json]:
    return {}


def stage(run: Run, name: str) -> Sealed:
    return read_sealed(run[0], name, run[1])


def test_every_form_passes_and_says_by_how_much(published: Path) -> None:
    def parity(form: str) -> Any:
        (found,) = json.loads((published / form / "onebase.json").read_text())["parity"].values()
        return found

    assert parity("adapter")["logits_relative_error"] == 0
    assert parity("adapter")["greedy_answers_equal"] == parity("adapter")["prompts"]
    assert 0 < parity("merged")["logits_relative_error"] < 0.02
    assert parity("reward")["scores_relative_error"] == 0


def test_a_publication_stops_where_training_did_and_decodes_plainly(published: Path) -> None:
    """Whatever words the base ships (all of them here): the gate has compared the answers, and the card names them."""
    from transformers import GenerationConfig

    shape_only = {"output_attentions", "output_hidden_states", "bos_token_id", "decoder_start_token_id"}
    speed_only = {"use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config"}
    speed_only |= {"disable_compile", "prefill_chunk_size", "low_memory", "use_mtp", "is_assistant"}
    assisted = {
        "max_matching_ngram_size",
        "speculation_type",
    }  # of a second model, which generate is given as an argument
    moved = {"penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "constraints", "force_words_ids"}
    known = {*DECODING, *shape_only, *speed_only, *assisted, *moved, "eos_token_id", "pad_token_id"}
    words = {word for word in vars(GenerationConfig()) if not word.startswith("_") and "assistant" not in word}
    assert words - known - {"transformers_version", "continuous_batching_config", "target_lookbehind"} == set()
    for form in ("adapter", "merged"):
        said = json.loads((published / form / "generation_config.json").read_text())
        assert {word: said[word] for word in said if word != "transformers_version"} == {
            "eos_token_id": [2], "pad_token_id": 2,
        }  # fmt: skip
        card = (published / form / "README.md").read_text()
        assert "`repetition_penalty: 1.9`" in card and all(f"`{word}: " in card for word in DECODING)


def test_no_file_names_a_folder_of_this_machine(published: Path, run: Run) -> None:
    config = json.loads((published / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_ID
    for file in published.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            text = file.read_text(encoding="utf-8")
            assert str(run[1]) not in text and str(run[0].spec.model.base) not in text, file


RELATIONS = {"adapter": "adapter", "merged": "finetune", "reward": "adapter"}  # of the four the Hub knows


def test_the_card_is_one_the_hub_accepts_and_tells_the_lineage(published: Path, run: Run) -> None:
    from huggingface_hub import ModelCard, metadata_load
    from huggingface_hub.inference._generated import types as tasks

    for form, relation in RELATIONS.items():
        raw = metadata_load(published / form / "README.md")
        assert raw == ModelCard.load(published / form / "README.md").data.to_dict()
        assert raw["base_model"] == BASE_ID and raw["base_model_relation"] == relation
        assert hasattr(tasks, raw["pipeline_tag"].replace("-", "_"))
        assert all(isinstance(tag, str) for tag in raw["tags"])
    found = ModelCard.load(published / "adapter" / "README.md")
    assert found.data.base_model == BASE_ID and found.data.library_name == "peft"
    assert found.data.to_dict()["base_model_relation"] == "adapter"
    lineage = json.loads((published / "adapter" / "onebase.json").read_text())["lineage"]
    assert [entry["stage"] for entry in lineage] == ["pretrain", "sft"]
    for entry in lineage:
        manifest = json.loads((run[1] / "tiny" / entry["stage"] / "manifest.json").read_text())
        assert entry["files"] == manifest["files"] and entry["data"]["counts"] == manifest["data"]["counts"]
        assert manifest["files"]["adapter_model.safetensors"][:16] in found.text


def test_the_card_has_what_the_evaluation_or_the_stage_found(run: Run, tmp_path: Path) -> None:
    from pipeline.publish import card, measured

    source = stage(run, "sft")
    lines = [line for line in measured.table(source).splitlines() if "corpus loss" in line]
    after = json.loads((run[1] / "tiny" / "pretrain" / "manifest.json").read_text())["after"]
    assert after["loss_low"] < after["loss"] < after["loss_high"]
    wanted = (
        f"| {after['loss']:.3f} | {after['loss_low']:.3f} to {after['loss_high']:.3f} (bootstrap over rows, n = 6) |"
    )
    assert lines[0].endswith(wanted)

    # Data of the Hub, alone, in a mixture and held out.
    section = {"data": {"path": None, "mix": [{"path": "a/one"}, {"path": "two.jsonl"}], "test": "b/three"}}
    parts = source.known[0].parts.model_copy(update={"data": {"mix[0]": "hub:12", "mix[1]": "34", "test": "hub:56"}})
    mixed = source.known[0].model_copy(update={"section": section, "parts": parts})
    assert card._hub_datasets(replace(source, lineage=[mixed, *source.lineage[1:]])) == ["a/one", "b/three"]


def test_a_reward_model_scores_alike_where_only_transformers_and_peft_are(published: Path, run: Run) -> None:
    probe = stage(run, "reward").manifest.invariants["probe"]
    script = f"""
import json, torch, sys
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig
from peft import PeftModel
load = json.load(open({str(published / "reward" / "onebase.json")!r}))["load"]
assert load["pad_token_id"] == 0, "not the token that ends a turn, though the base pads with that"
base = AutoModelForSequenceClassification.from_pretrained(
    {str(run[0].spec.model.base)!r}, dtype=load["dtype"], num_labels=1, pad_token_id=load["pad_token_id"],
    quantization_config=BitsAndBytesConfig(**load["quantization"]))
for module in base.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"): module.support_avx512bf16_for_cpu = False
base.score.float()
model = PeftModel.from_pretrained(base, {str(published / "reward")!r}).eval()
assert not [name for name in sys.modules if name.split(".")[0] in ("pipeline", "trl")]
with torch.no_grad():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = [base.base_model(torch.tensor([ids])).last_hidden_state for ids in {[one["ids"] for one in probe]!r}]
    print(json.dumps([base.score(state[0, -1].float()).item() for state in states]))
"""
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # PEFT's separate operations round in bfloat16 where ours, which trained it, do not.
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx([one["score"] for one in probe], abs=2e-3)


CARDS = """
import contextlib, io, json, re, sys, torch
import bitsandbytes.nn.modules as layers
layers.has_avx512bf16 = lambda: False  # its repacked weights do not fit a base this small
found = {}
for form in ("adapter", "merged", "reward"):
    code = re.findall("```python\\n(.*?)```", open(form + "/README.md").read(), re.DOTALL)
    assert len(code) == 2
    found[form], said = {}, io.StringIO()
    with contextlib.redirect_stdout(said):
        exec("\\n".join(code), found[form])
    found[form]["said"] = said.getvalue().strip()
assert not [name for name in sys.modules if name.split(".")[0] in ("pipeline", "trl")]
def logits(model, tokens):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return model(**tokens).logits[0].float()
adapter, tokens = found["adapter"]["model"], found["adapter"]["tokens"]
trained, merged = logits(adapter, tokens), logits(found["merged"]["model"], tokens)
with adapter.disable_adapter():
    base = logits(adapter, tokens)
print(json.dumps({
    "said": found["adapter"]["said"], "score": found["reward"]["score"],
    "merged": ((merged - trained).norm() / trained.norm()).item(),
    "base": ((base - trained).norm() / trained.norm()).item()}))
"""


def test_what_the_cards_say_to_type_runs_and_answers_as_what_was_trained(
    published: Path, run: Run, tmp_path: Path
) -> None:
    environment = having_pulled(Path(run[0].spec.model.base), tmp_path)
    command = [sys.executable, "-I", "-c", CARDS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=published, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    def asked(name: str, row: Json) -> Any:
        job = gate._job(stage(run, name), "adapter", published / "adapter") | {"rows": [row], "new_tokens": 100}
        return gate._run("trained", job, tmp_path / name)

    from transformers import AutoTokenizer

    sft = asked("sft", {"prompt": [{"role": "user", "content": "Hello!"}]})
    tokenizer = AutoTokenizer.from_pretrained(stage(run, "sft").artifact.adapter)
    assert found["said"] == tokenizer.decode(sft["answers"][0]["ids"], skip_special_tokens=True).strip()
    reward = asked("reward", {"prompt": [{"role": "user", "content": "..."}], "answer": "..."})
    assert found["score"] == reward["numbers"]["0"][0]
    assert found["merged"] < 0.03 < found["base"]


def altered(published: Path, form: str, to: Path) -> Path:
    shutil.copytree(published / form, to / form)
    return to / form


def without(file: Path, *endings: str) -> None:
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(endings)}
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_dropped_adapter_is_named(published: Path, run: Run, tmp_path: Path) -> None:
    folder = altered(published, "adapter", tmp_path)
    weights = load_file(folder / "adapter_model.safetensors")
    zeroed = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in weights.items()}
    save_file(zeroed, folder / "adapter_model.safetensors")
    with pytest.raises(gate.Broken, match=r"logits differ by .*\n.*\n?.*the adapter was dropped"):
        gate.check(stage(run, "sft"), "adapter", folder)


def scaled(source: Sealed, to: Path, factor: float) -> Sealed:
    """The same stage with an adapter that changes less."""
    place = Artifact(shutil.copytree(source.artifact.folder, to))
    weights = load_file(place.adapter / WEIGHTS)
    less = {name: factor * t if "lora_B" in name else t for name, t in weights.items()}
    save_file(less, place.adapter / WEIGHTS, metadata={"format": "pt"})
    return replace(source, artifact=place)


def test_a_merge_without_its_adapter_is_refused_though_it_is_within_the_limit(
    published: Path, run: Run, tmp_path: Path
) -> None:
    weak = scaled(stage(run, "sft"), tmp_path / "weak", 0.02)
    folder = altered(published, "merged", tmp_path)
    merged.write(weak, folder)
    found = gate.check(weak, "merged", folder)["merged"]
    assert found["logits_relative_error"] < found["base_distance"] / 4 < gate.LOGIT_LIMIT["merged"] / 4

    merged.write(scaled(weak, tmp_path / "none", 0), folder)
    with pytest.raises(gate.Broken, match=r"nearer to the bare base(.*\n)*.*the adapter was dropped") as refused:
        gate.check(weak, "merged", folder)
    assert "allowed is 2%" not in str(refused.value)


def test_a_merged_reward_model_without_its_adapter_is_refused(published: Path, run: Run, tmp_path: Path) -> None:
    source = stage(run, "reward")
    merged.write(scaled(source, tmp_path / "none", 0), tmp_path / "merged")
    with pytest.raises(gate.Broken, match="the adapter was dropped; these are the base's own answers"):
        gate.check(source, "merged", tmp_path / "merged")


@pytest.mark.parametrize("form", ["merged", "f16", "q8_0"])
def test_an_adapter_that_changes_too_little_to_tell_is_said_to(form: str) -> None:
    """Logits by hand: rounding of one size, and a base at another distance from what was trained."""
    noise, shift = torch.randn(2, 3, 16, 64, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(1)) * 4
    job = {"form": "merged" if form == "merged" else "gguf", "type": form, "rows": [{}, {}, {}]}
    job |= {"num_labels": 0, "labels": []}
    size = {"merged": 0.02, "f16": 0.01, "q8_0": 0.1}[form]

    def off(distance: float, kept: float) -> str:
        written = logits + size * noise + (1 - kept) * distance * shift
        trained = {f"{i}": logits[i].numpy() for i in range(3)}
        trained |= {f"{i}.base": (logits[i] + distance * shift[i]).numpy() for i in range(3)}
        told = {"ids": [[]] * 3, "stops": [], "tied": False, "missing": [], "answers": [{}] * 3, "labels": []}
        found = {"numbers": {f"{i}": written[i].numpy() for i in range(3)}}
        return " ".join(gate.compare(job, {**told, "numbers": trained}, {**told, **found})[1])

    assert not off(distance=0.4, kept=1)
    assert "nearer to the bare base" in off(distance=2 * size, kept=0)
    if form != "q8_0":
        assert "too much to tell it from the bare base" in off(distance=2 * size, kept=1)
        assert "--as adapter" in off(distance=2 * size, kept=1)
    assert off(distance=0, kept=1), "an adapter that changes nothing cannot be found in what was written"


def test_a_wrong_template_and_wrong_stop_tokens_are_named(published: Path, run: Run, tmp_path: Path) -> None:
    folder = altered(published, "adapter", tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\\n", "assistant: "))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [0]}))
    with pytest.raises(gate.Broken, match=r"(?s)chat template or the tokenizer is .*stop at different tokens: \[0\]"):
        gate.check(stage(run, "sft"), "adapter", folder)


def test_a_lost_tied_head_is_named(published: Path, run: Run, tmp_path: Path) -> None:
    folder = altered(published, "merged", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(gate.Broken, match="the LM head is missing: 1 tensors"):
        gate.check(stage(run, "sft"), "merged", folder)


def test_a_merge_onto_the_original_weights_is_named(published: Path, run: Run, tmp_path: Path) -> None:
    folder = altered(published, "merged", tmp_path)
    original = stage(run, "sft")
    unquantised = original.model.model_copy(update={"quantize": "none"})
    merged.write(replace(original, model=unquantised), folder)
    with pytest.raises(gate.Broken, match="onto the base's original weights, not onto the dequantised nf4"):
        gate.check(original, "merged", folder)


def test_a_missing_score_head_is_named(published: Path, run: Run, tmp_path: Path) -> None:
    folder = altered(published, "reward", tmp_path)
    without(folder / "adapter_model.safetensors", "score.weight")
    with pytest.raises(gate.Broken, match="the score head is missing"):
        gate.check(stage(run, "reward"), "adapter", folder)


def test_a_merge_is_the_sum_written_in_shards(published: Path, run: Run, tmp_path: Path) -> None:
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    source = stage(run, "sft")
    merged.write(source, tmp_path, shard_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert all(file.stat().st_size < 80_000 for file in tmp_path.glob("*.safetensors"))
    # One layer by hand: quantised and back by bitsandbytes, plus alpha / r * B A (arXiv 2106.09685, equation 3).
    layer = "model.layers.1.mlp.down_proj"
    base = AutoModelForCausalLM.from_pretrained(source.model.base, dtype=torch.bfloat16)
    packed, state = bitsandbytes.functional.quantize_4bit(
        base.get_submodule(layer).weight.data, quant_type="nf4", compress_statistics=True
    )
    lora = load_file(source.artifact.adapter / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
    by_hand = bitsandbytes.functional.dequantize_4bit(packed, state).float() + 8 / 4 * (b @ a)
    written = load_file(tmp_path / index[f"{layer}.weight"])[f"{layer}.weight"]
    assert torch.equal(written, by_hand.bfloat16())
    whole = load_file(published / "merged" / "model.safetensors")
    assert whole.keys() == index.keys() and "lm_head.weight" not in whole


def test_what_fails_leaves_the_destination_as_it_was(
    published: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(published / "adapter", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    config = adapter.config
    monkeypatch.setattr(adapter, "config", lambda source: {**config(source), "lora_alpha": 9})
    for to in ("out", "new"):
        with pytest.raises(gate.Broken, match="logits differ by"):
            publish(run[0], "sft", str(tmp_path / to), runs=run[1])
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_publish_that_is_terminated_leaves_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "thesis.txt").write_text("years of work")
    to = ["--to", str(tmp_path / "model"), "--as", "merged"]
    command = [sys.executable, "-m", "pipeline", "publish", str(run[1] / "tiny"), "sft", *to]
    here = {**os.environ, "ONEBASE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path.cwd())}
    writing = subprocess.Popen(command, env=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while writing.poll() is None and not list(tmp_path.rglob("model.safetensors")):
        time.sleep(0.05)  # until the files are there and the gate has begun
    assert [path.name for path in tmp_path.rglob("*.onebase-*.tmp")], "it was over before it could be ended"
    writing.terminate()
    assert writing.wait(30) == 128 + signal.SIGTERM
    assert not list(tmp_path.rglob("*.onebase-*.tmp")) and not list(tmp_path.rglob("model.safetensors"))
    assert (tmp_path / "model.tmp" / "thesis.txt").read_text() == "years of work"


def test_what_cannot_be_published_is_said_before_anything_is_loaded(run: Run, tmp_path: Path) -> None:
    recipe, runs = run
    nameless = build(recipe.tree, ["model.public_id=null"])
    with pytest.raises(UserError, match=r"model\.public_id"):
        publish(nameless, "sft", str(tmp_path / "x"), runs=runs)
    with pytest.raises(UserError, match="GGUF has no place for a score head"):
        publish(recipe, "reward", str(tmp_path / "x"), "gguf", runs=runs)
    with pytest.raises(UserError, match="holds no finished stage"):
        publish(recipe, "dpo", str(tmp_path / "x"), runs=runs)
    with pytest.raises(UserError, match="another model section.*quantize"):
        publish(build(recipe.tree, ["model.quantize=fp4"]), "sft", str(tmp_path / "x"), runs=runs)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"no publication wrote.*thesis\.txt"):
        publish(recipe, "sft", str(tmp_path / "mine"), runs=runs)
    for around in (runs, Path.cwd(), Path.cwd().parent):
        with pytest.raises(UserError, match="replaces the whole folder"):
            publish(recipe, "sft", str(around), runs=runs, overwrite=True)
    assert not (tmp_path / "x").exists()
