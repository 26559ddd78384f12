"""Evaluation: tasks judged by lm-eval, our own batched decoding, perplexity."""
