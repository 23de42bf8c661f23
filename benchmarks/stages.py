"""`python benchmarks/stages.py`: what share of the time each stage of each command takes on the reference model.

From these `coterie.pages.progress.SHARES` says how far a command is; round them into it when a command changes.
"""

import tempfile
import time
from pathlib import Path

import coterie
from coterie.reference_model import CALIBRATION, HELD_OUT, MODEL

DATA = {"data": CALIBRATION, "samples": 16, "seq_len": 512}
FEW = {"data": CALIBRATION, "samples": 5, "seq_len": 256}


def timed(verb: str, *given: object, **options: object) -> None:
    """Runs the verb and prints the share of each stage; what passes before a stage speaks counts as its own."""
    spent: dict[str, float] = {}
    began = last = time.perf_counter()

    def told(stage: str, done: int, total: int) -> None:
        nonlocal last
        now, name = time.perf_counter(), stage.partition(",")[0]
        spent[name], last = spent.get(name, 0.0) + now - last, now

    getattr(coterie, verb)(*given, on_progress=told, **options)
    whole = time.perf_counter() - began
    shares = ", ".join(f"{name} {seconds / whole:.2f}" for name, seconds in spent.items())
    print(f"{verb:<9} {whole:6.1f} s: {shares}; after the last {(time.perf_counter() - last) / whole:.2f}", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        (out / "text").write_text(HELD_OUT["prose"].read_text(encoding="utf-8")[:20_000], encoding="utf-8")
        timed("collect", MODEL, out / "stats", **DATA)
        timed("prune", MODEL, out / "pruned", ratio=0.25, **DATA)
        timed("merge", MODEL, out / "merged", ratio=0.25, **DATA)
        timed("sparsify", MODEL, out / "sparse", sparsity=0.5, save="sparse", **DATA)
        timed("stun", MODEL, out / "both", sparsity=0.4, **DATA)
        timed("quantize", MODEL, out / "rounded", bits=4)
        timed("quantize", MODEL, out / "low", bits=3, method="gptq", **DATA)
        timed("condense", MODEL, out / "dense", layers=2, **FEW)
        timed("recover", out / "dense", out / "good", teacher=MODEL, steps=5, data=CALIBRATION)
        timed("drop", MODEL, out / "flat", unit="block", count=1, **FEW)
        timed("pack", out / "both", out / "packed")
        timed("unpack", out / "packed", out / "back")
        timed("verify", out / "pruned", against=MODEL)
        timed("analyze", MODEL, **FEW)
        timed("eval", MODEL, data={"prose": out / "text"})
        timed("report", [MODEL, out / "pruned"], out / "r.html", data={"prose": out / "text"})
        timed("bench", MODEL)


if __name__ == "__main__":
    main()
