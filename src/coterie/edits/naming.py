"""Names of modules in JSON, such as the settings of a quantised checkpoint, under the numbers that a plan gives them.

    "model.layers.1.mlp.experts.11.up_proj"        a name: renumbered, or taken out with what it names
    "+:model\\.layers\\.1\\.mlp\\.experts\\.11\\..*"    a pattern with numbers written out: likewise
    "re:.*mlp.gate$", "model.layers.*.self_attn"   a pattern that no number changes: left as it is
    "re:.*experts\\.(3|7)\\..*"                      a pattern that numbers change in another way: refused

Patterns are read as text and never run: they come with untrusted files, and may take for ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from coterie.edits.plan import Numbers, Plan, kinds
from coterie.errors import CoterieError, reading
from coterie.model.layer import LAYER, Model, stack_of
from coterie.storage.checkpoint import parse_json
from coterie.storage.record import to_json

NAME = re.compile(r"[\w.-]+")
LAYERS, EXPERTS = r"(?:layers|blocks)", "experts"
REGEX = re.compile(r"^(re:|[+-]:|\.\*)|[\\()^$|]")  # marks are of compressed-tensors, and of GPTQ's `dynamic`
WILD = re.compile(r"[*\\()^$\[]")
# What matches any number if it matches one, for numbers in names stand between dots; and what may not.
LETTERS = re.compile(r"\[[A-Za-z_-]+\]")
ANY = re.compile(r"(\\[dwS]|\[0-9\]|\[\^\\?\.\]|\.)\)?[*+]\??|\\\.|(?<=[A-Za-z_])\.|\.(?=[A-Za-z_])")
LIMIT = re.compile(r"(?<![A-Za-z_\d-])\d|\\[dwS]|\[|(?<!\\)\.")
SETTINGS = re.compile("quant|compress")  # under such a key, and in files of such a name, strings may be patterns
LONGEST = 4096  # characters of a pattern
AROUND = {"model", "language_model", "text_model", "transformer", "decoder", "backbone"}  # what files put before layers
NUMBERED = re.compile(rb"(layers|blocks|experts)\W{1,4}\d")
TEXTS = ("tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "chat_template")  # words, not names


def words(stack: str) -> frozenset[str]:
    """What tells one stack of layers from others, however files wrap it."""
    return frozenset(re.findall(r"[A-Za-z]\w*", stack)) - AROUND - {"layers", "blocks", "re"}


@dataclass(frozen=True)
class Renumbering:
    """What a plan makes of numbers in names."""

    model: Model
    plan: Plan
    _known: dict[Numbers, Numbers | None] = field(default_factory=dict, repr=False)  # many names have the same numbers

    @cached_property
    def has_fewer_experts(self) -> bool:
        return any(len(choice.kept) < block.num_experts for block, choice in self.plan.chosen(self.model))

    @cached_property
    def stacks(self) -> dict[frozenset[str], str]:
        """What tells a stack of layers with experts -> what stands before the number in those layers' keys."""
        return {words(block.stack): block.key.rpartition(".")[0] for block in reversed(self.model.moe)}

    @cached_property
    def others(self) -> set[frozenset[str]]:
        """What tells the other stacks, such as a vision tower's: nothing is renumbered there."""
        found = {stack_of(match["prefix"]) for match in map(LAYER.fullmatch, self.model.checkpoint.tensors) if match}
        return set(map(words, found)) - self.stacks.keys()

    def json(self, value: Any, at: str, settings: bool) -> Any:
        """A JSON value with its names renumbered; entries of a list or an object go with what they name.

        settings: whether strings may be patterns too. Raises: CoterieError for one that cannot be renumbered.
        """
        if isinstance(value, dict):
            pairs = ((key, self.text(key, at, settings), found) for key, found in value.items())
            return {new: self._entry(key, found, at, settings) for key, new, found in pairs if new is not None}
        if isinstance(value, list):
            pairs_of = ((item, self.json(item, at, settings)) for item in value)
            return [new for old, new in pairs_of if new is not None or old is None]
        return self.text(value, at, settings) if isinstance(value, str) else value

    def _entry(self, key: str, value: Any, at: str, settings: bool) -> Any:
        where = f"{at}: {key}"
        found = self.json(value, where, settings or SETTINGS.search(key) is not None)
        if found is None and value is not None:
            raise self._refused(value, where, "what it names goes")
        return found

    def text(self, text: str, at: str, settings: bool) -> str | None:
        """A string, renumbered if it is a name, or a pattern among settings; None where what it names goes."""
        if not (self.plan.dropped or self.plan.drop_mtp or self.has_fewer_experts):
            return text
        if NAME.fullmatch(text):
            return self._renumbered(text, at, r"(?=\.|$)")
        if not settings or " " in text:
            return text
        if len(text) > LONGEST:
            raise self._refused(text, at, f"it has more than {LONGEST} characters")
        is_regex = REGEX.search(text) is not None
        end = r"(?=\\\.|\.(?![*+?{])|\$|$)" if is_regex else r"(?=\.|$)"
        found = self._renumbered(text, at, end)
        if WILD.search(text) and self._limits(text, end, is_regex):
            raise self._refused(text, at, "it tells numbers apart otherwise than by writing one out")
        if found is None and re.search(r"\||\(\?", text):
            raise self._refused(text, at, "a part of what it names goes")
        return found

    def _limits(self, text: str, end: str, is_regex: bool) -> bool:
        """Whether a pattern may match one number and not another, beside those written out, of what is renumbered."""
        rest = re.sub(rf"({LAYERS}|{EXPERTS})\\?\.[0-9]{{1,6}}{end}", "~", LETTERS.sub("x", text))
        limited = r"\\?\.(\([^()]*\)|\[[^\]]*\]|\\d|\d|[*+])+"
        if not self.plan.dropped:
            rest = re.sub(f"{LAYERS}{limited}", "~", rest)
        if not self.has_fewer_experts:
            rest = re.sub(f"{EXPERTS}{limited}", "~", rest)
        return bool(LIMIT.search(ANY.sub("~", rest)) if is_regex else re.search(r"(?<![\w-])\d|[?\[]", rest))

    def _renumbered(self, text: str, at: str, end: str) -> str | None:
        """A string with its numbers changed; None where what they name goes."""
        layers, experts = (list(re.finditer(rf"{kind}\\?\.([0-9]{{1,6}}){end}", text)) for kind in (LAYERS, EXPERTS))
        before = words(text[: layers[0].start()]) if layers else frozenset()
        if not (layers or experts) or (layers and before in self.others):
            return text
        prefix = self.stacks.get(before, "")
        layer = f"{prefix}.{layers[0][1]}".lstrip(".") if layers else None
        old = Numbers(layer, int(experts[0][1]) if experts else None)
        try:
            new = self.numbers(old)
        except LookupError:
            raise self._refused(text, at, "each layer keeps other experts, and it names no layer") from None
        if new == old:
            return text
        if len(layers) > 1 or len(experts) > 1:
            raise self._refused(text, at, "it has several numbers")
        vague = not before and self.others and not NAME.fullmatch(text)
        if layers and (before not in self.stacks or (vague and (new is None or new.layer != old.layer))):
            raise self._refused(text, at, "it does not say which layers it means")
        if new is None:
            return None
        numbers = [*zip(layers, [str(new.layer)], strict=False), *zip(experts, [str(new.expert)], strict=False)]
        for found, number in sorted(numbers, key=lambda pair: -pair[0].start()):
            text = text[: found.start(1)] + number.rpartition(".")[2] + text[found.end(1) :]
        return text

    def numbers(self, old: Numbers) -> Numbers | None:
        """New numbers; None where there is no such thing any more. Raises: LookupError where that depends on layers."""
        if old.layer is None:
            keys = {block.key for block in self.model.moe if not block.attention and not block.layout.segment[0]}
            numbers = [self.numbers(Numbers(key, old.expert)) for key in keys]
            experts = {new.expert if new else None for new in numbers}
            if len(experts) > 1:
                raise LookupError
            expert = experts.pop()
            return None if expert is None else Numbers(None, expert)
        if old not in self._known:
            new: Numbers | None = old
            for kind in kinds():
                new = kind.renumber(self.model, self.plan, new) if new else None
            self._known[old] = new
        return self._known[old]

    def _refused(self, text: str, at: str, reason: str) -> CoterieError:
        return CoterieError(
            f"{self.model.checkpoint.path}: {at}: {text!r:.200} names modules by number, and cannot be renumbered "
            f"({reason}); write their names out, or take the line out"
        )


def renumbered_files(model: Model, plan: Plan, paths: Iterable[Path]) -> dict[str, str]:
    """File name -> new content, of the JSON files among these in which names change.

    Raises: CoterieError for one that cannot be read, and for names that cannot be renumbered.
    """
    renumbering, found = Renumbering(model, plan), {}
    for path in paths:
        if path.suffix != ".json" or path.name.startswith(TEXTS):
            continue
        with reading(path):
            raw = path.read_bytes()
        settings = SETTINGS.search(path.name) is not None
        if settings or NUMBERED.search(raw):
            value = parse_json(b'{"": %s}' % raw, str(path))[""]
            new = renumbering.json(value, path.name, settings)
            if new != value:
                found[path.name] = to_json(new)
    return found
