"""README.md of a result: the model card that the hub shows, with what was done, and nothing of this machine.

Front matter comes from the source's own card where it has one; paths are reduced to names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from coterie.storage.files import write_whole
from coterie.storage.record import Report, object_at, record_of, typed

SOURCE_CARD = "README.source.md"  # the source's README, as it travels
KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")  # of the source's card
LICENCES = {  # how the text of a LICENSE file begins, in lower case and with single spaces -> the hub's name
    "apache license": "apache-2.0", "mit license": "mit",
    "bsd 3-clause": "bsd-3-clause", "bsd 2-clause": "bsd-2-clause",
}  # fmt: skip
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
REVISION = re.compile(r"[0-9a-f]{40}")
MOST_STEPS = 16  # a record that leads to itself would otherwise be followed for ever
MAX_CARD = 2**20  # bytes of a source's card that are read
QUALITY = "\n## Quality\n"
STOCK = """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("OUT") for kind in (AutoModelForCausalLM, AutoTokenizer))"""
VLLM = "\n\nand in vLLM by `vllm serve OUT`."
PACKED = """import coterie  # transformers knows the format after this, and refuses it before
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("OUT")"""
OWN = """import coterie

model = coterie.load("OUT")"""


def card(folder: Path, report: Report, config: Mapping[str, Any], measured: str = "") -> str:
    """The card of what was made of the model in `folder`. config: the result's config.json. measured: what follows the
    sizes."""
    before, after = report.report["before"], report.report["after"]
    rows = [
        f"| {name} | {_show(before[key])} | {_show(after[key])} |"
        for name, key in (("parameters", "parameters"), ("bytes", "bytes"), ("routed experts per layer", "experts"))
    ]
    zeros = report.report.get("expert_zeros")
    rows += [] if zeros is None else [f"| of the experts' parameters zero | | {zeros:,} |"]
    origin = str(report.source["path"])
    named = f"[{origin}](https://huggingface.co/{origin.partition('@')[0]})" if is_hub_id(origin) else folder.name
    revision = f", revision `{r}`" if (r := report.source.get("revision")) else ""
    commands = "\n".join([*chain(folder), typed(report.command, public(report.options))])
    from_data = zeros or report.report.get("checksums")  # which a plan alone does not repeat
    again = "The commands above repeat them" if from_data else "`coterie apply MODEL coterie.json OUT` repeats them"
    return f"""---
{yaml.safe_dump(front_matter(folder, report, config), sort_keys=False, allow_unicode=True).strip()}
---
# {_name(origin, folder)}, made smaller by `coterie {report.command}`

{sentence(report)}

|  | before | after |
|---|---|---|
{chr(10).join(rows)}
{measured}
## Use

```python
{_use(config)}
```{"" if _is_ours(config) or _is_packed(config) else VLLM}

## Made

From {named} (fingerprint `{report.source["hash"][:16]}`{revision}) by

```
{commands}
```

`coterie.json` holds every decision and number. {again}.
{_licence(folder)}
"""


def stored_as(text: str, packed: bool) -> str:
    """A card of ours, of weights that are packed now, or plain again."""
    swaps = [(STOCK + "\n```" + VLLM, PACKED + "\n```"), ("library_name: transformers", "library_name: coterie")]
    for plain, ours in swaps:
        text = text.replace(plain, ours) if packed else text.replace(ours, plain)
    return text


# --- front matter ------------------------------------------------------------------------------------------------


def front_matter(folder: Path, report: Report, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads: of the source's card what still holds, and what was made of what."""
    known = own_front_matter(folder)
    found: dict[str, Any] = {key: known[key] for key in KEPT if key in known}
    if "license" not in found and (licence := licence_of(folder)):
        found |= {"license": licence} | ({"license_link": "LICENSE"} if licence == "other" else {})
    origin = str(report.source["path"]).partition("@")[0]
    base = origin if is_hub_id(origin) else known.get("base_model")
    if base:
        found |= {"base_model": base, "base_model_relation": _relation(report)}
    found["library_name"] = "coterie" if _is_ours(config) or _is_packed(config) else "transformers"
    found.setdefault("pipeline_tag", "text-generation")
    tags = known.get("tags") if isinstance(known.get("tags"), list) else []
    found["tags"] = list(dict.fromkeys([*map(str, tags or []), "mixture-of-experts", "coterie", report.command]))
    return found


def own_front_matter(folder: Path) -> dict[str, Any]:
    """The front matter of a folder's README.md; empty where there is none that can be read."""
    file = folder / "README.md"
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() and file.stat().st_size <= MAX_CARD else ""
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        found = yaml.safe_load(match[1]) if match else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def licence_of(folder: Path) -> str:
    """The hub's name of the licence in a LICENSE file, "other" for one that is not known; empty without a file."""
    file = next((p for p in sorted(folder.glob("LICENSE*")) if p.is_file()), None)
    if file is None:
        return ""
    with file.open("rb") as opened:
        text = " ".join(opened.read(2000).decode("utf-8", "replace").lower().split())
    return next((name for begins, name in LICENCES.items() if begins in text[:200]), "other")


def _relation(report: Report) -> str:
    """One of the hub's words for what a model is to its base."""
    bits = report.command == "quantize" or object_at(report.report, "packed").get("values") == "int8"
    return "quantized" if bits else "finetune"


def _licence(folder: Path) -> str:
    known = "license" in own_front_matter(folder) or licence_of(folder)
    return "The licence is the source model's." if known else "The licence is the source model's; none stood beside it."


def source_of(path: str | Path, folder: Path, fingerprint: str | None) -> dict[str, Any]:
    """What a record says of the model that was given as `path`, and stands in `folder`: of the hub, which revision."""
    revision = folder.name if folder.parent.name == "snapshots" and REVISION.fullmatch(folder.name) else None
    return {"path": str(path), "hash": fingerprint} | ({"revision": revision} if revision else {})


def is_hub_id(path: str) -> bool:
    """Whether a model was given as a hub id, and not as a folder."""
    name = path.partition("@")[0]
    return HUB_ID.fullmatch(name) is not None and not Path(path).exists()


# --- what was done -----------------------------------------------------------------------------------------------


def sentence(report: Report) -> str:
    """What was done, in one sentence."""
    before, after = report.report["before"], report.report["after"]
    options, plan = report.options, report.plan
    experts = f"{_show(before['experts'])} routed experts per layer became {_show(after['experts'])}"
    share = 100 * float(object_at(report.report, "sparsity").get("experts") or 0)
    method = f" by `{options['method']}`" if options.get("method") else ""
    layers = object_at(plan, "layers")
    said: dict[str, Callable[[], str]] = {
        "prune": lambda: f"{experts}, chosen{method}; those that stay are as they were.",
        "merge": lambda: f"{experts}: experts that do alike were merged into their mean{method}.",
        "stun": lambda: (
            f"{share:.1f} % of the routed experts' weights are gone: redundant experts, then single weights."
        ),
        "sparsify": lambda: f"{share:.1f} % of the routed experts' weights are zero, chosen{method}.",
        "quantize": lambda: f"The routed experts have {_bits(options)} a weight{method}.",
        "condense": lambda: f"The MoE layers {_listed(layers, 'condensed')} became small dense ones.",
        "drop": lambda: "Whole layers were dropped.",
        "recover": lambda: "The condensed layers were fine-tuned, and nothing else.",
        "unpack": lambda: "The weights are stored as plain numbers again.",
    }
    return said.get(report.command, lambda: f"{experts}.")()


def _bits(options: Mapping[str, Any]) -> str:
    if options.get("average") is None:
        return f"{options.get('bits')} bits"
    return f"{options['average']:g} bits on average, each {options.get('per')} as many as it needs,"


def _listed(layers: Mapping[str, Any], part: str) -> str:
    return ", ".join(key for key, entry in layers.items() if part in object_at(entry)) or "asked for"


def chain(folder: Path) -> list[str]:
    """The commands that made the model in `folder`, as far back as records lead, the oldest first."""
    commands: list[str] = []
    for _ in range(MOST_STEPS):
        try:
            record = record_of(folder) or {}
        except ValueError:
            break
        command, options = record.get("command"), object_at(record, "options")
        path = object_at(record, "source").get("path")
        if not isinstance(command, str):
            break
        commands.insert(0, typed(command, public(options)))
        folder = Path(path) if isinstance(path, str) and Path(path).is_dir() else Path()
        if folder == Path():
            break
    return commands


def public(value: Any) -> Any:
    """The value with every local path in it reduced to its name."""
    if isinstance(value, Mapping):
        return {key: public(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [public(entry) for entry in value]
    if isinstance(value, Path) or (isinstance(value, str) and is_local(value)):
        return Path(value).name
    return value


def is_local(text: str) -> bool:
    """Whether a text is a path on this machine: an absolute one, or one that leads to something from here."""
    if not text or "\n" in text or len(text) > 4096 or "/" not in text:
        return False
    try:
        return text.startswith(("/", "~", "./", "../")) or Path(text).exists()
    except OSError:
        return False


def _name(origin: str, folder: Path) -> str:
    return origin.partition("@")[0].partition("/")[2] if is_hub_id(origin) else folder.name


def _use(config: Mapping[str, Any]) -> str:
    return OWN if _is_ours(config) else PACKED if _is_packed(config) else STOCK


def _is_ours(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "coterie"


def _is_packed(config: Mapping[str, Any]) -> bool:
    return "coterie" in object_at(config, "quantization_config")


def _show(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


# --- quality -----------------------------------------------------------------------------------------------------


def with_quality(text: str, entry: Mapping[str, Any]) -> str:
    """The card with what `eval` or `report` measured of the model; an earlier measurement goes."""
    rows = [
        f"| {name} | {kind} | {scale * v['value']:.2f} [{scale * v['low']:.2f}, {scale * v['high']:.2f}]{unit} |"
        for kind, key, scale, unit in (("perplexity", "perplexity", 1, ""), ("exact match", "exact_match", 100, " %"))
        for name, v in entry[key].items()
    ]
    table = "\n".join(["| data | measure | value, 95 % interval |", "|---|---|---|", *rows])
    start = text.find(QUALITY)
    if start >= 0:
        end = text.find("\n## ", start + 1)
        text = text[:start] + (text[end:] if end >= 0 else "")
    place = text.find("\n## Use\n")
    place = len(text) if place < 0 else place
    return f"{text[:place]}{QUALITY}\n{table}\n{text[place:]}"


def put_quality(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Writes what was measured into the folder's README.md, if a command of ours made that."""
    file = folder / "README.md"
    if record_of(folder) is None or not file.is_file():
        return False
    text = with_quality(file.read_text(encoding="utf-8", errors="replace"), entry)
    write_whole(file, lambda partial: partial.write_text(text, encoding="utf-8"))
    return True
