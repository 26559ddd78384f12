"""What llama.cpp makes of a merged INT4 model: our exact file beside its own rounding, and beside the dense model.

    python benchmarks/llama.py MERGED DENSE [--out benchmarks/results/llama.json]

Of each file: its bytes, the mean KL divergence to transformers in float32 and the loss over the text of
tests/llama/compare.py, and the tokens a second of greedy answers on one thread, prompts included. Seconds are those of
the processor, medians of alternating rounds. llama.cpp's own files are rounded from the float32 GGUF of the same merged
model, all matrices but the embeddings, as `llama-quantize --pure --token-embedding-type bf16` does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import sqft
from common import machine
from sqft.stages.export.converter import cache, install

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "llama"))
from compare import PROMPTS, REQUIREMENTS, Reference, llama_cpp, run_llama

# The converter guesses how text is cut from the tokens of one text, and does not know those of an unpacked GGUF file.
CONVERT = """
import sys, convert_hf_to_gguf
from conversion import TextModel
TextModel.get_vocab_base_pre = lambda _model, _tokenizer: "smollm"
convert_hf_to_gguf.main()
"""
QUANTIZE = """
import sys, cyllama.llama.llama_cpp as llama
settings = llama.LlamaModelQuantizeParams()
settings.ftype, settings.pure, settings.token_embedding_type, settings.nthread = int(sys.argv[3]), True, 30, 1
llama.model_quantize(sys.argv[1], sys.argv[2], settings)
"""
TYPES = {"stock Q4_0": 2, "stock Q4_1": 3}


def alone(folder: Path, script: str, *arguments: str | Path) -> None:
    """Run a script with a folder's packages, which are not to be imported here."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], env=environment, check=True)


def make(merged: Path, dense: Path, scratch: Path) -> dict[str, Path]:
    """Return the files to compare."""
    names = ["exact", *TYPES, "dense BF16"]
    files = {name: scratch / f"{name.replace(' ', '-')}.gguf" for name in names}
    sqft.export(merged, files["exact"])
    install()
    alone(cache(), CONVERT, dense, "--outtype", "bf16", "--outfile", files["dense BF16"])
    alone(cache(), CONVERT, merged, "--outtype", "f32", "--outfile", scratch / "float.gguf")
    for name, number in TYPES.items():
        alone(llama_cpp(), QUANTIZE, scratch / "float.gguf", files[name], str(number))
    return files


def measure(merged: Path, dense: Path, rounds: int, count: int) -> dict[str, object]:
    """Return sizes, distances and speeds."""
    reference = Reference(merged)
    text = reference.tokens("\n\n".join(PROMPTS))
    prompts = [reference.tokens(prompt) for prompt in PROMPTS[:2]]
    job = {"texts": [], "prompts": prompts, "text": [], "count": count, "threads": 1}
    with tempfile.TemporaryDirectory() as scratch:
        files = make(merged, dense, Path(scratch))
        rows: dict[str, dict[str, float]] = {name: {"bytes": file.stat().st_size} for name, file in files.items()}
        for name in files.keys() - {"dense BF16"}:
            found = run_llama(files[name], {**job, "text": text, "prompts": []})
            rows[name] |= reference.distance(text, found["log_probabilities"])
        seconds: dict[str, list[float]] = {name: [] for name in files}
        for _ in range(rounds):
            for name, file in files.items():
                seconds[name].append(run_llama(file, job)["seconds"])
    for name, row in rows.items():
        ratios = [a / b for a, b in zip(seconds["dense BF16"], seconds[name], strict=True)]
        row["tokens_per_second"] = count * len(prompts) / statistics.median(seconds[name])
        row["tokens_per_second_of_dense"] = statistics.median(ratios)
    return {"rounds": rounds, "new_tokens": count * len(prompts), "files": rows}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merged", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=48, help="new tokens an answer (%(default)s)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"llama_cpp": REQUIREMENTS[0], **machine()}
    result |= measure(options.merged, options.dense, options.rounds, options.count)
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
