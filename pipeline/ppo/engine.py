"""Answers sampled by vLLM, in a process and an environment of its own, from the model that is trained here.

The engine is given the base as it is in training, dequantised, which is written once; and the policy's adapter anew
after each update, under a new name, never merged. We speak with it through pipes (ppo/engine_process.py). It ends when
its stdin does, so it outlives this process in no case.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from pipeline.data import render
from pipeline.disk.artifact import Artifact
from pipeline.disk.atomic import Json, digest, read_json, write_json, written_whole
from pipeline.errors import UserError
from pipeline.language.say import say
from pipeline.models import adapters
from pipeline.models.sampling import Episode
from pipeline.models.spec import cache_folder
from pipeline.models.weights import write_base
from pipeline.plan.sizes import SHARD_BYTES
from pipeline.ppo.engine_settings import EngineSettings, find_python
from pipeline.ppo.importance import differences

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from pipeline.models.spec import ModelSpec
    from pipeline.ppo.settings import Sampling
    from pipeline.stages.stage import Context

PROGRAM = Path(__file__).with_name("engine_process.py")
QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which a kill reaches
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
BLOCK = 128
"""Tokens of a block of vLLM's cache on a CPU."""
TOLD = 12
"""Lines of what it printed last that are told when it fails."""


class EngineError(UserError):
    """The engine has failed, or answers as another model would; training can go on from where it stands."""


class Engine:
    """One running engine. `longest`: tokens of the longest prompt with an answer; `at_once`: answers sampled at once.

    Raises UserError where it cannot be started.
    """

    def __init__(
        self,
        settings: EngineSettings,
        spec: ModelSpec,
        model: PeftModel,
        base_digest: str,
        out: Artifact,
        *,
        longest: int,
        at_once: int,
    ) -> None:
        self.stage, self.model, self.log = out.name, model, out.folder / "engine.txt"
        self.adapters = out.folder / "engine"
        self.number, self.step = 0, -1
        self.furthest = 0.0
        """The largest mean difference of log-probabilities so far."""
        dtype = model.get_input_embeddings().weight.dtype
        exact = dtype is torch.float32
        self.max_difference = settings.max_logp_difference or (0.001 if exact else 0.1)
        python = find_python(settings, f"stages.{out.name}.rollout")
        base = written_base(model, spec, base_digest)
        shutil.rmtree(self.adapters, ignore_errors=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), **QUIET}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [python, str(PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the stage, which ends it in order
            )
        window = -(-(longest + 1) // BLOCK) * BLOCK
        options: Json = {
            "model": str(base),
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": longest + 1,
            "max_num_seqs": at_once,
        }
        if model.device.type == "cuda":
            options["gpu_memory_utilization"] = settings.gpu_memory_utilization
        else:
            options["kv_cache_memory_bytes"] = (at_once + 1) * window * _bytes_per_token(model)
        self.about: Json = self._ask({"load": {"options": options, "rank": _rank(model)}})["ready"]

    def answer(
        self,
        step: int,
        prompts: Sequence[list[int]],
        seeds: Sequence[Sequence[int]],
        *,
        new_tokens: int,
        temperature: float,
        stops: list[int],
    ) -> list[Episode]:
        """An answer to each prompt for each of its seeds, those to one prompt beside each other, by the policy as it
        stands after `step` updates; with the engine's log-probabilities, and without the model's own.

        Raises EngineError if it fails, or gives what is no answer.
        """
        if step != self.step:
            self._write_adapter(step)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()  # what our allocator holds and does not use, the engine can
        adapter = {"name": f"policy-{self.number}", "number": self.number, "folder": str(self._folder(self.number))}
        asked = [{"ids": prompt, "seeds": list(own)} for prompt, own in zip(prompts, seeds, strict=True)]
        said = {"adapter": adapter, "asked": asked, "temperature": temperature, "max_tokens": new_tokens}
        answers = self._ask({"answer": {**said, "stops": stops}})["answers"]
        repeated = [prompt for prompt, own in zip(prompts, seeds, strict=True) for _ in own]
        if len(answers) != len(repeated):
            raise self._failed(f"gave {len(answers)} answers to {len(repeated)} requests")
        return [self._episode(prompt, one, new_tokens, stops) for prompt, one in zip(repeated, answers, strict=True)]

    def compare(self, step: int, episodes: Sequence[Episode]) -> None:
        """Raises EngineError where the engine's log-probabilities are too far from the model's own, on average."""
        apart_N = differences(episodes)
        mean, largest = apart_N.mean().item(), apart_N.max().item()
        self.furthest = max(self.furthest, mean)
        if not mean <= self.max_difference:
            raise EngineError(
                f"stage '{self.stage}' was stopped at step {step + 1}: vLLM's log-probabilities are {mean:.3g} nats a "
                f"token from the model's own on average, and {largest:.3g} at most; allowed on average is "
                f"{self.max_difference:g} (rollout.max_logp_difference). It answers with other weights or another "
                f"adapter than what is trained, or computes more coarsely. What it printed is in {self.log}. Leave "
                "`rollout:` out to go on without it."
            )

    def close(self) -> None:
        """End it, and remove the adapters it was given. What it has printed stays."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.adapters, ignore_errors=True)

    def _write_adapter(self, step: int) -> None:
        former = self._folder(self.number)
        self.number, self.step = self.number + 1, step
        folder = self._folder(self.number)
        folder.mkdir(parents=True)
        adapters.save(self.model, folder)
        shutil.rmtree(former, ignore_errors=True)

    def _folder(self, number: int) -> Path:
        return self.adapters.absolute() / f"policy-{number}"

    def _episode(self, prompt: list[int], answer: Json, new_tokens: int, stops: list[int]) -> Episode:
        ids, logp = answer["ids"], answer["logp"]
        whole = 0 < len(ids) <= new_tokens and len(ids) == len(logp)
        if not whole or any(token in stops for token in ids[:-1]) or (len(ids) < new_tokens and ids[-1] not in stops):
            raise self._failed(f"gave {len(ids)} tokens with {len(logp)} log-probabilities, which is no whole answer")
        return Episode(prompt, ids, [], ended=ids[-1] in stops, sampling_logp=logp)

    def _ask(self, request: Json) -> Json:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise self._failed(f"has ended by itself (status {self.process.wait()})")
        try:
            reply: Json = json.loads(line)
        except ValueError:
            raise self._failed("said what is no JSON") from None
        if "error" in reply:
            raise self._failed(f"failed: {reply['error']}")
        return reply

    def _failed(self, what: str) -> EngineError:
        last = "\n  ".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TOLD:])
        return EngineError(
            f"stage '{self.stage}': vLLM {what}. What it printed is in {self.log}, last:\n  {last}\n"
            "Run again to go on from the last checkpoint, or leave `rollout:` out to sample without it."
        )


def start(
    ctx: Context,
    settings: EngineSettings | None,
    sampling: Sampling,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    base_digest: str,
) -> Engine | None:
    """The engine of a stage, where its section asks for one."""
    if settings is None:
        return None
    rows = [*ctx.data.train, *(ctx.data.test or [])]
    longest = max(len(render.prompt(tokenizer, row)) for row in rows) + sampling.response_length
    print("  " + say("starting vLLM"), flush=True)
    at_once = sampling.rollout_batch_size or sampling.batch_size
    engine = Engine(settings, ctx.model, model, base_digest, ctx.out, longest=longest, at_once=at_once)
    about = engine.about
    print("  " + say("vLLM {version} samples, on {device}", version=about["vllm"], device=about["device"]), flush=True)
    return engine


def end(engine: Engine | None) -> dict[str, Any]:
    """End a stage's engine, and give what its manifest tells of it."""
    if engine is None:
        return {}
    engine.close()
    return {"engine": f"vLLM {engine.about['vllm']} on {engine.about['device']}", "engine_differs": engine.furthest}


def refuse_several(settings: EngineSettings | None, ctx: Context) -> None:
    """Raises UserError where several processes train: an engine answers one."""
    if settings and (processes := PartialState().num_processes) > 1:
        raise UserError(
            f"stages.{ctx.out.name}.rollout: an engine answers one process, and here there are {processes}. Leave "
            "`rollout:` out, or run without --launch-config"
        )


def written_base(model: PeftModel, spec: ModelSpec, base_digest: str) -> Path:
    """The folder of the dequantised base, written once for each base in memory: its name is a hash of those bytes."""
    import bitsandbytes

    base: Any = model.get_base_model()
    config = digest(base.config.to_dict())
    content = [base_digest, spec.quantize, spec.computes_in, model.device.type, bitsandbytes.__version__, config]
    folder = cache_folder() / "engine" / digest(content)[:16]
    note = folder / "whole.json"
    if (read_json(note) or {}).get("files") != _files(folder):
        print("  " + say("writing the base for vLLM, dequantised, to {folder}, once", folder=folder), flush=True)
        with written_whole(folder) as new:
            write_base(model, new, SHARD_BYTES)
            write_json(new / note.name, {"files": _files(new)})
    return folder.absolute()


def _files(folder: Path) -> Json:
    """Their sizes: to hash gigabytes at each start would take longer than to find out by log-probabilities."""
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*")) if file.name != "whole.json"}


def _rank(model: PeftModel) -> int:
    config: Any = model.peft_config["default"]
    return int(max([config.r, *(config.rank_pattern or {}).values()]))


def _bytes_per_token(model: PeftModel) -> int:
    """Of keys and values of all layers."""
    base: Any = model.get_base_model()
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.get_input_embeddings().weight.element_size())
