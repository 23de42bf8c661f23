"""Loads a finished checkpoint into transformers, and refuses one that does not fill its model exactly.

`from_pretrained` succeeding proves nothing: it fills what is missing with random numbers and drops what it does
not know. Our own layout (layers with different numbers of experts, or with routers that know more of them than are
stored) is built from stock layers here.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coterie.codecs.bits import SETTINGS
from coterie.errors import CoterieError, check_choice
from coterie.model.arithmetic import fast
from coterie.model.family import detect, lookup, num_layers
from coterie.model.layer import LAYER, Model, MoE, is_mtp
from coterie.model.loadable import check_whole, stays_packed
from coterie.model.own import OWN, OwnLayout, is_own, own_layout
from coterie.storage.checkpoint import Checkpoint, load_json, resolve

logger = logging.getLogger("coterie")

FLOATS = ("float64", "float32", "bfloat16", "float16")  # what a model can be loaded as
DTYPES = ("auto", *FLOATS[1:])  # what verbs compute in
WIDTHS = ("hidden_size", "d_model", "vocab_size", "moe_intermediate_size", "shared_expert_intermediate_size")
NO_DATA = "use a method that needs no data"
TOKENIZER_NEEDED = "text and problems need the tokenizer beside the model, token ids (input_ids) do not"

DEQUANTISED = ("fp8", "mxfp4", "compressed-tensors")  # the library decodes these as it loads them, if asked

HEADROOM = 1.25  # loading holds some tensors twice


def available_memory() -> int | None:
    """Bytes of memory that are free to use; None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def memory_short(num_bytes: int) -> str:
    """What is missing to hold so many bytes of weights; empty if nothing is, or if the system does not say."""
    available = available_memory()
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


@contextlib.contextmanager
def guarded(where: object, what: str, advice: str = "") -> Iterator[None]:
    """Keeps transformers quiet, and makes a CoterieError of all that it raises: a checkpoint can provoke anything."""
    try:
        with quiet_transformers():
            yield
    except CoterieError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.400}"
        raise CoterieError(f"{where}: transformers {what} ({reason}){advice}") from error


def load(path: str | Path, *, dtype: str = "auto") -> Any:
    """The causal language model in a folder or on the hub, on the GPU if there is one.

    Packed weights stay packed in memory: those of our own format, and of compressed-tensors' integers in groups.
    Never runs code that comes with the checkpoint, never unpickles.
    Raises: CoterieError if it does not load, or any tensor is missing, unexpected or of another shape.
    """
    import torch

    check_folder(path)
    folder = resolve(path)
    checkpoint = Checkpoint.open(folder)
    check_whole(checkpoint)
    packed = stays_packed(checkpoint)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and on == "cpu":
        dtype = _fast(checkpoint)
    how = {"config": stock_config(_ours(checkpoint.config))} if packed else {}
    model, faults = load_ours(folder, dtype) if is_ours(folder) else load_stock(folder, dtype, **how)
    if faults:
        found = "; ".join(f"{len(keys)} {kind.replace('_', ' ')}, first {keys[0]}" for kind, keys in faults.items())
        raise CoterieError(f"{path}: the weights do not fit the config: {found}; expected every tensor exactly once")
    return model.to(on)


def _fast(checkpoint: Checkpoint) -> str:
    """ "float32" for weights, plain or packed, in a type that this processor has no arithmetic for, as far as memory
    goes; else "auto"."""
    said = {str(value) for _, _, value in lookup(checkpoint.config, ("dtype", "torch_dtype")) if value is not None}
    coded = any(settings is not None for _, _, settings in lookup(checkpoint.config, ("quantization_config",)))
    theirs = coded and not stays_packed(checkpoint)  # transformers computes with those in a way of its own
    slow = next((name for name in sorted(said) if fast(name) != name), None)
    if slow is None or theirs:
        return "auto"
    if short := memory_short(4 * checkpoint.num_parameters):
        logger.warning("%s: computed in %s, which is slow here: float32 %s", checkpoint.path, slow, short)
        return "auto"
    return "float32"


def is_ours(folder: Path) -> bool:
    """Whether a checkpoint is in our own layout, which stock transformers refuses by its model type."""
    config = folder / "config.json"
    return config.is_file() and is_own(load_json(config))


def load_stock(folder: Path, dtype: str, **how: Any) -> tuple[Any, dict[str, list[str]]]:
    """The stock model, and the keys that did not fit by kind. `how` goes to `from_pretrained`.

    Raises: CoterieError when transformers does not load it at all.
    """
    checkpoint = Checkpoint.open(folder)
    check_sizes(checkpoint)
    config = checkpoint.config
    quantised = any(settings is not None for _, _, settings in lookup(config, ("quantization_config",)))
    with guarded(folder, "cannot load it"):
        if "config" not in how and dtype in ("float32", "float64") and (changed := _dequantised(config)):
            how["config"] = stock_config(changed)
        model, info = auto_class(config).from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            use_safetensors=True, trust_remote_code=False, **how,
        )  # fmt: skip
    faults = {kind: sorted(k if isinstance(k, str) else str(k[0]) for k in keys) for kind, keys in info.items()}
    faults["unexpected_keys"] = [k for k in faults.get("unexpected_keys", []) if not is_mtp(k, config)]
    if quantised:
        _one_dtype(model, checkpoint)
    return model.eval(), {kind: keys for kind, keys in faults.items() if keys}


def _ours(config: Mapping[str, object]) -> dict[str, object]:
    """The config under which transformers leaves packed weights to us."""
    return dict(config) | {"quantization_config": SETTINGS}


def _dequantised(config: Mapping[str, object]) -> dict[str, object] | None:
    """The config under which transformers makes plain floats of weights that it would compute with as they are stored
    (and then not in float32); None where it knows no such way."""
    changed = copy.deepcopy(dict(config))
    for _, holder, settings in lookup(changed, ("quantization_config",)):
        if isinstance(settings, dict) and settings.get("quant_method") in DEQUANTISED:
            holder["quantization_config"] = settings | {"dequantize": True}
            return changed
    return None


def _one_dtype(model: Any, checkpoint: Checkpoint) -> None:
    """Gives every number the dtype that it has where nothing is quantised: the library leaves what it does not decode
    as it is stored. What is still packed, in other shapes or in bytes, stays."""
    plan = model._get_dtype_plan(model.config.dtype)  # what the library keeps in float32 whatever is asked
    meant = empty_stock(checkpoint, model.config.dtype)
    loaded = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in (*meant.named_parameters(), *meant.named_buffers()):
        found = loaded.get(name)
        if found is not None and found.shape == tensor.shape and found.is_floating_point() and found.itemsize > 1:
            kept = any(re.search(pattern.replace("*", ".*"), name) for pattern in plan)
            found.data = found.data.float() if kept else found.data.to(tensor.dtype)


def auto_class(config: Mapping[str, object]) -> Any:
    """The library's own choice of model classes that a checkpoint is one of."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL

    architectures = config.get("architectures")
    first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    multimodal = first.endswith("ForConditionalGeneration") or MULTIMODAL.get(str(config.get("model_type"))) == first
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


def load_ours(path: str | Path, dtype: str) -> tuple[Any, dict[str, list[str]]]:
    """A model whose layers keep different numbers of experts, or dense MLPs instead, and the keys that did not fit.

    The weights are read by the library's own loader.
    Raises: CoterieError for a config that is not as we write it, and for all that the library raises.
    """
    from safetensors import safe_open

    checkpoint = Checkpoint.open(path)
    own, wanted = own_layout(checkpoint.config), _wanted(checkpoint, dtype)
    routed = [block for block in Model.of(checkpoint).main if block.routes] if own.routes else []
    with guarded(path, "cannot load it"):
        model = _empty_ours(checkpoint, own, wanted)
        files = [safe_open(str(checkpoint.path / shard), "pt") for shard in checkpoint.shards]
        slices = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
        constants = {block.key: slices.pop(block.constants)[:].to(wanted) for block in routed if block.constants}
        faults = _fill(model, slices, wanted, checkpoint)
        for block in routed:
            _route(model, block, constants.get(block.key))
    return model.eval(), {kind: keys for kind, keys in faults.items() if keys}


def _wanted(checkpoint: Checkpoint, dtype: str) -> Any:
    """The dtype of that name; for "auto", what the config names. Raises: CoterieError for one that no model has."""
    import torch

    said = next((v for _, _, v in lookup(checkpoint.config, ("dtype", "torch_dtype")) if v is not None), "float32")
    name = said if dtype == "auto" else dtype
    check_choice(f"{checkpoint.path}: dtype", name, FLOATS)
    return getattr(torch, name)


def convert(model: Any, tensors: Mapping[str, Any], dtype: Any, plan: Mapping[str, Any] | None = None) -> Any:
    """Reads tensors, or slices of files, by their stored names into an empty model: the library's own conversion.

    plan: parameters of another dtype. Returns the library's report of what did not fit.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    mapping: Any = get_model_conversion_mapping(model)  # conversions keep state: a fresh one each time
    planned: Any = dict(plan or {})
    how = LoadStateDictConfig(weight_mapping=mapping, dtype=dtype, dtype_plan=planned, device_map={"": "cpu"})
    return convert_and_load_state_dict_in_model(model, dict(tensors), how, None)[0]


def _fill(model: Any, slices: Mapping[str, Any], dtype: Any, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Reads the weights into an empty model; what did not fit by kind."""
    info = convert(model, slices, dtype)
    model.tie_weights()
    return {
        "missing_keys": sorted(n for n, p in model.named_parameters() if p.is_meta),
        "unexpected_keys": sorted(k for k in map(str, info.unexpected_keys) if not is_mtp(k, checkpoint.config)),
        "mismatched_keys": sorted(map(str, info.mismatched_keys)),
        "conversion_errors": sorted(map(str, info.conversion_errors)),
    }


def _route(model: Any, block: MoE, constants: Any) -> None:
    """Leads what the block's router chooses to what is stored."""
    from coterie.model.routed import install

    hidden = model.config.get_text_config().hidden_size
    if constants is not None and constants.shape[1:] != (hidden,):
        found = list(constants.shape)
        raise CoterieError(f"tensor {block.constants!r}: shape {found}; expected rows of {hidden} values")
    install(decoder_layers(model.get_decoder(), block.name)[int(block.key)], block.routes, constants, block.name)


def check_routable(checkpoint: Checkpoint, keys: list[str]) -> None:
    """Raises: CoterieError unless these layers of the stock model can have a router that knows removed experts.

    Builds the model without its weights.
    """
    import torch

    from coterie.model.routed import shrink

    model = empty_stock(checkpoint, torch.float32, advice="; remove experts")
    layers = decoder_layers(model.get_decoder(), str(checkpoint.path))
    for key in keys:
        if int(key) >= len(layers):
            raise CoterieError(f"{checkpoint.path}: {type(model).__name__} has no decoder layer {key}; remove experts")
        shrink(layers[int(key)], 1, f"layer {key}")


def decoder_layers(decoder: Any, where: str) -> Any:
    """A decoder's list of layers. Raises: CoterieError where it has none."""
    import torch

    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[2] in ("layers", "blocks"):
            return module
    raise CoterieError(f"{where}: {type(decoder).__name__} has no list of layers; {NO_DATA}")


def empty_stock(
    checkpoint: Checkpoint, dtype: Any, config: Mapping[str, object] | None = None, *, advice: str = ""
) -> Any:
    """transformers' model with its parameters on the meta device. Buffers are real: rotary ones are computed, not
    loaded. By `config`, of the same sizes, or the checkpoint's own.

    Raises: CoterieError for sizes that no file here has, and when transformers does not build it.
    """
    from accelerate import init_empty_weights

    check_sizes(checkpoint)
    said = checkpoint.config if config is None else config
    with guarded(checkpoint.path, "does not build it", advice), init_empty_weights(include_buffers=False):
        return auto_class(said).from_config(stock_config(said), dtype=dtype)


def _empty_ours(checkpoint: Checkpoint, own: OwnLayout, dtype: Any) -> Any:
    """The model of our own layout on the meta device: each layer from a stock model of as many experts as its router
    knows, with room for those that are stored, and with a dense MLP in the place of a condensed block."""
    from coterie.model.opened import open_experts
    from coterie.model.routed import shrink
    from coterie.model.standin import replace_block

    family = detect(checkpoint.config)

    def empty(num_experts: int) -> Any:
        plain = copy.deepcopy({k: v for k, v in checkpoint.config.items() if k != OWN}) | {"model_type": own.model_type}
        for key, holder, value in list(lookup(plain, family.count)):
            if value is not None and num_experts:
                holder[key.rpartition(".")[2]] = num_experts
        return empty_stock(checkpoint, dtype, plain)

    rows = {int(key): len(own.routes.get(key, ())) or n for key, n in own.counts.items() if key.isdecimal()}
    rows = {index: n for index, n in rows.items() if index < num_layers(checkpoint.config)}  # the others: prediction
    models = {n: empty(n) for n in set(rows.values()) or {0}}  # 0: as the config says, where no layer has experts
    model = models[max(models)]
    where = str(checkpoint.path)
    layers = decoder_layers(model.get_decoder(), where)
    for index, n in rows.items():
        layers[index] = decoder_layers(models[n].get_decoder(), where)[index]
    for key in own.routes:
        shrink(layers[int(key)], own.counts[key], f"{where}: layer {key}")
    for key, width in own.dense.items():
        hidden = model.config.get_text_config().hidden_size
        open_experts(layers[int(key)])
        replace_block(layers[int(key)], hidden, width, dtype, f"{where}: layer {key}")
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


def stock_config(config: Mapping[str, object]) -> Any:
    """The library's config object, read by its own reader (which knows how it spells infinities)."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
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
