"""Opens a folder of safetensors: headers first, bytes only when asked for.

First step of the data flow (`Checkpoint -> Family -> layers`). A strict header reader of our own, because
rewriting a checkpoint needs byte offsets, and because every file is untrusted: whatever a file holds, the
reader answers with a `Checkpoint` or a `CoterieError`. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import CoterieError, reading

if TYPE_CHECKING:
    import numpy as np

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")  # what weights that are not quantised are stored as
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_JSON = 200_000_000  # bytes; the index of a 2 TB checkpoint is about 20 MB
MAX_VALUES = 2**22  # in one JSON file: that of half a million tensors; 3 bytes of JSON can take 64 of memory
MAX_DEPTH = 100  # of nested JSON; what Python reads deeper, it cannot always copy or write again
INDEX = "model.safetensors.index.json"
STALE = f"delete {INDEX}: all model files are read without one"
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
HASH_BLOCKS, HASH_BLOCK = 16, 4096  # what `Checkpoint.hash` reads of each shard


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor on disk: `file[start:end]` holds `shape` values of `dtype`, row-major, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int  # bytes from the beginning of the file
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)


def load_json(path: Path, *, limit: int = MAX_JSON) -> dict[str, Any]:
    """Reads a JSON object strictly: UTF-8, no duplicate keys, at most `limit` bytes.

    Raises: CoterieError for everything else the file may hold.
    """
    if "\0" in str(path):
        raise CoterieError(f"{str(path)!r:.200}: not a file name")
    with reading(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CoterieError(f"{path}: not a regular file; expected one with a JSON object")
        with path.open("rb") as file:  # some files of the system say that they have no size
            raw = b"" if status.st_size > limit else file.read(limit + 1)
    if max(status.st_size, len(raw)) > limit:
        raise CoterieError(f"{path}: {max(status.st_size, len(raw)):,} bytes of JSON; expected at most {limit:,}")
    return parse_json(raw, str(path))


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """A strict JSON object from bytes; `where` names the source in errors."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise CoterieError(f"{where}: key {twice!r} appears twice; a JSON object must name each key once")
        return found

    check_cost(raw, where)
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except CoterieError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise CoterieError(f"{where}: not valid JSON ({reason})") from error
    if not isinstance(value, dict):
        raise CoterieError(f"{where}: found a JSON {type(value).__name__}, expected an object")
    _check_writable(value, raw, where)
    return value


def check_cost(raw: bytes, where: str) -> None:
    """Raises: CoterieError for JSON that would take gigabytes of memory once parsed: it is refused before."""
    count = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if count > MAX_VALUES:
        raise CoterieError(f"{where}: {count:,} values of JSON; expected at most {MAX_VALUES:,}")


def _check_writable(value: dict[str, Any], raw: bytes, where: str) -> None:
    """What was parsed can be copied and written again. Raises: CoterieError for deep nesting and lone surrogates."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        items = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in items if isinstance(child, (dict, list))]
    if level:
        raise CoterieError(f"{where}: JSON nested deeper than {MAX_DEPTH} levels; expected less")
    if re.search(rb"\\u[dD][89a-fA-F]", raw):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise CoterieError(f"{where}: a string holds half of a surrogate pair, which is not Unicode") from error


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (in file order) and metadata of one safetensors file.

    A file is `u64 n | n bytes of JSON | data`; every entry is `{"dtype", "shape", "data_offsets"}`. The
    ranges must tile the data exactly: no overlap, no hole, no trailing bytes.
    Raises: CoterieError naming the file and the first fault.
    """
    with reading(path):
        if not stat.S_ISREG(path.stat().st_mode):  # a named pipe would be waited for
            raise CoterieError(f"{path}: cannot be read (not a regular file)")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise CoterieError(
                    f"{path}: the file has {size:,} bytes but its header claims {length:,}; "
                    "it is truncated or not safetensors: download it again"
                )
            if length > MAX_HEADER:
                raise CoterieError(f"{path}: header of {length:,} bytes; expected at most {MAX_HEADER:,}")
            header = parse_json(file.read(length), f"{path} (header)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CoterieError(f"{path}: __metadata__ must map strings to strings")
    tensors = sorted((_entry(path, *item, 8 + length) for item in header.items()), key=lambda t: (t.start, t.end))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            fault = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise CoterieError(f"{path}: tensor {tensor.name!r} {fault} (offset {tensor.start}, expected {position})")
        position = tensor.end
    if position != size:
        fault = "is truncated" if position > size else "has trailing bytes"
        raise CoterieError(f"{path}: {size:,} bytes, but the header accounts for {position:,}; the file {fault}")
    return {t.name: t for t in tensors}, metadata


def _entry(path: Path, name: str, entry: Any, data: int) -> Tensor:
    """One checked header entry; `data` is where the file's data begins."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CoterieError(f"{where}: expected an object with dtype, shape and data_offsets, found {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CoterieError(f"{where}: unknown dtype {dtype!r:.40}; expected one of {', '.join(BITS)}")
    if not _natural(shape):
        raise CoterieError(f"{where}: shape must be a list of non-negative integers, found {shape!r:.80}")
    if not _natural(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CoterieError(f"{where}: data_offsets must be [begin, end], found {offsets!r:.80}")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CoterieError(
            f"{where}: shape {list(shape)!r:.80} of {dtype} needs {_bytes(bits)} bytes, "
            f"data_offsets give {offsets[1] - offsets[0]}"
        )
    return Tensor(name, dtype, tuple(shape), path.name, data + offsets[0], data + offsets[1])


def _bytes(bits: int) -> str:
    return f"{bits // 8}" + (".5" if bits % 8 == 4 else "") if bits < 2**70 else "more than 2**67"


def _natural(values: Any) -> bool:
    # 2**63 bounds the product's cost as well as its meaning: no file has that many bytes.
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values) and len(values) <= 64


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, opened lazily: its config, its tensors by name, and their bytes on demand."""

    path: Path
    config: dict[str, Any]
    shards: tuple[str, ...]
    tensors: dict[str, Tensor]  # in shard order, then file order
    metadata: dict[str, dict[str, str]] = field(repr=False)  # by shard
    indexed: bool = False

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Opens a folder, or a hub id such as `Qwen/Qwen3-30B-A3B` (downloaded, or found in the hub's cache).

        Raises: CoterieError when anything about the folder's files is not as it should be.
        """
        try:
            return cls._open(resolve(model))
        except OSError as error:  # a folder that may not be listed, a name too long for the file system
            raise CoterieError(f"{model}: cannot be read ({error.strerror or error})") from error

    @classmethod
    def _open(cls, path: Path) -> Checkpoint:
        _check_no_adapter(path)
        config_path = path / "config.json"
        if not config_path.is_file():
            raise CoterieError(f"{path}: no config.json; expected a folder with config.json and *.safetensors")
        _check_link(path, "config.json")
        config = load_json(config_path)
        shards, weight_map = _shards(path)
        tensors: dict[str, Tensor] = {}
        metadata = {}
        for shard in shards:
            _check_link(path, shard)
            found, metadata[shard] = read_header(path / shard)
            for name in found:
                if name in tensors:
                    raise CoterieError(
                        f"{path}: tensor {name!r} is in {tensors[name].file} and again in {shard}; "
                        "remove the files that are not of this model"
                    )
            tensors |= found
        _check_index(path, weight_map, tensors)
        return cls(path, config, shards, tensors, metadata, bool(weight_map))

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(t.num_bytes for t in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        return sum(t.num_parameters for t in self.tensors.values())

    @cached_property
    def hash(self) -> str:
        """SHA-256 of config.json and, per shard, its name, size, header and 16 evenly spaced blocks of 4 KiB.

        A fingerprint that tells two checkpoints apart without reading a terabyte; not a proof of equality.
        """
        with reading(self.path):
            digest = hashlib.sha256((self.path / "config.json").read_bytes())
            for shard in self.shards:
                _hash_shard(digest, self.path / shard)
        return digest.hexdigest()

    @property
    def stamps(self) -> dict[str, list[int]]:
        """Bytes and time of the last change (nanoseconds) of every shard: what tells that somebody wrote to one."""
        with reading(self.path):
            found = {shard: (self.path / shard).stat() for shard in self.shards}
        return {shard: [status.st_size, status.st_mtime_ns] for shard, status in found.items()}

    def raw(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """The tensor's bytes as stored, or `length` of them from byte `start`."""
        tensor = self.tensors[name]
        length = tensor.num_bytes if length is None else length
        return read_bytes(self.path / tensor.file, tensor.start + start, length, name)

    def read(self, name: str) -> np.ndarray:
        """The tensor's values, decoded exactly: float64 stays, other floats become float32, integers stay."""
        from coterie.storage.numerics import decode

        tensor = self.tensors[name]
        return decode(self.raw(name), tensor.dtype, name).reshape(tensor.shape)

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows `first:last` of the first axis, decoded like `read`; only their bytes are touched."""
        from coterie.storage.numerics import decode

        tensor = self.tensors[name]
        row = tensor.num_bytes // tensor.shape[0]
        raw = self.raw(name, first * row, (last - first) * row)
        return decode(raw, tensor.dtype, name).reshape(last - first, *tensor.shape[1:])

    def other_files(self) -> Iterator[Path]:
        """Every regular file of the folder that is neither weights, index nor config, sorted by name."""
        for path in sorted(self.path.iterdir()):
            if path.is_file() and path.name not in {*self.shards, INDEX, "config.json"}:
                yield path


def _hash_shard(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = 8 + int.from_bytes(file.read(8), "little")
        digest.update(f"{path.name} {size}".encode())
        file.seek(0)
        digest.update(file.read(header))
        for i in range(HASH_BLOCKS):
            file.seek(header + (size - header) * i // HASH_BLOCKS)
            digest.update(file.read(HASH_BLOCK))


def read_bytes(path: Path, start: int, length: int, name: str) -> bytes:
    """`length` bytes of a file, of the tensor `name`. Raises: CoterieError where they cannot be had."""
    try:
        with reading(path), path.open("rb") as file:
            file.seek(start)
            found = file.read(length)
    except (MemoryError, OverflowError) as error:
        raise CoterieError(f"{path}: {name!r} has {length:,} bytes, more than fit into memory") from error
    if len(found) != length:
        raise CoterieError(f"{path}: ended while reading {name!r}; the file changed or is cut")
    return found


def resolve(model: str | Path) -> Path:
    """The local folder of a model given as a folder or as a hub id (`owner/name`, or `owner/name@revision`)."""
    path, text = Path(model), str(model)
    if text and os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for names that are too long
        return path
    if text and os.path.exists(path):  # noqa: PTH110
        raise CoterieError(f"{text}: found a file; expected a model folder or a hub id such as owner/name")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CoterieError(f"{text}: no such folder (and a hub id looks like owner/name)")
    from huggingface_hub import snapshot_download

    name, _, revision = text.partition("@")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
    try:
        return Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
            )
        )
    except Exception as error:  # the hub library raises a dozen kinds: network, cache, validation
        raise CoterieError(f"{text}: not a folder, and the hub did not give it ({error!s:.200})") from error


def _shards(path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """The weight files that make up the checkpoint, and the index's map (empty without an index)."""
    index = path / INDEX
    if index.is_file():
        _check_link(path, INDEX)
        weight_map = load_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CoterieError(f"{index}: no weight_map; expected tensor names mapped to file names")
        known: set[str] = set()
        for name, shard in weight_map.items():
            if isinstance(shard, str) and shard in known:
                continue
            plain = isinstance(shard, str) and shard == Path(shard).name and shard.endswith(".safetensors")
            if not plain or "\\" in shard or not shard.isprintable():
                raise CoterieError(f"{index}: {name!r} is mapped to {shard!r:.80}; expected a plain *.safetensors name")
            known.add(shard)
        shards = tuple(sorted(set(weight_map.values())))
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            others = sorted(p.name for p in path.glob("*.safetensors") if p.is_file() and p.name not in shards)
            whole = "model.safetensors" in others or (others and missing == list(shards))
            stale = f"; or, if the model was saved anew as {others[0]}, {STALE}" if whole else ""
            raise CoterieError(f"{path / missing[0]}: missing, though the index names it; download it again{stale}")
        return shards, weight_map
    if (path / "model.safetensors").is_file():
        return ("model.safetensors",), {}
    found = sorted(p.name for p in path.glob("*.safetensors") if p.is_file())
    numbered = [name for name in found if name.startswith("model-")]
    if found:
        return tuple(numbered or found), {}
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CoterieError(
            f"{path}: only pickled weights ({pickles[0]}), which can run code when opened; "
            "expected *.safetensors: convert them with save_pretrained first"
        )
    raise CoterieError(f"{path}: no *.safetensors file")


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Raises: CoterieError for an index that names tensors which are not where it says."""
    wrong = [n for n, shard in weight_map.items() if n not in tensors or tensors[n].file != shard]
    if wrong:
        name, shard = wrong[0], weight_map[wrong[0]]
        place = f"in {tensors[name].file}" if name in tensors else "in none of its files"
        raise CoterieError(
            f"{path / INDEX}: says tensor {name!r} is in {shard}, but it is {place} (so for {len(wrong):,} of "
            f"{len(weight_map):,} names). If the files are the newer ones, {STALE}; else download {shard} again"
        )


def _check_no_adapter(path: Path) -> None:
    """Raises: CoterieError for a folder with an adapter: its weights are not the model that transformers loads."""
    if (path / ADAPTER).is_file():
        found = "an adapter beside the weights" if (path / "config.json").is_file() else "an adapter without its model"
        raise CoterieError(
            f"{path / ADAPTER}: {found}, and transformers loads both as one; merge it first (peft: merge_and_unload, "
            "then save_pretrained), or, if the weights hold it already, remove it and adapter_model.*"
        )


def _check_link(path: Path, name: str) -> None:
    """A linked file is fine inside the folder or the hub's own cache; anywhere else it is refused."""
    if leads_outside(path / name):
        target = (path / name).resolve()
        raise CoterieError(f"{path / name}: a link to {target}, outside the model's folder; copy the file there")


def leads_outside(path: Path) -> bool:
    """Whether a file of a model folder is a link to neither the folder nor the hub's own cache."""
    target, home = path.resolve(), path.parent.resolve()
    cache = home.parent.parent if home.parent.name == "snapshots" else home
    return home not in target.parents and cache / "blobs" not in target.parents
