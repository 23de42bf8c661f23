"""`python benchmarks/page.py`: the page of `coterie report` on the shipped reference model, and a picture of it.

Makes a few results of the model, one of each kind, and compares them on the first 20,000 characters of each held-out
text and on 150 word problems; speeds are measured in turns, so an idle machine is wanted. Writes docs/report.html and,
where Chromium is installed, docs/report.png.
"""

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from coterie.reference_model import MODEL
from results import ROOT, run, some_of

PAGE, PICTURE = ROOT / "docs" / "report.html", ROOT / "docs" / "report.png"
CHARACTERS, PROBLEMS_JUDGED = 20_000, 150
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DATA = ("--samples", 64, "--seq-len", 512)
WAYS = {  # name: the command that makes it
    "reap-25": ("prune", "--method", "reap", "--ratio", 0.25, "--stats"),
    "router-distance-25": ("prune", "--method", "stun", "--ratio", 0.25),
    "random-25": ("prune", "--method", "random", "--ratio", 0.25),
    "hc-smoe-25": ("merge", "--method", "hc-smoe", "--ratio", 0.25, *DATA),
    "stun-40": ("stun", "--sparsity", 0.4, *DATA),
    "wanda-50-packed": ("sparsify", "--method", "wanda", "--sparsity", 0.5, "--save", "sparse", *DATA),
    "condensed-2": ("condense", "--layers", 2, *DATA),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        stats = folder / "stats"
        run("collect", MODEL, stats, *DATA)
        for name, (verb, *options) in WAYS.items():
            more = [stats] if options[-1] == "--stats" else []
            print(f"making {name}", flush=True)
            run(verb, MODEL, folder / name, *options, *more)
        data = some_of(folder, CHARACTERS, PROBLEMS_JUDGED)
        Path(folder, "model").symlink_to(MODEL)
        with contextlib.chdir(folder):  # the page names folders as they are given
            run("report", "model", *WAYS, "-o", PAGE, *data, "--window", 512, "--overwrite", as_json=False)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"{PICTURE.name} is as it was: no Chromium here")
        return
    size = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1500,2300"]
    subprocess.run([browser, *size, f"--screenshot={PICTURE}", PAGE.as_uri()], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
