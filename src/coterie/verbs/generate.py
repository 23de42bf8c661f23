"""Continue a text with any checkpoint, packed ones too; words appear as they come.

Example: coterie generate OUT --prompt "Once upon a time"
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from coterie.errors import CoterieError, check_choice
from coterie.forward.samples import Dtype
from coterie.model import causal
from coterie.model.loading import DTYPES, TOKENIZER_NEEDED, load, load_tokenizer
from coterie.options import Help, ModelPath, public
from coterie.pages.terminal import Asked

BROKEN = "\ufffd"  # what a tokenizer makes of half a character

OnText = Callable[[str], None]


# Greedy unless a temperature is given, and then drawn from the whole distribution: neither top-k nor top-p, nor what
# the checkpoint's own generation settings would add.
@public
def generate(
    model: ModelPath,
    prompt: Annotated[str, Help("The text to go on from; - reads standard input.", flags=("--prompt",), stdin=True)],
    *,
    max_new_tokens: Annotated[int, Help("Tokens at most.")] = 128,
    temperature: Annotated[float, Help("0: the likeliest token each time; else drawn.")] = 0.0,
    seed: Annotated[int, Help("Of what is drawn.")] = 0,
    dtype: Dtype = "auto",
    on_text: OnText = lambda _: None,
) -> dict[str, Any]:
    """Continues the prompt up to an end-of-text token, or for `max_new_tokens` tokens.

    temperature: 0 takes the likeliest token each time; else tokens are drawn with p ~ exp(logit / temperature), by
    `seed`. on_text: is given each piece of text when it is complete.
    Returns `{"text", "tokens" (new ones), "prompt_tokens", "seconds" (of generating), "tokens_per_second", "notes"}`;
    the text is without the prompt, and all pieces joined.
    Raises: CoterieError for options out of range, a model or tokenizer that does not load, a prompt without tokens or
    longer than the model's positions, and logits that are NaN.
    """
    _check(max_new_tokens, temperature, seed, dtype)
    loaded, tokenizer = causal.without_router_loss(load(model, dtype=dtype).eval()), load_tokenizer(model)
    ids = _encoded(loaded, tokenizer, prompt, str(model))
    room, notes = _room(loaded, len(ids), max_new_tokens)
    pieces = Pieces(tokenizer, on_text)
    began = time.perf_counter()
    _run(loaded, ids, pieces, str(model), most=room, temperature=temperature, seed=seed)
    seconds = time.perf_counter() - began
    return {
        "text": "".join(pieces.texts),
        "tokens": len(pieces.ids),
        "prompt_tokens": len(ids),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(len(pieces.ids) / seconds, 3),
        "notes": notes,
    }


def _check(max_new_tokens: int, temperature: float, seed: int, dtype: str) -> None:
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise CoterieError(f"--max-new-tokens {max_new_tokens!r}: expected a whole number, at least 1")
    if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise CoterieError(f"--temperature {temperature!r}: expected a finite number, 0 or more")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise CoterieError(f"--seed {seed!r}: expected a whole number, 0 or more")
    if seed and not temperature:
        raise CoterieError("--seed would be ignored: at --temperature 0 nothing is drawn")
    check_choice("--dtype", dtype, DTYPES)


@dataclass
class Pieces:
    """What `generate` of transformers calls a streamer: told of tokens, it hands on text whose characters are whole."""

    tokenizer: Any
    on_text: OnText
    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    begun: int = 0  # the first token of the last piece: how a token reads depends on the one before
    done: int = 0  # tokens whose text was handed on
    prompted: bool = False

    def put(self, ids: Any) -> None:
        """The prompt first, then one token at a time."""
        if self.prompted:
            self.ids += ids.reshape(-1).tolist()
            self._say(final=False)
        self.prompted = True

    def end(self) -> None:
        self._say(final=True)

    def _say(self, *, final: bool) -> None:
        known, text = self._decoded(self.done), self._decoded(len(self.ids))
        if len(text) <= len(known) or (text.endswith(BROKEN) and not final):
            return
        self.texts.append(text[len(known) :])
        self.begun, self.done = self.done, len(self.ids)
        self.on_text(self.texts[-1])

    def _decoded(self, end: int) -> str:
        ids = self.ids[self.begun : end]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _encoded(model: Any, tokenizer: Any, prompt: str, what: str) -> list[int]:
    """The prompt's tokens, with the tokenizer's own special ones."""
    try:
        ids: list[int] = tokenizer(prompt)["input_ids"]
    except Exception as error:  # lone surrogates, and whatever else a tokenizer may not take
        raise CoterieError(f"{what}: its tokenizer cannot read the prompt ({error!s:.200}); expected text") from error
    if not ids:
        raise CoterieError("--prompt: no tokens; expected some text to go on from")
    size = causal.vocabulary(model)
    if isinstance(size, int) and max(ids) >= size:
        raise CoterieError(
            f"{what}: token {max(ids)} of the prompt is not among the model's {size}; {TOKENIZER_NEEDED}"
        )
    return ids


def _room(model: Any, num_tokens: int, max_new_tokens: int) -> tuple[int, list[str]]:
    """How many tokens may be added, and what should be said about it."""
    limit = causal.positions(model)
    if not isinstance(limit, int) or num_tokens + max_new_tokens <= limit:
        return max_new_tokens, []
    if num_tokens >= limit:
        raise CoterieError(f"--prompt: {num_tokens} tokens; expected fewer than the model's {limit} positions")
    return limit - num_tokens, [f"{limit - num_tokens} new tokens at most: the model has {limit} positions"]


def _run(model: Any, ids: list[int], pieces: Pieces, what: str, *, most: int, temperature: float, seed: int) -> None:
    """Fills the pieces with what follows the ids, `most` tokens at most."""
    import torch

    given = torch.tensor([ids], device=model.device)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            causal.continued(
                model, pieces.tokenizer, given, most=most, what=what, temperature=temperature, streamer=pieces
            )
    except CoterieError:
        raise
    except Exception as error:  # whatever modelling code raises for a checkpoint it does not fit
        raise CoterieError(f"{what}: generating failed: {type(error).__name__}: {error!s:.300}") from error


def show(found: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    """The text stands there already; this ends its line."""
    yield ""
