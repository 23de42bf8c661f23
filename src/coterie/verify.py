"""`coterie verify`: does a written checkpoint hold what its plan says, load in stock transformers, and compute it?

Last step of the flow. Each check is one function that answers with what it found; a fault in OUT is an answer,
not an exception. torch and transformers are imported only when a model has to be loaded.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from coterie.apply import check_plan, patched_config, plan_outputs, whole
from coterie.checkpoint import INDEX, Checkpoint, load_json
from coterie.condensing.repackage import converted
from coterie.data import Document, encode, read_documents
from coterie.errors import CoterieError
from coterie.family import detect
from coterie.layer import LAYER, Model, MoE, find_blocks
from coterie.plan import Plan, read_plan
from coterie.report import Progress, no_progress
from coterie.routes import compared_constants, constants_name, routed_blocks
from coterie.sparse.view import CLOSED, DenseView, dense_view, is_sparse
from coterie.writing.writer import Hole, Made, Output, Run
from coterie.zeroing.check import zero_faults

CHUNK = 4 << 20  # bytes compared at a time
NUM_BLOCKS, BLOCK = 2, 64  # sequences and tokens of the random batch, and of a text
MAX_SEQUENCES = 8  # of a file that gives token ids
ROUNDING = 1e-5  # of the largest logit; a wrong expert shows as 1e-2 and more
ALIGNMENT = 64  # bytes, of what torch allocates

Check = dict[str, Any]


def verify(
    out: str | Path,
    *,
    against: str | Path | None = None,
    data: str | Path | None = None,
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """Checks a checkpoint folder: `{"ok": bool, "checks": [{"name", "ok", "detail"}]}`.

    against: the original; its bytes, and its logits with the dropped experts masked, are compared with OUT's. For what
    `recover` wrote: the model that was trained; all bytes but the trained tensors' are compared.
    data: what to compute logits on: the first 2 blocks of 64 tokens of a text, or the first 8 lines of a JSONL with
    input_ids, uncut (default: 2 blocks of random token ids, always the same).
    A packed folder is checked as the dense one that it stands for, once its version, masks, counts and checksums are.
    A check that cannot be made here (no stock class, too little memory) is ok, and its detail begins with "not".
    Raises: CoterieError when OUT is no folder, or when `against` or `data` cannot be used.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise CoterieError(f"{out}: no such folder; expected a checkpoint folder that coterie wrote")
    documents = list(islice(read_documents(data), MAX_SEQUENCES)) if data is not None else None
    source: Model | Checkpoint | None = None
    if against is not None:
        source = Checkpoint.open(against) if _was_trained(folder) else Model.open(against)
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

    dense = run("packed tensors", lambda: check_packed(folder, on_progress)) if _is_packed(folder) else None
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
    sequences, logits = _own_logits(out, documents, run)
    if isinstance(source, Model):
        run("logits equal the masked original", lambda: check_logits(out, source, sequences, logits))


def _own_logits(
    out: Checkpoint, documents: list[Document] | None, run: Callable[[str, Callable[[], Any]], Any]
) -> tuple[list[list[int]], list[Any] | None]:
    """The tokens and OUT's logits on them; returning frees the model before the original is loaded."""
    model = run("loads in stock transformers", lambda: check_loads(out))
    sequences = _sequences(out, documents, model) if model is not None else []
    return sequences, run("computes", lambda: check_computes(model, sequences))


Answer = tuple[bool, str, Any]  # ok, detail, what later checks need


# --- files ------------------------------------------------------------------------------------------------------


def _is_packed(folder: Path) -> bool:
    """Whether config.json says so; what cannot be read is a fault of the files."""
    try:
        return is_sparse(Checkpoint.open(folder))
    except CoterieError:
        return False


def check_packed(folder: Path, on_progress: Progress = no_progress) -> tuple[bool, str, DenseView]:
    """The version is ours; of each packed matrix mask, counts, values and checksum agree."""
    view = dense_view(Checkpoint.open(folder))
    assert isinstance(view, DenseView)
    for done, entry in enumerate(view.packed.values()):
        for e in range(entry.num_matrices):
            entry.matrix(e)
        on_progress("checking packed tensors", done + 1, len(view.packed))
    matrices = sum(entry.num_matrices for entry in view.packed.values())
    rounded = f", {len(view.rounded):,} rounded to int8" if view.rounded else ""
    return True, f"{matrices:,} matrices of {len(view.packed):,} tensors agree with their checksums{rounded}", view


def check_files(out: Checkpoint) -> tuple[bool, str, Checkpoint | None]:
    """Headers, index, tensor names and expert counts agree with each other, with config.json and with the plan."""
    try:
        if out.indexed:
            _check_index(out.source if isinstance(out, DenseView) else out)
        plan = _plan(out) if _record(out) is not None else Plan({})
        blocks = () if _all_condensed(out, plan) else find_blocks(out, detect(out.config, list(out.tensors))).moe
        planned = _check_counts(blocks, plan) if _record(out) is not None else "no coterie.json"
    except CoterieError as error:
        return False, str(error), out
    counts = sorted({block.num_experts for block in blocks}) or [0]
    return True, (
        f"{len(out.tensors):,} tensors in {len(out.shards)} file(s); {len(blocks)} MoE blocks "
        f"of {' to '.join(map(str, sorted({counts[0], counts[-1]})))} experts; {planned}"
    ), out  # fmt: skip


def _all_condensed(out: Checkpoint, plan: Plan) -> bool:
    """Whether the plan left no layer with experts, and none has a router."""
    routers = {layout.router for layout in detect(out.config).layouts}
    rest = {match["rest"] for name in out.tensors if (match := LAYER.fullmatch(name))}
    return bool(plan.condensed) and not routers & rest


def _check_index(out: Checkpoint) -> None:
    """Raises: CoterieError for a tensor that the index leaves out (`Checkpoint.open` has seen to the reverse)."""
    unlisted = set(out.tensors) - set(load_json(out.path / INDEX)["weight_map"])
    if unlisted:
        raise CoterieError(f"{out.path / INDEX}: leaves out {_first(unlisted)}; loaders would not see them")


def _check_counts(blocks: tuple[MoE, ...], plan: Plan) -> str:
    """Raises: CoterieError unless every block holds the experts that the plan keeps."""
    found = {(block.key, block.attention): block.num_experts for block in blocks}
    for keys, attention in ((plan.layers, False), (plan.attention, True)):
        for key, choice in keys.items():
            count = found.get((key, attention))
            if count != len(choice.kept):
                where = f"layer {key}" + (" (attention)" if attention else "")
                shown = "no experts" if count is None else f"{count} experts"
                raise CoterieError(f"{where} has {shown}; the plan in coterie.json keeps {len(choice.kept)}")
    whole = next((key for key in plan.condensed if (key, False) in found), None)
    if whole is not None:
        raise CoterieError(f"layer {whole} has experts; the plan in coterie.json condenses it")
    left = [block.name for block in blocks if block.mtp and plan.drop_mtp]
    if left:
        raise CoterieError(f"{left[0]} is a multi-token-prediction layer; the plan in coterie.json drops those")
    return "as the plan in coterie.json says"


def _record(out: Checkpoint) -> dict[str, Any] | None:
    """The content of coterie.json, if OUT has one."""
    path = out.path / "coterie.json"
    return load_json(path) if path.is_file() else None


def _plan(out: Checkpoint) -> Plan:
    record = _record(out)
    if record is None:
        raise CoterieError(f"{out.path}: no coterie.json, so nothing says what was done to the original")
    return read_plan(record)


def _first(names: Any, limit: int = 3) -> str:
    """The first few names and how many there are: `a, b, c and 4 more`."""
    ordered = sorted(map(str, names))
    more = f" and {len(ordered) - limit:,} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


# --- bytes ------------------------------------------------------------------------------------------------------


def check_bytes(out: Checkpoint, source: Model, on_progress: Progress = no_progress) -> Answer:
    """Every tensor that the plan makes of the original is in OUT, byte for byte, and nothing else is."""
    plan, record = _plan(out), _record(out)
    if _was_packed_from(record, source.checkpoint):
        return _check_same(out, source.checkpoint, on_progress)
    recorded = record.get("source") if record else None
    if not isinstance(recorded, dict) or recorded.get("hash") != source.checkpoint.hash:
        return False, f"{source.checkpoint.path} is not what OUT was made from (another fingerprint)", None
    source = converted(source, plan.converted)
    check_plan(source, plan)
    rounded = _rounded(out)
    outputs = [o for shard in plan_outputs(source, plan).values() for o in shard if o.name not in rounded]
    faults = _header_faults(out, outputs)
    config = patched_config(source, plan)
    wrong = [key for key in {*config, *out.config} if config.get(key) != out.config.get(key)]
    if wrong:
        faults.append(f"config.json is not the original's with new counts: {_first(wrong)}")
    pruned: set[str] = set()
    if not faults and plan.sparsity and not rounded:
        pruned, faults = zero_faults(out, source, plan, corrected=_corrected(record))
    if not faults:
        constants, others = compared_constants(out, source, plan)
        same = [o for o in outputs if o.name not in pruned | constants]
        differing = others + list(_differing(out, source.checkpoint, same, on_progress))
        faults += [f"other bytes in {_first(differing)}"] if differing else []
    zeroed = f", {len(pruned):,} with zeros, as many as recorded" if pruned else ""
    added = {constants_name(b) for b, choice in routed_blocks(source, plan) if choice.removed == "constant"}
    outputs = [o for o in outputs if o.name not in added]
    zeroed += f", {len(added):,} with constants added" if added else ""
    zeroed += f"; not compared: {len(rounded):,} that packing rounded to int8" if rounded else ""
    return not faults, "; ".join(faults) or _tally(source.checkpoint, outputs) + zeroed, None


def _rounded(out: Checkpoint) -> set[str]:
    """Tensors whose dense bytes are lost."""
    return out.rounded if isinstance(out, DenseView) else set()


def _was_packed_from(record: dict[str, Any] | None, source: Checkpoint) -> bool:
    """Whether `coterie pack` (or unpack) made OUT from this very checkpoint, rather than a command before it."""
    report = record.get("report") if record else None
    ends = [report.get(key) for key in ("packed_from", "unpacked_from")] if isinstance(report, dict) else []
    return any(isinstance(end, dict) and end.get("hash") == source.hash for end in ends)


def _check_same(out: Checkpoint, source: Checkpoint, on_progress: Progress) -> Answer:
    """OUT stands for the very bytes of the dense checkpoint that it was packed from."""
    rounded = _rounded(out)
    outputs = [whole(tensor) for tensor in source.tensors.values() if tensor.name not in rounded]
    faults = _header_faults(out, outputs) + ([] if out.config == source.config else ["config.json is another"])
    if not faults:
        differing = list(_differing(out, source, outputs, on_progress))
        faults += [f"other bytes in {_first(differing)}"] if differing else []
    said = f"{len(outputs):,} kept as is" + (f", {len(rounded):,} rounded to int8: not compared" if rounded else "")
    return not faults, "; ".join(faults) or said, None


def _was_trained(folder: Path) -> bool:
    """Whether the folder says that `recover` wrote it; what cannot be read is a fault that the checks find."""
    record = folder / "coterie.json"
    try:
        return record.is_file() and load_json(record).get("command") == "recover"
    except CoterieError:
        return False


def _object(record: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under a key of a file that may hold anything."""
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def check_trained(out: Checkpoint, source: Checkpoint, on_progress: Progress = no_progress) -> Answer:
    """Every tensor of the model that `recover` was given is in OUT, and only those recorded as trained differ."""
    record = _record(out) or {}
    if _was_packed_from(record, source):
        return _check_same(out, source, on_progress)
    recorded, trained = _object(record, "source"), _object(_object(record, "report"), "trained")
    if recorded.get("hash") != source.hash:
        return False, f"{source.path} is not the model that was trained, {recorded.get('path')!s:.200}", None
    listed = trained.get("tensors")
    if not isinstance(listed, list) or not all(isinstance(name, str) and name in source.tensors for name in listed):
        return (
            False,
            "coterie.json does not say which of the model's tensors were trained (report.trained.tensors)",
            None,
        )
    outputs = [Output(t.name, t.dtype, t.shape, (Run(t.file, t.start, t.end),)) for t in source.tensors.values()]
    faults = _header_faults(out, outputs) + ([] if out.config == source.config else ["config.json is another"])
    if not faults:
        differing = set(_differing(out, source, outputs, on_progress))
        wrong = differing - set(listed)
        faults += [f"other bytes in {_first(wrong)}"] if wrong else []
    same = len(outputs) - len(listed)
    return (
        not faults,
        "; ".join(faults) or f"{same:,} kept as is, {len(listed):,} trained, {len(differing):,} changed",
        None,
    )


def _corrected(record: dict[str, Any] | None) -> bool:
    """Whether the rule also changed the weights that stayed."""
    options = record.get("options") if record else None
    return isinstance(options, dict) and "sparsegpt" in (options.get("method"), options.get("second"))


def _header_faults(out: Checkpoint, outputs: list[Output]) -> list[str]:
    meant = {o.name: (o.dtype, o.shape) for o in outputs}
    found = {t.name: (t.dtype, t.shape) for t in out.tensors.values()}
    faults = {
        "missing": meant.keys() - found.keys(),
        "not meant to be there": found.keys() - meant.keys() - _rounded(out),
        "of another shape or dtype": {n for n in meant.keys() & found.keys() if meant[n] != found[n]},
    }
    return [f"{fault}: {_first(names)}" for fault, names in faults.items() if names]


def _differing(out: Checkpoint, source: Checkpoint, outputs: list[Output], on_progress: Progress) -> Iterator[str]:
    """The outputs whose bytes in OUT are not those meant; reads both sides once, a chunk at a time."""
    total, done = sum(o.num_bytes for o in outputs), 0
    with _Reader() as read:
        for output in outputs:
            position, at = 0, _stored(out, output.name, read)
            for part in output.parts:
                if not _same(part, source.path, read, at, position):
                    yield output.name
                    break
                position += part.num_bytes
            done += output.num_bytes
            on_progress("comparing bytes", done, total)


Bytes = Callable[[int, int], bytes]  # of a tensor: (first, how many)


def _stored(out: Checkpoint, name: str, read: _Reader) -> Bytes:
    """A tensor's bytes in OUT, decoded where it is packed."""
    tensor = out.tensors[name]
    if isinstance(out, DenseView) and name in out.packed:
        return lambda first, length: out.raw(name, first, length)
    return lambda first, length: read(out.path / tensor.file, tensor.start + first, length)


def _same(part: Run | Made | Hole, folder: Path, read: _Reader, at: Bytes, position: int) -> bool:
    """Whether the tensor holds the part at `position`."""
    if isinstance(part, Made):
        return part.make() == at(position, part.num_bytes)
    assert isinstance(part, Run), "plans have no holes"
    for skip in range(0, part.num_bytes, CHUNK):
        length = min(CHUNK, part.num_bytes - skip)
        if read(folder / part.file, part.start + skip, length) != at(position + skip, length):
            return False
    return True


class _Reader(contextlib.ExitStack):
    """Reads runs of bytes of any number of files, each opened once."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: dict[Path, int] = {}

    def __call__(self, path: Path, start: int, length: int) -> bytes:
        try:
            if path not in self._opened:
                self._opened[path] = os.open(path, os.O_RDONLY)
                self.callback(os.close, self._opened[path])
            return os.pread(self._opened[path], length, start)
        except OSError as error:
            raise CoterieError(f"{path}: cannot be read ({error.strerror or error})") from error


def _tally(source: Checkpoint, outputs: list[Output]) -> str:
    """How many tensors had which fate."""
    fates = Counter(_fate(source, output) for output in outputs)
    fates["dropped"] = max(0, len(source.tensors) - len(outputs))
    always = dict.fromkeys(("kept as is", "renamed", "row-sliced", "computed", "dropped"), 0)
    return ", ".join(f"{count:,} {fate}" for fate, count in (always | fates).items())


def _fate(source: Checkpoint, output: Output) -> str:
    """What became of one source tensor on its way to an output."""
    if any(isinstance(part, Made) for part in output.parts):
        return "computed"
    original = source.tensors.get(output.name)
    runs = [(part.file, part.start, part.end) for part in output.parts if isinstance(part, Run)]
    if original and runs == [(original.file, original.start, original.end)]:
        return "kept as is"
    same_shape = original is None or original.shape == output.shape
    return "renamed" if same_shape and len(runs) == 1 else "row-sliced"


# --- loading ----------------------------------------------------------------------------------------------------


def check_loads(out: Checkpoint) -> Answer:
    """Stock transformers fills its model from OUT exactly: nothing missing, unexpected or of another shape."""
    short = _memory_short(out)
    if _is_ours(out):
        model = None if short else _own_model(out)
        kind = "condensed layers in a family without dense ones"
        if not out.config["coterie"].get("dense"):
            kind = "layers keep different numbers of experts"
        if out.config["coterie"].get("routes"):
            kind = "routers keep rows that lead to no expert of their own"
        return True, f"not loaded: {kind}, which only `coterie.load` reads", model
    family = detect(out.config, list(out.tensors))
    if not family.stock:
        return True, (
            f"not loaded: transformers has no class for {family.name}; names, shapes and bytes were "
            "checked, but not that the model computes"
        ), None  # fmt: skip
    if isinstance(out, DenseView) and short:
        return True, f"not loaded: {short}", None
    try:
        model, faults = _load(out, device="meta" if short else "cpu")
    except CoterieError as error:
        if isinstance(out, DenseView) and CLOSED in str(error):  # what is in the files is fine
            return True, f"not loaded: {error}", None
        raise
    if faults:
        return False, "; ".join(f"{kind.replace('_', ' ')}: {_first(keys)}" for kind, keys in faults.items()), None
    fits = f"{type(model).__name__}: no key missing, unexpected or of another shape"
    return True, fits + (f"; values were not read ({short})" if short else ""), None if short else model


def _is_ours(out: Checkpoint) -> bool:
    return out.config.get("model_type") == "coterie"


def _memory_short(checkpoint: Checkpoint) -> str:
    """What is missing to load the model in float32; empty if nothing is, or if the system does not say."""
    from coterie.loading import memory_short

    return memory_short(4 * checkpoint.num_parameters)


def _load(checkpoint: Checkpoint, device: str = "cpu") -> tuple[Any, dict[str, list[str]]]:
    """The stock model in float32, and what did not fit by kind; on the device "meta", names and shapes alone."""
    from coterie.loading import load_stock

    model, faults = load_stock(checkpoint.path, "float32", device_map=device, experts_implementation="eager")
    _align(model)
    return model, faults


def _align(model: Any) -> None:
    """Moves weights that lie unaligned in a mapped file: kernels add in another order there, which shows in the
    last bits of the logits."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def _own_model(out: Checkpoint) -> Any:
    """A model in our own layout, with the same experts computation as `_load`'s."""
    from coterie.loading import load_ours

    model, faults = load_ours(out.path, "float32")
    if faults:
        raise CoterieError(f"the weights do not fit the config: {_first(next(iter(faults.values())))}")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    _align(model)
    return model


# --- logits -----------------------------------------------------------------------------------------------------


def _sequences(out: Checkpoint, documents: list[Document] | None, model: Any) -> list[list[int]]:
    """Token ids to compute logits on. Raises: CoterieError for ids that the model does not know."""
    config = model.config.get_text_config()
    if documents is None:
        return _random_sequences(config)
    tokenizer = None
    if any(d.input_ids is None for d in documents):
        from coterie.loading import load_tokenizer

        tokenizer = load_tokenizer(out.path)
    sequences: list[list[int]] = []
    for document in documents:
        tokens = encode(document, tokenizer)
        cut = [tokens] if document.input_ids else [tokens[i : i + BLOCK] for i in range(0, len(tokens), BLOCK)]
        sequences += cut if document.input_ids else cut[: max(0, NUM_BLOCKS - len(sequences))]
    largest = max((t for s in sequences for t in s), default=None)
    if largest is None or largest >= config.vocab_size:
        found = "no tokens" if largest is None else f"token {largest}"
        raise CoterieError(f"{documents[0].where}: found {found}; expected ids below {config.vocab_size:,}")
    return sequences


def _random_sequences(config: Any) -> list[list[int]]:
    import numpy as np

    positions = getattr(config, "max_position_embeddings", None) or BLOCK
    shape = (NUM_BLOCKS, min(BLOCK, positions))
    return np.random.default_rng(0).integers(0, config.vocab_size, shape).tolist()


def _forward(model: Any, sequences: list[list[int]]) -> list[Any]:
    """Logits of each sequence, one forward each: (T, vocabulary) float32."""
    import torch

    from coterie.loading import quiet_transformers

    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False
    with quiet_transformers(), torch.inference_mode():
        return [model(input_ids=torch.tensor([s]), use_cache=False).logits[0].float() for s in sequences]


def check_computes(model: Any, sequences: list[list[int]]) -> Answer:
    """The model's logits are finite."""
    if model is None:
        return True, "not computed: no model was loaded", None
    try:
        logits = _forward(model, sequences)
    except Exception as error:  # whatever modelling code raises for a wrong checkpoint
        return False, f"the forward pass failed: {type(error).__name__}: {error!s:.300}", None
    tokens = f"{sum(map(len, sequences)):,} tokens in {len(sequences)} sequence(s)"
    bad = sum(int((~values.isfinite()).sum()) for values in logits)
    if bad:
        return False, f"{bad:,} logits are NaN or infinite, on {tokens}", None
    return True, f"finite logits on {tokens}", logits


def check_logits(out: Checkpoint, source: Model, sequences: list[list[int]], logits: list[Any] | None) -> Answer:
    """OUT computes exactly what the original does when its routers cannot choose the dropped experts."""
    from coterie.masked import mask_experts
    from coterie.routed import route_original

    plan = _plan(out)
    if logits is None:
        return True, "not compared: OUT gave no logits", None
    if plan.sparsity:
        return True, "not compared: weights were zeroed; every byte that stayed was", None
    if any(choice.merged for choice in (*plan.layers.values(), *plan.attention.values())):
        return True, "not compared: experts were averaged, so the original has no such experts to leave on", None
    if plan.condensed or plan.dropped or plan.converted:
        return _check_explicit(source, plan, sequences, logits)
    short = _memory_short(source.checkpoint)
    if short:
        return True, f"not compared: the original {short}", None
    model, faults = _load(source.checkpoint)
    if faults:
        raise CoterieError(f"{source.checkpoint.path}: the original itself does not load: {_first(faults)}")
    before = _forward(model, sequences)
    routing, num_routed = mask_experts(model, source, plan), route_original(model, source, plan, out)
    with routing:
        expected = _forward(model, sequences)
    idle = [name for name, hits in routing.hits.items() if hits == 0]
    if idle:
        return False, f"not a comparison: the router of {_first(idle)} was never seen at work in the original", None
    moved, num_changed = _largest_gap(before, expected), len(routing.hits) + num_routed
    ok, detail = _judge(_largest_gap(logits, expected), expected)
    return ok, f"{detail}; leaving experts out of {num_changed} routers moved them by up to {moved:.3g}", None


def _check_explicit(source: Model, plan: Plan, sequences: list[list[int]], logits: list[Any]) -> Answer:
    """OUT computes what the original does with its condensed blocks as plain sums, and without its dropped layers."""
    from coterie.condensing.explicit import explicit_logits

    try:
        expected = explicit_logits(converted(source, plan.converted), plan, sequences)
    except CoterieError as error:
        return True, f"not compared: {error}", None
    ok, detail = _judge(_largest_gap(logits, expected), expected)
    what = f"{len(plan.condensed)} condensed layers as explicit sums" if plan.condensed else "explicit forward"
    return ok, f"{detail}; {what}, {len(plan.dropped)} layers skipped", None


def _judge(gap: float, expected: list[Any]) -> tuple[bool, str]:
    """Equal to the last bit, or but for sums whose order a family's router makes depend on the number of experts."""
    if gap == 0.0:
        return True, "bit-equal"
    scale = max(float(values.abs().max()) for values in expected)
    if gap <= ROUNDING * scale:
        return True, f"equal but for rounding (up to {gap:.2g})"
    return False, f"they differ by up to {gap:.3g}"


def _largest_gap(a: list[Any], b: list[Any]) -> float:
    """max |a - b|; NaN, which equals nothing, becomes infinity."""
    gaps = [float((x - y).abs().max()) if x.shape == y.shape else float("inf") for x, y in zip(a, b, strict=True)]
    return max((float("inf") if gap != gap else gap for gap in gaps), default=0.0)
