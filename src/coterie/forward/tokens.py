"""Documents to tokens: as a model reads one of them, and the samples that calibration draws from all.

Imports neither torch nor transformers: tokenizers are passed in.
"""

from typing import Any

from coterie.errors import CoterieError
from coterie.forward.documents import Document


def encode(document: Document, tokenizer: Any) -> list[int]:
    """Token ids of a document or of a problem's prompt: `input_ids` as given, text with the tokenizer's special tokens.

    Raises: CoterieError if there is text but no tokenizer.
    """
    if document.input_ids is not None:
        return list(document.input_ids)
    if tokenizer is None:
        raise CoterieError(f"{document.where}: text needs a tokenizer; give one, or lines of token ids (input_ids)")
    if _is_templated(document, tokenizer):
        return _plain_ids(_spelled_out(document, tokenizer), tokenizer)
    text = document.text if document.prompt is None else document.prompt
    return tokenizer(text, verbose=False)["input_ids"]  # else it warns of lengths that windows will cut


def _plain_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text without special tokens, but for those that the text itself spells out."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _is_templated(document: Document, tokenizer: Any) -> bool:
    """Whether a chat template spells the document out: a conversation, unless it has a text and there is none."""
    return document.messages is not None and bool(document.text is None or getattr(tokenizer, "chat_template", None))


def _spelled_out(document: Document, tokenizer: Any) -> str:
    """A conversation as the text that the model was trained on.

    Raises: CoterieError where there is no template, or it fails, or leaves all of it out.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CoterieError(f"{document.where}: the tokenizer has no chat template for messages; write them as text")
    messages, tools = list(document.messages or ()), {"tools": list(document.tools)} if document.tools else {}
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **tools))
    except Exception as e:  # a template is a program, and refuses roles or orders in its own way
        raise CoterieError(f"{document.where}: the chat template refuses the messages ({e!s:.200})") from e
    said = [str(m["content"]).strip() for m in messages if m.get("content")]
    if any(said) and not any(part in text for part in said if part):
        raise CoterieError(f"{document.where}: the chat template leaves out what the messages say; write them as text")
    return text


def draw(
    documents: dict[str, list[Document]],
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    max_positions: int | None,
) -> tuple[dict[str, list[tuple[int, ...]]], list[str]]:
    """Token sequences by name, and what should be said aloud about them.

    `samples` in all are spread evenly over the names, one more for the first where they do not divide. Lines of
    token ids are a sample each, in order. Texts are tokenised without special tokens, joined by the end-of-text token
    and cut into blocks of `seq_len` (at most `max_positions`), of which as many as are needed are drawn without
    replacement, in their order; a text shorter than one block is one shorter sample.
    Raises: CoterieError for what is no document, has no tokens, or does not fit the model.
    """
    for option, value, least in (("samples", samples, len(documents)), ("seq-len", seq_len, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise CoterieError(f"--{option} {value!r}: expected a whole number, at least {least}")
    notes = []
    length = min(seq_len, max_positions or seq_len)
    if length < seq_len and any(d.input_ids is None for entries in documents.values() for d in entries):
        notes.append(f"--seq-len {seq_len} is more than the model's {length} positions: blocks have {length} tokens")
    base, rest = divmod(samples, len(documents))
    found = {}
    for number, (name, entries) in enumerate(documents.items()):
        share = base + (number < rest)
        if _all_token_ids(entries):
            found[name] = _as_given(entries[:share], max_positions)
        else:
            found[name] = _drawn_blocks(_joined(entries, tokenizer, notes), length, share, seed)
        if len(found[name]) < share:
            notes.append(f"data {name!r} gives {len(found[name])} of the {share} samples that were its share")
    return found, notes


def _all_token_ids(documents: list[Document]) -> bool:
    """Whether documents are token ids, not texts. Raises: CoterieError for problems, and for both in one."""
    given = [d.input_ids is not None for d in documents]
    odd = next((d for d, is_ids in zip(documents, given, strict=True) if is_ids != given[0]), None)
    if odd:
        raise CoterieError(f"{odd.where}: found texts and token ids under one name; give each a name of its own")
    if any(d.is_problem for d in documents):
        raise CoterieError(f"{documents[0].where}: problems are for eval; calibration expects texts or token ids")
    return given[0]


def _as_given(documents: list[Document], max_positions: int | None) -> list[tuple[int, ...]]:
    for document in documents:
        if max_positions and len(document.input_ids or ()) > max_positions:
            raise CoterieError(
                f"{document.where}: {len(document.input_ids or ())} token ids; the model has {max_positions} positions"
            )
    return [document.input_ids or () for document in documents]


def _joined(documents: list[Document], tokenizer: Any, notes: list[str]) -> list[int]:
    """All texts as one sequence, with the end-of-text token between them."""
    if tokenizer is None:
        encode(documents[0], None)  # says what is missing
    texts = (_spelled_out(d, tokenizer) if _is_templated(d, tokenizer) else d.text or "" for d in documents)
    parts = [part for text in texts if (part := _plain_ids(text, tokenizer))]
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None and len(parts) > 1:
        notes.append("the tokenizer has no end-of-text token: texts are joined without one")
    joined: list[int] = []
    for number, part in enumerate(parts):
        joined += ([end] if number and end is not None else []) + list(part)
    if not joined:
        raise CoterieError(f"{documents[0].where}: no tokens; expected some text")
    return joined


def _drawn_blocks(tokens: list[int], length: int, count: int, seed: int) -> list[tuple[int, ...]]:
    import numpy as np

    total = len(tokens) // length
    if not total:
        return [tuple(tokens)]
    chosen = np.sort(np.random.default_rng(seed).choice(total, size=min(count, total), replace=False))
    return [tuple(tokens[i * length : (i + 1) * length]) for i in chosen.tolist()]
