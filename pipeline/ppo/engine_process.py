"""The other side of ppo/engine.py: vLLM, run by the Python of its own environment. Imports nothing of OneBase.

It reads a JSON object from each line of stdin, and answers each with one line on what was stdout when it began:

    {"load": {"options": {...}, "rank": 16}}     {"ready": {"vllm": "0.32.0", "device": "cpu"}}
    {"answer": {"adapter": {"name", "number", "folder"}, "temperature", "max_tokens", "stops",
                "asked": [{"ids": [...], "seeds": [...]}]}}
                                                 {"answers": [{"ids": [...], "logp": [...]}]}, one for each seed

What goes wrong is {"error": "..."}. Once stdin ends, whoever started this is gone: it ends at once, with all processes
of its group.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import traceback
from typing import Any, TextIO, get_args

Json = dict[str, Any]


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    requests: queue.SimpleQueue[Json] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    engine: Any = None
    while True:
        request = requests.get()
        try:
            if "load" in request:
                engine, reply = _load(**request["load"])
            else:
                reply = {"answers": _answer(engine, **request["answer"])}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        _send(replies, reply)


def _listen(requests: queue.SimpleQueue[Json]) -> None:
    with os.fdopen(os.dup(0), "rb") as lines:
        for line in lines:
            requests.put(json.loads(line))
    os.killpg(0, signal.SIGKILL)


def _send(replies: TextIO, reply: Json) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _load(options: Json, rank: int) -> tuple[Any, Json]:
    """`options`: of vllm.LLM. `rank`: of the adapters, of which it takes some sizes only."""
    import vllm
    from vllm.config.lora import MaxLoRARanks
    from vllm.platforms import current_platform

    fits = min(size for size in get_args(MaxLoRARanks) if size >= rank)
    sleeps = current_platform.is_cuda()  # the card is the trainer's in between
    engine = vllm.LLM(
        **options,
        enable_lora=True,
        max_lora_rank=fits,
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",  # of the distribution that is drawn from, temperature included
        enable_sleep_mode=sleeps,
    )
    if sleeps:
        engine.sleep(level=1)
    return engine, {"ready": {"vllm": vllm.__version__, "device": current_platform.device_type, "sleeps": sleeps}}


def _answer(
    engine: Any, adapter: Json, asked: list[Json], temperature: float, max_tokens: int, stops: list[int]
) -> list[Json]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sleeps = engine.llm_engine.vllm_config.model_config.enable_sleep_mode
    if sleeps:
        engine.wake_up()
    for number in engine.llm_engine.list_loras() - {adapter["number"]}:
        engine.llm_engine.remove_lora(number)
    engine.reset_prefix_cache()  # so that no answer depends on what was asked before
    prompts, settings = [], []
    for one in asked:
        for seed in one["seeds"]:
            prompts.append({"prompt_token_ids": one["ids"]})
            settings.append(
                SamplingParams(
                    seed=seed,
                    temperature=temperature,
                    max_tokens=max_tokens,
                    stop_token_ids=stops,
                    ignore_eos=True,
                    logprobs=0,
                    detokenize=False,
                )
            )
    lora = LoRARequest(adapter["name"], adapter["number"], adapter["folder"])
    done = engine.generate(prompts, settings, lora_request=lora, use_tqdm=False)
    answers = []
    for request in done:
        ids = list(request.outputs[0].token_ids)
        of_each = zip(ids, request.outputs[0].logprobs, strict=True)
        answers.append({"ids": ids, "logp": [places[token].logprob for token, places in of_each]})
    if sleeps:
        engine.sleep(level=1)
    return answers


if __name__ == "__main__":
    main()
