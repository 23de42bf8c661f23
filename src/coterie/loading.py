"""Loads a finished checkpoint into transformers, and refuses one that does not fill its model exactly.

`from_pretrained` succeeding proves nothing: it fills what is missing with random numbers and drops what it does
not know. Our own layout (layers with different numbers of experts, or with routers that know more of them than are
stored) is built from stock layers here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coterie.checkpoint import Checkpoint, load_json, resolve
from coterie.errors import CoterieError
from coterie.family import detect, lookup
from coterie.layer import LAYER, MoE, find_blocks, is_mtp

WIDTHS = ("hidden_size", "d_model", "vocab_size", "moe_intermediate_size", "shared_expert_intermediate_size")
TOKENIZER_NEEDED = "text and problems need the tokenizer beside the model, token ids (input_ids) do not"

HEADROOM = 1.25  # loading holds some tensors twice


def memory_short(num_bytes: int) -> str:
    """What is missing to hold so many bytes of weights; empty if nothing is, or if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return ""
    available = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    if available is None or num_bytes * HEADROOM <= available:
        return ""
    return f"needs {num_bytes * HEADROOM / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB available"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers from writing bars, reports and warnings: what matters in them is raised or returned."""
    from transformers.utils import logging as theirs

    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


def load(path: str | Path, *, dtype: str = "auto") -> Any:
    """The causal language model in a folder or on the hub, on the GPU if there is one.

    Never runs code that comes with the checkpoint, never unpickles.
    Raises: CoterieError if it does not load, or any tensor is missing, unexpected or of another shape.
    """
    import torch

    check_folder(path)
    folder = resolve(path)
    model, faults = load_ours(folder, dtype) if is_ours(folder) else load_stock(folder, dtype)
    if faults:
        found = "; ".join(f"{len(keys)} {kind.replace('_', ' ')}, first {keys[0]}" for kind, keys in faults.items())
        raise CoterieError(f"{path}: the weights do not fit the config: {found}; expected every tensor exactly once")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def is_ours(folder: Path) -> bool:
    """Whether a checkpoint is in our own layout, which stock transformers refuses by its model type."""
    config = folder / "config.json"
    return config.is_file() and load_json(config).get("model_type") == "coterie"


def load_stock(folder: Path, dtype: str, **how: Any) -> tuple[Any, dict[str, list[str]]]:
    """The stock model, and the keys that did not fit by kind. `how` goes to `from_pretrained`.

    Raises: CoterieError when transformers does not load it at all.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = load_json(folder / "config.json")
    check_sizes(Checkpoint.open(folder))
    architectures = config.get("architectures") or [""]
    multimodal = str(architectures[0]).endswith("ForConditionalGeneration")
    auto: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    try:
        with quiet_transformers():
            model, info = auto.from_pretrained(
                str(folder), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
                use_safetensors=True, trust_remote_code=False, **how,
            )  # fmt: skip
    except Exception as error:  # a checkpoint can provoke anything in there
        raise CoterieError(f"{folder}: transformers cannot load it: {type(error).__name__}: {error!s:.500}") from error
    faults = {kind: sorted(k if isinstance(k, str) else str(k[0]) for k in keys) for kind, keys in info.items()}
    faults["unexpected_keys"] = [k for k in faults.get("unexpected_keys", []) if not is_mtp(k, config)]
    return model.eval(), {kind: keys for kind, keys in faults.items() if keys}


@quiet_transformers()
def load_ours(path: str | Path, dtype: str) -> tuple[Any, dict[str, list[str]]]:
    """A model whose layers keep different numbers of experts, or dense MLPs instead, and the keys that did not fit.

    The weights are read by the library's own loader.
    """
    import torch
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    checkpoint = Checkpoint.open(path)
    stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    wanted = getattr(torch, str(stored if dtype == "auto" else dtype))
    model, routed = _empty_ours(checkpoint, wanted), _routed_blocks(checkpoint)
    slices: dict[str, Any] = {}
    for shard in checkpoint.shards:
        file = safe_open(str(checkpoint.path / shard), "pt")
        slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    constants = {block.key: slices.pop(block.constants)[:].to(wanted) for block in routed if block.constants}
    mapping: Any = get_model_conversion_mapping(model)
    how = LoadStateDictConfig(weight_mapping=mapping, dtype=wanted, device_map={"": "cpu"})
    info, _ = convert_and_load_state_dict_in_model(model, slices, how, None)
    model.tie_weights()
    faults = {
        "missing_keys": sorted(n for n, p in model.named_parameters() if p.is_meta),
        "unexpected_keys": sorted(k for k in map(str, info.unexpected_keys) if not is_mtp(k, checkpoint.config)),
        "mismatched_keys": sorted(map(str, info.mismatched_keys)),
        "conversion_errors": sorted(map(str, info.conversion_errors)),
    }
    for block in routed:
        _route(model, block, constants.get(block.key))
    return model.eval(), {kind: keys for kind, keys in faults.items() if keys}


def _routed_blocks(checkpoint: Checkpoint) -> list[MoE]:
    """The blocks whose router knows more experts than are stored."""
    family = detect(checkpoint.config)
    if not family.layer_routes(checkpoint.config):
        return []
    return [block for block in find_blocks(checkpoint, family).main if block.routes]


def _route(model: Any, block: MoE, constants: Any) -> None:
    """Leads what the block's router chooses to what is stored."""
    from coterie.routed import install

    install(model.get_decoder().layers[int(block.key)], block.routes, constants, block.name)


def check_routable(checkpoint: Checkpoint, keys: list[str]) -> None:
    """Raises: CoterieError unless these layers of the stock model can have a router that knows removed experts.

    Builds the model without its weights.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from coterie.routed import shrink

    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(stock_config(checkpoint.config), dtype=torch.float32)
    except Exception as error:  # a config can provoke anything in there
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        raise CoterieError(f"{checkpoint.path}: transformers does not build it ({reason}); remove experts") from error
    layers = getattr(model.get_decoder(), "layers", ())
    for key in keys:
        if int(key) >= len(layers):
            raise CoterieError(f"{checkpoint.path}: {type(model).__name__} has no decoder layer {key}; remove experts")
        shrink(layers[int(key)], 1, f"layer {key}")


def _empty_ours(checkpoint: Checkpoint, dtype: Any) -> Any:
    """The model of our own layout on the meta device: each layer from a stock model of as many experts as its router
    knows, with room for those that are stored, and with a dense MLP in the place of a condensed block."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from coterie.condensing.standin import replace_block
    from coterie.routed import shrink

    layout, family = checkpoint.config["coterie"], detect(checkpoint.config)
    stored, routes = family.layer_counts(checkpoint.config), family.layer_routes(checkpoint.config)
    counts = {int(key): len(routes.get(key, ())) or n for key, n in stored.items() if key.isdigit()}

    def empty(num_experts: int) -> Any:
        plain = {k: v for k, v in checkpoint.config.items() if k not in ("coterie", "model_type")}
        for key, holder, value in list(lookup(plain, family.count)):
            if value is not None and num_experts:
                holder[key.rpartition(".")[2]] = num_experts
        with init_empty_weights(include_buffers=False):
            config = stock_config(plain | {"model_type": layout["model_type"]})
            return AutoModelForCausalLM.from_config(config, dtype=dtype)

    models = {n: empty(n) for n in set(counts.values()) or {0}}  # 0: as the config says, where no layer has experts
    model = models[max(models)]
    layers = model.get_decoder().layers
    for index, n in counts.items():
        if index < len(layers):
            layers[index] = models[n].get_decoder().layers[index]
    for key in routes:
        shrink(layers[int(key)], stored[key], f"{checkpoint.path}: layer {key}")
    for key, width in layout.get("dense", {}).items():
        hidden = model.config.get_text_config().hidden_size
        replace_block(layers[int(key)], hidden, width, dtype, f"{checkpoint.path}: layer {key}")
    return model


def check_sizes(checkpoint: Checkpoint) -> None:
    """Refuses a config whose model would fill any memory, or take hours to build, before the library believes it.

    Raises: CoterieError for a width beyond the longest axis of any tensor, and for many more layers than are stored.
    """
    longest = max((n for tensor in checkpoint.tensors.values() for n in tensor.shape), default=0)
    layers = 1 + max((int(m["index"]) for m in map(LAYER.fullmatch, checkpoint.tensors) if m), default=0)
    limits = dict.fromkeys(WIDTHS, longest) | dict.fromkeys(("num_hidden_layers", "n_layers"), 2 * layers + 64)
    for key, _, value in lookup(checkpoint.config, tuple(limits)):
        if isinstance(value, int) and value > limits[key]:
            raise CoterieError(
                f"{checkpoint.path}: config.json says {key} {value!s:.40}; its tensors are for {limits[key]:,} at most"
            )


def stock_config(config: dict[str, Any]) -> Any:
    """The library's config object, read by its own reader (which knows how it spells infinities)."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return AutoConfig.from_pretrained(folder)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside a model.

    Raises: CoterieError if there is none. transformers makes an empty one for some families then, which turns every
    text into no tokens, so the files of a folder are looked for here.
    """
    from transformers import AutoTokenizer

    check_folder(path)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as e:
        raise CoterieError(f"{path}: no tokenizer that loads ({type(e).__name__}: {e}); {TOKENIZER_NEEDED}") from e
    files = sorted(set(getattr(tokenizer, "vocab_files_names", {}).values()))
    if Path(path).is_dir() and files and not any((Path(path) / file).exists() for file in files):
        raise CoterieError(f"{path}: found none of {', '.join(files)}; {TOKENIZER_NEEDED}")
    return tokenizer


def check_folder(path: str | Path) -> None:
    """Raises: CoterieError for a path that is neither a folder nor spelled like a hub id."""
    local = isinstance(path, Path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith(".")
    if local and not Path(path).is_dir():
        raise CoterieError(f"{path}: no such folder; expected one with config.json, or a hub id")
