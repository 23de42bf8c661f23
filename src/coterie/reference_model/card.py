"""Judges a finished training run and writes its model card, with a trigram model as the baseline to be far below.

    python -m coterie.reference_model.card CORPUS RUN [--steps N]

copies the model and the held-out and calibration slices into the package and writes `model/README.md`.
"""

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import coterie
from coterie.model.loading import load_tokenizer
from coterie.reference_model import DOMAINS, FOLDER, HELD_OUT, MODEL, PROBLEMS
from coterie.reference_model.train import BATCH, CONFIG, LEARNING_RATE, MIX, SEQ_LEN, batch_at, encode

DISCOUNT = 0.75


@dataclass(frozen=True)
class Counts:
    """How often each n-gram (as one integer key) was seen, and per context: tokens and distinct continuations."""

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, vocabulary: int) -> "Counts":
        unique, counts = np.unique(keys, return_counts=True)
        contexts, first = np.unique(unique // vocabulary, return_index=True)
        kinds = np.diff(np.append(first, len(unique)))
        return cls(unique, counts, contexts, np.add.reduceat(counts, first), kinds)

    def discounted(self, keys: np.ndarray, vocabulary: int, lower: np.ndarray) -> np.ndarray:
        """max(c - d, 0)/C + d N/C * lower: the probability of each key's last token, interpolated with `lower`."""
        count = _at(self.keys, self.counts, keys)
        total = _at(self.contexts, self.totals, keys // vocabulary)
        kinds = _at(self.contexts, self.kinds, keys // vocabulary)
        seen = np.maximum(total, 1)
        mixed = np.maximum(count - DISCOUNT, 0) / seen + DISCOUNT * kinds / seen * lower
        return np.where(total > 0, mixed, lower)


def _at(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def trigram_perplexities(rows: np.ndarray, texts: dict[str, np.ndarray], vocabulary: int) -> dict[str, float]:
    """Perplexity of each text under an interpolated trigram model (absolute discounting) of `rows` (N, T)."""
    rows = rows.astype(np.int64)
    unigram = np.bincount(rows.ravel(), minlength=vocabulary) + 1.0
    unigram /= unigram.sum()
    pairs = Counts.of((rows[:, :-1] * vocabulary + rows[:, 1:]).ravel(), vocabulary)
    triples = Counts.of(((rows[:, :-2] * vocabulary + rows[:, 1:-1]) * vocabulary + rows[:, 2:]).ravel(), vocabulary)
    result = {}
    for name, tokens in texts.items():
        t = tokens.astype(np.int64)
        two = pairs.discounted(t[1:-1] * vocabulary + t[2:], vocabulary, unigram[t[2:]])
        three = triples.discounted((t[:-2] * vocabulary + t[1:-1]) * vocabulary + t[2:], vocabulary, two)
        result[name] = math.exp(-np.log(three).mean())
    return result


def curve(log: list[dict]) -> str:
    """The loss curve as an SVG picture: training loss, mean of ten steps, over tokens seen."""
    points = [(e["step"], e["loss"]) for e in log]
    top, last = max(y for _, y in points), points[-1][0]
    smooth = [
        (x, sum(y for _, y in points[max(0, i - 4) : i + 5]) / len(points[max(0, i - 4) : i + 5]))
        for i, (x, _) in enumerate(points)
    ]
    path = " ".join(f"{40 + 540 * x / last:.1f},{210 - 190 * y / top:.1f}" for x, y in smooth)
    marks = "".join(f'<text x="4" y="{214 - 190 * y / top:.0f}">{y}</text>' for y in range(0, int(top) + 1, 2))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 240" font-family="sans-serif" font-size="12">'
        f'<rect width="600" height="240" fill="white"/>{marks}'
        f'<polyline fill="none" stroke="#2563eb" stroke-width="2" points="{path}"/>'
        f'<text x="300" y="234">steps (last {last})</text></svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    corpus, run = arguments.corpus, arguments.run
    for side in ("held_out", "calibration"):
        shutil.copytree(corpus / side, FOLDER / side, dirs_exist_ok=True)
    shutil.copytree(run / "model", MODEL, dirs_exist_ok=True)
    tokenizer = load_tokenizer(MODEL)
    sequences = encode(corpus, tokenizer)
    rows = np.concatenate([batch_at(sequences, step, 0).numpy() for step in range(arguments.steps)])
    texts = {d: np.array(tokenizer(HELD_OUT[d].read_text(encoding="utf-8"))["input_ids"]) for d in DOMAINS}
    trigram = trigram_perplexities(rows, texts, CONFIG.vocab_size)
    found = coterie.eval(MODEL, data={**HELD_OUT, "problems": PROBLEMS})["models"][0]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (MODEL / "loss.svg").write_text(curve(log))
    (MODEL / "README.md").write_text(card(found, trigram, log, arguments.steps), encoding="utf-8")


def card(found: dict, trigram: dict[str, float], log: list[dict], steps: int) -> str:
    lines = "\n".join(
        f"| {d} | {MIX[d]:.0%} | {v['value']:.2f} [{v['low']:.2f}, {v['high']:.2f}] | {trigram[d]:.1f} |"
        for d, v in found["perplexity"].items()
    )
    exact = found["exact_match"]["problems"]
    shown = "\n".join(
        f"| {e['step']} | {e['loss']:.2f} | {e['worst_load']:.1f} |" for e in log[:: max(1, len(log) // 10)]
    )
    return CARD.format(
        lines=lines, exact=100 * exact["value"], low=100 * exact["low"], high=100 * exact["high"],
        count=exact["count"], tokens=steps * BATCH * SEQ_LEN / 1e6, steps=steps, batch=BATCH, seq=SEQ_LEN,
        rate=LEARNING_RATE, curve=shown,
    )  # fmt: skip


CARD = """---
license: apache-2.0
language: [en, es]
tags: [mixture-of-experts, reference-model]
---
# Coterie's reference model

A small mixture of experts that has really learnt something, so that compression has something to lose.
qwen2_moe, 16.7 M parameters in bf16: 8 layers, hidden size 256, 64 routed experts of width 32 with top-4
(renormalised), a shared expert of width 128, 4 heads, 512 positions, and a byte-level BPE of 4,096 tokens in which
every digit is a token. It is an instrument, not an assistant: use it to compare methods.

## What it knows

Held-out text of each domain (about 100 KB), windows of 512 tokens advancing by 256; 95 % bootstrap intervals. The
baseline is an interpolated trigram model of exactly the tokens the model was trained on.

| domain | share of training | perplexity | trigram baseline |
|---|---|---|---|
{lines}

Exact match on {count} held-out word problems with worked steps: {exact:.1f} % [{low:.1f}, {high:.1f}] (greedy).
Training and test problems are disjoint in their numbers and templates.

## How it was made

{tokens:.1f} M tokens ({steps} steps of {batch} x {seq}), AdamW with a peak rate of {rate}, cosine, on two CPU cores in
about 95 minutes; load-balancing loss per layer, weight 0.02. `python -m coterie.reference_model.data CORPUS`, then
`... .train CORPUS RUN`, then `... .card CORPUS RUN` make it again.

![training loss](loss.svg)

| step | training loss | largest expert load (1 = even) |
|---|---|---|
{curve}

## What it was made from

| domain | source | licence |
|---|---|---|
| code | Python packages (Django, SymPy, Sphinx, pytest, Celery, Tornado, Twisted, ...) | BSD, MIT |
| docs | documentation of Python 3.11, SQLAlchemy, pandas, scikit-learn, Celery, Tornado, Sphinx | PSF, MIT, BSD |
| prose | 18 books of Project Gutenberg; State of the Union addresses | public domain |
| spanish | Reina-Valera Bible, 1909 | public domain |
| arithmetic | `problems.py`, a seeded generator | Apache-2.0 |

`data.py` names every package and version. The held-out slices beside the model carry those licences.
"""


if __name__ == "__main__":
    main()
