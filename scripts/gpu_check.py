"""What only a GPU can tell, row by row; scripts/gpu_check.sh says how to start it.

    bytes      a base quantised on the GPU has the bytes that it has on the CPU
    chain      every stage runs through the command line on a tiny base, and its checks before step 0 hold
    float16    reward model and PPO in float16, as cards without bfloat16 run them
    resume     stages killed by SIGKILL end with the adapters that they have unkilled
    full ...   a batch that does not fit is halved, and the adapter is the one that an ample card gives
    segments   batches without padding: the kernel against the loop, gradients, tokens/s and memory against padded ones
    8B ...     peak memory, planned and measured, and tokens/s against plain TRL + PEFT, at the shapes of an 8B model

Each row is a process of its own with a time limit: whatever one dies of, the others still run, and the JSON is written
anew after every row. A row that no time was left for says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), "."]

from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import read_json, write_json
from pipeline.disk.manifest import Manifest

STAGES = ("pretrain", "sft", "reward", "dpo", "ppo")
TRAINED = ("sft", "reward", "dpo", "ppo")
KILLED = ("dpo", "ppo")
SHAPES = {"nf4": ((64, 128), (1024, 4096), (4096, 14336)), "fp4": ((1024, 4096),)}
CLOSE = 1e-3
"""The most by which two adapters of equal runs may differ on a GPU, whose sums have no fixed order."""
ROUNDING = 0.02
"""Of the way that an adapter went, the most by which bfloat16 may turn it when sums are taken in another order."""
MIDDLING = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": True,
}  # fmt: skip
"""Large enough that most of the memory of a step is activations, small enough to be made in a second."""


@dataclass
class Row:
    name: str
    word: str
    """holds, FAILS (what it found is wrong, or it died) or "no time"."""
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    why: str = ""


class Wrong(Exception):
    """What a row checks does not hold; `found` is what it found instead."""

    def __init__(self, why: str, found: dict[str, Any]) -> None:
        super().__init__(why)
        self.found = found


def check_bytes(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The same matrices quantised on the CPU and on the GPU, packed weights and their constants compared."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    differing: dict[str, Any] = {}
    worst = 0.0
    for kind, shapes in SHAPES.items():
        for shape in shapes:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                weight = (torch.randn(shape, generator=torch.Generator().manual_seed(17)) * 0.02).to(dtype)
                sides = []
                for device in ("cpu", given.device):
                    # quantize_4bit may work in place on what it is given
                    packed, state = quantize_4bit(weight.to(device).clone(), quant_type=kind, compress_statistics=True)
                    constants = (state.absmax, state.offset, state.state2.absmax)
                    plain = dequantize_4bit(packed, state).float().cpu()
                    sides.append(([packed.cpu(), *(tensor.cpu() for tensor in constants)], plain))
                (ours, plain), (theirs, plain_theirs) = sides
                shares = [(a != b).float().mean().item() for a, b in zip(ours, theirs, strict=True)]
                worst = max(worst, ((plain - plain_theirs).norm() / plain.norm()).item())
                if any(shares):
                    differing[f"{kind} {shape} {dtype}"] = dict(
                        zip(("packed", "absmax", "offset", "absmax of absmax"), shares, strict=True)
                    )
    found = {"matrices": 3 * sum(map(len, SHAPES.values())), "differing": differing, "worst_relative_error": worst}
    if differing:
        raise Wrong("4-bit bytes differ between CPU and GPU", found)
    return found


def check_chain(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All five stages on the tiny base, and what their manifests say of the hand-overs."""
    path = write_recipe(scratch / "chain.yaml", scratch)
    run(path, scratch / "whole", given)
    found: dict[str, Any] = {}
    for stage in STAGES:
        manifest = manifest_of(scratch / "whole", stage)
        checks = {key: value for key, value in manifest.invariants.items() if key != "probe"}
        found[stage] = {"seconds": manifest.seconds, "device": manifest.device, **checks}
    return found


def check_float16(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    if given.device == "cpu":
        return {"left out": "a CPU does not train in float16"}
    path = write_recipe(scratch / "float16.yaml", scratch, name="float16", stages=("sft", "reward", "ppo"))
    run(path, scratch / "float16", given, "-o", "model.dtype=float16")
    lines = (scratch / "float16" / "float16" / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    norms = [line["grad_norm"] for line in map(json.loads, lines) if "grad_norm" in line]
    found = {"grad_norms": norms, **manifest_of(scratch / "float16", "ppo", "float16").after}
    if not norms or not all(0 < norm < float("inf") for norm in norms):
        raise Wrong("a step of PPO in float16 had no finite gradient", found)
    return found


def check_resume(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Each of KILLED, on the parents that check_chain left, is killed once it has a checkpoint and goes on from it;
    the adapters are compared with those of check_chain."""
    from safetensors.torch import load_file

    path = scratch / "chain.yaml"
    if not (scratch / "whole").is_dir():
        raise RuntimeError("the chain that was to be compared with has not run")
    shutil.copytree(scratch / "whole", scratch / "killed")
    for stage in KILLED:
        shutil.rmtree(scratch / "killed" / "gpu-check" / stage)
    for stage in KILLED:
        with (scratch / "killed.log").open("ab") as log:
            process = subprocess.Popen(command(path, scratch / "killed"), stdout=log, stderr=log)
        folder = scratch / "killed" / "gpu-check" / stage
        while process.poll() is None and not any((folder / "checkpoints").glob("checkpoint-*/")):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)  # its worker notices that the runner is gone, and ends
        process.wait()
    run(path, scratch / "killed", given)
    found: dict[str, Any] = {}
    for stage in KILLED:
        whole, killed = (
            load_file(scratch / side / "gpu-check" / stage / "adapter" / WEIGHTS) for side in ("whole", "killed")
        )
        found[stage] = max((whole[name] - killed[name]).abs().max().item() for name in whole)
    if max(found.values()) > CLOSE:
        raise Wrong(f"an adapter differs by more than {CLOSE:g} from the one of the chain that was not killed", found)
    return found


def check_full(stage: str, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Two steps with memory to spare, and the same two with less than they need."""
    import torch

    free, start, peak, _ = few_steps(stage, given, scratch, None)
    limit = None if given.device == "cpu" else start + round(0.6 * (peak - start))
    limited, _, _, halved = few_steps(stage, given, scratch, limit or "planted")
    moved = torch.cat([(after - before).flatten() for before, after in free.values()]).norm().item()
    apart = torch.cat([(free[name][1] - limited[name][1]).flatten() for name in free]).norm().item()
    found = {"peak_gib": peak / 2**30, "limit_gib": (limit or 0) / 2**30, "at_once": halved, "apart": apart / moved}
    if not halved:
        raise Wrong("nothing was halved, although memory was limited", found)
    if not found["apart"] <= ROUNDING:
        raise Wrong(f"the adapter is {found['apart']:.2g} of its way from the one of an ample card", found)
    return found


def few_steps(
    stage: str, given: argparse.Namespace, scratch: Path, limit: int | str | None
) -> tuple[dict[str, Any], int, int, list[int]]:
    """Each adapter tensor before and after the steps, bytes before and at the peak, and to how many rows it was halved.

    limit: bytes that the process may allocate; "planted" on a CPU, which has no limit to run into.
    """
    import bench_gpu
    import torch

    words = {"rows": 8, "length": 64 if given.tiny else 512, "steps": 0 if stage == "ppo" else 1, "checkpointed": 0}
    given = argparse.Namespace(**{**vars(given), **words})
    config = bench_gpu.TINY if given.tiny else MIDDLING
    torch.manual_seed(17)
    trainer = bench_gpu.ppo_trainer(given, config, scratch) if stage == "ppo" else bench_gpu.trainer_of(
        stage, "ours", given, config, scratch
    )  # fmt: skip
    model = trainer.actors.model if stage == "ppo" else trainer.model
    if stage != "ppo":  # AdamW's first steps are signs, which rounding turns where a gradient is next to nothing
        trainer.args.optim, trainer.args.learning_rate = "sgd", 0.1
    halved: list[int] = []
    trainer.when_split = lambda rows, left: halved.append(left)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    start, cuda = 0, given.device == "cuda"
    if cuda:
        bench_gpu._reset(torch.device(given.device))
        start = torch.cuda.memory_allocated()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total) if isinstance(limit, int) else 1.0)
    elif limit:
        plant_limit(model, given.rows * given.length // (1 if stage in ("reward", "dpo") else 2))
    if stage == "ppo":
        list(trainer.steps())
    else:
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    after = {name: (before[name], weight.detach().cpu().clone()) for name, weight in weights.items()}
    del trainer, model, weights
    if cuda:
        bench_gpu._reset(torch.device(given.device))
    return after, start, peak, halved


def plant_limit(model: Any, tokens: int) -> None:
    """A pass that keeps gradients and is of more than `tokens` raises what CUDA raises."""
    import torch

    def entered(layer: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if torch.is_grad_enabled() and hidden.shape[0] * hidden.shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. (planted)")

    layers = [module for module in model.modules() if hasattr(module, "self_attn") and hasattr(module, "mlp")]
    layers[-1].register_forward_pre_hook(entered, with_kwargs=True)


def check_bench(stage: str, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both sides of a stage, by scripts/bench_gpu.py."""
    out = scratch / f"bench-{stage}.json"
    # A rollout writes one token at a time: PPO gets shorter rows and fewer steps, to be done in its time.
    steps, length = ("1", "512") if stage == "ppo" else ("3", "1024")
    words = ["--device", given.device, "--stages", stage, "--steps", steps, "--out", str(out)]
    words += ["--tiny", "--length", "64"] if given.tiny else ["--length", length]
    subprocess.run([sys.executable, "scripts/bench_gpu.py", *words], check=True)
    measured = (read_json(out) or {})["measured"]
    found = {"rows_of_tokens": words[-1], **{one["side"]: one for one in measured}}
    broken = [one["note"] for one in measured if one["side"] == "ours" and one["tokens_per_second"] is None]
    if broken:
        raise Wrong(broken[0], found)
    return found


def segments(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    import check_segments

    found, wrong = check_segments.check(given)
    if wrong:
        raise Wrong(wrong, found)
    return found


Check = Callable[[argparse.Namespace, Path], dict[str, Any]]


def of_stage(check: Callable[[str, argparse.Namespace, Path], dict[str, Any]], stage: str) -> Check:
    return lambda given, scratch: check(stage, given, scratch)


ROWS: dict[str, tuple[Check, int]] = {
    # in order of worth, each with the seconds it may take
    "bytes": (check_bytes, 60),
    "chain": (check_chain, 180),
    **{f"8B {stage}": (of_stage(check_bench, stage), 120) for stage in TRAINED},
    "segments": (segments, 90),
    **{f"full {stage}": (of_stage(check_full, stage), 60) for stage in TRAINED},
    "float16": (check_float16, 120),
    "resume": (check_resume, 180),
    "8B pretrain": (of_stage(check_bench, "pretrain"), 120),
}


def write_recipe(path: Path, scratch: Path, name: str = "gpu-check", stages: tuple[str, ...] = STAGES) -> Path:
    """A chain of some ten steps a stage on the tiny base."""
    pairs = {"path": "data/comparisons.jsonl", "test": "data/comparisons_test.jsonl", "limit": 48}
    sections: dict[str, Any] = {
        "pretrain": {"data": {"path": "data/corpus.jsonl", "limit": 48}},
        "sft": {"from": "pretrain", "data": {"path": "data/demonstrations.jsonl", "limit": 48}},
        "reward": {"from": "sft", "data": pairs},
        "dpo": {"from": "sft", "data": pairs},
        "ppo": {
            "from": "sft", "reward": "reward",
            "data": {"path": "data/prompts.jsonl", "test": "data/prompts_test.jsonl", "limit": 64},
            "train": {
                "steps": 6, "batch_size": 16, "mini_batch_size": 8, "response_length": 48, "save_steps": 1,
                "kl_stop": 1000.0, "learning_rate": 1e-4,
            },
        },
    }  # fmt: skip
    if "pretrain" not in stages:
        del sections["sft"]["from"]
    tree = {
        "name": name,
        "model": {"base": str(scratch / "tiny"), "lora": {"r": 4, "target_modules": "all-linear"}},
        "train": {
            "per_device_train_batch_size": 4, "max_length": 128, "learning_rate": 1e-3, "num_train_epochs": 1,
            "save_steps": 2, "logging_steps": 2,
        },
        "stages": {stage: sections[stage] for stage in stages},
    }  # fmt: skip
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return path


def command(path: Path, runs: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "run", str(path), "--runs", str(runs), *words]


def run(path: Path, runs: Path, given: argparse.Namespace, *words: str) -> None:
    done = subprocess.run(command(path, runs, *words), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"onebase run ended with status {done.returncode}: {done.stderr.strip()[-800:]}")


def manifest_of(runs: Path, stage: str, name: str = "gpu-check") -> Manifest:
    return Artifact(runs / name / stage).finished()


def take(name: str, given: argparse.Namespace, scratch: Path, out: Path) -> None:
    """One row, in this process."""
    begun = time.monotonic()
    row = Row(name, "holds")
    try:
        row.found = ROWS[name][0](given, scratch)
    except Wrong as error:
        row = Row(name, "FAILS", found=error.found, why=str(error))
    except Exception as error:  # whatever it is, it is this row's result
        traceback.print_exc()
        row = Row(name, "FAILS", why=f"{type(error).__name__}: {error}")
    row.seconds = round(time.monotonic() - begun, 1)
    write_json(out, asdict(row))


def taken(name: str, given: argparse.Namespace, scratch: Path, left: float) -> Row:
    """One row, in a process of its own that is given so many seconds at most."""
    limit = min(ROWS[name][1] * (1 if given.device == "cuda" else 4), left)  # a CPU only rehearses
    if limit < 10:
        return Row(name, "no time")
    out, begun = scratch / "row.json", time.monotonic()
    out.unlink(missing_ok=True)
    words = ["--device", given.device, *(["--tiny"] if given.tiny else []), "--row", name, str(scratch), str(out)]
    with (scratch / "log.txt").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, *words], stdout=log, stderr=log, text=True, start_new_session=True
        )
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()
            return Row(name, "FAILS", round(time.monotonic() - begun, 1), why=f"not done within {limit:.0f} s")
        log.seek(0)
        said = log.read().strip()
    known = read_json(out)
    if known is None:
        return Row(name, "FAILS", round(time.monotonic() - begun, 1), why=f"died: {said[-400:]}")
    if known["word"] == "FAILS":
        print(said[-2000:], flush=True)
    return Row(**known)


def figures(row: Row) -> str:
    """A row's figures in one cell."""
    found = row.found
    if row.name.startswith("8B") and "ours" in found:
        ours, plain = found["ours"], found.get("plain") or {}
        planned, measured, speed = (ours[key] for key in ("planned_gib", "measured_gib", "tokens_per_second"))
        parts = [f"{speed:.0f} tokens/s" if speed else ""]
        if measured:
            parts.append(f"{measured:.2f} GiB (planned {planned:.2f}, {100 * (planned / measured - 1):+.1f} %)")
        if plain.get("tokens_per_second") and speed:
            parts.append(f"plain TRL {plain['tokens_per_second']:.0f} tokens/s, {plain['measured_gib'] or 0:.2f} GiB")
            parts.append(f"{speed / plain['tokens_per_second']:.2f} times")
        return "; ".join(filter(None, [*parts, ours["note"]]))
    if row.name == "chain" and found:
        names = ("step_0_margin", "step_0_kl", "step_0_ratio_minus_1", "reload_score_difference")
        checks = [f"{key} {part[key]:.2g}" for part in found.values() for key in names if key in part]
        return ", ".join(checks)
    if row.name == "resume" and found:
        return ", ".join(f"{stage} {'equal' if apart == 0 else f'{apart:.1g}'}" for stage, apart in found.items())
    if row.name.startswith("full") and found:
        return (
            f"halved to {found['at_once']}; adapters apart by {found['apart']:.1g} of their way; "
            f"{found['limit_gib']:.2f} of {found['peak_gib']:.2f} GiB"
        )
    if row.name == "segments" and found:
        import check_segments

        return check_segments.told(found)
    if row.name == "bytes" and found:
        return f"{len(found['differing'])} of {found['matrices']} differ, by {found['worst_relative_error']:.1g}"
    return "; ".join(f"{key} {value}" for key, value in found.items())[:160]


def machine(given: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found: dict[str, Any] = {"device": "cpu"}
    if given.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found = {
            "device": card.name, "memory_gib": card.total_memory / 2**30, "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
        }  # fmt: skip
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in place of 8B ones")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all rows together")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)  # one row, its scratch folder and its result's file
    given = parser.parse_args()
    if given.row:
        take(given.row[0], given, Path(given.row[1]), Path(given.row[2]))
        return
    import torch
    from make_tiny_base import make_tiny_base

    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA here; --device cpu --tiny tries the script itself")
    begun = time.monotonic()
    rows: list[Row] = []
    known = {"machine": machine(given), "tiny": given.tiny}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ["ONEBASE_CACHE"] = str(scratch / "cache")
        make_tiny_base(scratch / "tiny")
        for row_name in given.only:
            left = given.minutes * 60 - (time.monotonic() - begun)
            rows.append(taken(row_name, given, scratch, left))
            row = rows[-1]
            print(f"{row.name:<12} {row.word:<8} {row.seconds:6.1f} s  {row.why or figures(row)}", flush=True)
            write_json(given.out, {**known, "rows": [asdict(one) for one in rows]})
    print(f"\n{known['machine']}, {time.monotonic() - begun:.0f} s in all; {given.out}\n")
    print("| row | result | seconds | figures |\n| --- | --- | --- | --- |")
    for row in rows:
        told = (row.why or figures(row)).replace("|", "/").replace("\n", " ")
        print(f"| {row.name} | {row.word} | {row.seconds:.0f} | {told[:220]} |")
    sys.exit(1 if any(row.word == "FAILS" for row in rows) else 0)


if __name__ == "__main__":
    main()
