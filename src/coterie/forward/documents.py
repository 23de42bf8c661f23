"""What one record of a data file says: a text, token ids, a conversation or a problem. Its keys tell which.

    {"text": "..."}                                      a text
    {"input_ids": [17, 4, ...]}                          token ids, used as given
    {"messages": [{"role": ..., "content": ...}]}        a conversation, spelled out by the tokenizer's chat template;
                                                         content may be a list of parts, "tools" may stand beside it
    {"conversations": [{"from": ..., "value": ...}]}     the same in the names of ShareGPT
    {"instruction": ..., "input": ..., "output": ...}    a question and its answer; input may be missing or empty
    {"prompt": ..., "completion": ...}                   a text in two parts, or two lists of messages
    {"prompt": "...", "answer": "46"}                    a problem, for generation

Further keys are left alone. Where one record says a thing in several ways, as a text and as its instruction and
output, the first of this list is read; only text, input_ids, messages and problems exclude each other.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from coterie.errors import CoterieError
from coterie.forward.json_records import parsed

EXCLUSIVE = {
    "text": ("text",),
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "problems": ("prompt", "answer"),
}
FORMS = EXCLUSIVE | {
    "conversations": ("conversations",),
    "instruction and output": ("instruction", "output"),
    "prompt and completion": ("prompt", "completion"),
}
COLUMNS = tuple(dict.fromkeys([key for keys in FORMS.values() for key in keys] + ["input", "tools"]))
KINDS = ", ".join("{" + ", ".join(keys) + "}" for keys in FORMS.values())
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip

Messages = tuple[Mapping[str, object], ...]


@dataclass(frozen=True)
class Document:
    """One text, token sequence, conversation or problem; `where` is its place, as `file` or `file:line`.

    A conversation that also has a `text` is written as that where the tokenizer has no chat template.
    """

    where: str
    text: str | None = None
    input_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: Messages | None = None
    tools: tuple[object, ...] = ()
    form: str = field(default="plain text", compare=False)  # what it was read as, for people

    @property
    def is_problem(self) -> bool:
        return self.prompt is not None


def forms_of(keys: Iterable[str]) -> list[str]:
    """The forms that a record with these keys has: one, or those that exclude each other, or none."""
    keys = set(keys)
    found = [form for form, needed in FORMS.items() if keys.issuperset(needed)]
    return [form for form in found if form in EXCLUSIVE] or found[:1]


def document(entry: object, where: str) -> Document:
    """What a record says. Raises: CoterieError for what the module's docstring does not describe."""
    if not isinstance(entry, dict):
        raise CoterieError(f"{where}: found {type(entry).__name__}; expected an object with one of {KINDS}")
    forms = forms_of(key for key, value in entry.items() if value is not None) or forms_of(entry)
    if len(forms) != 1:
        found = f"an object with keys {sorted(entry)}"[:300]
        raise CoterieError(f"{where}: found {found}; expected exactly one of {KINDS}")
    return READERS[forms[0]](entry, where)


def _text(entry: Mapping[str, object], where: str) -> Document:
    return Document(where, text=_string(entry, "text", where), form="text")


def _ids(entry: Mapping[str, object], where: str) -> Document:
    return Document(where, input_ids=_token_ids(entry["input_ids"], where), form="input_ids")


def _problem(entry: Mapping[str, object], where: str) -> Document:
    whole = type(entry["answer"]) is int
    answer = str(entry["answer"]) if whole else _string(entry, "answer", where).strip()
    prompt = _string(entry, "prompt", where)
    if not answer or not prompt:
        raise CoterieError(f"{where}: the {'prompt' if answer else 'answer'} is empty; expected some text")
    return Document(where, prompt=prompt, answer=answer, form="problems")


def _conversation(entry: Mapping[str, object], where: str) -> Document:
    key = "messages" if entry.get("messages") is not None else "conversations"
    return Document(where, messages=_messages(entry, key, where), tools=_tools(entry, where), form=key)


def _instruction(entry: Mapping[str, object], where: str) -> Document:
    """A user and an assistant, or all of it joined by blank lines."""
    asked = [_string(entry, key, where) for key in ("instruction", "input") if entry.get(key) is not None]
    question, answer = "\n\n".join(part for part in asked if part.strip()), _string(entry, "output", where)
    messages = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    text = "\n\n".join(part for part in (question, answer) if part)
    return Document(where, text=text, messages=messages, form="instruction and output")


def _completion(entry: Mapping[str, object], where: str) -> Document:
    """Both as they stand, a blank line between them where they have no white space there."""
    form = "prompt and completion"
    if isinstance(entry["prompt"], list):
        messages = _messages(entry, "prompt", where) + _messages(entry, "completion", where)
        return Document(where, messages=messages, tools=_tools(entry, where), form=form)
    prompt, completion = _string(entry, "prompt", where), _string(entry, "completion", where)
    apart = not prompt or not completion or prompt[-1].isspace() or completion[0].isspace()
    return Document(where, text=prompt + ("" if apart else "\n\n") + completion, form=form)


READERS = {
    "text": _text, "input_ids": _ids, "messages": _conversation, "problems": _problem,
    "conversations": _conversation, "instruction and output": _instruction, "prompt and completion": _completion,
}  # fmt: skip


def _string(entry: Mapping[str, object], key: str, where: str) -> str:
    value = entry[key]
    if not isinstance(value, str):
        raise CoterieError(f"{where}: {key!r} is {type(value).__name__}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:  # half of an escaped surrogate pair, which no tokenizer takes
        raise CoterieError(f"{where}: {key!r} is not valid Unicode ({e.reason}); mend the escape sequence") from e
    return value


def _messages(entry: Mapping[str, object], key: str, where: str) -> Messages:
    value = entry[key]
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise CoterieError(f"{where}: {key!r} holds lists of different lengths; expected a turn in each place")
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]  # of `datasets`
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise CoterieError(f"{where}: {key!r} must be a list of objects, each with a role and its content")
    return tuple(_message(turn, key, where) for turn in value)


def _message(turn: Mapping[str, object], key: str, where: str) -> Mapping[str, object]:
    """A turn with a role and a content that is text, if any; what else it has stays."""
    if "role" not in turn and {"from", "value"} <= turn.keys():
        said = _string(turn, "from", where)
        if (role := ROLES.get(said, said)) not in (*ROLES.values(), "system"):
            expected = ", ".join(["system", "user", "assistant", "tool", *ROLES])
            raise CoterieError(f"{where}: a turn is from {said!r:.40}; expected one of {expected}")
        return {"role": role, "content": _string(turn, "value", where)}
    if "role" not in turn:
        raise CoterieError(
            f"{where}: {key!r} holds an object with keys {sorted(turn)}; expected a role and its content"
        )
    _string(turn, "role", where)
    if isinstance(turn.get("content"), list):
        return {**turn, "content": _joined_parts(turn["content"], where)}
    if turn.get("content") is not None:
        _string(turn, "content", where)
    return turn


def _joined_parts(parts: object, where: str) -> str:
    """The texts of a content in parts: templates of models that read text alone take one string."""
    assert isinstance(parts, list)
    texts = []
    for part in parts:
        if isinstance(part, dict) and "text" in part:
            texts.append(_string(part, "text", where))
        else:
            found = part.get("type", sorted(part)) if isinstance(part, dict) else type(part).__name__
            raise CoterieError(f"{where}: a message has a part {found!r:.60}; expected parts of text alone")
    return "".join(texts)


def _tools(entry: Mapping[str, object], where: str) -> tuple[object, ...]:
    """Descriptions of tools, as a list or, as tables have it, as the JSON of one."""
    value = entry.get("tools")
    if isinstance(value, str):
        value = parsed(value, f"{where}, tools") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise CoterieError(f"{where}: 'tools' is {type(value).__name__}; expected a list of objects")
    return tuple(value)


def _token_ids(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        found = "empty" if value == [] else type(value).__name__
        raise CoterieError(f"{where}: 'input_ids' is {found}; expected a list of token ids")
    for token in value:
        if type(token) is not int or not 0 <= token < 2**31:  # bool is an int to isinstance
            found = str(token) if type(token) is int else type(token).__name__
            raise CoterieError(f"{where}: 'input_ids' holds {found}; expected whole numbers from 0")
    return tuple(value)
