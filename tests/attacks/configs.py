"""Attacks by config.json: absurd counts, kinds that no key has, sizes that only a loader believes, code to run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from attacks.corpus import ESCAPE, MB, add_all, attack, with_config, with_shard
from attacks.headers import hollow
from coterie.reference_model import MODEL

HUGE = 10**4000
LOADING = ("eval", "generate", "bench")  # the verbs that load a model whole


add_all(
    "model",
    {
        "experts-a-million": (
            "A million experts by the config, eight in the files.",
            with_config(num_experts=2**20 - 1),
        ),
        "experts-beyond-all": ("A count of experts of 4,000 digits.", with_config(num_experts=HUGE)),
        "experts-a-string": ("A count of experts that is a string.", with_config(num_experts="8")),
        "experts-a-float": ("A count of experts that is a float.", with_config(num_experts=8.0)),
        "experts-infinite": ("A count of experts that is infinite.", with_config(num_experts=float("inf"))),
        "experts-nan": ("A count of experts that is no number.", with_config(num_experts=float("nan"))),
        "experts-true": ("A count of experts that is a boolean.", with_config(num_experts=True)),
        "experts-negative": ("A negative count of experts.", with_config(num_experts=-8)),
        "experts-contradict": ("Two counts of experts under two keys.", with_config(num_local_experts=4)),
        "experts-nested": (
            "A count of experts in a text config that is a list of itself.",
            with_config(text_config=[{"num_experts": 4}], num_experts={"num_experts": 8}),
        ),
        "top-k-zero": ("No expert chosen per token.", with_config(num_experts_per_tok=0)),
        "top-k-huge": ("A top-k of 4,000 digits.", with_config(num_experts_per_tok=HUGE)),
        "groups-of-none": ("Eight experts in seven routing groups.", with_config(n_group=7, topk_group=1)),
        "groups-huge": ("Routing groups by a number of 4,000 digits.", with_config(n_group=HUGE, topk_group=HUGE)),
        "type-of-megabytes": (
            "A model type of 20 MB, to be compared with every known one.",
            with_config(model_type="x" * 20 * MB),
        ),
        "type-escapes": ("A model type that holds escape sequences.", with_config(model_type=ESCAPE)),
        "type-climbs": ("A model type that is a path.", with_config(model_type="../../etc/passwd")),
        "type-a-list": ("A model type that is a list.", with_config(model_type=["qwen2_moe"])),
        "own-layout-counts": (
            "Our own layout, with counts that are no numbers.",
            with_config(model_type="coterie", coterie={"model_type": "qwen2_moe", "num_experts": {"0": HUGE}}),
        ),
        "own-layout-nested": (
            "Our own layout, which names itself as what it was made from.",
            with_config(model_type="coterie", coterie={"model_type": "coterie", "num_experts": []}),
        ),
        "sparse-format-version": (
            "Our sparse format, of version 10^4000.",
            with_config(quantization_config={"quant_method": "coterie", "format": HUGE}),
        ),
    },
)
add_all(
    "model",
    {
        "top-k-beyond": ("More experts chosen per token than there are.", with_config(num_experts_per_tok=9)),
    },
    "inspect",
    "verify",
)
add_all(
    "model",
    {
        "layers-beyond-all": ("A count of layers of 4,000 digits.", with_config(num_hidden_layers=HUGE)),
        "layers-a-string": ("A count of layers that is a string.", with_config(num_hidden_layers="many")),
    },
    "inspect",
    "dry",
    "prune",
    "verify",
)


@attack("model", "Ten thousand layers of as many experts as a config may say, in a file without data.")
def hollow_layers(folder: Path) -> Path:
    model = with_shard(hollow(10_000, 8192))(folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_experts": 8192}))
    return model


# --- what only a loader believes: the shipped model under another config -----------------------------------------


def reference(folder: Path, **changes: Any) -> Path:
    """The shipped model, its config changed."""
    model = folder / "model"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    return model


def loading(**changes: Any) -> Any:
    return lambda folder: reference(folder, **changes)


add_all(
    "loaded",
    {
        "hidden-size-absurd": ("A hidden size of 10^9: a layer of it fills any memory.", loading(hidden_size=10**9)),
        "vocabulary-absurd": ("A vocabulary of 10^12 tokens.", loading(vocab_size=10**12)),
        "expert-width-absurd": ("Experts 10^9 wide.", loading(moe_intermediate_size=10**9)),
        "layers-absurd": (
            "Ten million layers, of which the files hold eight.",
            loading(num_hidden_layers=10**7, layer_types=None),
        ),
        "positions-absurd": (
            "10^15 positions, on a model that knows 512.",
            loading(max_position_embeddings=10**15, hidden_size="256"),
        ),
        "attention-heads-zero": ("No attention heads, to divide by.", loading(num_attention_heads=0)),
        "activation-unknown": ("An activation that does not exist.", loading(hidden_act="os.system")),
    },
)
OWN = {"format": 1, "model_type": "qwen2_moe", "num_experts": {}}


def own_layout(section: Any = OWN, **changes: Any) -> Any:
    """The shipped model in our own layout."""
    return loading(model_type="coterie", **({} if section is None else {"coterie": section}), **changes)


add_all(
    "loaded",
    {
        "own-layout-missing": ("Our own layout by the model type alone.", own_layout(None)),
        "own-layout-stranger": (
            "Our own layout of a model type that is a list.",
            own_layout(OWN | {"model_type": [1]}),
        ),
        "own-layout-dense-beyond": ("A dense layer beyond the model's.", own_layout(OWN | {"dense": {"99": 4}})),
        "own-layout-dense-list": ("Dense layers that are a list.", own_layout(OWN | {"dense": []})),
        "own-layout-dense-wide": ("A dense layer 10^15 wide.", own_layout(OWN | {"dense": {"0": 10**15}})),
        "own-layout-routes-beyond": (
            "Routes of a layer beyond the model's.",
            own_layout(OWN | {"num_experts": {"99": 1}, "routes": {"99": [0, -1]}}),
        ),
        "own-layout-huge": (
            "Our own layout of ten million layers.",
            own_layout(num_hidden_layers=10**7, layer_types=None),
        ),
        "own-layout-hidden": ("Our own layout of a hidden size of 10^9.", own_layout(hidden_size=10**9)),
        "own-layout-activation": (
            "Our own layout, with an activation that does not exist.",
            own_layout(hidden_act="os.system"),
        ),
    },
)
add_all(
    "loaded",
    {
        "own-layout-dtype": ("Our own layout in a dtype that is no dtype.", own_layout(dtype="__builtins__")),
    },
    "verify",
)  # which loads it as float32
add_all(
    "loaded",
    {
        "own-layout-stray": ("A section of our own layout beside a stock model type.", loading(coterie=OWN)),
    },
    *LOADING,
)  # by the library, which sees a stock model
add_all(
    "loaded",
    {
        "quantised-by-a-stranger": (
            "A quantisation that its library would have to read.",
            loading(quantization_config={"quant_method": "gptq", "bits": 4}),
        ),
    },
    "collect",
    "verify",
)
add_all(
    "loaded",
    {
        "dtype-escapes": ("A dtype that is no dtype.", loading(dtype="__builtins__")),
    },
    "verify",
    "collect",
    *LOADING,
)  # the weights say what they are
CODE = "import os\nos.mkdir('PWNED')\nclass Config: pass\nclass Model: pass\n"


@attack("loaded", "Code beside the weights, which the config asks to run.", "verify", "collect", *LOADING)
def remote_code(folder: Path) -> Path:
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    model = reference(folder, auto_map=auto)
    (model / "code.py").write_text(CODE)
    return model


@attack("loaded", "Code beside the weights, of a model type that only the code knows.")
def remote_code_alone(folder: Path) -> Path:
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    model = reference(folder, auto_map=auto, model_type="stranger")
    (model / "code.py").write_text(CODE)
    return model


@attack("loaded", "Attention by a kernel that would be downloaded and run.", "verify", "collect", *LOADING)
def remote_kernel(folder: Path) -> Path:
    return reference(folder, attn_implementation="owner/kernel", _attn_implementation="owner/kernel")
