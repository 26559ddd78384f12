"""A flag in tokenizer.json that says something else than the vocabulary does."""

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
