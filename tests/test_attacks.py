"""Every file is untrusted: each attack of the corpus on each command that reads such a file, in a process with limits.

Refused with one line and exit code 2, in bounded time and memory; nothing is written, nothing is lost, and no control
character reaches the terminal.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from attacks import make
from attacks.make import ATTACKS
from attacks.tables import sound_stats
from coterie.reference_model import MODEL
from coterie.storage.checkpoint import parse_json
from handmade import qwen

HERE = Path(__file__).parent
SECONDS = 30  # of CPU for a command
MEMORY = {"light": 600 << 20, "heavy": 1700 << 20}  # bytes resident at most, with what the libraries themselves take
ROWS = '{"input_ids": [1, 2, 3, 4]}\n'

VERBS = {  # kind: name -> the command; X is the attack, OUT a name that does not exist
    "model": {
        "inspect": "inspect X",
        "dry": "prune X OUT --dry-run",
        "prune": "prune X OUT",
        "pack": "pack X OUT",
        "verify": "verify X",
    },
    "plan": {"dry": "apply MODEL X OUT --dry-run", "apply": "apply MODEL X OUT"},
    "record": {
        "verify": "verify X --against ORIGINAL",
        "resume": "prune ORIGINAL X --experts 4 --resume",
        "apply": "apply ORIGINAL X/coterie.json OUT",
    },
    "interrupted": {"resume": "prune ORIGINAL X --resume"},
    "stats": {
        "prune": "prune MODEL OUT --method reap --stats X",
        "ties": "prune MODEL OUT --lambda2 1 --stats X",
        "compare": "compare MODEL X",
    },
    "packed": {"unpack": "unpack X OUT", "verify": "verify X", "prune": "prune X OUT"},
    "data": {
        "eval": "eval REFERENCE --data d=X",
        "collect": "collect REFERENCE OUT --samples 2 --data d=X",
        "prune": "prune REFERENCE OUT --method naee-greedy --samples 2 --data d=X",
    },
    "loaded": {
        "verify": "verify X",
        "eval": "eval X --data d=ROWS",
        "collect": "collect X OUT --samples 1 --data d=ROWS",
        "generate": "generate X --prompt a --max-new-tokens 1",
        "bench": "bench X --batch 1",
    },
}
HEAVY = ("data", "loaded")  # kinds whose commands load torch; verify does, too


class Runner:
    """A warm process that runs commands under limits."""

    def __init__(self, kind: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "attacks" / "run.py"), kind]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, argv: list[str], folder: Path) -> dict:
        self.process.stdin.write(json.dumps({"argv": argv, "folder": str(folder), "seconds": SECONDS}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="module")
def runners():
    started: dict[str, Runner] = {}

    def get(kind: str) -> Runner:
        if kind not in started:
            started[kind] = Runner(kind)
        return started[kind]

    yield get
    for runner in started.values():
        runner.close()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """What stands beside an attack, in order: a model, the shipped model, and rows of token ids."""
    home = tmp_path_factory.mktemp("sound")
    (home / "rows.jsonl").write_text(ROWS)
    return {"MODEL": qwen(home / "model"), "REFERENCE": MODEL, "ROWS": home / "rows.jsonl"}


def listing(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: kind, size and time of change, and where links lead."""
    found = {}
    for home, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(home, name)  # noqa: PTH118 - some names are no UTF-8
            state = os.lstat(path)
            target = os.readlink(path) if os.path.islink(path) else ""  # noqa: PTH114, PTH115
            kind = state.st_mode >> 12
            found[path] = (kind, target) if kind == 4 else (kind, target, state.st_size, state.st_mtime_ns)
    return found


def is_clean(text: str) -> bool:
    """No character that a terminal would obey, but line breaks."""
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_an_attack_is_refused_and_does_nothing(attack, runners, sound, tmp_path):
    """Exit code 2 (3: a fault that verify found), one line, no byte written or lost, in bounded time and memory."""
    hostile = attack.make(tmp_path)
    paths = {**sound, "X": hostile, "OUT": tmp_path / "result", "ORIGINAL": tmp_path / "original"}
    for verb, command in VERBS[attack.kind].items():
        before = listing(tmp_path)
        argv = [spelled(word, paths) for word in command.split()]
        weight = "heavy" if attack.kind in HEAVY or verb == "verify" else "light"
        done = runners(weight)(argv, tmp_path)
        where = f"{attack.name}, {verb}: exit {done['code']}: {done['err'][-3000:]}"
        harmless = verb in attack.harmless
        assert done["code"] in ({0, 2, 3} if harmless else {2, 3} if verb == "verify" else {2}), where
        assert is_clean(done["out"] + done["err"]), where
        assert "Traceback" not in done["err"] and len(done["err"]) < 20_000, where
        if done["code"] == 2:
            said = re.sub(r"^note: documents read: [^\n]*\n", "", done["err"])  # sound data beside a hostile model
            assert said.startswith("error: ") and said.count("\n") == 1 and not done["out"], where
        assert done["rss"] < MEMORY[weight], f"{where} {done['rss']:,} bytes"
        after = listing(tmp_path)
        mine = allowed(attack, verb, paths)
        before, after = ({k: v for k, v in found.items() if not k.startswith(mine)} for found in (before, after))
        assert after == before, where
        if attack.kind != "interrupted":
            subprocess.run(["rm", "-rf", paths["OUT"], f"{paths['OUT']}.partial"], check=True)


def allowed(attack: make.Attack, verb: str, paths: dict[str, Path]) -> tuple[str, ...]:
    """What a command may write: OUT where it accepts the attack, OUT.partial where a run is resumed that left one."""
    if attack.kind == "interrupted":
        return str(paths["X"]), f"{paths['X']}.partial"
    return (str(paths["OUT"]),) if verb in attack.harmless else ("\0",)


def spelled(word: str, paths: dict[str, Path]) -> str:
    """A word of a command with the paths in the place of their names."""
    name = word.removeprefix("d=").partition("/")[0]
    return word.replace(name, str(paths[name]), 1) if name in paths else word


def test_every_kind_of_attack_is_run():
    """No attack is left out because nothing reads its kind, and names are not taken twice."""
    assert {a.kind for a in ATTACKS} == set(VERBS)
    assert len({a.name for a in ATTACKS}) == len(ATTACKS)


def test_sound_files_pass(runners, sound, tmp_path):
    """The commands that refuse the attacks accept what they were made from, so it is the attack that is refused."""
    sound_stats(sound["MODEL"]).save(tmp_path / "stats")
    (tmp_path / "plan.json").write_text('{"layers": {"0": {"kept": [0, 1, 2, 3]}, "1": {"kept": [0, 1, 2, 3]}}}')
    for verb, attack in (("model", sound["MODEL"]), ("plan", tmp_path / "plan.json"), ("stats", tmp_path / "stats")):
        for number, (name, command) in enumerate(VERBS[verb].items()):
            paths = {**sound, "X": attack, "OUT": tmp_path / f"{verb}{number}"}
            done = runners("heavy" if name == "verify" else "light")(
                [spelled(word, paths) for word in command.split()], tmp_path
            )
            wanted = {"verify": 3, "pack": 2}.get(name, 0)  # nothing in it is sparse, and it is no whole stock model
            assert done["code"] == wanted, f"{name}: {done['err']}"


def test_the_table_of_attacks_is_current():
    """docs/reliability.md names every attack and what it tries; `python tests/attacks/make.py --table` mends it."""
    assert make.PAGE.read_text(encoding="utf-8") == make.page()


# --- the fuzzer ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzzer():
    return runpy.run_path(str(HERE.parent / "benchmarks" / "fuzz.py"), run_name="fuzz")


def test_a_short_fuzz_run_finds_no_crash(fuzzer, tmp_path):
    """Every reader answers mutated files with CoterieError or not at all, and mutations reach what seeds do not."""
    for name, (target, seeds) in fuzzer["targets"](tmp_path).items():
        found = fuzzer["fuzz"](target, seeds, seed=1, inputs=120)
        assert not found.crashes, f"{name}: {found.crashes}"
        assert len(found.corpus) > len(seeds), name


def test_the_fuzzer_follows_lines_and_reports_what_is_not_our_error(fuzzer):
    """A defect behind two conditions, which no seed meets, is found; a CoterieError is no crash."""

    def target(raw):
        if parse_json(raw, "x").get("a") == 8:
            raise IndexError("planted")

    found = fuzzer["fuzz"](target, [b'{"a": 3}'], seed=0, inputs=2000)
    assert [crash.split(" at ")[0] for crash in found.crashes] == ["IndexError"]
    assert all(json.loads(raw)["a"] == 8 for raw in found.crashes.values())


def test_the_fuzzer_repeats_itself(fuzzer, tmp_path):
    """The same seed and number of inputs try the same inputs."""
    target, seeds = fuzzer["targets"](tmp_path)["header"]
    first, again = (fuzzer["fuzz"](target, seeds, seed=3, inputs=200) for _ in range(2))
    assert first.corpus == again.corpus and first.lines == again.lines
