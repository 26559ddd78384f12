"""Talk to a model: its greedy answers, word by word as they are made."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from sqft.adapters.attach import load_model
from sqft.adapters.cached import cached_weights
from sqft.context import Context
from sqft.data.encode import encode_prompt
from sqft.device import DeviceName, place, resolve
from sqft.errors import InputError
from sqft.model.load import decodes_packed


class Chat:
    """A model and what was said so far.

    Args:
        model: model folder, dense, sparse, quantised or an archive.
        adapter: an adapter to attach, unmerged.
        raw: read each prompt as it is, alone, and not as a turn of a chat, where the tokenizer has a template.
        max_tokens: of an answer.
        trust_remote_code: run code that the model's repository brings.
        device: auto, cpu or cuda.

    Raises:
        InputError: the folder cannot be read, or the adapter is another base's.
    """

    def __init__(
        self,
        model: Path,
        adapter: Path | None = None,
        *,
        raw: bool = False,
        max_tokens: int = 256,
        trust_remote_code: bool = False,
        device: DeviceName = "auto",
    ) -> None:
        self.tokenizer: Any = Context(0, trust_remote_code).tokenizer(model)
        where = resolve(device)
        # One sequence is decoded at a time, which is as fast as the weights are small.
        packed = where.type == "cpu" and decodes_packed(model)
        opened = load_model(model, adapter, packed=packed, trust_remote_code=trust_remote_code, device=where)
        self.model: Any = place(opened, where, "use a card with more memory").eval()
        self.templated = not raw and bool(self.tokenizer.chat_template)
        self.max_tokens = max_tokens
        self.turns: list[dict[str, str]] = []

    def answer(self, prompt: str, show: Callable[[str], None]) -> tuple[str, float]:
        """Return the answer to a prompt and its tokens a second, reading the prompt included; `show` gets its pieces.

        Raises:
            InputError: the prompt is empty, or leaves no room for an answer in the model's context.
        """
        if not prompt:
            raise InputError("the prompt is empty")
        ids = self._ids(prompt)
        most = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        room = self.max_tokens if most is None else min(self.max_tokens, most - len(ids))
        if room < 1:
            raise InputError(f"the conversation has {len(ids)} tokens and the model's context is {most}; begin anew")
        started = time.monotonic()
        with torch.no_grad(), cached_weights(self.model, but_decoded=True):
            found = self.model.generate(
                torch.tensor([ids], device=self.model.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.model.device),
                max_new_tokens=room,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                streamer=_Pieces(self.tokenizer, show),
            )[0, len(ids) :]
        speed = len(found) / max(time.monotonic() - started, 1e-9)
        text = self.tokenizer.decode(found, skip_special_tokens=True)
        if self.templated:
            self.turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        return text, speed

    def _ids(self, prompt: str) -> list[int]:
        if self.templated:
            turns = [*self.turns, {"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return encode_prompt(self.tokenizer, prompt)


class _Pieces(TextStreamer):
    """Hands on the text of an answer as soon as its words are complete."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show a piece of the answer."""
        self.show(text)
