"""What `recover` trains and by what, as far as headers and configs tell: checked before anything is loaded.

    local     each condensed MLP is fitted to its layer's MoE block in the original: the down projection in closed form,
              then all three matrices by gradient
    lm        the language modelling loss, as published
    distill   the divergence from the original's logits

Only the condensed MLPs change; every other tensor keeps its bytes. Rows and columns of zeros that pad an MLP to the
model's one dense width stay zero, as their gradients are.
Source: CD-MoE, arXiv 2412.00069 (lm: only the condensed layers learn, AdamW, linear decay).
Deviates: float32 masters, no padding in the loss, no balancing loss of the layers that still route; the constant gates
are folded into the MLPs, and so learn with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from coterie.codecs.open import codec_of
from coterie.decide.condensing import parse_ids
from coterie.edits.folding import shared_names
from coterie.edits.plan import Plan, read_plan
from coterie.errors import CoterieError, check_choice
from coterie.forward.samples import DATA, Calibration
from coterie.model.arithmetic import fast
from coterie.model.experts import expert_weights
from coterie.model.family import GATED, NUM_LAYERS, detect, lookup, registry
from coterie.model.layer import LAYER, Model, MoE, find_blocks, has_routers
from coterie.model.loading import DTYPES
from coterie.options import Help, as_text, flag_of
from coterie.storage.checkpoint import FLOATS, Checkpoint
from coterie.storage.record import record_of
from coterie.storage.shards import Output, whole

STAGES = {"all": ("local", "distill"), "local": ("local",), "lm": ("lm",), "distill": ("distill",)}
SIZES = {"vocabulary": ("vocab_size",), "hidden size": ("hidden_size", "d_model"), "number of layers": NUM_LAYERS}


@dataclass(frozen=True)
class Training:
    """What `recover` was asked for, with its defaults; recorded in coterie.json."""

    teacher: Annotated[str | None, Help("The original, to learn from.", "MODEL", read=as_text)] = None
    data: Annotated[dict[str, Path], DATA] = field(default_factory=dict)
    stage: Annotated[str, Help("all (local, then distill), local, distill, or lm.")] = "all"
    layer_ids: Annotated[
        list[int] | None,
        Help("With --stage lm: train these layers of any model instead.", "A,B,...", given=str, read=parse_ids),
    ] = None
    steps: Annotated[int, Help("Optimiser steps of each stage.")] = 200
    lr: Annotated[float | None, Help("Peak learning rate [default: by the model's width].")] = None
    batch_size: Annotated[int, Help("Samples per forward.")] = 8
    accumulate: Annotated[int, Help("Forwards per step.")] = 1
    seq_len: Annotated[int, Help("Tokens of each sample.")] = 256
    samples: Annotated[int, Help("Samples in all, spread evenly over the names.")] = 2048
    seed: Annotated[int, Help("Which passages of the data are drawn.")] = 0
    dtype: Annotated[
        str, Help("To compute in: auto (as stored, or float32 where that is faster), float32 or bfloat16.")
    ] = "auto"

    @property
    def calibration(self) -> Calibration:
        return Calibration(data=self.data, samples=self.samples, seq_len=self.seq_len, seed=self.seed)


def check_options(options: Training, save_every: int = 1) -> None:
    """Raises: CoterieError for a value out of its range, or options that contradict or ignore each other."""
    check_choice("--stage", options.stage, STAGES)
    least = {"steps": 0 if options.stage == "local" else 1, "batch_size": 1, "accumulate": 1, "save_every": 1}
    for name, low in least.items():
        value = save_every if name == "save_every" else getattr(options, name)
        if type(value) is not int or value < low:
            raise CoterieError(f"{flag_of(name)} {value!r}: expected a whole number, at least {low}")
    if options.lr is not None and not (isinstance(options.lr, (int, float)) and 0 < options.lr < 1):
        raise CoterieError(f"--lr {options.lr!r}: expected a learning rate between 0 and 1, such as 1e-4")
    if options.dtype not in DTYPES or options.dtype == "float16":
        raise CoterieError(f"--dtype {options.dtype!r}: expected auto, float32 or bfloat16")
    if options.layer_ids is not None and options.stage != "lm":
        raise CoterieError("--layer-ids is for --stage lm alone: the other stages train what was condensed")
    if options.teacher is None and options.stage != "lm":
        raise CoterieError(f"--stage {options.stage}: needs --teacher, the model that was condensed; lm needs none")


@dataclass(frozen=True)
class Trainee:
    """What is trained, by what, and what is known of it from headers."""

    model: Model
    plan: Plan  # of MODEL's own coterie.json
    record: Mapping[str, object]
    options: Training
    teacher: Checkpoint | None
    mlps: dict[int, tuple[str, str, str]]  # (gate, up, down) tensors of a layer's dense MLP
    blocks: dict[int, MoE]
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> list[str]:
        found = [name for names in self.mlps.values() for name in names]
        for block in self.blocks.values():
            shared = shared_names(block)  # a gate of its own is a router, and stays
            found += [*expert_weights(self.model.checkpoint, block), *(shared[0] if shared else ())]
        return found

    @property
    def outputs(self) -> dict[str, list[Output]]:
        checkpoint = self.model.checkpoint
        return {s: [whole(t) for t in checkpoint.tensors.values() if t.file == s] for s in checkpoint.shards}


def trainee_of(checkpoint: Checkpoint, options: Training) -> Trainee:
    """Raises: CoterieError for layers that do not exist, weights that cannot be trained, or a teacher that differs."""
    record = record_of(checkpoint.path) or {}
    plan = read_plan(record) if record else Plan({})
    if codec_of(checkpoint):
        raise CoterieError(f"{checkpoint.path}: holds packed weights; restore the dense ones first: `coterie unpack`")
    family = detect(checkpoint.config)
    routed = has_routers(checkpoint, family)  # not where every layer is condensed
    model = find_blocks(checkpoint, family) if routed else Model(checkpoint, family, (), {})
    layers, notes = chosen_layers(model, plan, options)
    blocks = {int(b.key): b for b in model.main if int(b.key) in layers}
    mlps = {i: mlp_names(model, i) for i in layers if i not in blocks}
    teacher = open_teacher(checkpoint, options)
    trainee = Trainee(model, plan, record, options, teacher, mlps, blocks, tuple(notes))
    for name in trainee.tensors:
        dtype = checkpoint.tensors[name].dtype if name in checkpoint.tensors else "packed"
        if dtype not in FLOATS:
            raise CoterieError(f"tensor {name!r}: {dtype} weights cannot be trained; dequantise the checkpoint first")
    return trainee


def chosen_layers(model: Model, plan: Plan, options: Training) -> tuple[list[int], list[str]]:
    """The decoder layers to train, ascending, and what should be said aloud."""
    path, known = model.checkpoint.path, stacks(model)
    if options.layer_ids is not None:
        wanted = sorted(set(options.layer_ids))
        if not wanted or len(wanted) != len(options.layer_ids):
            raise CoterieError(f"--layer-ids {options.layer_ids}: expected distinct layers, one at least")
        wrong = next((i for i in wanted if i not in known or str(i) in plan.sparsity), None)
        if wrong is not None:
            fault = f"the model's {len(known)} layers end at {max(known)}"
            fault = "it was made sparse, and training would fill its zeros" if str(wrong) in plan.sparsity else fault
            raise CoterieError(f"--layer-ids {wrong}: {fault}; choose other layers")
        return wanted, []
    if not plan.condensed:
        raise CoterieError(
            f"{path}: its coterie.json records no condensed layers; expected what `coterie condense` wrote, or, for "
            "any model, --stage lm with --layer-ids"
        )
    odd = next((k for k in plan.condensed if not k.isdecimal() or int(k) not in known), None)
    whole = next((b.key for b in model.main if b.key in plan.condensed), None)
    if odd is not None or whole is not None:
        fault = f"layer {whole} has experts" if odd is None else f"there is no layer {odd!r}"
        raise CoterieError(f"{path}: {fault}, but coterie.json records it as condensed; was one of the two changed?")
    empty = [int(key) for key, c in plan.condensed.items() if not c.experts and not c.shared_gate]
    left = sorted(int(key) for key in plan.condensed if int(key) not in empty)
    if not left:
        raise CoterieError(f"{path}: its condensed layers are all empty (dropped), so there is nothing to train")
    said = f"layers {', '.join(map(str, empty))} were dropped: they are empty, and stay so"
    return left, [said] if empty else []


def stacks(model: Model) -> dict[int, list[str]]:
    """Layer number -> what its tensors' names begin with: of the decoder, or of any stack where no router tells it."""
    found = {m["prefix"]: int(m["index"]) for name in model.checkpoint.tensors if (m := LAYER.fullmatch(name))}
    decoder = model.main[0].stack if model.main else ""
    result: dict[int, list[str]] = {}
    for prefix, index in sorted(found.items()):
        if not decoder or prefix == f"{decoder}.{index}.":
            result.setdefault(index, []).append(prefix)
    return result


def mlp_names(model: Model, index: int) -> tuple[str, str, str]:
    """The (gate, up, down) tensors of a layer's dense MLP. Raises: CoterieError where there are none."""
    tensors, dense = model.checkpoint.tensors, model.family.dense
    places = dict.fromkeys([dense.mlp] if dense else []) | dict.fromkeys(x.blocks[0] for x in model.family.layouts)
    spellings = dict.fromkeys([dense.names, GATED] if dense else [GATED])
    for prefix in stacks(model).get(index, []):
        for place in places:
            for gate, up, down in spellings:
                names = (f"{prefix}{place}{part}.weight" for part in (gate, up, down))
                found = tuple(name for name in names if name in tensors)
                if len(found) == 3:
                    return found
    raise CoterieError(f"{model.checkpoint.path}: layer {index} has neither experts nor a dense MLP that we know")


def open_teacher(student: Checkpoint, options: Training) -> Checkpoint | None:
    """Raises: CoterieError for a teacher that cannot be loaded, or whose sizes are not the student's."""
    if options.teacher is None:
        return None
    teacher = Checkpoint.open(options.teacher)
    if teacher.path.resolve() == student.path.resolve():
        raise CoterieError(f"--teacher {options.teacher}: is MODEL itself; expected the model that was condensed")
    known = registry().get(str(teacher.config.get("model_type")))
    if known and not known.stock:
        raise CoterieError(
            f"{teacher.path}: transformers has no causal language model for {teacher.config['model_type']!r}; "
            "repackage it first: `coterie condense MODEL OUT --layers 0`"
        )
    for what, keys in SIZES.items():
        if what == "number of layers" and "local" not in STAGES[options.stage]:
            continue
        sizes = [next((v for _, _, v in lookup(c.config, keys) if v is not None), None) for c in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise CoterieError(
                f"--teacher {teacher.path}: its {what} is {sizes[1]}, that of {student.path} is {sizes[0]}; "
                "expected the model that was condensed"
            )
    return teacher


def peak_rate(trainee: Trainee) -> float:
    """The highest learning rate: as asked, or 0.25 over the hidden size, 1e-3 at most (1e-4 for a size of 2500).

    Source: Yang et al., Tensor Programs V, arXiv 2203.03466: under Adam the best rate of hidden matrices falls with
    one over their width. The factor is from the reference model. Published for a hidden size of 2048 and lm: 1e-5.
    """
    if trainee.options.lr is not None:
        return trainee.options.lr
    sizes = lookup(trainee.model.checkpoint.config, SIZES["hidden size"])
    hidden = next((v for _, _, v in sizes if type(v) is int and v > 0), None)
    return min(1e-3, 0.25 / hidden) if hidden else 1e-4


def num_trained(trainee: Trainee) -> int:
    return sum(trainee.model.checkpoint.tensors[name].num_parameters for name in trainee.tensors)


def memory_bytes(trainee: Trainee) -> int:
    """About what training takes: both models, 16 bytes a trained weight, logits of one batch four times over, and, for
    the closed form, five float64 matrices between the hidden units of a layer."""
    config = trainee.model.checkpoint.config
    size = 2 if compute_dtype(trainee) == "bfloat16" else 4
    weights = sum(c.num_parameters for c in (trainee.model.checkpoint, trainee.teacher) if c)
    vocabulary = next((v for _, _, v in lookup(config, ("vocab_size",)) if type(v) is int), 0)
    tokens = trainee.options.batch_size * trainee.options.seq_len
    fitted = trainee.mlps.values() if "local" in STAGES[trainee.options.stage] else ()
    width = max((trainee.model.checkpoint.tensors[down].shape[1] for _, _, down in fitted), default=0)
    return size * weights + 16 * num_trained(trainee) + 16 * tokens * vocabulary + 40 * width**2


def compute_dtype(trainee: Trainee) -> str:
    """The dtype to compute in: unless named, bfloat16 where the trained weights are stored so and the processor has
    arithmetic for it, else float32."""
    if trainee.options.dtype != "auto":
        return trainee.options.dtype
    stored = trainee.model.checkpoint.tensors[trainee.tensors[0]].dtype
    return fast("bfloat16") if stored == "BF16" else "float32"
