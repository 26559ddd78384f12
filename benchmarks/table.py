"""Write docs/benchmarks.md from benchmarks/results/*.json, so that no number there is typed by hand.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "–" if value is None else str(value)


def layer(result: dict[str, Any]) -> str:
    rows = [
        {
            "shape (out × in)": f"{row['shape']} ({row['out']} × {row['in']})",
            "LoRA ms": row["lora_ms"],
            "reference ms": row["reference_ms"],
            "sqft ms": row["sqft_ms"],
            "sqft / reference (floor 0.60)": row["sqft_to_reference"],
            "sqft / LoRA (floor 1.50)": row["sqft_to_lora"],
            "peak MB LoRA / reference / sqft": f"{row['lora_peak_mb']} / {row['reference_peak_mb']} / {row['sqft_peak_mb']}",
        }
        for row in result["rows"]
    ]
    return (
        f"One linear, forward and backward, bf16 under autocast, {result['tokens']} tokens, rank 32, median of "
        f"{result['rounds']} alternating rounds. The floor counts matmuls alone: LoRA 4/6, reference 10/6 of ours. Peak is what "
        f"torch allocates above the weights during the call.\n\n{table(rows)}"
    )


def training(result: dict[str, Any]) -> str:
    rows = [
        {
            "loop": name,
            "tokens/s": result["tokens_per_second"][name],
            "examples/s": result["examples_per_second"][name],
            "model holds, GB": round(result["held_bytes"][name] / 1e9, 2),
            "a step adds, GB": round(result["step_bytes"][name] / 1e9, 2),
            "matrix products, % of a step": round(100 * result["products_share"][name], 1),
        }
        for name in result["tokens_per_second"]
    ]
    computes = (
        ""
        if result["bfloat16_instructions"]
        else (
            " The processor has no instructions for bfloat16: all loops but the plain one compute in float32, as `sqft` does there."
        )
    )
    return (
        f"A whole step on SmolLM2-135M, {result['data']} ({result['mean_tokens_per_example']} tokens an example on average), "
        f"median of {result['rounds']} alternating rounds; tokens are real ones, padding does not count. Products are those of the profiler, attention "
        f"apart.{computes}\n\n{table(rows)}\n\n"
        f"sqft against the plain padded loop: {result['sqft_to_plain_tokens_per_second']} × the tokens per second. Masked against "
        f"unmasked speed in the same loop: {result['masked_to_unmasked_speed']}. Step time against the reference's form: "
        f"{result['step_time_to_reference']}. Memory against packed LoRA on the float base: "
        f"{result['peak_memory_to_lora']}.{_int4(result)}"
    )


def _int4(result: dict[str, Any]) -> str:
    if "int4_qa" not in result["tokens_per_second"]:
        return ""
    return (
        f"\n\nOn the INT4 base the packed linears take {result['quantised_linears_to_bfloat16']} of their bfloat16 size. "
        f"Quantisation-aware training: {result['qa_step_time_to_sparse']} × the step time of kind sparse, "
        f"{result['qa_memory_to_lora']} × the memory of packed LoRA on the float base; LoRA on the INT4 base: "
        f"{result['int4_lora_step_time_to_lora']} × the time and {result['int4_lora_memory_to_lora']} × the memory of LoRA on "
        "the float base."
    )


def attention(result: dict[str, Any]) -> str:
    rows = [
        {
            "tokens a row": row["length"],
            **{f"{kind} s": round(seconds, 2) for kind, seconds in row["seconds"].items()},
            "by example / eager": round(row["seconds"]["by example"] / row["seconds"]["eager"], 2),
            "by example / sdpa": round(row["seconds"]["by example"] / row["seconds"]["sdpa"], 2),
            "a step adds, GB": " / ".join(f"{size / 1e9:.2f}" for size in row["step_bytes"].values()),
        }
        for row in result["rows"]
    ]
    return (
        f"A training step of {result['tokens']} tokens on SmolLM2-135M, masked adapters, bf16 under autocast, examples of "
        f"{result['example']} tokens packed into rows of each length; medians of {result['rounds']} alternating rounds. "
        f"`finetune.attention: auto` is eager up to 256 tokens on a CPU, and attends example by example beyond.\n\n{table(rows)}"
    )


def plan(result: dict[str, Any]) -> str:
    def share(row: dict[str, Any], key: str) -> str | None:
        if not row["taken"][key]:
            return None
        return f"{round(row['forecast'][key] / row['taken'][key] - 1, 2) + 0.0:+.0%}"  # + 0.0: no -0%

    rows = [
        {
            "model": name,
            "stage": row["stage"],
            "memory taken, GB": f"{row['taken']['memory_bytes'] / 1e9:.2f}",
            "forecast": share(row, "memory_bytes"),
            "disk taken, MB": round((row["taken"]["disk_bytes"] or 0) / 1e6) or None,
            "forecast of it": share(row, "disk_bytes"),
            "seconds taken": round(row["taken"]["seconds"]),
            "forecast of them": share(row, "seconds"),
        }
        for name, found in result["models"].items()
        for row in found
    ]
    return (
        "`sqft plan` against the `sqft run` that followed, the quickstart's recipe on SmolLM2-135M and, with fewer samples, steps "
        f"and rows, on a random Llama of 1.2 B. Memory is the highest resident of the process, libraries and all.\n\n{table(rows)}"
    )


def large(result: dict[str, Any]) -> str:
    counts = list(result["blocks"])
    rows = []
    for stage in ("sparsify", "quantize", "finetune", "merge", "verify"):
        row: dict[str, Any] = {"stage": stage}
        for what in ("peak", "written"):
            for count in counts:
                row[f"{what} GB, {count} blocks"] = round(result["blocks"][count][stage][what] / 1e9, 2)
        rows.append(row)
    models = " and ".join(f"{result['blocks'][count]['model_bytes'] / 1e9:.2f}" for count in counts)
    quantised = "rounded" if result["method"] == "rtn" else "quantised by GPTQ"
    text = (
        f"A random model with the shapes of {result['shape']} and {' and '.join(counts)} blocks ({models} GB in bfloat16), pruned by Wanda to 50 % "
        f"on {result['samples']} × {result['length']} tokens, {quantised} to 4 bits in groups of 64, tuned for two steps at rank 8, merged, and "
        "verified without generated answers. Peaks are of each stage's own process, libraries and all (0.62 GB); finetune holds the whole model."
    )
    return f"{text}\n\n{table(rows)}"


def streaming(result: dict[str, Any]) -> str:
    how = "pruned by Wanda and quantised by GPTQ in one pass" if "bound_bytes" in result else "pruned by Wanda"
    bound = f" (stated bound: {result['bound_bytes'] / 1e9:.2f} GB)" if "bound_bytes" in result else ""
    return (
        f"A random Llama of {result['parameters'] / 1e9:.2f} B parameters in bf16 ({result['weights_bytes'] / 1e9:.2f} GB) {how} "
        f"to {100 * result['sparsity']:.0f} % with {result['calibration_tokens']} calibration tokens: anonymous resident memory above "
        f"the imports' own peaked at {result['peak_anonymous_bytes_above_imports'] / 1e9:.2f} GB{bound}, "
        f"**{100 * result['share_of_weights']:.1f} %** of the weights' size, in {result['seconds']} s."
    )


def compression(result: dict[str, Any]) -> str:
    settings = result["settings"]
    rows = [{"model": name, **row} for name, row in result["rows"].items()]
    text = (
        f"The same {settings['samples']} × {settings['length']} calibration tokens for all; WikiText-2 test text, "
        f"{settings['test_windows']} windows of {settings['window']} tokens. Seconds are whole calls, folder to folder. "
        "`mask ignored` and `feedback forgotten` are ours with one thing changed (see the script). Sparsity counts every "
        f"zero, also weights that merely round to it.\n\n{table(rows)}"
    )
    equal = result.get("wanda_masks_equal")
    if equal:
        least = ", ".join(f"{name} {100 * value:.1f} %" for name, value in equal["least"].items())
        text += f"\n\nThe two Wanda masks agree in {100 * equal['share']:.2f} % of the weights; least in {least}."
        text += f" Our joint pass takes {result['joint_seconds_to_peer']} of the peer's time."
    return text


def starts(result: dict[str, Any]) -> str:
    settings = result["settings"]

    def cell(value: dict[str, float]) -> str:
        return f"{value['mean']:.3f} ± {value['stderr_over_seeds']:.3f}"

    rows = [
        {
            "task": task,
            "start": start,
            "loss of step 1": cell(found["first_loss"]),
            "loss, last 5 steps": cell(found["last_loss"]),
            "accuracy merged": cell(found["accuracy"]),
        }
        for task, by_start in result["rows"].items()
        for start, found in by_start.items()
    ]
    return (
        f"Quantisation-aware training from three starting weights: {settings['steps']} steps of 1,024 tokens, rank 32, "
        f"{settings['seeds']} seeds, {settings['rows']} test rows; ± is the standard error over seeds.\n\n{table(rows)}"
    )


def costs(result: dict[str, Any]) -> str:
    return (
        "Storage, precision, memory and speed of the pipelines on SmolLM2-135M (the paper's tables 6 and 7). Training memory is "
        "what the model holds plus what a step of about 1,000 packed tokens adds. Inference in transformers, one sequence; "
        "merged INT4 folders are decompressed by transformers, so only their storage is small there. vLLM holds the codes, and "
        "serves a plain LoRA beside its base; an unmerged masked or quantisation-aware adapter it does not know. Its seven servers "
        "were up together on the two processors, so compare their figures with each other alone. Medians of "
        f"{result['rounds']} alternating rounds.\n\n{table(result['rows'])}\n\nIn vLLM the merged models "
        f"write {_merging(result)} times the tokens a second of the same bases with a LoRA beside them."
    )


def _merging(result: dict[str, Any]) -> str:
    """Return how much faster vLLM serves the merged models, in 16 bit and in INT4."""
    speed = {row["pipeline"]: row["vllm_tokens_per_second"] for row in result["rows"]}
    pairs = (("SQFT + SparsePEFT, merged", "LoRA, Shears"), ("QA-SparsePEFT, merged", "GPTQ + LoRA, SQFT"))
    return " (16 bit) and ".join(f"{speed[merged] / speed[unmerged]:.1f}" for merged, unmerged in pairs) + " (INT4)"


def memory(result: dict[str, Any]) -> str:
    parts = []
    for model, found in result["models"].items():
        rows = [
            {
                "fine-tuning": row["run"],
                "weights held, GB": f"{row['model'] / 1e9:.2f}",
                "quantised linears / their bf16 size": row.get("packed_share", ""),
                "peak, GB": f"{row['peak'] / 1e9:.2f}",
                "peak above the libraries, GB": f"{(row['peak'] - row['libraries']) / 1e9:.2f}",
            }
            for row in found
        ]
        parts.append(f"**{model}**\n\n{table(rows)}")
    return (
        f"`sqft finetune` in a process of its own, {result['steps']} steps of {result['tokens']} tokens, rank 32 on q, k, v, up and "
        "down, eager attention; highest resident memory of the process.\n\n" + "\n\n".join(parts)
    )


def searching(result: dict[str, Any]) -> str:
    hourly = result["configurations_per_hour"]
    return (
        f"{result['configurations']} configurations of an adapter of kind {result['kind']}, {result['rows']} rows of "
        f"{result['task']}, alternating: {hourly['sqft']} configurations an hour switched in place against "
        f"{hourly['reference']} loaded and run by lm-eval, **{result['speed_up']} ×** (medians); "
        f"{result['speed_up_if_the_reference_kept_the_base']} × if the reference kept the base in memory. Rows judged alike: "
        f"{result['rows_judged_alike']}. The one load takes {result['load_seconds_once']} s more."
    )


def workers(result: dict[str, Any]) -> str:
    one, two = result["seconds"]["1"], result["seconds"]["2"]
    same = "the same ranks were chosen" if result["chosen_alike"] else "the chosen ranks differ"
    return (
        f"{result['configurations']} configurations on {result['rows']} rows of {result['task']}, one thread a process, loading "
        f"included: {one} s by one process, {two} s by two that share the study, **{result['speed_up']} ×** (medians of "
        f"{result['rounds']} alternating rounds); {same}."
    )


def processes(result: dict[str, Any]) -> str:
    rows = [
        {
            "round": number + 1,
            "load before": one["load"],
            "one process, s": one["1"]["work"],
            "two, s": one["2"]["work"],
            "one, processor s": one["1"]["processor"],
            "two, the slower's": one["2"]["processor"],
        }
        for number, one in enumerate(result["rounds"])
    ]
    speed_up, changed = result["speed_up"], result["codes_changed"]
    return (
        f"`sqft quantize` on {result['samples']} samples of {result['length']} tokens, one thread a process. By two "
        f"processes that share samples and linears the work takes **{speed_up['work']} ×** less time (medians of "
        f"{len(rows)} alternating rounds), the whole command with its imports {speed_up['command']} × less, and the "
        f"processor {speed_up['processor']} × less in the slower of the two. "
        f"{100 * changed['two_processes']:.2f} % of the codes differ from one process'; "
        f"{100 * changed['one_process_other_batch']:.2f} % differ where one process runs five sequences at a time "
        f"instead of eight.\n\n{table(rows)}"
    )


def strategies(result: dict[str, Any]) -> str:
    rows = [
        {
            "strategy": row["strategy"],
            "evaluated": row["evaluated"] or "–",
            "validation, chosen": row["validation"],
            "validation, heuristic": row["validation_of_heuristic"],
            "mean rank": row["mean_rank"],
            "test": row["test"],
            "test − heuristic (95 % interval)": "{:+.1f} ({:+.1f} to {:+.1f})".format(*row["test_minus_heuristic"]),
        }
        for row in result["rows"]
    ]
    return (
        f"Sub-adapters of {result['adapter']}, chosen on {result['validation_rows']} validation rows of MAWPS, judged on "
        f"{result['test_rows']} test rows of MAWPS and SVAMP; per cent.\n\n{table(rows)}"
    )


def evaluation(result: dict[str, Any]) -> str:
    rows = [
        {
            "task": row["task"],
            "`generate`, rows/s": row["rows_per_second"].get("generate"),
            "lm-eval, rows/s": row["rows_per_second"]["lm-eval"],
            "sqft, rows/s": row["rows_per_second"]["sqft"],
            "sqft, one batch": row["rows_per_second"].get("sqft, one batch"),
            "sqft / `generate`": row["speed_up"].get("generate"),
            "one batch / `generate`": row["speed_up_of_one_batch"],
            "sqft / lm-eval": row["speed_up"]["lm-eval"],
            "judged alike": f"{row['judged_alike']} of {result['rows']}",
            "right, in that order": " / ".join(
                str(row["right"][side]) for side in ("generate", "lm-eval", "sqft") if side in row["right"]
            ),
        }
        for row in result["tasks"]
    ]
    return (
        "lm-eval's evaluator with its own Hugging Face model and with our decoding, and for generation with transformers' "
        f"`generate` over the prompts as they come; {result['rows']} rows of each task in batches of {result['batch']}, {result['rounds']} alternating rounds, model {result.get('model', 'runs/quickstart/dense')}.\n\n{table(rows)}"
    )


def hashing(result: dict[str, Any]) -> str:
    seconds, (fastest, slowest) = result["seconds_per_gb"], result["fastest_and_slowest"]["hashing"]
    instructions = "has" if result["sha_instructions"] else "does not show"
    return (
        f"A file of {result['gigabytes']} GB of random bytes, in the system's cache, hashed by SHA-256 as `verify`, `evaluate` and every "
        f"stage hash what they are given: **{seconds['hashing']} s a GB** ({fastest} to {slowest}), reading alone {seconds['reading']}; "
        f"medians of {result['rounds']} alternating rounds, in seconds of the processor. It {instructions} instructions for SHA-256. A "
        "disk that reads more slowly than that decides alone."
    )


def columns(result: dict[str, Any]) -> str:
    text = (
        "One linear, or those that share an input as one, pruned to 50 % and quantised to 4 bits in groups of 64: median ms, the median "
        f"over {result['rounds']} alternating rounds of the time to GPTQ's under a given mask, and the lost share of the outputs' energy on "
        "random, correlated inputs. `gptq` compensates rounding alone; `update` compensates what the given mask prunes; `sparsegpt` chooses "
        "its mask in the loop. Without `gptq` the weight stays float.\n\n"
    )
    names = list(next(iter(result["rows"].values())))
    text += "| shape (out × in) | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|"
    for shape, row in result["rows"].items():
        cells = (f"{row[n]['ms']} ms, {row[n]['to_gptq']} ×, {row[n]['lost']}" for n in names)
        text += f"\n| {shape} | " + " | ".join(cells) + " |"
    return text


def serving(result: dict[str, Any]) -> str:
    summary, difference = result["summary"], result["summary"]["logprob_difference"]
    return (
        f"Greedy tokens of vLLM {result['vllm']} on the CPU ({result['activations']}-bit activations) against transformers "
        f"{result['transformers']} on the quickstart's merged model ({result['kind']}), {summary['prompts']} prompts of up to 32 "
        f"new tokens: {summary['equal']} equal, {summary['near_tie']} differ first at a near tie (transformers' own logits of "
        f"the two tokens less than {result['near_tie']} apart: two kernels rounding differently), {summary['mismatch']} "
        f"mismatches. Log-probabilities differ by {difference['mean']:.3f} on average, {difference['max']:.2f} at most. One "
        f"sequence at a time: first token after {1e3 * summary['ttft_s']['median']:.0f} ms (median), "
        f"{summary['output_tokens_per_s']:.1f} tokens/s."
    )


def archive(result: dict[str, Any]) -> str:
    def megabytes(row: dict[str, Any], name: str) -> str | None:
        return f"{row[name] / 1e6:.1f} MB" if name in row else None

    rows = [
        {
            "folder": name,
            "plain": megabytes(row, "bytes"),
            "`sqft pack`": megabytes(row, "packed_bytes"),
            "`zstd -3`": megabytes(row, "zstd_3_bytes"),
            "`sqft pack`, then `zstd -3`": megabytes(row, "packed_and_zstd_3_bytes"),
        }
        for name, row in result["folders"].items()
    ]
    return (
        "All safetensors files of folders of SmolLM2-135M at 50 % zeros, the stored mask among them: pruned by magnitude in 16 bits, the same at "
        "2:4, the quickstart's INT4 base with its starting weights, and the quickstart's merged INT4 model. The 16-bit weights were "
        f"unpacked from a 4-bit file and have few values each, which zstd finds.\n\n{table(rows)}{_archive_times(result)}"
    )


def _archive_times(result: dict[str, Any]) -> str:
    if "speed" not in result:
        return ""

    def cell(row: dict[str, Any], name: str) -> str:
        return f"{row['seconds'][name]:.2f} s, {row['seconds']['cp'] / row['seconds'][name]:.2f}"

    actions = ("pack", "unpack", "open", "pack, SHA-256", "unpack, SHA-256")
    speed = [
        {
            "": f"{name}, {row['bytes'] / 1e6:.0f} MB in {row['tensors']} tensors",
            "`cp`": f"{row['seconds']['cp']:.2f} s",
            **{action: cell(row, action) for action in actions},
        }
        for name, row in result["speed"].items()
    ]
    evaluated = [
        {
            "": name,
            "folder": f"{row['seconds']['folder']:.1f} s",
            "archive": f"{row['seconds']['archive']:.1f} s",
            "archive to folder": f"{row['seconds']['archive'] / row['seconds']['folder']:.2f}",
        }
        for name, row in result.get("evaluate", {}).items()
    ]
    of = next(iter(result["speed"].values()))
    text = (
        f"\n\nSeconds of the processor on one thread, files in the page cache, and behind the comma the speed relative to `cp` of the same "
        f"bytes (1 is as fast); medians of {of['rounds']} alternating rounds. The last two columns hash what is read and what is written, as "
        f"the commands do. A small model's time is that of its many tensors.\n\n{table(speed)}"
    )
    if evaluated:
        row = next(iter(result["evaluate"].values()))
        text += (
            f"\n\n`sqft evaluate` on {row['rows']} rows of {row['task']}, opening included; seconds of the processor, one thread, the median of "
            f"{row['rounds']} alternating round(s):\n\n{table(evaluated)}"
        )
    return text


def decoding(result: dict[str, Any]) -> str:
    names = {
        "read": "reading the dense matrix alone",
        "torch_bf16": "PyTorch, BF16",
        "bf16": "kernel, BF16",
        "sparse_bf16": "kernel, sparse BF16",
        "int4": "kernel, INT4",
        "sparse_int4": "kernel, sparse INT4",
    }
    one = result["rows"]["1"]
    rows = [
        {
            "": said,
            "MB": round(one[name]["bytes"] / 1e6, 1),
            "ms": f"{one[name]['milliseconds']:.1f}",
            "GB/s": f"{one[name]['gigabytes_a_second']:.1f}",
            **{
                f"× PyTorch, {count} row{'s' * (count != '1')}": f"{many[name]['times_torch_bf16']:.2f}"
                for count, many in result["rows"].items()
            },
            **{
                key: value
                for count, many in result.get("by_threads", {}).items()
                for key, value in (
                    (f"ms, {count} threads", f"{many[name]['milliseconds']:.1f}"),
                    (f"× PyTorch, {count} threads", f"{many[name]['times_torch_bf16']:.2f}"),
                )
            },
        }
        for name, said in names.items()
    ]
    models = [
        {
            "folder": folder,
            "opened": {"plain": "plain", "archive": "archive", "packed": "plain, `packed=True`"}[name],
            "in memory": f"{row['bytes'] / 1e6:.0f} MB",
            "tokens/s": f"{row['tokens_a_second']:.1f}",
            "× plain": f"{row['times_plain']:.2f}",
        }
        for folder, opened in result["models"].items()
        for name, row in opened.items()
    ]
    shape = " x ".join(map(str, result["shape"]))
    return (
        f"One row of x (and several) times matrices of {shape} in turn, out of the cache; {result['zeros']:.0%} zeros at random, groups of "
        f"{result['group']}. Forms alternate; times are seconds of the processor on one thread, or of the clock on several, times and ratios medians. "
        f"The weights are those of the dequantised model to the bit.\n\n{table(rows)}\n\nOne sequence, token by token, on one thread "
        "(SmolLM2-135M's products are small, and a fifth of its weights are the dense head):"
        f"\n\n{table(models)}"
    )


def llama(result: dict[str, Any]) -> str:
    rows = [
        {
            "file": name,
            "MB": round(row["bytes"] / 1e6, 1),
            "KL to transformers, float32": f"{row['kl']:.4f}" if "kl" in row else None,
            "loss (transformers)": f"{row['loss_llama_cpp']:.4f} ({row['loss_transformers']:.4f})"
            if "kl" in row
            else None,
            "tokens/s": round(row["tokens_per_second"], 1),
            "of dense BF16": f"{row['tokens_per_second_of_dense']:.2f} ×",
        }
        for name, row in result["files"].items()
    ]
    tokens = next(row["loss_tokens"] for row in result["files"].values() if "kl" in row)
    return (
        "The quickstart's merged INT4 model in llama.cpp: exactly (`sqft export`), rounded anew by llama.cpp from the same weights in "
        f"float32, and the dense model in BF16. KL and loss over {tokens} tokens of a text. Greedy answers on one thread, "
        f"{result['new_tokens']} new tokens, seconds of the processor, medians of {result['rounds']} alternating rounds "
        f"({result['llama_cpp']}).\n\n{table(rows)}"
    )


SECTIONS = {
    "layer_cpu": ("Masked layer", "python benchmarks/layer.py", layer),
    "layer_cuda": ("Masked layer on a GPU", "python benchmarks/layer.py", layer),
    "training": (
        "Training step",
        "python benchmarks/training.py runs/quickstart-fp16/sparse --quantized runs/quickstart/quantized",
        training,
    ),
    "attention": (
        "Attention in training",
        "python benchmarks/attention.py runs/quickstart/dense --threads 1 --rounds 2",
        attention,
    ),
    "plan": ("Forecasts", "python benchmarks/plan.py", plan),
    "large": (
        "What grows with the blocks",
        "python benchmarks/large.py runs/quickstart/dense --shape TinyLlama-1.1B --blocks 2 8 --method rtn",
        large,
    ),
    "large_8b": (
        "The shapes of an 8 B model",
        "python benchmarks/large.py runs/quickstart/dense --blocks 2 --method rtn",
        large,
    ),
    "streaming": ("Pruning a model that does not fit", "python benchmarks/streaming.py", streaming),
    "streaming_joint": (
        "Pruning and quantising one that does not fit",
        "python benchmarks/streaming.py --joint --samples 16 --threads 1",
        streaming,
    ),
    "columns": ("One column loop", "python benchmarks/columns.py", columns),
    "compression": (
        "Pruning and quantising beside llm-compressor",
        "python benchmarks/compression.py runs/quickstart/dense --peer-python PEER/bin/python --windows 20",
        compression,
    ),
    "starts": (
        "Where quantisation-aware training starts",
        "python benchmarks/starts.py runs/quickstart/dense --rows 100 --threads 1",
        starts,
    ),
    "costs": (
        "What the pipelines cost",
        "python benchmarks/costs.py runs/quickstart/dense --vllm ENVIRONMENT",
        costs,
    ),
    "memory": ("Memory of fine-tuning", "python benchmarks/memory.py runs/quickstart/dense", memory),
    "evaluation": ("Evaluation", "python benchmarks/evaluation.py MODEL --rows 238 --batch 48 --rounds 2", evaluation),
    "search": ("Search", "python benchmarks/search.py BASE ADAPTER --configurations 8", searching),
    "workers": ("Two processes on one search", "python benchmarks/workers.py BASE ADAPTER", workers),
    "processes": (
        "Two processes on one model",
        "python benchmarks/processes.py runs/quickstart/dense",
        processes,
    ),
    "strategies": (
        "What searching gives",
        "python benchmarks/strategies.py BASE ADAPTER --out DIR",
        strategies,
    ),
    "hashing": ("Hashing", "python benchmarks/hashing.py", hashing),
    "serving": ("Serving in vLLM", "make serving MODEL=runs/quickstart/merged", serving),
    "llama": ("Running in llama.cpp", "python benchmarks/llama.py runs/quickstart/merged runs/quickstart/dense", llama),
    "decode_avx512": ("Decoding with packed weights", "python benchmarks/decode.py FOLDER... --out", decoding),
    "decode_avx2": (
        "Decoding with packed weights, AVX2",
        "python benchmarks/decode.py FOLDER... --threads 2 --out",
        decoding,
    ),
    "archive": ("Archives", "python benchmarks/archive.py FOLDER... --sizes --speed --evaluate arc_easy", archive),
}


def main() -> None:
    parts = [
        "# Benchmarks",
        "Made by `python benchmarks/table.py` from `benchmarks/results/*.json`; run by hand on a shared, noisy machine. Trust the ratios "
        "of sections that name several alternating rounds; the other times are single runs. The model is SmolLM2-135M-Instruct, unpacked "
        "to BF16 from the 4-bit file in its Python wheel.",
    ]
    for name, (title, command, write) in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            continue
        result = json.loads(file.read_text())
        machine = result.get("machine", result)
        note = f"\n\n{result['note']}" if "note" in result else ""
        amx = ", AMX bf16" if machine.get("amx_bf16") else ""
        where = f"{machine.get('device', 'CPU')}{amx}, {machine['threads']} threads, torch {machine['torch']}"
        parts.append(f"## {title}\n\n`{command}` ({where})\n\n{write(result)}{note}")
    PAGE.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
