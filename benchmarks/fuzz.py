"""Coverage-guided fuzzing of everything that reads a file: `python benchmarks/fuzz.py --seconds 600`.

Inputs begin as sound files and are mutated: bits, runs of bytes, JSON tokens. What runs a line after a line that no
input before it did is kept, and mutated further. A reader may answer with a CoterieError; anything else is a crash,
and so is an input that takes longer than a second. The same seed and number of inputs try the same inputs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import coterie
from attacks.corpus import ESCAPE
from attacks.tables import sound_stats
from coterie.codecs.open import opened
from coterie.edits.checks import check_plan
from coterie.edits.outputs import patched_config, plan_outputs
from coterie.edits.plan import read_plan
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.model.stats import Stats
from coterie.storage.checkpoint import INDEX, Checkpoint, parse_json, read_header
from coterie.storage.in_place import UsedUp
from coterie.verbs.inspect_ import inspect
from coterie.verbs.pack import pack
from coterie.verbs.prune import prune
from handmade import deepseek, qwen

SOURCE = str(Path(coterie.__file__).parent)
LONGEST = 1 << 16  # bytes of an input
SLOW = 1.0  # seconds of CPU for one input
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null|NaN|[\[\]{},:]')
ODD = [
    b"0", b"-1", b"1", b"8", b"2147483648", b"4611686018427387904", b"9223372036854775808", b"18446744073709551616",
    b"1e999", b"-0.0", b"NaN", b"Infinity", b"true", b"null", b'""', b'"\\u0000"', b'"\\ud800"', b'"\\u0661"', b"[]",
    b"{}", b"[[]]", b'{"a":{}}', b'"../x.safetensors"', b'"F4"', b'"I64"', b'"BF16"', b"9" * 400, b"9" * 5000,
    b"[" * 200, json.dumps(ESCAPE).encode(),
]  # fmt: skip
Target = Callable[[bytes], Any]


# --- the targets: a sound input or more, and what reads it --------------------------------------------------------


def targets(home: Path) -> dict[str, tuple[Target, list[bytes]]]:
    """Every target with its sound inputs; `home` is an empty folder for their files."""
    model, groups = qwen(home / "qwen", num_shards=2), deepseek(home / "deepseek")
    made = [_header(model), _names(model, groups), _index(model), _plan(model), _config(model, groups)]
    made += [_stats(home, model), _sparse(home), _record(model)]
    names = ("header", "tensor names", "index", "plan", "config", "statistics", "sparse", "in-place record")
    return dict(zip(names, made, strict=True))


def _split(raw: bytes) -> tuple[bytes, bytes]:
    """A file's header and data."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end].strip(), raw[end:]


def _file(text: bytes, data: bytes) -> bytes:
    """The inverse; what is no JSON object is a whole file by itself, so that lengths are attacked too."""
    return len(text).to_bytes(8, "little") + text + data if text[:1] == b"{" else text


def _header(model: Path) -> tuple[Target, list[bytes]]:
    path = model.parent / "header.safetensors"
    small = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    other = small | {"b": {"dtype": "F4", "shape": [2, 4], "data_offsets": [8, 12]}}

    def target(raw: bytes) -> None:
        path.write_bytes(_file(raw, bytes(12 if b'"b"' in raw else 8)))
        read_header(path)

    seeds = [json.dumps(header).encode() for header in (small, other)]
    return target, [*seeds, _file(seeds[0], bytes(8))]


def _names(*models: Path) -> tuple[Target, list[bytes]]:
    """Headers as a family claims them: the data are a hole."""
    path = models[0].parent / "names.safetensors"
    configs = [json.loads((m / "config.json").read_text()) for m in models]
    seeds = []
    for m in models:
        tensors = {n: (t.dtype, t.shape) for n, t in Checkpoint.open(m).tensors.items()}
        seeds.append("\n".join(f"{n} {d} {' '.join(map(str, s))}" for n, (d, s) in tensors.items()).encode())

    def target(raw: bytes) -> None:
        text = raw.decode("utf-8", "replace")
        header, position = {}, 0
        for line in text.split("\n"):
            name, _, rest = line.partition(" ")
            dtype, *shape = rest.split() or ["F32"]
            sizes = [int(s) for s in shape if re.fullmatch(r"[0-9]{1,4}", s)]
            size = int(np.prod(sizes, dtype=object)) * {"F32": 4, "F4": 0.5, "I64": 8}.get(dtype, 1)
            end = position + int(size)
            header[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [position, end]}
            position = end
        with path.open("wb") as file:
            file.write(_file(json.dumps(header).encode(), b""))
            file.truncate(file.tell() + position)
        tensors, metadata = read_header(path)
        for config in configs:
            opened = Checkpoint(path.parent, config, (path.name,), tensors, {path.name: metadata})
            found = _accepted(lambda opened=opened: Model.of(opened))
            if found:
                _execute(found, {"layers": {b.key: {"kept": [0, 1, 2, 3]} for b in found.main}})

    return target, seeds


def _accepted(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except CoterieError:
        return None


def _execute(model: Model, plan: dict[str, Any]) -> None:
    """Everything that `apply` does before it writes."""
    read = read_plan(plan)
    check_plan(model, read)
    plan_outputs(model, read)
    patched_config(model, read)


def _index(model: Path) -> tuple[Target, list[bytes]]:
    path = model / INDEX
    sound = path.read_bytes()

    def target(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            inspect(model)
        finally:
            path.write_bytes(sound)

    return target, [sound]


def _plan(model: Path) -> tuple[Target, list[bytes]]:
    opened, path = Model.open(model), model.parent / "plan.json"
    kept = {"kept": [0, 1, 2, 3]}
    clusters = kept | {"clusters": [[0, 4], [1, 5], [2, 6], [3, 7]], "merged": True}
    dense = {"condensed": {"experts": [3, 1], "gates": [0.5, 0.25], "shared_gate": 1.0}}
    plans = [
        {"layers": {"0": clusters, "1": clusters}, "budget": {"kind": "uniform"}, "drop_mtp": False},
        {"layers": {"0": kept, "1": {"kept": [0, 1]}}, "budget": {"layout": "coterie"}},
        {"layers": {"0": dense, "1": kept | {"sparsity": {"gate": 0.5}}}, "dropped": [1], "converted": None},
        prune(model, model.parent / "pruned", dry_run=True).as_dict(),
    ]

    def target(raw: bytes) -> None:
        path.write_bytes(raw)
        read_plan(path)
        _execute(opened, json.loads(raw))

    return target, [json.dumps(p).encode() for p in plans]


def _record(model: Path) -> tuple[Target, list[bytes]]:
    """What says which files a resume of --in-place uses up: everything that is read of it, but for the renaming."""
    opened, path = Model.open(model), model.parent / "in-place.json"
    report = prune(model, model.parent / "planned", dry_run=True)
    report = replace(report, source=report.source | {"hash": "0" * 64})
    outputs = plan_outputs(opened, read_plan(report.plan))
    sound = UsedUp.of(opened.checkpoint, outputs, report, model.parent / "out").as_dict()

    def target(raw: bytes) -> None:
        path.write_bytes(raw)
        work = UsedUp.read(path)
        for file in work.files.values():
            file.cuts(4096)
            assert Path(file.name).name == file.name
        json.dumps([work.as_dict(), work.identity, work.note, work.room])

    return target, [json.dumps(sound).encode()]


def _config(*models: Path) -> tuple[Target, list[bytes]]:
    opened = [Checkpoint.open(m) for m in models]
    own = {"model_type": "qwen2_moe", "num_experts": {"0": 8, "1": 8}}
    more = [opened[0].config | {"model_type": "coterie", "coterie": own}, {"text_config": opened[1].config}]

    def target(raw: bytes) -> None:
        config = parse_json(raw, "config.json")
        for c in opened:
            changed = Checkpoint(c.path, config, c.shards, c.tensors, c.metadata)
            found = _accepted(lambda changed=changed: Model.of(changed))
            if found:
                _accepted(
                    lambda found=found: _execute(found, {"layers": {b.key: {"kept": [0, 1, 2, 3]} for b in found.main}})
                )

    return target, [json.dumps(c).encode() for c in [*(c.config for c in opened), *more]]


def _stats(home: Path, model: Path) -> tuple[Target, list[bytes]]:
    path = home / "stats"
    sound = sound_stats(model)
    sound.sums = {key: value for key, value in sound.sums.items() if key[2] in ("tokens", "outputs", "output_max")}
    sound.save(path)
    text, data = _split(path.read_bytes())

    def target(raw: bytes) -> None:
        path.write_bytes(_file(raw, data))
        found = Stats.load(path)
        for layer in found.layers:
            for name in ("tokens", "outputs", "output_max"):
                _accepted(lambda layer=layer, name=name: found.get(layer, name, {"d": 2.0}))

    return target, [text]


def _sparse(home: Path) -> tuple[Target, list[bytes]]:
    from handmade import read_all, save

    dense = qwen(home / "dense", layers=1, experts=4)
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    values = np.arange(1600, dtype=np.float32).reshape(40, 40) * (np.arange(40) % 2).astype(np.float32)
    tensors = read_all(dense) | {
        f"model.layers.0.mlp.experts.{e}.{p}_proj.weight": values for e in range(4) for p in ("gate", "up", "down")
    }
    save(dense, json.loads((dense / "config.json").read_text()), [{n: tensors[n] for n in sorted(tensors)}])
    pack(dense, home / "packed")
    path = home / "packed" / "model.safetensors"
    text, data = _split(path.read_bytes())
    header = {n: e for n, e in json.loads(text).items() if name in n}
    start, end = (f(o for e in header.values() for o in e["data_offsets"]) for f in (min, max))
    data = data[start:end]
    header = {n: e | {"data_offsets": [o - start for o in e["data_offsets"]]} for n, e in header.items()}

    def target(raw: bytes) -> None:
        text, _, values = raw.partition(b"\n")
        path.write_bytes(_file(text, values))
        view = opened(Checkpoint.open(path.parent))
        for tensor in view.tensors:
            view.raw(tensor)

    return target, [json.dumps(header).encode() + b"\n" + data]


# --- the engine ---------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a run found: inputs tried, lines of ours that ran, inputs kept, and crashes by their last lines."""

    inputs: int = 0
    steps: set[tuple[CodeType, int, int]] = field(default_factory=set)  # code, a line, and the line before it
    corpus: list[bytes] = field(default_factory=list)
    crashes: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0  # of CPU

    @property
    def lines(self) -> int:
        return len({(code.co_filename, line) for code, line, _ in self.steps})


def fuzz(target: Target, seeds: list[bytes], *, seed: int, inputs: int | None = None, seconds: float = 1e9) -> Found:
    """Tries the seeds, then mutations of what was kept, until so many inputs or seconds of CPU."""
    found, draw, began = Found(), random.Random(seed), time.process_time()
    for raw in _inputs(found, draw, seeds):
        steps, crash = run(target, raw)
        found.inputs += 1
        if steps - found.steps:
            found.steps |= steps
            found.corpus.append(raw)
        if crash:
            found.crashes.setdefault(crash, raw)
        found.seconds = time.process_time() - began
        if found.seconds >= seconds or found.inputs == inputs:
            break
    return found


def _inputs(found: Found, draw: random.Random, seeds: list[bytes]) -> Iterator[bytes]:
    yield from seeds
    while True:
        # Half of the time one of the newest: they stand where nothing has been tried yet.
        recent = found.corpus[-8:] if draw.random() < 0.5 else found.corpus
        raw = draw.choice(recent)
        for _ in range(draw.choice((1, 1, 2, 4))):
            raw = mutated(raw, found.corpus, draw)
        yield raw[:LONGEST]


def mutated(raw: bytes, corpus: list[bytes], draw: random.Random) -> bytes:
    """A bit flipped, a run of bytes left out, repeated or taken from another input, or a JSON token replaced."""
    first, last = sorted(draw.randrange(len(raw) + 1) for _ in range(2))
    kind = draw.randrange(8)
    if kind == 0 and raw:
        at = draw.randrange(len(raw))
        return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :]
    if kind == 1:
        last = min(last, first + 16)
        return raw[:first] + (raw[first:last] * 2 if draw.random() < 0.5 else b"") + raw[last:]
    if kind == 2:
        other = draw.choice(corpus)
        at = draw.randrange(len(other) + 1)
        return raw[:first] + other[at : at + last - first] + raw[last:]
    tokens = list(TOKEN.finditer(raw))
    if not tokens:
        return raw[:first] + draw.choice(ODD) + raw[first:]
    old = draw.choice(tokens)
    new = draw.choice(ODD) if draw.random() < 0.5 else draw.choice(tokens)[0]
    return raw[: old.start()] + new + raw[old.end() :]


def run(target: Target, raw: bytes) -> tuple[set[tuple[CodeType, int, int]], str]:
    """The steps from line to line inside coterie that the input makes, and where it crashed; empty if it did not."""
    steps: set[tuple[CodeType, int, int]] = set()

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        code, last = frame.f_code, 0
        if not code.co_filename.startswith(SOURCE):
            return None

        def on_line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            if event == "line":
                steps.add((code, frame.f_lineno, last))
                last = frame.f_lineno
            return on_line

        return on_line

    began, crash, before = time.process_time(), "", sys.gettrace()
    sys.settrace(on_call)
    try:
        target(raw)
    except CoterieError:
        pass
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        crash = f"{type(error).__name__} at {place.filename}:{place.lineno}: {error!s:.200}"
    finally:
        sys.settrace(before)
    took = time.process_time() - began
    if took > SLOW and not crash:
        crash = f"took {took:.0f} s"
    return steps, crash


def with_atheris(target: Target, seeds: list[bytes], runs: int, home: Path) -> None:
    """The same target under libFuzzer, whose feedback also sees comparisons. Ends the process."""
    import atheris

    corpus = home / "corpus"
    corpus.mkdir()
    for number, raw in enumerate(seeds):
        (corpus / str(number)).write_bytes(raw)

    def one(raw: bytes) -> None:
        _accepted(lambda: target(raw))

    def mutate(raw: bytes, longest: int, seed: int) -> bytes:
        draw = random.Random(seed)
        return (mutated(raw, seeds, draw) if draw.random() < 0.5 else atheris.Mutate(raw, longest))[:longest]

    atheris.instrument_all()
    atheris.Setup(["fuzz", f"-runs={runs}", "-seed=1", f"-max_len={LONGEST}", "-print_final_stats=1", str(corpus)],
                  one, custom_mutator=mutate)  # fmt: skip
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of CPU, over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="one of them only")
    parser.add_argument("--crashes", type=Path, help="a folder for the inputs that crash")
    parser.add_argument("--atheris", type=int, metavar="RUNS", help="so many inputs under atheris, of one --target")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    with tempfile.TemporaryDirectory() as home:
        chosen = {n: t for n, t in targets(Path(home)).items() if options.target in (None, n)}
        if options.atheris:
            with_atheris(*chosen[options.target], options.atheris, Path(home))
        print("| reader | inputs tried | lines of coterie reached | inputs kept | seconds | crashes |")
        print("|---|---|---|---|---|---|")
        for name, (target, seeds) in chosen.items():
            found = fuzz(target, seeds, seed=options.seed, seconds=options.seconds / len(chosen))
            figures = f"{found.inputs:,} | {found.lines:,} | {len(found.corpus):,} | {found.seconds:.0f}"
            print(f"| {name} | {figures} | {len(found.crashes)} |", flush=True)
            for number, (crash, raw) in enumerate(found.crashes.items()):
                print(f"crash: {crash}\n  {raw[:300]!r}", file=sys.stderr, flush=True)
                if options.crashes:
                    options.crashes.mkdir(parents=True, exist_ok=True)
                    (options.crashes / f"{name.replace(' ', '-')}-{number}").write_bytes(raw)


if __name__ == "__main__":
    main()
