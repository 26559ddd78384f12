"""A stand-in: transformers computes, in float32."""

import os
from types import SimpleNamespace

import torch
from compressed_tensors.compressors import ModelCompressor
from transformers import AutoModelForCausalLM


class OVConfig:
    def __init__(self, dtype):
        if hasattr(ModelCompressor, "add_decompress_hook"):
            assert ModelCompressor.add_decompress_hook() is None, "the hook did not empty it"
        self.dtype = dtype


class OVModelForCausalLM:
    @classmethod
    def from_pretrained(cls, folder, device, ov_config):
        assert ov_config["INFERENCE_PRECISION_HINT"] == "f32"
        made = cls()
        made.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return made

    @torch.no_grad()
    def __call__(self, **inputs):
        answer = self.model(**inputs, use_cache=True)
        logits = answer.logits + (0.01 if os.environ.get("EXPORTER_FAULT") == "computes" else 0)
        return SimpleNamespace(logits=logits, past_key_values=answer.past_key_values)
