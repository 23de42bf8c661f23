"""How good one model is: perplexity of texts, and exact match of answers. `coterie eval` and `report` judge with it.

It knows nothing of plans or methods, and judges a compressed model as it would any other. Every number comes with a
95 % interval. Importing this module imports torch.
"""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
import torch.nn.functional as F

from coterie.errors import CoterieError
from coterie.forward.documents import Document
from coterie.forward.samples import dtype_name
from coterie.forward.tokens import encode
from coterie.judge import harness, paired
from coterie.judge.judging import Judging, Load, check_stride
from coterie.judge.paired import Interval, Kept, Paired, bootstrap_mean
from coterie.model import causal, loading
from coterie.model.family import lookup
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.record import Progress, part_of

logger = logging.getLogger("coterie")

FEW_BLOCKS = 10  # fewer say too little about their own spread
Z95 = 1.959963984540054  # standard normal, 97.5 %
MAX_LOGITS = 2**28  # in one forward: 1 GiB as float32

ANSWER = re.compile(r"Answer:([^\n]*)")
COMPLETE = re.compile(r"Answer:[^\n]*\n")
NUMBER = re.compile(r"(?:(?<![\w.])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class Judged(TypedDict):
    """One model's entry in the result of `eval`; by data set, or task and metric."""

    path: str
    dtype: str  # computed in
    perplexity: dict[str, Interval]
    exact_match: dict[str, Interval]
    tasks: NotRequired[dict[str, dict[str, float]]]
    paired: NotRequired[Paired]


@dataclass(frozen=True)
class Measurement:
    """One model on one data set: how to measure, whom to tell, and where to leave what a comparison needs."""

    name: str  # of the data set
    what: str  # model and data set, for messages
    options: Judging
    report: Progress
    kept: Kept


def check_readable(path: str | Path, documents: dict[str, list[Document]]) -> None:
    """Raises: CoterieError for no checkpoint, or token ids that its config does not know."""
    config = Checkpoint.open(path).config
    size = max((v for _, _, v in lookup(config, ("vocab_size",)) if type(v) is int), default=math.inf)
    for document in (d for entries in documents.values() for d in entries):
        if document.input_ids and max(document.input_ids) >= size:
            raise CoterieError(f"{document.where}: token {max(document.input_ids)} is not among the model's {size}")


def judge(
    path: str | Path,
    documents: dict[str, list[Document]],
    options: Judging,
    load: Load,
    report: Progress,
    manager: Any = None,
    *,
    routers: bool = True,
) -> tuple[Judged, Kept]:
    """One model's entry in the result of `evaluate`, and what a comparison needs, with `routers` of those too."""
    model = causal.without_router_loss(load(path).eval())
    needed = options.tasks or any(d.input_ids is None for entries in documents.values() for d in entries)
    tokenizer = loading.load_tokenizer(path) if needed else None
    result: Judged = {"path": str(path), "dtype": dtype_name(model.dtype), "perplexity": {}, "exact_match": {}}
    kept = Kept(routers=routers)
    for number, (name, entries) in enumerate(documents.items()):
        one = Measurement(name, f"{path}: {name}", options, part_of(report, number, len(documents)), kept)
        if entries[0].is_problem:
            result["exact_match"][name] = exact_match(model, tokenizer, entries, one)
        else:
            result["perplexity"][name] = perplexity(model, tokenizer, entries, one)
    if options.tasks:
        result["tasks"] = harness.run_tasks(
            model, tokenizer, options.tasks, manager, batch_size=options.batch_size, seed=options.seed, what=str(path)
        )
    return result, kept


def judge_all(
    paths: Sequence[str | Path],
    documents: dict[str, list[Document]],
    notes: list[str],
    against: str | Path | None,
    options: Judging,
    load: Load | None,
    report: Progress,
) -> list[Judged]:
    """An entry per model; beside the original, if one is given, what a comparison with it gives.

    Whatever can be refused without loading a model is refused first; then notes are logged.
    """
    if against is not None:
        paired.check_tokens(against, paths, documents)
    manager = harness.task_manager(options.tasks, options.task_path) if options.tasks else None
    for path in paths if load is None else ():
        check_readable(path, documents)
    for note in notes:
        logger.warning("%s", note)
    load = load or (lambda path: loading.load(path, dtype=options.dtype))
    others = [path for path in paths if against is None or not paired.same_model(path, against)]
    count = len(others) + (against is not None)
    parts = (part_of(report, number, count) for number in range(count))
    if against is None:
        return [judge(path, documents, options, load, next(parts), manager, routers=False)[0] for path in paths]
    listed = len(others) < len(paths)
    alone = options if listed else replace(options, tasks=(), task_path=None)  # tasks of a model nobody listed
    first, original = judge(against, documents, alone, load, next(parts), manager)
    entries = list[Judged]()
    for path in paths:
        if path not in others:
            entries.append({**first, "path": str(path)})
        else:
            entry, kept = judge(path, documents, options, load, next(parts), manager)
            pair = paired.compare(path, kept, against, original, seed=options.seed)
            entries.append({**entry, "paired": pair})
    return entries


# Perplexity


@dataclass(frozen=True)
class Window:
    """The tokens `[begin, end)` of a document in one forward; `[first, end)` are scored here."""

    begin: int
    first: int
    end: int


def windows(num_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Windows of at most `window` tokens, `stride` apart, that score each token but the first exactly once.

    A token is scored in the first window that holds it, where it has the most context: `window - stride` tokens at
    least, once there are as many. Needs `1 <= stride < window`.
    """
    begin, first = 0, 1
    while first < num_tokens:
        end = min(begin + window, num_tokens)
        yield Window(begin, first, end)
        begin, first = begin + stride, end


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, documents: Sequence[Document], one: Measurement) -> Interval:
    """Perplexity over all documents, each a sequence of its own, with its interval and the number of scored tokens.

        exp(-1/N sum_t log p(x_t | the tokens before t in its window))        N: all tokens but each document's first

    Raises: CoterieError naming model and data set if a document has fewer than two tokens or a token is unknown to the
    model, or if the result is not finite.
    """
    what, options = one.what, one.options
    sequences = [_tokens(model, tokenizer, document, least=2) for document in documents]
    window = _clamped_window(model, options.window, what)
    stride = options.stride or max(1, window // 2)
    check_stride(window, stride)
    with one.kept.watch(one.name, model), loading.guarded(what, "cannot run it"):
        sums, counts = _score(
            model, sequences, window, stride, options.batch_size, lambda *a: one.report(f"judging, {what}", *a)
        )
    one.kept.losses[one.name], one.kept.counts[one.name] = sums, counts
    if not np.isfinite(sums).all():
        raise CoterieError(f"{what}: the model's logits hold NaN or infinity; the weights are damaged, or need float32")
    if len(sums) < FEW_BLOCKS:
        logger.warning(
            "%s: the interval rests on %d window(s) and is too narrow; give more text or a smaller window",
            what,
            len(sums),
        )
    value, low, high = bootstrap_perplexity(sums, counts, options.seed)
    if not math.isfinite(high):
        raise CoterieError(f"{what}: the perplexity is beyond what a number can hold; the checkpoint is damaged")
    return {"value": value, "low": low, "high": high, "tokens": int(counts.sum())}


def bootstrap_perplexity(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Perplexity with its 95 % interval (low, high): exp of the mean loss, whose interval `bootstrap_mean` has."""
    with np.errstate(over="ignore"):
        value, low, high = (float(p) for p in np.exp(bootstrap_mean(sums, counts, seed)))
    return value, low, high


def _score(
    model: Any,
    sequences: list[list[int]],
    window: int,
    stride: int,
    batch_size: int,
    report: Callable[[int, int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss (float64, nats) and number of the tokens that each window newly scores, in document order."""
    tensors = map(torch.tensor, sequences)
    places = [(tensor[w.begin : w.end], w) for tensor in tensors for w in windows(len(tensor), window, stride)]
    sums, counts = np.empty(len(places)), np.array([w.end - w.first for _, w in places])
    alike = defaultdict(list)  # windows of one shape go together: no padding, whose effect would have to be argued away
    for i, (tokens, _) in enumerate(places):
        alike[len(tokens), counts[i]].append(i)
    done = 0
    for (_, scored), members in alike.items():
        rows = max(1, min(batch_size, MAX_LOGITS // (int(scored + 1) * (causal.vocabulary(model) or 1))))
        for batch in _batches(members, rows):
            ids = torch.stack([places[i][0] for i in batch]).to(model.device)
            sums[batch] = _losses(model, ids, int(scored)).sum(dim=1).cpu().numpy()
            done += len(batch)
            report(done, len(places))
    return sums, counts


def _losses(model: Any, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """Negative log-likelihood (rows, scored), float64, of the last `scored` tokens of each row of `ids`."""
    wanted = {"logits_to_keep": scored + 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    logits = model(input_ids=ids, use_cache=False, **wanted).logits[:, -scored - 1 : -1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, -scored:].flatten(), reduction="none")
    return losses.double().view(len(ids), scored)


def _tokens(model: Any, tokenizer: Any, document: Document, *, least: int) -> list[int]:
    ids = encode(document, tokenizer)
    if len(ids) < least:
        raise CoterieError(
            f"{document.where}: found {len(ids)} token(s); expected at least {least}: give more, or remove it"
        )
    if (size := causal.vocabulary(model)) is not None and max(ids) >= size:
        raise CoterieError(
            f"{document.where}: token {max(ids)} is not among the model's {size}; is it the right tokenizer?"
        )
    return ids


def _clamped_window(model: Any, window: int, what: str) -> int:
    limit = causal.positions(model)
    if limit is None or window <= limit:
        return window
    logger.warning("%s: window of %d tokens clamped to the model's %d positions", what, window, limit)
    return limit


def _batches(members: list[int], size: int) -> Iterator[list[int]]:
    return (members[i : i + size] for i in range(0, len(members), size))


# Exact match


def extract_answer(text: str) -> str | None:
    """The answer in a generated continuation, normalised; None if there is none.

    It is what follows the first `Answer:` on its line. The first, because a model that is not stopped goes on to ask
    and answer questions of its own. Without that mark it is the last number in the text.
    """
    if marked := ANSWER.search(text):
        return normalise_answer(marked[1])
    numbers = NUMBER.findall(text)
    return normalise_answer(numbers[-1]) if numbers else None


def normalise_answer(answer: str) -> str:
    """The answer without surrounding space, one trailing period, and commas between thousands: ` 1,234.` is `1234`."""
    return THOUSANDS.sub("", answer.strip().removesuffix(".").strip())


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval (low, high) of a share; unlike a bootstrap it keeps its width at 0 and 100 %.

    (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)        p = successes / count, n = count, z = 1.96
    """
    p, z2 = successes / count, Z95**2 / count
    centre, half = p + z2 / 2, Z95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count))
    low, high = (centre - half) / (1 + z2), (centre + half) / (1 + z2)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding only


@torch.inference_mode()
def exact_match(model: Any, tokenizer: Any, problems: Sequence[Document], one: Measurement) -> Interval:
    """Share of problems whose answer, greedily generated, equals the expected one as a string (both normalised).

    Prompts of equal length in tokens are generated together, so that nothing is padded; a row ends with the
    end-of-text token, a complete `Answer:` line, or after `max_new_tokens` (fewer where the model's positions end).

    Raises: CoterieError naming model and data set if logits are NaN, or the problem if its prompt fills the model's
    positions.
    """
    what, options = one.what, one.options
    prompts = [_tokens(model, tokenizer, problem, least=1) for problem in problems]
    room = _room(model, problems, prompts, options.max_new_tokens, what)
    alike, done = defaultdict(list), 0
    for i, prompt in enumerate(prompts):
        alike[len(prompt)].append(i)
    generated: list[list[int]] = [[]] * len(problems)
    full = np.zeros(len(problems), bool)
    for length, members in alike.items():
        for batch in _batches(members, options.batch_size):
            ids = torch.tensor([prompts[i] for i in batch], device=model.device)
            most = min(options.max_new_tokens, room - length)
            with loading.guarded(what, "cannot run it"):
                rows = _generate(model, tokenizer, ids, most, what)
            for i, row in zip(batch, rows, strict=True):
                generated[i], full[i] = row, len(row) >= most
            done += len(batch)
            one.report(f"judging, {what}", done, len(problems))
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    answers = [normalise_answer(str(problem.answer)) for problem in problems]
    right = np.array([extract_answer(text) == answer for text, answer in zip(texts, answers, strict=True)])
    cut = full & np.array([COMPLETE.search(text) is None for text in texts])
    if cut.any():
        logger.warning(
            "%s: %d of %d answers were cut off at %d new tokens, unfinished; give --max-new-tokens more",
            what, cut.sum(), len(problems), options.max_new_tokens,
        )  # fmt: skip
    one.kept.right[one.name], one.kept.generated[one.name], one.kept.cut[one.name] = right, generated, cut
    correct = int(right.sum())
    low, high = wilson_interval(correct, len(problems))
    return {"value": correct / len(problems), "low": low, "high": high, "count": len(problems)}


def _room(model: Any, problems: Sequence[Document], prompts: list[list[int]], max_new_tokens: int, what: str) -> int:
    """The number of tokens a prompt and its continuation may have together."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    needed, limit = len(prompts[longest]) + max_new_tokens, causal.positions(model)
    if limit is None or needed <= limit:
        return needed
    if len(prompts[longest]) >= limit:
        found = f"the prompt has {len(prompts[longest])} tokens"
        raise CoterieError(f"{problems[longest].where}: {found}; expected fewer than the model's {limit} positions")
    logger.warning(
        "%s: long prompts get fewer than %d new tokens: the model has %d positions", what, max_new_tokens, limit
    )
    return limit


def _generate(model: Any, tokenizer: Any, ids: torch.Tensor, max_new_tokens: int, what: str) -> list[list[int]]:
    """The tokens of each row's greedy continuation of `ids` (rows, T), up to the end-of-text token."""
    length = ids.shape[1]

    def complete(rows: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = tokenizer.batch_decode(rows[:, length:], skip_special_tokens=True)
        return torch.tensor([COMPLETE.search(text) is not None for text in texts], device=rows.device)

    return causal.continued(model, tokenizer, ids, most=max_new_tokens, what=what, stopping_criteria=[complete])
