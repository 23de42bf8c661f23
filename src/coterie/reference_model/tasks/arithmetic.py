"""What `arithmetic.yaml` calls: the 500 test problems, and the answer rule of `coterie eval`."""

import itertools

import datasets

from coterie.judge.quality import extract_answer, normalise_answer
from coterie.reference_model.problems import problems

NUM_PROBLEMS = 500


def load(num_problems: int = NUM_PROBLEMS, **_: object) -> dict[str, datasets.Dataset]:
    """The first problems of the test side, made again from their seed (`**_`: the task's own metadata)."""
    chosen = itertools.islice(problems(2, test=True), num_problems)
    return {"test": datasets.Dataset.from_list([{"prompt": p["prompt"], "answer": p["answer"]} for p in chosen])}


def judge(problem: dict[str, str], results: list[str]) -> dict[str, float]:
    """1 if the answer found in the generation is the expected one, else 0."""
    return {"exact_match": float(extract_answer(results[0]) == normalise_answer(problem["answer"]))}
