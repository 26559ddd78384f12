"""Run by a Python that has cyllama: tokens, greedy answers and the loss of a text, by llama.cpp on the CPU.

python llama.py FILE.gguf JOB.json RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import cyllama.llama.llama_cpp as llama
import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - logits.max()
    return logits - np.log(np.exp(logits).sum())


class Runner:
    def __init__(self, file: str, threads: int) -> None:
        llama.disable_logging()
        if hasattr(llama, "ggml_backend_load_all"):
            llama.ggml_backend_load_all()
        settings = llama.LlamaModelParams()
        settings.n_gpu_layers = 0
        vocabulary = llama.LlamaModel(file, settings).get_vocab()

        class Model(llama.LlamaModel):
            n_vocab = vocabulary.n_vocab  # get_logits_ith of cyllama 0.2.18 reads what its own class lacks

        self.model = Model(file, settings)
        self.vocabulary = self.model.get_vocab()
        context = llama.LlamaContextParams()
        context.n_ctx, context.n_batch, context.n_ubatch = 2048, 1024, 512
        context.n_threads = context.n_threads_batch = threads
        self.context = llama.LlamaContext(self.model, context)

    def decode(self, tokens: list[int], at: int, every: bool) -> None:
        batch = llama.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for i, token in enumerate(tokens):
            batch.add(token, at + i, [0], every or i == len(tokens) - 1)
        self.context.decode(batch)

    def logits(self, i: int) -> np.ndarray:
        return np.asarray(self.context.get_logits_ith(i), dtype=np.float32)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        self.context.kv_cache_clear()
        self.decode(prompt, 0, every=False)
        tokens = [int(self.logits(-1).argmax())]
        while len(tokens) < count:
            self.decode(tokens[-1:], len(prompt) + len(tokens) - 1, every=False)
            tokens.append(int(self.logits(-1).argmax()))
        return tokens

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        """Return those of every token but the first, float32 [T - 1, vocabulary]."""
        self.context.kv_cache_clear()
        self.decode(tokens, 0, every=True)
        return np.stack([log_softmax(self.logits(i)).astype(np.float32) for i in range(len(tokens) - 1)])


def main() -> None:
    file, job_file, result = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    runner = Runner(file, job["threads"])
    found = {"tokens": [list(runner.vocabulary.tokenize(text, False, True)) for text in job["texts"]]}
    began = time.process_time()
    found["greedy"] = [runner.greedy(prompt, job["count"]) for prompt in job["prompts"]]
    found["seconds"] = time.process_time() - began
    if job["text"]:
        np.save(job["log_probabilities"], runner.log_probabilities(job["text"]))
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
