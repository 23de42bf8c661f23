"""Arithmetic word problems with worked steps, from a seeded generator.

The reference model is judged on these by exact match: a wrong digit anywhere in the work usually
spoils the answer, which is why compression shows here long before it shows in perplexity.

Training and test problems are disjoint by construction: a problem is its template and its numbers
(names and objects do not count), and a hash of those decides which side it belongs to.
"""

import hashlib
import random
from collections.abc import Callable, Iterator

NAMES = ("Ana", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Kate", "Leo")
THINGS = ("apples", "books", "coins", "cards", "pens", "stamps", "shells", "marbles", "cakes", "stones")
TEST_SHARE = 50  # one problem in fifty belongs to the test side


def add(a: int, b: int) -> tuple[int, str]:
    """The sum and its work, tens before ones: `34 + 27: 30 + 20 = 50, 4 + 7 = 11, 50 + 11 = 61.`"""
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    return a + b, (
        f"{a} + {b}: {a // 10 * 10} + {b // 10 * 10} = {tens}, {a % 10} + {b % 10} = {ones}, {tens} + {ones} = {a + b}."
    )


def subtract(a: int, b: int) -> tuple[int, str]:
    """The difference and its work: `61 - 15: 61 - 10 = 51, 51 - 5 = 46.`"""
    rest = a - b // 10 * 10
    return a - b, f"{a} - {b}: {a} - {b // 10 * 10} = {rest}, {rest} - {b % 10} = {a - b}."


def multiply(a: int, b: int) -> tuple[int, str]:
    """The product with a single digit b, and its work: `23 * 4: 20 * 4 = 80, 3 * 4 = 12, 80 + 12 = 92.`"""
    tens, ones = a // 10 * 10 * b, a % 10 * b
    return a * b, f"{a} * {b}: {a // 10 * 10} * {b} = {tens}, {a % 10} * {b} = {ones}, {tens} + {ones} = {a * b}."


def _gain_and_give(r: random.Random, name: str, thing: str):
    a, b = r.randint(11, 79), r.randint(11, 79)
    c = r.randint(2, a + b - 1)
    total, first = add(a, b)
    left, second = subtract(total, c)
    text = f"{name} has {a} {thing}. {name} finds {b} more and then gives away {c}. How many {thing} are left?"
    return (a, b, c), text, [first, second], left


def _give_and_gain(r: random.Random, name: str, thing: str):
    a = r.randint(21, 99)
    b, c = r.randint(11, a - 1), r.randint(11, 79)
    left, first = subtract(a, b)
    total, second = add(left, c)
    text = f"There are {a} {thing} in a box. {name} takes out {b} and puts in {c}. How many {thing} are in the box now?"
    return (a, b, c), text, [first, second], total


def _boxes_and_more(r: random.Random, name: str, thing: str):
    a, b, c = r.randint(11, 29), r.randint(2, 9), r.randint(11, 79)
    product, first = multiply(a, b)
    total, second = add(product, c)
    text = f"{name} buys {b} boxes with {a} {thing} in each and already had {c}. How many {thing} does {name} have?"
    return (a, b, c), text, [first, second], total


def _boxes_and_less(r: random.Random, name: str, thing: str):
    a, b = r.randint(11, 29), r.randint(3, 9)
    c = r.randint(11, a * b - 1)
    product, first = multiply(a, b)
    left, second = subtract(product, c)
    text = f"{name} packs {b} bags of {a} {thing}. Then {c} {thing} are sold. How many {thing} remain?"
    return (a, b, c), text, [first, second], left


def _difference(r: random.Random, name: str, thing: str):
    a, b, c = r.randint(11, 49), r.randint(11, 49), r.randint(11, 49)
    other = r.choice([n for n in NAMES if n != name])
    total, first = add(a, b)
    (more, second) = subtract(total, c) if total >= c else subtract(c, total)
    text = (
        f"{name} collects {a} {thing} on Monday and {b} on Tuesday. {other} collects {c}. "
        f"What is the difference between the two?"
    )
    return (a, b, c), text, [first, second], more


def _three_days(r: random.Random, name: str, thing: str):
    a, b, c = r.randint(11, 59), r.randint(11, 59), r.randint(11, 59)
    two, first = add(a, b)
    three, second = add(two, c)
    text = f"{name} sells {a} {thing} in the morning, {b} at noon and {c} in the evening. How many {thing} is that?"
    return (a, b, c), text, [first, second], three


TEMPLATES: tuple[Callable, ...] = (
    _gain_and_give,
    _give_and_gain,
    _boxes_and_more,
    _boxes_and_less,
    _difference,
    _three_days,
)


def is_test(template: int, numbers: tuple[int, ...]) -> bool:
    """Whether the problem with this template and these numbers is kept out of training."""
    digest = hashlib.sha256(repr((template, numbers)).encode()).digest()
    return int.from_bytes(digest[:4], "little") % TEST_SHARE == 0


def problems(seed: int, *, test: bool) -> Iterator[dict[str, str]]:
    """An endless stream of `{"prompt", "work", "answer"}` from one side of the split."""
    r = random.Random(seed)
    while True:
        template = r.randrange(len(TEMPLATES))
        numbers, question, steps, answer = TEMPLATES[template](r, r.choice(NAMES), r.choice(THINGS))
        if is_test(template, numbers) == test:
            yield {
                "prompt": f"Question: {question}\nWork:",
                "work": f" {' '.join(steps)}\nAnswer: {answer}\n",
                "answer": str(answer),
            }
