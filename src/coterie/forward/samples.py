"""What a verb that calibrates feeds the streaming forward: token sequences by domain, and the dtype to compute in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from coterie.errors import check_choice
from coterie.forward.data import SHIPPED, calibration_files, read_all
from coterie.forward.tokens import draw
from coterie.model.arithmetic import fast
from coterie.model.family import lookup
from coterie.model.layer import Model
from coterie.model.loading import DTYPES, load_tokenizer
from coterie.options import Help, flag_of, flat
from coterie.reference_model import CALIBRATION
from coterie.storage.folders import partial_of
from coterie.storage.journal import read_journal

if TYPE_CHECKING:
    import torch

STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
DATA = Help(
    "Calibration data: text, JSON, Parquet, a folder, or hub:OWNER/NAME; repeatable [default: texts that ship].",
    "NAME=FILE", given=list[str], read=calibration_files, default=(),
)  # fmt: skip
SAMPLES = Help("Calibration sequences in all, spread evenly over the names.", given=int)
DTYPE = Help("To compute in: auto (as stored, or float32 where that is faster), float32, bfloat16 or float16.")
Dtype = Annotated[str, DTYPE]
POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions", "max_sequence_length")


@dataclass(frozen=True)
class Calibration:
    """On what a model is run to be measured: files by domain, sequences in all, tokens of each, and which of them.

    samples: None where the command chooses a number.
    """

    data: Annotated[dict[str, Path], DATA] = field(default_factory=dict)
    samples: Annotated[int | None, SAMPLES] = 128
    seq_len: Annotated[int, Help("Tokens of each.")] = 2048
    seed: Annotated[int, Help("Which passages of the data are drawn.")] = 0

    @property
    def sizes(self) -> dict[str, object]:
        """All but the files, for the record."""
        return {"samples": self.samples, "seq_len": self.seq_len, "seed": self.seed}

    @property
    def named(self) -> dict[str, str]:
        """The files' names by domain, for the record."""
        return {name: str(file) for name, file in self.data.items()}


def read_samples(model: Model, calibration: Calibration) -> tuple[dict[str, list[tuple[int, ...]]], list[str]]:
    """Token sequences by domain, and what should be said aloud.

    The model's tokenizer is loaded only where there is text.
    Raises: CoterieError as `tokens.draw` and `data.calibration_files`.
    """
    files = calibration_files(calibration.data)
    documents, notes = read_all(files or CALIBRATION)
    notes = notes if files else [SHIPPED]
    is_text = any(d.input_ids is None for entries in documents.values() for d in entries)
    tokenizer = load_tokenizer(model.checkpoint.path) if is_text else None
    limit = max_positions(model.checkpoint.config)
    number: Any = calibration.samples  # checked there
    drawn, more = draw(
        documents, tokenizer, samples=number, seq_len=calibration.seq_len, seed=calibration.seed,
        max_positions=limit,
    )  # fmt: skip
    return drawn, notes + more


def unsampled(options: object, default: object, reason: str) -> tuple[str, ...]:
    """What to say of options that choose samples, where none are read. default: the same record, with nothing asked."""
    asked, usual = flat(options), flat(default)
    given = [name for name in ("samples", "seq_len", "seed", "dtype") if asked[name] != usual[name]]
    return tuple(f"{flag_of(name)} had no effect: {reason}" for name in given)


def counted(by_domain: dict[str, list[tuple[int, ...]]]) -> dict[str, dict[str, int]]:
    """Samples and tokens of each domain, for the record."""
    return {name: {"samples": len(given), "tokens": sum(map(len, given))} for name, given in by_domain.items()}


def max_positions(config: dict[str, Any]) -> int | None:
    """The longest sequence that the config admits, if it says."""
    return next((v for _, _, v in lookup(config, POSITIONS) if type(v) is int and v > 0), None)


def compute_dtype(model: Model, name: str = "auto", begun: Path | None = None) -> torch.dtype:
    """The dtype to compute in: unless named, that of the experts on disk, or of the config where they are quantised; or
    float32, where the processor has no arithmetic in that.

    begun: OUT of a run that goes on, in the dtype that it began in. Raises: CoterieError for another name.
    """
    import torch

    check_choice("--dtype", name, DTYPES)
    if name == "auto":
        block = next(b for b in model.moe if not b.mtp)
        tensors = [model.checkpoint.tensors[n] for n in (block.experts[0].values() if block.experts else block.fused)]
        largest = max(tensors, key=lambda t: t.num_parameters)
        said = next((v for _, _, v in lookup(model.checkpoint.config, ("dtype", "torch_dtype"))), None)
        stored = STORED.get(largest.dtype) or (said if said in DTYPES[1:] else "bfloat16")
        name = (begun and begun_in(begun)) or fast(stored)
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """As options have it, for the record."""
    return str(dtype).removeprefix("torch.")


def begun_in(out: Path) -> str | None:
    """The dtype that an interrupted run which is to write OUT computed its first layer in; None if it finished none."""
    units = (unit for entry in read_journal(partial_of(out)) if isinstance(unit := entry.get("unit"), dict))
    return next((name for unit in units if (name := unit.get("dtype")) in DTYPES[1:]), None)
