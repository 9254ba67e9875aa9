"""What one record of a text file says: a text, or a chat in one of the common spellings that a template renders."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["ALLOWED", "Render", "records_of", "text_of"]

Render = Callable[[Sequence[dict[str, Any]]], str]
"""From the messages of a chat to text. Raises ValueError with the reason if it cannot."""

ALLOWED = 'expected are texts, or objects with "text", "messages", "conversations", or "prompt" and "completion"'

_TALKS = ("messages", "conversations", "conversation")
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "function_response": "tool", "observation": "tool",
}  # fmt: skip
"""Who speaks in ShareGPT's spelling, and what a template calls it."""


def records_of(document: Any) -> Iterator[tuple[str, Any]]:
    """The records of a JSON document, each with where it stands: of a list, of an object with one list in it, of an
    object of objects, or the one that it is. Raises ValueError for anything else."""
    if isinstance(document, list):
        yield from ((f"item {number}", item) for number, item in enumerate(document, 1))
        return
    if not isinstance(document, dict):
        yield "the document", document
        return
    column = document.get("text")
    lists = [key for key, value in document.items() if isinstance(value, list)]
    if isinstance(column, list):
        yield from ((f'item {number} of "text"', item) for number, item in enumerate(column, 1))
    elif _is_record(document):
        yield "the document", document
    elif len(lists) == 1:
        yield from ((f'item {number} of "{lists[0]}"', item) for number, item in enumerate(document[lists[0]], 1))
    elif document and all(isinstance(value, dict) for value in document.values()):
        yield from ((f'entry "{key}"', value) for key, value in document.items())
    else:
        raise ValueError(f"an object with {_fields(document)}; {ALLOWED}, in a list or under keys of their own")


def text_of(record: Any, render: Render) -> str:
    """The text of a record. Raises ValueError with the reason if it has none."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise ValueError(f"{_named(record)} where a text is expected; {ALLOWED}")
    if "text" in record:
        if not isinstance(record["text"], str):
            raise ValueError(f'its "text" is {_named(record["text"])}; leave out records without a text')
        return record["text"]
    talk = next((key for key in _TALKS if key in record), None)
    if talk is not None:
        return render(_messages(record[talk], talk))
    if "prompt" in record and "completion" in record:
        asked, answered = (
            [{"role": role, "content": record[key]}] if isinstance(record[key], str) else record[key]
            for key, role in (("prompt", "user"), ("completion", "assistant"))
        )
        return render([*_messages(asked, "prompt"), *_messages(answered, "completion")])
    raise ValueError(f"an object with {_fields(record)}; {ALLOWED}")


def _is_record(document: dict[str, Any]) -> bool:
    return "text" in document or any(key in document for key in _TALKS) or {"prompt", "completion"} <= document.keys()


def _messages(talk: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(talk, list) or not talk:
        raise ValueError(f'its "{key}" is {_named(talk)}, expected is a list of messages')
    return [_message(entry, f'message {number} of "{key}"') for number, entry in enumerate(talk, 1)]


def _message(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {_named(entry)}, expected is an object with role and content")
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if not isinstance(role, str) or ("from" in entry and "role" not in entry and role not in _ROLES):
        raise ValueError(f"{where} is from {role!r}; known are {', '.join(_ROLES)}")
    if isinstance(content, list):
        parts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{where} has a part that is no text; leave out chats with images or sound")
        content = "".join(parts)
    if not isinstance(content, str) and not entry.get("tool_calls"):
        raise ValueError(f"{where} has no text ({_named(content)})")
    others = {k: v for k, v in entry.items() if k not in ("role", "from", "content", "value")}
    return {"role": _ROLES.get(role, role), "content": content} | others


def _fields(record: dict[str, Any]) -> str:
    names = [f'"{name}"' for name in record]
    return "no fields" if not names else ("the fields " + ", ".join(names[:5]) + (", ..." if len(names) > 5 else ""))


def _named(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")
