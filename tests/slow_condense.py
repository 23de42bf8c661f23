"""Condensing done the slow, obvious way: whole models, one text at a time, one candidate at a time.

What the streamed searches of `coterie.condense` must agree with.
"""

from __future__ import annotations

import contextlib

import torch

from coterie.model.loading import load_stock


class Whole:
    """A stock model in float32 whose MoE blocks can be replaced by always-on sums."""

    def __init__(self, folder, block="mlp", shared=("shared_expert", "shared_experts")):
        self.model, faults = load_stock(folder, "float32", experts_implementation="eager")
        assert not faults
        self.layers = self.model.get_decoder().layers
        self.blocks = {i: getattr(layer, block) for i, layer in enumerate(self.layers)}
        self.blocks = {i: b for i, b in self.blocks.items() if hasattr(b, "experts")}
        self.shared = {i: next((getattr(b, n) for n in shared if hasattr(b, n)), None) for i, b in self.blocks.items()}

    def expert(self, index, e, x):
        """Expert e of layer `index` on x (T, D)."""
        experts = self.blocks[index].experts
        gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
        return (experts.act_fn(gate) * up) @ experts.down_proj[e].T

    def always_on(self, index, experts, gates, shared_gate):
        """What stands in for a block: c S(x) + sum w_i E_i(x)."""

        def forward(x, *_, **__):
            flat = x.reshape(-1, x.shape[-1])
            shared = self.shared[index]
            total = shared_gate * shared(flat) if shared is not None else torch.zeros_like(flat)
            for e, w in zip(experts, gates, strict=True):
                total = total + w * self.expert(index, e, flat)
            return total.view_as(x)

        return forward

    @contextlib.contextmanager
    def condensed(self, plan):
        """With some layers condensed: {layer: (experts, gates, shared gate)}."""
        for index, parts in plan.items():
            self.blocks[index].forward = self.always_on(index, *parts)
        try:
            yield
        finally:
            for index in plan:
                del self.blocks[index].forward

    def states(self, ids, plan=None):
        """(logits, final normed state, [state after each layer]) of one text, with some layers condensed."""
        after, normed = [], []
        handles = [layer.register_forward_hook(lambda m, a, out: after.append(out)) for layer in self.layers]
        handles.append(self.model.get_decoder().norm.register_forward_hook(lambda m, a, out: normed.append(out)))
        with torch.no_grad(), self.condensed(plan or {}):
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        return logits, normed[0][0], [(a[0] if isinstance(a, tuple) else a)[0] for a in after]

    def logits(self, texts, plan=None):
        return [self.states(ids, plan)[0] for ids in texts]

    def routing(self, texts):
        """{layer: [(expert, weight, shared gate)] of every choice of every token}."""
        found = {i: [] for i in self.blocks}
        shared = {i: [] for i in self.blocks}
        handles = []
        for i, block in self.blocks.items():

            def note(module, args, i=i):
                found[i] += list(zip(args[1].flatten().tolist(), args[2].flatten().tolist(), strict=True))

            def note_shared(module, args, i=i):
                gate = getattr(module, "shared_expert_gate", None)
                shared[i] += [1.0] if gate is None else torch.sigmoid(gate(args[0])).flatten().tolist()

            handles += [block.experts.register_forward_pre_hook(note), block.register_forward_pre_hook(note_shared)]
        self.logits(texts)
        for handle in handles:
            handle.remove()
        return found, {i: sum(values) / len(values) for i, values in shared.items()}


def divergence(expected, found):
    """Mean over tokens of the divergence between softmaxes over hidden features."""
    p, q = expected.double().softmax(-1), found.double().softmax(-1)
    m = (p + q) / 2

    def kl(a):
        return ((a + 1e-10) * ((a + 1e-10) / (m + 1e-10)).log()).sum(-1)

    return float(((kl(p) + kl(q)) / 2).mean())


def hidden(states, layer):
    """The `hidden_states` entry of a layer: after it, or, as the last entry is, after the final norm."""
    _, normed, after = states
    return normed if layer == len(after) - 1 else after[layer]


def official(folder, texts, keep, count, searched):
    """CD-MoE as published: ({layer: (experts, gates, shared gate)}, layers in the order chosen)."""
    whole = Whole(folder)
    choices, shared = whole.routing(texts)
    texts = [text[:searched] for text in texts]
    original = [whole.states(text) for text in texts]
    plan = {}
    for layer in whole.blocks:
        gates = {}
        for e, weight in choices[layer]:
            gates.setdefault(e, []).append(weight)
        gates = {e: sum(ws) / len(ws) for e, ws in gates.items()}
        chosen = []
        for _ in range(min(keep, len(gates))):
            scores = {}
            for e in sorted(set(gates) - set(chosen)):
                members = [*chosen, e]
                trial = {layer: (members, [gates[m] for m in members], shared[layer])}
                found = [
                    divergence(hidden(o, layer), hidden(whole.states(t, trial), layer))
                    for o, t in zip(original, texts, strict=True)
                ]
                scores[e] = sum(found) / len(found)
            chosen.append(min(scores, key=lambda e: (round(scores[e], 12), e)))
        plan[layer] = (chosen, [gates[e] for e in chosen], shared[layer])
    order = []
    for _ in range(count):
        scores = {}
        for layer in sorted(set(whole.blocks) - set(order)):
            trial = {i: plan[i] for i in [*order, layer]}
            found = [divergence(o[1], whole.states(t, trial)[1]) for o, t in zip(original, texts, strict=True)]
            scores[layer] = sum(found) / len(found)
        order.append(min(scores, key=lambda i: (round(scores[i], 12), i)))
    return plan, order


def block_io(whole, texts, layer, plan=None):
    """(inputs, outputs) of a block as it is, over all tokens, with the layers of `plan` condensed."""
    x, y = [], []
    block = whole.blocks[layer]

    def note(module, args, output):
        x.append(args[0][0])
        y.append(output[0])

    handle = block.register_forward_hook(note)
    whole.logits(texts, plan)
    handle.remove()
    return torch.cat(x), torch.cat(y)


def least_squares(whole, texts, layer, keep, plan=None):
    """(experts in the order chosen, gates, shared gate, error) by solving from the outputs themselves."""
    x, y = block_io(whole, texts, layer, plan)
    num_experts = len(whole.blocks[layer].experts.gate_up_proj)
    with torch.no_grad():
        outputs = [whole.expert(layer, e, x).double().flatten() for e in range(num_experts)]
        shared = [] if whole.shared[layer] is None else [whole.shared[layer](x).double().flatten()]
    target = y.double().flatten()

    def solve(members):
        a = torch.stack([*(outputs[e] for e in members), *shared], 1)
        gates = torch.linalg.lstsq(a, target[:, None]).solution[:, 0]
        return gates.tolist(), float(((a @ gates - target) ** 2).sum() / (target**2).sum())

    chosen = []
    for _ in range(keep):
        left = [e for e in range(num_experts) if e not in chosen]
        chosen.append(min(left, key=lambda e: solve([*chosen, e])[1]))
    gates, error = solve(chosen)
    return chosen, gates[:keep], gates[keep] if shared else 1.0, error
