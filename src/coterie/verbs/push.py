"""Upload a result to the hub, after it was verified; local paths in its record become names.

Example: coterie push OUT user/name --dry-run
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from coterie.errors import CoterieError
from coterie.options import Help, public
from coterie.pages.terminal import Asked, sized, table
from coterie.storage.card import HUB_ID
from coterie.storage.card import public as names_only
from coterie.storage.record import Progress, no_progress, record_of, to_json
from coterie.verbs.verify import verify

RECORD, LOG = "coterie.json", "coterie.log"  # the latter stays here
Api = Callable[[], Any]  # makes what uploads: huggingface_hub's HfApi


def _hub() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


@public
def push(
    out: Annotated[str | Path, Help("A folder that coterie wrote.", "OUT", given=Path)],
    name: Annotated[str, Help("Where it goes on the hub: owner/name.", "NAME")],
    *,
    against: Annotated[
        str | Path | None, Help("What OUT was made of, to verify it against.", "MODEL", given=str)
    ] = None,
    private: Annotated[bool, Help("Only its owner sees it.")] = False,
    revision: Annotated[str | None, Help("The branch to write to [default: main].")] = None,
    dry_run: Annotated[bool, Help("Upload nothing: verify, and show what would be.")] = False,
    api: Api = _hub,
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """Verifies OUT, and uploads it with its card, its record and whatever stands beside the weights.

    Local paths in coterie.json are reduced to names in what is uploaded; OUT keeps them. The log stays here.
    api: makes the client, of huggingface_hub's `HfApi`; its token is that of `hf auth login`, or HF_TOKEN.
    Returns `{"name", "files": {name: bytes}, "bytes", "reduced" (paths that became names), "dry_run", "url"}`.
    Raises: CoterieError for a folder without a record of ours, one that `verify` finds fault with, and whatever the hub
    refuses.
    """
    folder = Path(out)
    record = record_of(folder) if folder.is_dir() else None
    if record is None:
        raise CoterieError(f"{folder}: no coterie.json, so nothing that coterie wrote; push what a command wrote")
    if not HUB_ID.fullmatch(name):
        raise CoterieError(f"NAME {name!r:.100}: expected owner/name")
    faults = [c for c in verify(folder, against=against, on_progress=on_progress)["checks"] if not c["ok"]]
    if faults:
        raise CoterieError(
            f"{folder}: verify finds fault: {faults[0]['name']}: {faults[0]['detail']}; nothing uploaded"
        )
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file() and p.name not in (LOG,)}
    told = names_only(record)
    found = {
        "name": name, "files": files, "bytes": sum(files.values()), "reduced": sorted(set(_changed(record, told))),
        "dry_run": dry_run, "url": None,
    }  # fmt: skip
    return found if dry_run else found | {"url": _upload(api(), folder, name, told, private, revision)}


def _changed(before: Any, after: Any) -> Iterator[str]:
    """The texts that are others afterwards."""
    if isinstance(before, dict):
        for key, value in before.items():
            yield from _changed(value, after[key])
    elif isinstance(before, list):
        for one, other in zip(before, after, strict=True):
            yield from _changed(one, other)
    elif before != after:
        yield str(before)


def _upload(hub: Any, folder: Path, name: str, record: Any, private: bool, revision: str | None) -> str:
    """The weights and what stands beside them, then the record without local paths."""
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        if revision:
            hub.create_branch(name, branch=revision, exist_ok=True)
        where = {"repo_id": name, "revision": revision}
        hub.upload_folder(folder_path=str(folder), ignore_patterns=[RECORD, LOG], **where)
        hub.upload_file(path_or_fileobj=to_json(record).encode(), path_in_repo=RECORD, **where)
    except Exception as error:  # the hub library raises a dozen kinds: network, login, rights
        raise CoterieError(f"{name}: the hub did not take it ({error!s:.300}); log in with `hf auth login`") from error
    return f"https://huggingface.co/{name}"


def show(found: dict[str, Any], asked: Asked) -> Iterator[str]:
    """What was uploaded, or would be."""
    title = "verified; nothing uploaded" if found["dry_run"] else f"{found['url']}: uploaded"
    rows = [(name, sized(size)) for name, size in found["files"].items()]
    rows += [("in all", sized(found["bytes"]))]
    rows += [("paths that become names", ", ".join(found["reduced"]))] if found["reduced"] else []
    yield from table(title, rows)
