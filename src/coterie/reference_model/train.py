"""Trains the reference model: a small qwen2_moe with 64 fine-grained experts, on one or two CPU cores.

    python -m coterie.reference_model.data CORPUS
    python -m coterie.reference_model.train CORPUS OUT      (interrupt and run again to resume)

The steps are those of `train/loop.py`, which `recover` takes as well: bf16 weights compute where the processor has
arithmetic for them, else float32 ones, and fp32 masters learn (`torch.autocast` casts on every call and is slower on
CPUs).
All experts of a layer run as one batched product over tiles of 128 tokens: a loop over experts would meet
a new shape for each expert, and oneDNN compiles a kernel for every new shape.
Export `MALLOC_TOP_PAD_=268435456 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184`:
freshly mapped pages cost a third of the time otherwise.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from coterie.model.arithmetic import fast
from coterie.reference_model import DOMAINS
from coterie.reference_model.data import END
from coterie.train.loop import Learner, Schedule, State, run
from coterie.train.trainable import Part

MIX = {"code": 0.20, "docs": 0.18, "prose": 0.22, "spanish": 0.12, "arithmetic": 0.28}
SEQ_LEN, BATCH = 512, 16
TILE = 128  # rows of one block of the batched expert products
LEARNING_RATE, WEIGHT_DECAY, WARMUP = 3e-3, 0.1, 100
BALANCE = 0.02  # weight of the load-balancing loss

CONFIG = Qwen2MoeConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=512,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=128,
    num_experts=64,
    num_experts_per_tok=4,
    norm_topk_prob=True,
    output_router_logits=True,
    max_position_embeddings=SEQ_LEN,
    tie_word_embeddings=True,
    use_sliding_window=False,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 tokens, every digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ((corpus / "train" / f"{domain}.txt").read_text(encoding="utf-8") for domain in DOMAINS)
    tokenizer.train_from_iterator((text[: int(8e6)].replace(END, "\n") for text in texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


def encode(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, np.ndarray]:
    """Token sequences (N, SEQ_LEN + 1) per domain; arithmetic ones begin with a whole problem."""
    sequences = {}
    for domain in DOMAINS:
        cache = corpus / "train" / f"{domain}.npy"
        if not cache.exists():
            documents = (corpus / "train" / f"{domain}.txt").read_text(encoding="utf-8").split(END)
            length, rows, row = SEQ_LEN + 1, [], []
            for start in range(0, len(documents), 1000):
                for ids in tokenizer(documents[start : start + 1000])["input_ids"]:
                    row += [*ids, CONFIG.eos_token_id]
                    while len(row) >= length:
                        rows.append(np.array(row[:length], dtype=np.uint16))
                        row = [] if domain == "arithmetic" else row[length:]
            np.save(cache, np.stack(rows))
        sequences[domain] = np.load(cache)
        print(f"{domain}: {sequences[domain].size:,} tokens")
    return sequences


def tiled_experts(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """y_t = sum_k weights[t,k] * down_e(silu(gate_e x_t) * up_e x_t), e = chosen[t,k], as two batched products.

    hidden (T, D), chosen and weights (T, K). Each expert's tokens fill whole tiles of `TILE` rows, so the cost
    does not depend on how evenly the tokens are spread, and the number of tiles depends on T, K and E alone.
    """
    num_experts, dim = self.gate_up_proj.shape[0], hidden.shape[1]
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    load = torch.bincount(flat, minlength=num_experts)
    tiles = -(-load // TILE)
    num_tiles = len(flat) // TILE + num_experts
    expert_of_tile = torch.repeat_interleave(torch.arange(num_experts), tiles)
    expert_of_tile = F.pad(expert_of_tile, (0, num_tiles - len(expert_of_tile)))
    first_row = (tiles.cumsum(0) - tiles) * TILE - (load.cumsum(0) - load)
    row = torch.arange(len(flat)) + first_row[flat[order]]
    token = order // chosen.shape[1]
    x = hidden.new_zeros(num_tiles * TILE, dim).index_copy(0, row, hidden.index_select(0, token))
    gate_up = self.gate_up_proj.index_select(0, expert_of_tile).transpose(1, 2)
    down = self.down_proj.index_select(0, expert_of_tile).transpose(1, 2)
    gate, up = torch.bmm(x.view(num_tiles, TILE, dim), gate_up).chunk(2, -1)
    out = torch.bmm(F.silu(gate) * up, down).view(-1, dim).index_select(0, row)
    out = out * weights.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(hidden).index_add(0, token, out)


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> tuple[torch.Tensor, float]:
    """Mean over layers of E/k * sum_e f_e P_e (1 when balanced), and the largest load over the even one.

    f_e is the share of tokens that chose expert e and P_e its mean probability, each layer by itself: the
    library's own loss pools f and P over the layers first, so that opposite imbalances cancel.
    Source: Switch Transformers (arXiv 2101.03961), equation 4.
    """
    losses, worst = [], 0.0
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(top_k).indices.flatten()
        share = torch.bincount(chosen, minlength=logits.shape[-1]) / len(logits)
        losses.append(logits.shape[-1] / top_k * (share * probabilities.mean(0)).sum())
        worst = max(worst, share.max().item() * logits.shape[-1] / top_k)
    return torch.stack(losses).mean(), worst


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / (steps - WARMUP)
    return LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_at(sequences: dict[str, np.ndarray], step: int, seed: int) -> torch.Tensor:
    """The step's (BATCH, SEQ_LEN + 1) tokens: a pure function of the step, so a resumed run sees the same data."""
    rng = np.random.default_rng((seed, step))
    rows = []
    for domain in rng.choice(list(MIX), size=BATCH, p=list(MIX.values())):
        data = sequences[domain]
        rows.append(data[rng.integers(len(data))])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@dataclass
class Lesson:
    """What is minimised: the next tokens' cross entropy and `BALANCE` of the load-balancing loss, of ids (B, T + 1)."""

    model: Any
    last: dict[str, float] = field(default_factory=dict)  # of the last batch, for the log

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(the sum over all tokens, how many)."""
        output, count = self.model(input_ids=ids[:, :-1], use_cache=False), ids[:, 1:].numel()
        loss = F.cross_entropy(output.logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        balance, worst = balance_loss(output.router_logits, self.model.config.num_experts_per_tok)
        self.last = {"loss": round(loss.item(), 4), "balance": round(balance.item(), 4), "worst_load": round(worst, 2)}
        return count * (loss + BALANCE * balance), count


def decaying_adam(masters: list[torch.Tensor]) -> torch.optim.AdamW:
    """Matrices decay, vectors do not."""
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [m for m in masters if m.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def teach(
    model: Any,
    sequences: dict[str, np.ndarray],
    out: Path,
    *,
    steps: int,
    part: range | None = None,
    seed: int = 0,
    save_every: int = 100,
) -> None:
    """Trains every weight of the model, from the state in `out` on if there is one, with a line in its log every 10
    steps.

    part: those of all `steps` to take; without the first ones there is a warm-up of its own (default: all).
    """
    part = range(steps) if part is None else part
    parameters = dict(model.named_parameters())
    masters = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}
    learner, lesson = Learner([Part(parameters, masters, lambda _: iter(()))], decaying_adam), Lesson(model)

    def rate(done: int) -> float:
        return min(learning_rate(part[done], steps), LEARNING_RATE * (done + 1) / WARMUP)

    schedule = Schedule(len(part), rate, out / "state.safetensors", save_every)
    state = State.load(learner, schedule.place)
    state.curve.setdefault("all", [])
    began, first = time.time(), state.step

    def log(done: int) -> None:
        if (done - 1) % 10 == 0:
            speed = (done - first) * BATCH * SEQ_LEN / (time.time() - began)
            line = {
                "step": part[done - 1],
                **lesson.last,
                "norm": round(learner.norm, 3),
                "tokens_per_second": round(speed),
            }
            with (out / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    run(learner, lesson, lambda step: [batch_at(sequences, part[step], seed)], schedule, state, "all", log)
    state.save(learner, schedule.place)


def prepare(corpus: Path, out: Path, seed: int) -> dict[str, np.ndarray]:
    """The tokenizer in `out`, made if it is not there, and the token sequences of each domain."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer.json").exists():
        train_tokenizer(corpus).save_pretrained(out)
    return encode(corpus, PreTrainedTokenizerFast.from_pretrained(out))


def ready(model: Any, experts: str = "tiled") -> Any:
    """The model in the type that this processor trains fast in, its experts computed by `tiled_experts`, or by one of
    transformers' own ways."""
    ALL_EXPERTS_FUNCTIONS.register("tiled", tiled_experts)
    model.set_experts_implementation(experts)
    return model.to(getattr(torch, fast("bfloat16")))


def finish(model: Any, out: Path) -> None:
    """Writes the trained model in bf16, with its tokenizer, into `out/model`."""
    model.config.output_router_logits = False
    model.bfloat16().save_pretrained(out / "model")
    PreTrainedTokenizerFast.from_pretrained(out).save_pretrained(out / "model")


def train(corpus: Path, out: Path, *, steps: int, seed: int = 0) -> None:
    sequences = prepare(corpus, out, seed)
    model = ready(Qwen2MoeForCausalLM(CONFIG))
    teach(model, sequences, out, steps=steps, seed=seed)
    finish(model, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.corpus, arguments.out, steps=arguments.steps)
