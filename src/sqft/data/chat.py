"""Chats: rows of `messages`, and plain prompts rendered by the tokenizer's chat template.

A chat's answer is its last turn; the prompt is everything before it. Training appends the EOS token, so the
template's own is removed. A template receives the row's `tools` and `documents`, the entries of `chat_template_kwargs`,
and every column with the name of one of its variables. A field that it does not render raises an error: a prompt
without its tools would teach calls of tools that were never offered. A field counts as rendered if rendering without
it gives another text. The same check covers tool calls in a turn, an answer's reasoning, text in parts, and empty text.

Some templates insert the date. They get `data.date` or, without it, the time of this process's first call, not the
current time: two renderings in one run must give the same prompt.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, meta, nodes
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sqft.data.encode import beginning
from sqft.data.generated import PREFIX
from sqft.data.placeholders import names
from sqft.data.taskfile import is_task_file
from sqft.data.tasks import BUILTIN, Example, Row, Task, mix_members
from sqft.errors import InputError

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from transformers import PreTrainedTokenizerBase

    from sqft.recipe import DataConfig

_CLOCK = "strftime_now"
# Inputs of any template besides the chat. A row with one that the template does not use raises an error.
_INPUTS = ("tools", "documents", "functions", "system", "chat_template_kwargs")
_CALLS = ("tool_calls", "function_call")
_PART = re.compile(r"""(['"])type\1\s*:\s*(['"])text\2""")
_REASONING = ("reasoning_content", "reasoning", "thinking")


def uses_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a chat template of the tokenizer inserts the date."""
    found = getattr(tokenizer, "chat_template", None) or {}
    templates = found.values() if isinstance(found, Mapping) else [found]
    return any(_CLOCK in _variables(template) for template in templates)


def with_date(data: DataConfig, tokenizer: PreTrainedTokenizerBase, moment: datetime) -> DataConfig:
    """Return the settings with a date for chat templates, if rows may be chats and no date is set."""
    if data.date is not None or not (data.chat_template or _may_be_chats(data)) or not uses_clock(tokenizer):
        return data
    return data.model_copy(update={"date": moment.isoformat(timespec="seconds")})


def _may_be_chats(data: DataConfig) -> bool:
    """Return whether rows may be chats: the user's own, with neither a template nor a task file."""
    name = data.task
    worded = name in BUILTIN or mix_members(name) or name.startswith(PREFIX) or is_task_file(name)
    return data.template is None and not worded


def chat_example(row: Row, tokenizer: PreTrainedTokenizerBase, date: str | None) -> Example:
    """Return the example of a row of messages.

    Args:
        row: `messages`, and further inputs of the template.
        tokenizer: its chat template renders.
        date: for the template, as ISO text.

    Raises:
        ValueError: the messages are malformed, or the template raises or does not render a field of the row.
    """
    turns = _turns(row["messages"])
    chat = _Chat(tokenizer, _moment(date), _inputs(row, tokenizer))
    whole = chat.render(turns)
    prompt = chat.render(turns[:-1], add_generation_prompt=True)
    _refuse_unseen(chat, turns, whole)
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template does not continue its own generation prompt, so the answer has no tokens of its own; "
            "give prompt and completion columns"
        )
    answer = whole[len(prompt) :]
    end = tokenizer.eos_token
    if isinstance(end, str) and end in answer:
        answer = answer[: answer.rindex(end)]
    return Example(_without_beginning(prompt, tokenizer), answer)


def as_chat(
    example: Example, tokenizer: PreTrainedTokenizerBase | None, task: Task, date: str | None = None
) -> Example:
    """Return an example whose prompt is in the tokenizer's chat template; answers lose their leading space.

    Raises:
        InputError: there is no template, or it raises for a single question, or the choices are contexts, which a chat
            cannot express.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise InputError("data.chat_template: the model's tokenizer has no chat template; set it to false")
    if example.contexts:
        raise InputError(f"data.chat_template: {task.name} compares whole sentences, which no chat turn holds")
    turns = [{"role": "user", "content": example.prompt}]
    try:
        chat = _Chat(tokenizer, _moment(date), {})
        prompt = chat.render(turns, add_generation_prompt=True)
        if example.prompt.strip() not in prompt and prompt == chat.render(
            _changed(turns, 0, "content", f"{example.prompt} ?"), add_generation_prompt=True
        ):
            raise ValueError("the tokenizer's chat template does not show a turn's text; it may want it in parts")
    except ValueError as error:
        raise InputError(f"data.chat_template: {error}; set it to false") from error
    return replace(
        example,
        prompt=_without_beginning(prompt, tokenizer),
        answer=example.answer.lstrip(),
        choices=tuple(choice.lstrip() for choice in example.choices),
        question=example.question or example.prompt,
    )


def refuse_inputs(row: Row) -> None:
    """Check that a row of which only the prompt is used has no inputs for a chat template.

    Raises:
        ValueError: it has some.
    """
    given = [name for name in _INPUTS if row.get(name)]
    if given:
        raise ValueError(
            f"has {', '.join(given)}, which a prompt that is put into the chat template does not show; give messages"
        )


@dataclass(frozen=True)
class _Chat:
    """How one row's chat is rendered."""

    tokenizer: PreTrainedTokenizerBase
    moment: datetime
    inputs: Mapping[str, Any]

    def render(self, turns: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """Return a chat as text.

        Raises:
            ValueError: the template raises, as many do for a system turn or for turns that do not alternate.
        """
        # Overrides transformers' function of this name.
        clock: dict[str, Any] = {_CLOCK: self.moment.strftime} if uses_clock(self.tokenizer) else {}
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **clock,
                    **self.inputs,
                )
            )
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            null = any("content" in turn and turn["content"] is None for turn in turns)
            raise ValueError(
                f"the tokenizer's chat template refuses the turns {roles} ({error})"
                + ("; one has content null: give an empty text" if null else "")
            ) from error


def _turns(messages: Any) -> list[dict[str, Any]]:
    """Return a row's messages.

    Raises:
        ValueError: they are not a chat that ends with an answer.
    """
    messages = _parsed("messages", messages)
    form = "its messages are not a list of {role, content} with texts"
    if not isinstance(messages, list) or not messages:
        raise ValueError(form)
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise ValueError(f"{form}: turn {number}")
        content = turn.get("content")
        if content is None and not any(turn.get(name) for name in _CALLS):
            raise ValueError(f"{form}: turn {number} ({turn['role']}) has neither content nor calls of tools")
        if isinstance(content, list):
            kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content}
            if kinds != {"text"} or not all(isinstance(part.get("text"), str) for part in content):
                raise ValueError(
                    f"turn {number} ({turn['role']}) has parts of type {', '.join(sorted(map(str, kinds))) or 'none'}; "
                    "only texts are read"
                )
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"{form}: turn {number} ({turn['role']}) has {type(content).__name__}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("its messages do not end with an answer of the assistant")
    return [dict(turn) for turn in messages]


def _inputs(row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the template's inputs besides the chat.

    Raises:
        ValueError: an input is malformed, or the template has no variable of its name.
    """
    given = {name: value for name, value in row.items() if name != "messages" and value is not None}
    further = given.pop("chat_template_kwargs", None) or {}
    if not isinstance(further, Mapping):
        raise ValueError(f"its chat_template_kwargs are {type(further).__name__}, not names with values")
    for name in ("tools", "documents"):
        given[name] = _parsed(name, given.get(name)) or None
        if given[name] is not None and not (
            isinstance(given[name], list) and all(isinstance(part, Mapping) for part in given[name])
        ):
            raise ValueError(f"its {name} are not a list of objects")
    variables = _variables(tokenizer.get_chat_template(tools=given["tools"]))
    # Names of the renderer itself: a column of that name is not an input of the template.
    taken = {"messages", _CLOCK, "raise_exception", *DEFAULT_NAMESPACE, *tokenizer.special_tokens_map}
    taken |= set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
    shown = variables - taken
    wanted = [name for name in _INPUTS if given.get(name)] + list(further)
    if unseen := [name for name in wanted if name not in shown]:
        raise ValueError(
            f"has {', '.join(unseen)}, which the tokenizer's chat template does not show (its variables are "
            f"{names(dict.fromkeys(sorted(shown)))}); use a model whose template does, write it into the messages, or "
            "take the column out"
        )
    return {name: value for name, value in {**given, **further}.items() if name in shown and value is not None}


def _refuse_unseen(chat: _Chat, turns: list[dict[str, Any]], whole: str) -> None:
    """Check that the rendered chat contains all fields of the row.

    Raises:
        ValueError: one is missing; which, and in which turn.
    """

    def same(inputs: Mapping[str, Any], turns: list[dict[str, Any]]) -> bool:
        try:
            return replace(chat, inputs=inputs).render(turns) == whole
        except ValueError:
            return False

    for name in _INPUTS:
        if name in chat.inputs and same({n: v for n, v in chat.inputs.items() if n != name}, turns):
            raise ValueError(f"has {name}, which the tokenizer's chat template does not show in this chat")
    for place, turn in enumerate(turns):
        who = f"turn {place + 1} ({turn['role']})"
        # A template may omit earlier turns' reasoning, as it will when the model answers.
        for name in (*_CALLS, *(_REASONING if place == len(turns) - 1 else ())):
            if turn.get(name) and same(chat.inputs, _changed(turns, place, name, None)):
                raise ValueError(f"{who} has {name}, which the tokenizer's chat template does not show")
        content = turn.get("content")
        if isinstance(content, list) and not _shows_parts(content, whole):
            raise ValueError(
                f"{who} has its text in parts, which the tokenizer's chat template does not show as text; join them"
            )
        # A template may alter a text; one that ignores it renders another text the same.
        if isinstance(content, str) and content.strip() not in whole:
            if same(chat.inputs, _changed(turns, place, "content", f"{content} ?")):
                raise ValueError(
                    f"{who} has a text, which the tokenizer's chat template does not show; it may want it in parts"
                )
        elif "content" in turn and content is None:
            try:
                empty = chat.render(_changed(turns, place, "content", ""))
            except ValueError:
                continue
            if whole.count("None") > empty.count("None"):
                raise ValueError(
                    f"{who} has content null, which the tokenizer's chat template writes as None; give an empty text"
                )


def _changed(turns: list[dict[str, Any]], place: int, name: str, value: Any) -> list[dict[str, Any]]:
    """Return the turns with one field of one turn replaced, or removed if the value is None."""
    changed = copy.copy(turns)
    changed[place] = {n: v for n, v in turns[place].items() if n != name} | ({} if value is None else {name: value})
    return changed


def _shows_parts(parts: list[Mapping[str, Any]], whole: str) -> bool:
    """Return whether a rendered chat has the parts' texts, and not the list in Python or JSON syntax."""
    said = "".join(part["text"] for part in parts)
    written = len(_PART.findall(whole)) > len(_PART.findall(said))
    return not written and all(part["text"].strip() in whole for part in parts)


def _parsed(name: str, value: Any) -> Any:
    """Return a value, parsed if it is JSON text, as in files whose columns are all text.

    Raises:
        ValueError: it is text, but not JSON.
    """
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {name} are not a list of objects, nor the JSON text of one") from error


def _without_beginning(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Remove the template's BOS token if the tokenizer adds one too: two of them would be another prompt."""
    bos = tokenizer.bos_token
    if not isinstance(bos, str) or not prompt.startswith(bos):
        return prompt
    adds = beginning(tokenizer)[:1] == [tokenizer.bos_token_id]
    return prompt.removeprefix(bos) if adds else prompt


def _moment(date: str | None) -> datetime:
    return _began() if date is None else datetime.fromisoformat(date)


@functools.cache
def _began() -> datetime:
    return datetime.now()


class _Generation(Extension):
    """Parses transformers' `generation` tag, which marks the model's turns."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _variables(template: str) -> frozenset[str]:
    """Return a chat template's undeclared variables; none if it cannot be parsed, for which rendering raises."""
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except TemplateError:
        return frozenset()
