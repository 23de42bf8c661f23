"""The small trained mixture-of-experts model that ships with Coterie, and what it is judged on.

`MODEL` is an ordinary qwen2_moe checkpoint; README.md beside it is its card. `HELD_OUT` maps data-set names to
files the model never saw: one text per domain, and 500 worked problems judged by exact match.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
DOMAINS = ("code", "docs", "prose", "spanish", "arithmetic")
HELD_OUT = {domain: FOLDER / "held_out" / f"{domain}.txt" for domain in DOMAINS}
PROBLEMS = FOLDER / "held_out" / "problems.jsonl"
CALIBRATION = {domain: FOLDER / "calibration" / f"{domain}.txt" for domain in DOMAINS}
