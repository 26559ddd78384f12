"""What tokenizer.json says of itself, where llama.cpp's converter would take it for something else."""

from __future__ import annotations

import re
from pathlib import Path

from sqft.disk import read_json

FILE = "tokenizer.json"


def mend_byte_fallback(folder: Path) -> bool:
    """Clear `byte_fallback` of a vocabulary that has no byte to fall back on; return whether it was set.

    A byte-level vocabulary has a character for every byte and no token such as <0x0A>, so the flag changes no text's
    tokens. transformers sets it on every vocabulary that it unpacks from a GGUF file, and llama.cpp's converter takes
    it for the mark of a SentencePiece vocabulary.
    """
    file = folder / FILE
    model = read_json(file).get("model") if file.is_file() else None
    if not isinstance(model, dict) or not model.get("byte_fallback") or "<0x0A>" in model.get("vocab", {}):
        return False
    # Text, not JSON read and written: every other byte of the file stays.
    text, found = re.subn(r'("byte_fallback":\s*)true', r"\1false", file.read_text(encoding="utf-8"), count=1)
    file.write_text(text, encoding="utf-8")
    return bool(found)


def splits_as_gpt2(folder: Path) -> bool:
    """Tell whether a text is cut by GPT-2's regular expression and nothing else before it becomes tokens.

    The converter recognises how a tokenizer cuts by the tokens of one text, and takes one that transformers unpacked
    from SmolLM2's GGUF file for SmolLM2's own, which cuts every digit off: the tokens of " ½" then differ.
    """
    file = folder / FILE
    value = read_json(file) if file.is_file() else {}
    cut = value.get("pre_tokenizer") or {}
    plain = (value.get("normalizer") or {"normalizers": []}).get("normalizers") == []
    return plain and cut.get("type") == "ByteLevel" and cut.get("use_regex") is True and not cut.get("add_prefix_space")
