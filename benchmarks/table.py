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
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


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
            "peak GB above weights": round(result["peak_bytes"][name] / 1e9, 2),
        }
        for name in result["tokens_per_second"]
    ]
    return (
        f"A whole step on SmolLM2-135M, {result['data']} ({result['mean_tokens_per_example']} tokens an example on average), "
        f"median of {result['rounds']} alternating rounds; tokens are real ones, padding does not count.\n\n{table(rows)}\n\n"
        f"sqft against the plain padded loop: {result['sqft_to_plain_tokens_per_second']} × the tokens per second. Masked against "
        f"unmasked speed in the same loop: {result['masked_to_unmasked_speed']}. Step time against the reference's form: "
        f"{result['step_time_to_reference']}. Peak memory against packed LoRA: {result['peak_memory_to_lora']}."
    )


def streaming(result: dict[str, Any]) -> str:
    return (
        f"A random Llama of {result['parameters'] / 1e9:.2f} B parameters in bf16 ({result['weights_bytes'] / 1e9:.2f} GB) pruned by Wanda "
        f"to {100 * result['sparsity']:.0f} % with {result['calibration_tokens']} calibration tokens: anonymous resident memory above "
        f"the imports' own peaked at {result['peak_anonymous_bytes_above_imports'] / 1e9:.2f} GB, "
        f"**{100 * result['share_of_weights']:.1f} %** of the weights' size, in {result['seconds']} s."
    )


def perplexity(result: dict[str, Any]) -> str:
    settings = result["settings"]
    rows = [{"model": name, **row} for name, row in result["rows"].items() if "perplexity" in row]
    equal = result["rows"].get("masks_equal")
    note = f"\n\nThe two masks agree in {100 * equal['share']:.2f} % of the weights." if equal else ""
    return (
        f"WikiText-2 test text, {settings['test_windows']} windows of {settings['window']} tokens; the same {settings['samples']} × "
        f"{settings['length']} calibration tokens for both pruners.\n\n{table(rows)}{note}"
    )


SECTIONS = {
    "layer_cpu": ("Masked layer", "python benchmarks/layer.py", layer),
    "layer_cuda": ("Masked layer on a GPU", "python benchmarks/layer.py", layer),
    "training": ("Training step", "python benchmarks/training.py runs/quickstart/sparse", training),
    "streaming": ("Pruning a model that does not fit", "python benchmarks/streaming.py", streaming),
    "perplexity": (
        "Wanda beside llm-compressor's",
        "python benchmarks/perplexity.py runs/quickstart/dense --peer-python PEER/bin/python",
        perplexity,
    ),
}


def main() -> None:
    parts = [
        "# Benchmarks",
        "Made by `python benchmarks/table.py` from `benchmarks/results/*.json`; run by hand. The machine was shared and noisy: trust "
        "the ratios, which were measured side by side in alternation, more than the times.",
    ]
    for name, (title, command, write) in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            continue
        result = json.loads(file.read_text())
        machine = result["machine"]
        amx = ", AMX bf16" if machine.get("amx_bf16") else ""
        where = f"{machine.get('device', '?')}{amx}, {machine['threads']} threads, torch {machine['torch']}"
        parts.append(f"## {title}\n\n`{command}` ({where})\n\n{write(result)}")
    PAGE.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
