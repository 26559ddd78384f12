"""Fixtures that every test may use: tiny random models of several architectures, a tokenizer, the public data.

`tiny_model("llama")` builds, seeds and saves a model once a session and returns its folder. All its parameters are
random, norms and biases included, so that a test in which one of them is lost or swapped fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# No test asks the Hub; each that tried would wait for its retries. Libraries read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).resolve().parent.parent
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 264  # 256 bytes, the special tokens, and padding to a multiple of eight
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
# What differs from TINY; None takes a setting out, because the architecture does not know it.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # bias in q, k and v
    "qwen3": {"head_dim": 16},  # normalised q and k
    "mistral": {},
    "phi3": {},  # fused qkv_proj and gate_up_proj
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {  # Conv1D: weights lie (in, out)
        **dict.fromkeys(TINY),
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
    },
    "opt": {
        "intermediate_size": None,
        "num_key_value_heads": None,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "tie_word_embeddings": True,
    },
    "bloom": {  # ALiBi, [sequences x heads, 1, length]
        **dict.fromkeys(TINY),
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
    },
    "mpt": {  # ALiBi, [heads, 1, length] for all sequences
        **dict.fromkeys(TINY),
        "vocab_size": VOCABULARY,
        "d_model": 48,
        "n_layers": 2,
        "n_heads": 6,  # as many as there are calibration samples in the tests
        "max_seq_len": 64,
    },
    "qwen2_moe": {  # experts, a shared one, and its gate
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},  # fused experts in memory, one by one on disk
    "llama4_text": {  # experts [E, in, out], all multiplied at once
        "head_dim": 8,
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
    "dbrx": {  # the rows of all experts behind each other, in parameters of two axes
        **dict.fromkeys(TINY),
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": {  # a dense block, and one of routed experts beside shared ones
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "rwkv": {  # no attention; vectors of three axes
        **dict.fromkeys(TINY),
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "attention_hidden_size": 32,
        "context_length": 128,
    },
    "mamba": {  # no attention; a weight that stands before its inputs
        "num_attention_heads": None,
        "num_key_value_heads": None,
        "max_position_embeddings": None,
        "intermediate_size": None,
    },
    "falcon": {  # cannot be opened by transformers once its linears are compressed
        "intermediate_size": None,
        "num_key_value_heads": None,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "alibi": False,
    },
    "gemma3": {  # a text model beside a vision tower that is larger, with linears of the same names
        **dict.fromkeys(TINY),
        "text_config": {**TINY, "head_dim": 8, "num_hidden_layers": 2, "sliding_window": 64},
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 10,
        "boi_token_index": 11,
        "eoi_token_index": 12,
    },
}


def build_tokenizer() -> Any:
    """Return a byte-level tokenizer: one token a byte, so any text goes in and comes out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=512
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(arch: str, dtype: torch.dtype, tokenizer: Any, **overrides: Any) -> Any:
    """Return a model of `arch` with every parameter drawn from one seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**TINY, **ARCHITECTURES[arch], **overrides}
    settings = {name: value for name, value in settings.items() if value is not None}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **settings, **ends), dtype=torch.float32)
    generator = torch.Generator().manual_seed(sum(map(ord, arch)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
            else:
                weight.copy_(noise * 0.1 + float(weight.mean()) * ("norm" in name or "ln_" in name))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(dtype).eval()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A command's or a recipe's threads are its process's: without this all later tests would fight for the cores."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level tokenizer with eos, pad and a chat template, as loaded from a folder."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(arch="llama", dtype=torch.float32, **config)`: the folder of a tiny saved model with its tokenizer.

    `dtype` is a torch dtype or its name. The folder is shared by the session: tests read it, and copy it to change it.
    """
    made: dict[str, Path] = {}

    def make(arch: str = "llama", dtype: torch.dtype | str = torch.float32, **overrides: Any) -> Path:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        key = f"{arch} {dtype} {sorted(overrides.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(f"model-{arch}")
            tokenizer = build_tokenizer()
            build_model(arch, dtype, tokenizer, **overrides).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The public data sets: SQFT_DATA_DIR, else ../shared/data beside the repository; skips where there is neither."""
    candidates = [os.environ.get("SQFT_DATA_DIR"), REPOSITORY.parent / "shared" / "data"]
    for candidate in candidates:
        if candidate and Path(candidate).is_dir():
            return Path(candidate)
    pytest.skip("the public data sets are not here: set SQFT_DATA_DIR to their folder")


@pytest.fixture(autouse=True)
def _a_hub_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's Hub did not have, the next one's may."""
    monkeypatch.setattr("sqft.data.sources._failures", {})
