"""How good a model is: tasks judged by lm-eval, answers decoded by us, perplexity of a text."""
