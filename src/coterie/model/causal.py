"""A loaded causal language model: what its config says, where its texts end, and how it goes on from a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coterie.errors import CoterieError
from coterie.model.loading import quiet_transformers

if TYPE_CHECKING:
    import torch


def without_router_loss(model: Any) -> Any:
    """The model, told to leave out a balancing loss that nobody asks for and that takes gigabytes to compute."""
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False
    return model


def vocabulary(model: Any) -> int | None:
    """How many tokens the model knows, if its config says."""
    return getattr(model.config.get_text_config(), "vocab_size", None)


def positions(model: Any) -> int | None:
    """How many tokens a sequence may have, if the model's config says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the model's own, by its generation settings and its config, and the tokenizer's."""
    sayers = (model.generation_config, model.config, model.config.get_text_config(), tokenizer)
    found = [getattr(sayer, "eos_token_id", None) for sayer in sayers]
    ends = [end for each in found for end in (each if isinstance(each, list | tuple) else [each])]
    return list(dict.fromkeys(end for end in ends if isinstance(end, int)))


def continued(
    model: Any, tokenizer: Any, ids: torch.Tensor, *, most: int, what: str, temperature: float = 0.0, **given: Any
) -> list[list[int]]:
    """What follows each row of `ids` (rows, T), before a token that ends it, of `most` tokens at most: the likeliest
    each time, or drawn at a temperature. `given` goes to transformers' own `generate`.

    Raises: CoterieError naming `what` for logits that are NaN.
    """
    import torch
    from transformers import GenerationConfig

    def refuse_nan(_: Any, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise CoterieError(f"{what}: the model's logits hold NaN; the weights are damaged, or need float32")
        return scores

    ends = end_tokens(model, tokenizer)
    drawn = {"temperature": float(temperature), "top_k": 0, "top_p": 1.0} if temperature else {}
    theirs = model.generation_config
    # A config given to generate() inherits what it leaves open, such as repetition penalties; the model's own is ours.
    model.generation_config = GenerationConfig(
        do_sample=bool(temperature), max_new_tokens=most, eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0, **drawn,
    )  # fmt: skip
    try:
        with quiet_transformers():
            rows = model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[refuse_nan], **given)
    finally:
        model.generation_config = theirs
    new = rows[:, ids.shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in new]
