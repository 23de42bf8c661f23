"""Pairs of models on the same tokens: differences, flips, repetition and router overlap by original ids."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import END, PROBLEM, make_model, make_tokenizer, scripted, text_of, write

import coterie
from coterie.edits.lineage import fate, plans_between
from coterie.edits.plan import CONDENSED, KEPT, MERGED, REMOVED, Choice, Condensed, Plan
from coterie.errors import CoterieError
from coterie.judge.paired import Kept, bootstrap_mean, compare, experts_fate, jaccard, mean_of_sets, repetition
from coterie.model.loading import load
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.eval import evaluate
from handmade import qwen


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small MoE model, and one with half of its experts."""
    home = tmp_path_factory.mktemp("pair")
    make_model("qwen2_moe").save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    coterie.prune(home / "model", home / "out", ratio=0.5)
    (home / "a.txt").write_text(text_of(300))
    return home


def per_token(path, text, window):
    """Log-likelihood of each token but the first, one forward a token."""
    model, ids = load(path), make_tokenizer()(text)["input_ids"]
    found = []
    for t in range(1, len(ids)):
        begin = next(b for b in range(0, len(ids), window // 2) if b + window > t)
        with torch.no_grad():
            found.append(model(torch.tensor([ids[begin:t]])).logits[0, -1].double().log_softmax(0)[ids[t]].item())
    return np.array(found)


# In eval


def test_the_difference_is_that_of_the_log_likelihoods(folders):
    """Token by token, the other model's minus the original's, in nats; the values of eval itself stay as they are."""
    text = folders / "a.txt"
    result = evaluate([folders / "model", folders / "out"], data={"a": text}, window=32, against=folders / "model")
    model, out = result["models"]
    found = out["paired"]["difference"]["a"]
    gain = per_token(folders / "out", text.read_text(), 32) - per_token(folders / "model", text.read_text(), 32)
    assert found["value"] == pytest.approx(gain.mean(), abs=1e-5)
    assert found["value"] == pytest.approx(
        math.log(model["perplexity"]["a"]["value"]) - math.log(out["perplexity"]["a"]["value"]), abs=1e-9
    )
    assert found["low"] < found["value"] < found["high"] and found["tokens"] == 299
    assert "paired" not in model
    plain = evaluate([folders / "model", folders / "out"], data={"a": text}, window=32)["models"]
    assert [plain[0], plain[1]] == [model, {k: v for k, v in out.items() if k != "paired"}]


def test_the_original_need_not_be_listed(folders):
    """Only the models that were asked for are in the result, each but the original compared."""
    result = evaluate(folders / "out", data={"a": folders / "a.txt"}, window=32, against=str(folders / "model"))
    assert [m["path"] for m in result["models"]] == [str(folders / "out")]
    assert result["models"][0]["paired"]["against"] == str(folders / "model")
    assert json.loads(json.dumps(result)) == result


def test_a_copy_differs_in_nothing(folders, tmp_path):
    """No difference, no flip, the same routing."""
    shutil.copytree(folders / "model", tmp_path / "copy")
    data = {"a": folders / "a.txt", "p": write(tmp_path / "p.jsonl", {"prompt": PROBLEM, "answer": "46"})}
    pair = evaluate(tmp_path / "copy", data=data, window=32, max_new_tokens=20, against=folders / "model")
    found = pair["models"][0]["paired"]
    assert found["difference"]["a"] == {"value": 0.0, "low": 0.0, "high": 0.0, "tokens": 299}
    assert found["flipped"] == {"p": 0.0}
    assert found["repetition"]["p"]["model"] == found["repetition"]["p"]["against"]
    assert found["router_overlap"] == {"0": 1.0, "1": 1.0}


def test_router_overlap_is_by_original_ids(folders):
    """Against a slow count: what each model's routers chose, the pruned one's ids led back by its plan."""
    ids = make_tokenizer()((folders / "a.txt").read_text())["input_ids"]
    text = {"a": write(folders / "ids.jsonl", {"input_ids": ids[:40]})}
    found = evaluate(folders / "out", data=text, window=64, against=folders / "model")["models"][0]["paired"]
    plan = json.loads((folders / "out" / "coterie.json").read_text())["plan"]["layers"]
    chosen = {}
    for name in ("model", "out"):
        model = load(folders / name)
        for layer in (0, 1):
            taken = chosen.setdefault((name, str(layer)), [])
            hook = lambda _, args, taken=taken: taken.extend(args[1].tolist())  # noqa: E731
            model.model.layers[layer].mlp.experts.register_forward_pre_hook(hook)
        with torch.no_grad():
            model(torch.tensor([ids[:40]]))
    for key in ("0", "1"):
        shares = []
        for ours, theirs in zip(chosen["model", key], chosen["out", key], strict=True):
            one, other = set(ours), {plan[key]["kept"][e] for e in theirs}
            shares.append(len(one & other) / len(one | other))
        assert found["router_overlap"][key] == pytest.approx(np.mean(shares))
    assert min(found["router_overlap"].values()) < 1


def test_flips_are_counted_both_ways(folders, tmp_path):
    """One problem lost and one won is one share in common, and two flips of three."""
    prompts = [PROBLEM, PROBLEM.replace("34", "35"), PROBLEM.replace("34", "36")]
    data = {"p": write(tmp_path / "p.jsonl", *({"prompt": p, "answer": "46"} for p in prompts))}
    right, wrong = f"\nAnswer: 46\n{END}", f"\nAnswer: 47\n{END}"
    models = {
        "model": scripted(dict(zip(prompts, (right, right, wrong), strict=True)))[0],
        "out": scripted(dict(zip(prompts, (right, wrong, right), strict=True)))[0],
    }
    result = evaluate(folders / "out", data=data, against=folders / "model", load=lambda path: models[path.name])
    found = result["models"][0]
    assert found["exact_match"]["p"]["value"] == pytest.approx(2 / 3)
    assert found["paired"]["flipped"]["p"] == pytest.approx(2 / 3)
    assert found["paired"]["router_overlap"] == {}


def test_other_tokens_are_refused_before_anything_is_loaded(folders, tmp_path):
    """A tokenizer that splits the data differently makes pairs meaningless; token ids do not ask it."""
    shutil.copytree(folders / "out", tmp_path / "out")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["ab"])
    tokenizer.save_pretrained(tmp_path / "out")
    text = write(tmp_path / "a.jsonl", {"text": "xyz"}, {"text": "xaby"})
    with pytest.raises(CoterieError, match=r"other tokens of .*a\.jsonl:2"):
        evaluate(tmp_path / "out", data={"a": text}, against=folders / "model", load=lambda path: pytest.fail("loaded"))
    ids = write(tmp_path / "ids.jsonl", {"input_ids": [5, 6, 7]})
    assert evaluate(tmp_path / "out", data={"a": ids}, against=folders / "model")["models"][0]["paired"]


def test_against_without_data_is_refused(folders, tmp_path):
    """Tasks of the harness are not paired, and no option is ignored."""
    with pytest.raises(CoterieError, match="give data"):
        evaluate(folders / "out", tasks="t", task_path=tmp_path, against=folders / "model")


def test_windows_that_differ_are_refused():
    """Fewer positions give other windows, hence other context."""
    one, other = Kept(counts={"a": np.array([7, 4])}), Kept(counts={"a": np.array([3, 4, 4])})
    with pytest.raises(CoterieError, match="3 windows, and for model into 2"):
        compare("out", other, "model", one, seed=0)


# Numbers


def test_the_mean_of_two_blocks():
    """-4 over four tokens and 4 over four: mean 0, and draws of one block alone are the ends."""
    assert bootstrap_mean(np.array([-4.0, 4.0]), np.array([4, 4]), seed=0) == (0.0, -1.0, 1.0)


def test_a_paired_interval_is_narrow_where_texts_vary():
    """Losses that vary much from text to text, and differ by little between models: the pair tells them apart."""
    rng = np.random.default_rng(0)
    ours, counts = rng.normal(200, 60, 50), np.full(50, 100)
    theirs = ours + rng.normal(1, 0.5, 50)
    _, low, high = bootstrap_mean(ours - theirs, counts, seed=0)
    assert high < 0 and high - low < 0.01
    assert bootstrap_mean(ours, counts, seed=0)[2] > bootstrap_mean(theirs, counts, seed=0)[1]


def test_each_data_set_counts_once():
    """Means 1 and 3 give 2, whatever the number of tokens."""
    sets = {"a": (np.array([1.0, 1.0]), np.array([1, 1])), "b": (np.array([300.0, 300.0]), np.array([100, 100]))}
    assert mean_of_sets(sets, seed=0) == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert mean_of_sets({}, seed=0) is None


@pytest.mark.parametrize(
    ("texts", "share"),
    [([], None), ([[1, 2, 3]], None), ([[1, 2, 3, 4]], 0), ([[1] * 8], 4 / 5), ([[1, 2, 3, 4], [1, 2, 3, 4]], 0)],
)
def test_repetition(texts, share):
    """4-grams seen before in the same text; two texts that agree do not repeat."""
    assert repetition(texts) == share


rows = st.lists(st.permutations(range(6)).map(lambda ids: ids[:3]), min_size=1, max_size=5)


@given(rows, st.data())
def test_jaccard_is_that_of_sets(one, data):
    """Of every row, whatever the order of ids."""
    other = data.draw(st.lists(st.permutations(range(6)).map(lambda i: i[:2]), min_size=len(one), max_size=len(one)))
    slow = [len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(one, other, strict=True)]
    assert jaccard(np.array(one), np.array(other)).tolist() == pytest.approx(slow)


# Where experts went


def test_experts_are_followed_through_plans():
    """Each plan speaks of the experts that the one before left, in their new order."""
    first = Plan({"0": Choice((0, 2, 3)), "1": Choice((1, 3), ((0, 1), (2, 3)), merged=True)})
    second = Plan({"0": Choice((1, 2))}, condensed={"1": Condensed((1,), (0.5,))})
    found = fate([first, second], {"0": 4, "1": 4, "2": 4})
    assert found.levels["0"] == (REMOVED, REMOVED, KEPT, KEPT)
    assert found.levels["1"] == (REMOVED, REMOVED, REMOVED, CONDENSED)
    assert found.routed == {"0": ("0", (2, 3)), "2": ("2", (0, 1, 2, 3))}
    assert fate([first], {"0": 4, "1": 4}).levels["1"] == (REMOVED, MERGED, REMOVED, MERGED)


def test_a_router_that_stays_names_all_experts():
    """In our own layout a router may go on choosing experts that are gone: its ids are the original's."""
    found = fate([Plan({"0": Choice((0, 2), removed="null")})], {"0": 4})
    assert found.levels["0"] == (KEPT, REMOVED, KEPT, REMOVED)
    assert found.routed == {"0": ("0", (0, 1, 2, 3))}


def test_layers_move_up_where_one_was_dropped():
    """After layer 1 is gone, the original's layer 2 is layer 1."""
    found = fate([Plan({}, dropped=(1,))], {"0": 2, "1": 2, "2": 2})
    assert found.routed == {"0": ("0", (0, 1)), "1": ("2", (0, 1))}
    assert found.levels["1"] == (REMOVED, REMOVED)


def test_a_plan_beyond_what_is_there_is_refused():
    """A record edited by hand may name anything."""
    with pytest.raises(CoterieError, match="names expert 9"):
        fate([Plan({"0": Choice((1, 9))})], {"0": 4})


def test_records_lead_back_step_by_step(tmp_path):
    """OUT2 was made from OUT1 from MODEL; without OUT1 nothing is known, and a copy needs no record."""
    model = qwen(tmp_path / "model")
    coterie.prune(model, tmp_path / "out1", experts=6)
    coterie.prune(tmp_path / "out1", tmp_path / "out2", experts=4)
    fingerprint = Checkpoint.open(model).hash
    assert [len(p.layers["0"].kept) for p in plans_between(tmp_path / "out1", fingerprint)] == [6]
    assert [len(p.layers["0"].kept) for p in plans_between(tmp_path / "out2", fingerprint)] == [6, 4]
    known = experts_fate(tmp_path / "out2", model)
    assert set(known.routed["0"][1]) == {e for e, level in enumerate(known.levels["0"]) if level == KEPT}
    assert len(known.routed["0"][1]) == 4
    assert plans_between(shutil.copytree(model, tmp_path / "copy"), fingerprint) == []
    shutil.rmtree(tmp_path / "out1")
    assert plans_between(tmp_path / "out2", fingerprint) is None
