"""Check a result: every tensor accounted for, loads in stock transformers, computes what it should.

Exits with 3 when a check finds a fault. Example: coterie verify OUT --against MODEL
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from coterie.codecs.open import opened as as_dense
from coterie.errors import CoterieError
from coterie.forward.data import read_documents
from coterie.forward.documents import Document
from coterie.judge.contents import check_bytes, check_trained
from coterie.judge.files import check_files, check_packed, is_packed, was_trained
from coterie.judge.loads import check_loads
from coterie.judge.logits import check_computes, check_logits, sequences_of
from coterie.model.layer import Model
from coterie.options import Help, public
from coterie.pages.terminal import Asked
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.record import Progress, no_progress

MAX_SEQUENCES = 8  # of a file that gives token ids

Check = dict[str, object]  # "name", "ok", "detail"


# Each check is one function that answers with what it found; a fault in OUT is an answer, not an exception. torch and
# transformers are imported only when a model has to be loaded.
@public
def verify(
    out: Annotated[str | Path, Help("A folder that coterie wrote.", "OUT", given=Path)],
    *,
    against: Annotated[str | Path | None, Help("The original, to compare with.", "MODEL", given=str)] = None,
    data: Annotated[str | Path | None, Help("Text or JSONL to compute logits on.", "FILE", given=Path)] = None,
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """Checks a checkpoint folder: `{"ok": bool, "checks": [{"name", "ok", "detail"}]}`.

    against: the original; its bytes, and its logits with the dropped experts masked, are compared with OUT's. For what
    `recover` wrote: the model that was trained; all bytes but the trained tensors' are compared.
    data: what to compute logits on: the first 2 blocks of 64 tokens of a text, or the first 8 lines of a JSONL with
    input_ids, uncut (default: 2 blocks of random token ids, always the same).
    A packed folder is checked as the dense one that it stands for, once its version, masks, counts and checksums are.
    A check that cannot be made here (no stock class, a package that is missing, too little memory), or that the
    original passes no better, is ok, and its detail begins with "not" and says why.
    Raises: CoterieError when OUT is no folder, or when `against` or `data` cannot be used.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise CoterieError(f"{out}: no such folder; expected a checkpoint folder that coterie wrote")
    documents = list(islice(read_documents(data), MAX_SEQUENCES)) if data is not None else None
    source: Model | Checkpoint | None = None
    if against is not None:
        source = as_dense(Checkpoint.open(against)) if was_trained(folder) else Model.open(against)
    checks: list[Check] = []

    def run(name: str, check: Callable[[], Any]) -> Any:
        """Adds the check's answer; a CoterieError about OUT is a fault. Returns what the check has to hand on."""
        on_progress("verifying", len(checks), 5 if source else 3)
        try:
            ok, detail, found = check()
        except CoterieError as error:
            ok, detail, found = False, str(error), None
        checks.append({"name": name, "ok": ok, "detail": detail})
        return found

    dense = run("packed tensors", lambda: check_packed(folder, on_progress)) if is_packed(folder) else None
    opened = run("files", lambda: check_files(dense or Checkpoint.open(folder))) if dense or not checks else None
    if opened:
        _check_contents(opened, source, documents, run, on_progress)
    return {"ok": all(check["ok"] for check in checks), "checks": checks}


def _check_contents(
    out: Checkpoint,
    source: Model | Checkpoint | None,
    documents: list[Document] | None,
    run: Callable[[str, Callable[[], Any]], Any],
    on_progress: Progress,
) -> None:
    """The checks that need OUT's headers to be in order."""
    if isinstance(source, Checkpoint):
        run("accounts for every tensor", lambda: check_trained(out, source, on_progress))
    elif source:
        run("accounts for every tensor", lambda: check_bytes(out, source, on_progress))
    original = source.checkpoint if isinstance(source, Model) else source
    sequences, logits = _own_logits(out, original, documents, run)
    if isinstance(source, Model):
        run("logits equal the masked original", lambda: check_logits(out, source, sequences, logits))


def _own_logits(
    out: Checkpoint,
    original: Checkpoint | None,
    documents: list[Document] | None,
    run: Callable[[str, Callable[[], Any]], Any],
) -> tuple[list[list[int]], list[Any] | None]:
    """The tokens and OUT's logits on them; returning frees the model before the original is loaded."""
    model = run("loads in stock transformers", lambda: check_loads(out, original))
    sequences = sequences_of(out, documents, model) if model is not None else []
    return sequences, run("computes", lambda: check_computes(out, model, sequences, original))


def show(found: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    """One line per check."""
    return (f"{'ok   ' if c['ok'] else 'FAULT'}  {c['name']}: {c['detail']}" for c in found["checks"])
