"""What the four pipelines cost: storage, precision, memory of training and of inference, speed unmerged and merged.

    python benchmarks/costs.py MODEL_FOLDER [--threads 2] [--rounds 3] [--vllm ENVIRONMENT]

The paper's tables 6 and 7, measured, with the dense BF16 and dense INT4 models beside. Adapters have rank 32 on q, k,
v, up and down and random factors: costs do not depend on what they learned. Training memory is what the model holds
plus the highest that a step of about 1,000 packed tokens adds. Inference runs in transformers: the live layers where
the adapter is unmerged, the stock model where it is merged (INT4 folders are decompressed by transformers: what it
gains by INT4 is storage; vLLM keeps the codes). First token: a prompt of 64 tokens. Then 8 greedy tokens, one
sequence.

With --vllm each model that vLLM can hold is also served by it, from an environment that is made there if need be (see
tests/serving): the base with a plain LoRA beside it, or the merged model; 32 greedy tokens after the same prompt. All
servers are up at once and asked in turn. An unmerged masked or quantisation-aware adapter is none that vLLM knows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from common import ADAPTERS, peak_memory, save
from sqft.adapters.attach import load_model
from sqft.adapters.layers import sqft_layers
from sqft.context import Context
from sqft.data.calibration import calibration_tokens
from sqft.model.opening import load_tokenizer
from sqft.recipe import CalibrationConfig, FinetuneConfig, MergeConfig, QuantizeConfig, SparsifyConfig
from sqft.stages import merge, quantize, sparsify
from sqft.stages.finetune import attach
from sqft.training.batches import collate, pack_rows
from sqft.training.loss import answer_loss
from training import resident

PROMPT, NEW, SERVED = 64, 8, 32


def adapter(base: Path, kind: str, out: Path) -> int:
    """Save an adapter with random factors; return what a training step holds at its highest."""
    torch.manual_seed(0)
    model = attach(load_model(base, packed=True, attention="eager"), FinetuneConfig(kind=kind, **ADAPTERS)).train()  # type: ignore[arg-type]
    for layer in sqft_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    model.save_pretrained(str(out))
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(5, 5000, (16, 64), generator=generator).tolist()]
    batch = collate(pack_rows(rows, 256, packing=True), 2)

    def step() -> None:
        answer_loss(model, batch).backward()
        model.zero_grad()

    step()
    return resident(model) + peak_memory(step)


def serve(
    models: dict[str, tuple[Path, Path | None]], environment: Path, prompt: list[int], threads: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Return vLLM's first-token latency and tokens per second of every model, asked in turn."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "serving"))
    from vllm_server import complete, install, serving

    python = install(environment)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(serving(python, folder, threads, False, 900, adapter, kv_cache_gb=1))[0]
            for name, (folder, adapter) in models.items()
        }
        for turn in range(rounds + 1):
            for name, url in urls.items():
                answer = complete(url, prompt, SERVED)
                if turn:  # the first turn warms up
                    answers[name].append(answer)
    return {
        name: {
            "vllm_first_token_ms": round(1e3 * statistics.median(a["ttft_s"] for a in found), 1),
            "vllm_tokens_per_second": round((SERVED - 1) / statistics.median(a["decode_s"] for a in found), 2),
        }
        for name, found in answers.items()
    }


def stored(*folders: Path) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", type=Path, metavar="ENVIRONMENT", help="also serve by vLLM, from this folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calibration = CalibrationConfig(data="wikitext2", samples=16, length=128)
    tokens = calibration_tokens(calibration, None, load_tokenizer(options.model), 0)
    with tempfile.TemporaryDirectory() as temporary:
        at = Path(temporary)
        sparsify.run(SparsifyConfig(), options.model, tokens, at / "sparse", Context())
        quantize.run(QuantizeConfig(), at / "sparse", tokens, at / "sparse-int4", Context())
        quantize.run(QuantizeConfig(), options.model, tokens, at / "dense-int4", Context())
        training = {
            "dense": adapter(options.model, "dense", at / "dense-lora"),
            "LoRA, Shears": adapter(at / "sparse", "dense", at / "lora"),
            "SQFT + SparsePEFT": adapter(at / "sparse", "sparse", at / "masked"),
            "GPTQ + LoRA, SQFT": adapter(at / "sparse-int4", "dense", at / "int4-lora"),
            "QA-SparsePEFT": adapter(at / "sparse-int4", "quantized", at / "qa"),
        }
        merge.run(MergeConfig(), at / "sparse", at / "masked", at / "merged", Context())
        merge.run(MergeConfig(), at / "sparse-int4", at / "qa", at / "merged-int4", Context())
        # (name, precision, mergeable, folder, adapter, training memory's row)
        models: list[tuple[str, str, str, Path, Path | None, str | None]] = [
            ("dense", "BF16", "", options.model, None, None),
            ("dense + LoRA, unmerged", "BF16 + FP32", "yes", options.model, at / "dense-lora", "dense"),
            ("dense INT4", "INT4", "", at / "dense-int4", None, None),
            ("LoRA, Shears", "BF16 + FP32", "no", at / "sparse", at / "lora", "LoRA, Shears"),
            ("SQFT + SparsePEFT, unmerged", "BF16 + FP32", "yes", at / "sparse", at / "masked", "SQFT + SparsePEFT"),
            ("SQFT + SparsePEFT, merged", "BF16", "merged", at / "merged", None, "SQFT + SparsePEFT"),
            ("GPTQ + LoRA, SQFT", "INT4 + FP32", "no", at / "sparse-int4", at / "int4-lora", "GPTQ + LoRA, SQFT"),
            ("QA-SparsePEFT, unmerged", "INT4 + FP32", "yes", at / "sparse-int4", at / "qa", "QA-SparsePEFT"),
            ("QA-SparsePEFT, merged", "INT4", "merged", at / "merged-int4", None, "QA-SparsePEFT"),
        ]  # fmt: skip
        prompt = torch.randint(5, 5000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
        loaded = {name: load_model(folder, low) for name, _, _, folder, low, _ in models}

        def generate(model: Any, new: int) -> None:
            model.generate(input_ids=prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)

        first: dict[str, list[float]] = {name: [] for name in loaded}
        whole: dict[str, list[float]] = {name: [] for name in loaded}
        with torch.no_grad():
            for turn in range(options.rounds + 1):
                for name, model in loaded.items():
                    for times, new in ((first, 1), (whole, NEW)):
                        start = time.perf_counter()
                        generate(model, new)
                        if turn:  # the first turn warms up
                            times[name].append(time.perf_counter() - start)
        rows = [
            {
                "pipeline": name,
                "precision": precision,
                "mergeable": mergeable,
                "stored_mb": round(stored(folder, *([] if low is None else [low])) / 1e6, 1),
                "training_memory_mb": None if key is None else round(training[key] / 1e6),
                "inference_memory_mb": round(resident(loaded[name]) / 1e6),
                "first_token_ms": round(1e3 * statistics.median(first[name]), 1),
                "tokens_per_second": round(
                    (NEW - 1) / (statistics.median(whole[name]) - statistics.median(first[name])), 2
                ),
            }
            for name, precision, mergeable, folder, low, key in models
        ]  # fmt: skip
        if options.vllm is not None:
            del loaded
            plain = {at / "dense-lora", at / "lora", at / "int4-lora", None}
            served = {name: (folder, low) for name, _, _, folder, low, _ in models if low in plain}
            found = serve(served, options.vllm, prompt[0].tolist(), options.threads, options.rounds)
            rows = [
                row | found.get(row["pipeline"], {"vllm_first_token_ms": None, "vllm_tokens_per_second": None})
                for row in rows
            ]
    for row in rows:
        print(row, flush=True)
    save("costs", {"rounds": options.rounds, "prompt": PROMPT, "new_tokens": NEW, "rows": rows})


if __name__ == "__main__":
    main()
