"""`recover`: only condensed MLPs learn, losses are what they say, an interrupted run ends as an undisturbed one."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny
from coterie.errors import CoterieError
from coterie.model.loading import is_ours, load, load_stock
from coterie.storage.checkpoint import Checkpoint
from coterie.train.loop import Learner, batches, learning_rate, taken
from coterie.train.objectives import distillation, language_modelling, pair
from coterie.train.refit import Sums, refit
from coterie.train.trainable import Part, mlp, routed
from coterie.train.trainee import Training, mlp_names, peak_rate, trainee_of
from coterie.verbs.apply import apply
from coterie.verbs.recover import recover
from coterie.verbs.verify import verify

PLAN = {
    "1": {"condensed": {"experts": [5, 0], "gates": [0.7, -0.3], "shared_gate": 0.6}},
    "3": {"condensed": {"experts": [2, 1], "gates": [1.5, 0.2], "shared_gate": 0.4}},
}
LENGTHS = (20, 13, 20, 20, 13, 20, 20, 9)
PARTS = ("gate_proj", "up_proj", "down_proj")
TRAINED = {f"model.layers.{layer}.mlp.{part}.weight" for layer in (1, 3) for part in PARTS}
QUICK = {"steps": 3, "lr": 1e-3, "batch_size": 2}


def texts(lengths=LENGTHS * 2, seed=3):
    """Token ids that follow each other by a rule, with noise: something to learn."""
    draw, found = np.random.default_rng(seed), []
    for length in lengths:
        text = [int(draw.integers(3, tiny.VOCABULARY))]
        while len(text) < length:
            follows = 3 + (text[-1] * 7 + 1) % (tiny.VOCABULARY - 3)
            text.append(follows if draw.random() < 0.8 else int(draw.integers(3, tiny.VOCABULARY)))
        found.append(text)
    return found


def write_data(folder, samples):
    file = folder / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"input_ids": sample}) for sample in samples))
    return [f"texts={file}"]


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path, texts())


@pytest.fixture(scope="session")
def student(tmp_path_factory, tiny_checkpoint):
    """`student(model_type, layers=PLAN)`: layers of a tiny model condensed by a plan."""
    home, made = tmp_path_factory.mktemp("condensed"), {}

    def get(model_type="qwen2_moe", layers=PLAN):
        key = model_type + json.dumps(layers)
        if key not in made:
            made[key] = home / str(len(made))
            apply(tiny_checkpoint(model_type), {"layers": layers}, made[key])
        return made[key]

    return get


def changed(before, after):
    """The tensors whose bytes differ; names, shapes and dtypes must be the same."""
    one, other = Checkpoint.open(before), Checkpoint.open(after)
    kinds = [{n: (t.dtype, t.shape) for n, t in c.tensors.items()} for c in (one, other)]
    assert kinds[0] == kinds[1] and one.config == other.config
    return {name for name in one.tensors if one.raw(name) != other.raw(name)}


def with_config(folder, target, **changes):
    """A copy of a model with other values in its config."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def contents(folder):
    return (folder / "model.safetensors").read_bytes()


# --- what changes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["all", "local", "lm", "distill"])
def test_only_the_condensed_mlps_change(student, tiny_checkpoint, tmp_path, data, stage):
    """Each of their three matrices does; every other tensor and the config keep their bytes, and the model loads."""
    teacher = None if stage == "lm" else tiny_checkpoint("qwen2_moe")
    recover(student(), tmp_path / "out", teacher=teacher, data=data, stage=stage, **QUICK)
    assert changed(student(), tmp_path / "out") == TRAINED
    assert load_stock(tmp_path / "out", "float32")[1] == {}
    assert verify(tmp_path / "out")["ok"]


@pytest.mark.parametrize("model_type", ["exaone_moe", "deepseek_v2", "mixtral", "lfm2_moe", "jamba"])
def test_families_and_layouts(student, tiny_checkpoint, tmp_path, data, model_type):
    """Where the stock config says which layers are dense, and in our own layout: 3 matrices of layer 3 change."""
    folder = student(model_type, {"3": PLAN["1"]})
    recover(folder, tmp_path / "out", teacher=tiny_checkpoint(model_type), data=data, **QUICK)
    found = changed(folder, tmp_path / "out")
    assert len(found) == 3 and all(".3." in name for name in found)
    assert is_ours(tmp_path / "out") == (model_type in ("deepseek_v2", "mixtral", "lfm2_moe", "jamba"))
    load(tmp_path / "out")


def test_a_converted_model_learns_from_the_original(tiny_checkpoint, tmp_path, data):
    """mixtral, condensed as qwen2_moe: the teacher's blocks are another class."""
    teacher = with_config(tiny_checkpoint("mixtral"), tmp_path / "mixtral", sliding_window=None)
    apply(teacher, {"layers": {"1": PLAN["1"]}, "converted": "qwen2_moe"}, tmp_path / "small")
    report = recover(tmp_path / "small", tmp_path / "out", teacher=teacher, data=data, **QUICK)
    assert report.plan["converted"] == "qwen2_moe"
    assert report.report["stages"][0]["after"]["local"] < report.report["stages"][0]["before"]["local"]


@pytest.mark.parametrize("model_type", ["qwen2_moe", "olmoe"])
def test_all_layers_may_be_condensed(student, tiny_checkpoint, tmp_path, data, model_type):
    """No router is left in the model; it learns all the same."""
    folder = student(model_type, {str(layer): PLAN["1"] for layer in range(4)})
    recover(folder, tmp_path / "out", teacher=tiny_checkpoint(model_type), data=data, **QUICK)
    assert len(changed(folder, tmp_path / "out")) == 12


def test_padding_stays_zero(student, tiny_checkpoint, tmp_path, data):
    """Layer 2 fills 32 of the 56 units that layer 3 needs: the other rows and columns get no gradient."""
    plan = {
        "2": {"condensed": {"experts": [0], "gates": [0.5]}},
        "3": {"condensed": {"experts": [1, 2], "gates": [0.5, 0.5]}},
    }
    folder = student("exaone_moe", plan)
    width = tiny.read(folder)[0]["model.layers.2.mlp.up_proj.weight"].shape[0]
    recover(folder, tmp_path / "out", teacher=tiny_checkpoint("exaone_moe"), data=data, **QUICK)
    tensors, _ = tiny.read(tmp_path / "out")
    empty = np.flatnonzero(~tiny.read(folder)[0]["model.layers.2.mlp.up_proj.weight"].any(1))
    assert 0 < len(empty) < width
    for part in ("gate_proj", "up_proj"):
        assert not tensors[f"model.layers.2.mlp.{part}.weight"][empty].any()
    assert not tensors["model.layers.2.mlp.down_proj.weight"][:, empty].any()


def test_bfloat16_is_rounded_once_from_float32_masters(tiny_checkpoint, tmp_path, data):
    """Stored as bfloat16 again; computed in float32 where that is asked for."""
    model, _ = load_stock(tiny_checkpoint("qwen2_moe"), "bfloat16")
    model.save_pretrained(tmp_path / "bf16")
    apply(tmp_path / "bf16", {"layers": PLAN}, tmp_path / "small")
    for dtype in ("auto", "float32"):
        out = tmp_path / dtype
        report = recover(tmp_path / "small", out, teacher=tmp_path / "bf16", data=data, dtype=dtype, **QUICK)
        assert changed(tmp_path / "small", out) == TRAINED
        assert report.report["dtype"] in ("float32", "bfloat16" if dtype == "auto" else "float32")


# --- the control ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_layers_of_any_model_can_be_given_the_same_fine_tuning(tiny_checkpoint, tmp_path, data, fused):
    """Of layers with experts: routed and shared experts, not routers, nor the shared expert's gate."""
    folder = tiny_checkpoint("qwen2_moe", fused)
    report = recover(folder, tmp_path / "out", data=data, stage="lm", layer_ids="1,3", **QUICK | {"steps": 20})
    found = changed(folder, tmp_path / "out")
    assert found <= set(report.report["trained"]["tensors"])
    assert {name.split(".")[2] for name in found} == {"1", "3"}
    assert {name.split(".mlp.")[1].split(".")[0] for name in found} == {"experts", "shared_expert"}
    assert report.report["stages"][0]["after"]["lm"] < report.report["stages"][0]["before"]["lm"]
    assert load_stock(tmp_path / "out", "float32")[1] == {}


def test_dense_layers_can_be_named_too(tiny_checkpoint, tmp_path, data):
    """exaone_moe's layer 0 is dense from birth."""
    folder = tiny_checkpoint("exaone_moe")
    recover(folder, tmp_path / "out", data=data, stage="lm", layer_ids=[0], **QUICK)
    assert changed(folder, tmp_path / "out") == {f"model.layers.0.mlp.{part}.weight" for part in PARTS}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "gpt_oss", "granitemoe"])
def test_experts_come_back_as_they_were_stored(tiny_checkpoint, model_type, fused):
    """Transposed, interleaved, numbered or fused: untrained masters are the stored bytes."""
    folder = tiny_checkpoint(model_type, fused)
    job = trainee_of(Checkpoint.open(folder), Training(stage="lm", layer_ids=[1]))
    (block,) = job.blocks.values()
    part = routed(load(folder), job.model.checkpoint, block)
    seen = set()
    for name, offset, data in part.stored(part.masters):
        assert job.model.checkpoint.raw(name, offset, len(data)) == data
        seen.add(name)
    assert seen == set(job.tensors) - {n for n in job.tensors if "shared" in n}


def test_experts_that_transformers_keeps_to_itself_are_refused(tiny_checkpoint, tmp_path, data):
    """dbrx's are no module of the registry."""
    with pytest.raises(CoterieError, match="holds its experts in 0 modules"):
        recover(tiny_checkpoint("dbrx"), tmp_path / "out", data=data, stage="lm", layer_ids=[1])
    assert not (tmp_path / "out.partial").exists()


# --- what is minimised ---------------------------------------------------------------------------------------------


def test_a_step_is_adamw_on_the_mean_over_all_tokens(student, tmp_path):
    """Three steps of samples of two lengths, against torch's optimiser on a stock model and one loss per step."""
    samples = texts((20, 13, 20, 13))
    options = {"steps": 3, "lr": 1e-3, "batch_size": 1, "accumulate": 4}
    recover(student(), tmp_path / "out", data=write_data(tmp_path, samples), stage="lm", **options)
    model, _ = load_stock(student(), "float32")
    model.requires_grad_(False)
    weights = {name: model.get_parameter(name).requires_grad_() for name in TRAINED}
    adam = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    for rate in (1e-3, 1e-3 * 2 / 3, 1e-3 / 3):
        found = [model(input_ids=torch.tensor([s]), use_cache=False).logits[0, :-1] for s in samples]
        following = torch.cat([torch.tensor(s[1:]) for s in samples])
        F.cross_entropy(torch.cat(found), following).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        adam.zero_grad()
    tensors, _ = tiny.read(tmp_path / "out")
    for name, weight in weights.items():  # Adam's first steps only see signs: what is near zero may turn
        assert np.mean(np.abs(tensors[name] - weight.detach().numpy()) < 1e-5) > 0.99


def test_distillation_is_the_divergence_from_the_teacher(student, tiny_checkpoint):
    """Sum over tokens of p log(p / q), and how many; zero of a model from itself."""
    models = [load_stock(folder, "float32")[0] for folder in (student(), tiny_checkpoint("qwen2_moe"))]
    ids = torch.tensor(texts((20, 20)))
    with torch.no_grad():
        q, p = (m(input_ids=ids, use_cache=False).logits.double().softmax(-1) for m in models)
        loss, count = distillation(*models)(ids)
        none, _ = distillation(models[1], models[1])(ids)
    assert count == 40 and float(loss) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
    assert abs(float(none)) < 1e-4


def test_a_layer_is_compared_with_its_teacher_on_the_students_own_inputs(student, tiny_checkpoint):
    """The mean over layers of |f(x) - y(x)|^2 / power, with x from the student's stream in both."""
    model, teacher = (load_stock(folder, "float32")[0] for folder in (student(), tiny_checkpoint("qwen2_moe")))
    students = {i: model.model.layers[i].mlp for i in (1, 3)}
    layers, ids, inputs = pair(model, teacher, students), torch.tensor(texts((20, 20))), {}
    for i, module in students.items():
        module.register_forward_pre_hook(lambda m, args, i=i: inputs.setdefault(i, args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        expected, power = 0.0, {}
        for i, x in inputs.items():
            y = teacher.model.layers[i].mlp(x)
            y = y[0] if isinstance(y, tuple) else y
            power[i] = float(y.square().sum()) / 40
            expected += float((students[i](x) - y).square().sum()) / power[i] / 2
        layers.measure_power([ids])
        assert layers.power == pytest.approx(power, rel=1e-5)
        assert float(layers(ids)[0]) == pytest.approx(expected, rel=1e-4)


def test_every_stage_lowers_its_own_loss_on_held_out_samples(student, tiny_checkpoint, tmp_path):
    """Local, then distilled; or by text alone."""
    data, many = write_data(tmp_path, texts((20,) * 64)), {"steps": 40, "lr": 2e-3, "batch_size": 8}
    both = recover(student(), tmp_path / "a", teacher=tiny_checkpoint("qwen2_moe"), data=data, **many).report
    text = recover(student(), tmp_path / "b", data=data, stage="lm", **many).report
    for stage in [*both["stages"], *text["stages"]]:
        assert stage["after"][stage["stage"]] < stage["before"][stage["stage"]]
    assert both["stages"][1]["before"] == both["stages"][0]["after"]
    assert all(v["after"] <= v["before"] for v in both["stages"][0]["closed_form"].values())


# --- the closed form -----------------------------------------------------------------------------------------------


def sums(hidden, wanted):
    width, dim = hidden.shape[1], wanted.shape[1]
    found = Sums(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dim, dtype=torch.float64))
    found.add(hidden[:7], wanted[:7])
    found.add(hidden[7:], wanted[7:])
    return found


def test_the_refit_is_least_squares_beside_the_ridge():
    """As numpy solves the tokens with the ridge's rows below them; units that never fire keep their columns."""
    draw = torch.Generator().manual_seed(0)
    hidden, down = torch.randn(60, 9, generator=draw), torch.randn(4, 9, generator=draw)
    hidden[:, 5] = 0
    wanted = torch.randn(60, 4, generator=draw) + hidden @ torch.randn(9, 4, generator=draw)
    found, ridge = refit(sums(hidden, wanted), sums(hidden, wanted), down)
    assert ridge == 1e-4  # judged by the same tokens, the weakest wins
    live = [i for i in range(9) if i != 5]
    h, y = hidden[:, live].double().numpy(), wanted.double().numpy()
    weight = np.sqrt(ridge * np.mean(np.sum(h * h, 0)))
    rows = np.concatenate([h, weight * np.eye(8)])
    targets = np.concatenate([y, weight * down[:, live].double().numpy().T])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    assert found[:, live].numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert torch.equal(found[:, 5], down[:, 5])


def test_the_error_of_a_refit_is_that_of_its_outputs():
    """Relative squared error, from the sums alone."""
    draw = torch.Generator().manual_seed(1)
    hidden, wanted, down = (torch.randn(*s, generator=draw) for s in ((20, 6), (20, 3), (3, 6)))
    expected = (wanted - hidden @ down.T).square().sum() / wanted.square().sum()
    assert sums(hidden, wanted).error(down) == pytest.approx(float(expected), rel=1e-5)


def test_a_refit_that_others_do_not_like_is_not_made():
    """Fitted to noise, judged by what the present weights explain: they stay."""
    draw = torch.Generator().manual_seed(2)
    hidden, down = torch.randn(30, 6, generator=draw), torch.randn(3, 6, generator=draw)
    found, ridge = refit(sums(hidden, torch.randn(30, 3, generator=draw)), sums(hidden, hidden @ down.T), down)
    assert ridge is None and torch.equal(found, down)


def test_the_closed_form_alone_changes_down_alone(student, tiny_checkpoint, tmp_path, data):
    """`--stage local --steps 0`; gates and ups keep their bytes."""
    out = tmp_path / "out"
    report = recover(student(), out, teacher=tiny_checkpoint("qwen2_moe"), data=data, stage="local", steps=0)
    found = {v["ridge"] for v in report.report["stages"][0]["closed_form"].values()}
    assert None not in found
    assert changed(student(), out) == {name for name in TRAINED if "down" in name}
    assert report.report["stages"][0]["after"]["local"] < report.report["stages"][0]["before"]["local"]


def test_verify_finds_what_changed_besides_the_trained_layers(student, tiny_checkpoint, tmp_path, data):
    """Against the condensed model all but six matrices are byte-equal; a seventh that differs is named, and so is a
    model that was never trained."""
    recover(student(), tmp_path / "out", teacher=tiny_checkpoint("qwen2_moe"), data=data, **QUICK)
    found = verify(tmp_path / "out", against=student())
    assert found["ok"] and "6 trained, 6 changed" in found["checks"][1]["detail"]
    other = verify(tmp_path / "out", against=tiny_checkpoint("qwen2_moe"))
    assert not other["ok"] and "is not the model that was trained" in other["checks"][1]["detail"]
    name = "model.layers.0.mlp.gate.weight"
    tensor = Checkpoint.open(tmp_path / "out").tensors[name]
    with (tmp_path / "out" / tensor.file).open("r+b") as file:
        file.seek(tensor.start)
        file.write(b"\x01")
    damaged = verify(tmp_path / "out", against=student())
    assert not damaged["ok"] and f"other bytes in {name}" in damaged["checks"][1]["detail"]


# --- the loop ------------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls_linearly():
    """100 steps: 5 of warm-up, then down by 1/96 each; a step after the last would have 0."""
    rates = [learning_rate(step, 100, 96.0) for step in range(100)]
    assert rates[:6] == pytest.approx([19.2, 38.4, 57.6, 76.8, 96.0, 95.0])
    assert rates[-2:] == pytest.approx([2.0, 1.0])
    assert learning_rate(0, 1, 1.0) == 1.0


@pytest.mark.parametrize(("hidden", "given", "rate"), [(2500, None, 1e-4), (32, None, 1e-3), (2500, 0.5, 0.5)])
def test_wide_models_learn_slowly_unless_told(student, tmp_path, hidden, given, rate):
    """0.25 over the hidden size, 1e-3 at most."""
    folder = with_config(student(), tmp_path / "small", hidden_size=hidden)
    assert peak_rate(trainee_of(Checkpoint.open(folder), Training(stage="lm", lr=given))) == pytest.approx(rate)


def test_all_samples_are_taken_before_any_is_taken_again():
    """7 samples, 3 a step: the first 7 of 9 are all of them, in an order that the seed decides."""
    order = [i for step in range(7) for i in taken(7, 3, step, seed=5)]
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14] and order != [i for step in range(7) for i in taken(7, 3, step, seed=6)]


def test_only_samples_of_one_length_share_a_batch():
    """Nothing is padded, nothing is lost."""
    found = [b.tolist() for b in batches([(1, 2), (3, 4, 5), (6, 7), (8, 9)], 2)]
    assert found == [[[1, 2], [6, 7]], [[8, 9]], [[3, 4, 5]]]


def test_how_samples_are_put_together_does_not_matter(student, tmp_path, data):
    """4 at a time, or 2 and 2 accumulated: the same curve."""
    curves = [
        recover(student(), tmp_path / str(size), data=data, stage="lm", steps=4, batch_size=size, accumulate=4 // size)
        for size in (4, 2)
    ]
    losses = [[loss for _, loss in report.report["curve"]["lm"]] for report in curves]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def constant_gradient(parameter):
    """One weight, of bfloat16, under a gradient of 1."""
    part = Part({"w": parameter}, {"w": torch.ones(1)}, lambda values: iter(()))
    return Learner([part]), part, lambda ids: (parameter.float().sum(), 1)


def test_masters_learn_what_bfloat16_would_lose():
    """Steps of 1e-3 from 1.0, where bfloat16 has gaps of 4e-3 below: ten of them arrive."""
    learner, part, objective = constant_gradient(torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16)))
    for _ in range(10):
        learner.step(objective, [torch.zeros(1, 1)], 1e-3)
    assert part.masters["w"].item() == pytest.approx(0.99, abs=1e-5)
    assert part.parameters["w"].item() == pytest.approx(0.99, abs=2e-3)


def test_a_loss_that_is_no_number_stops_the_run():
    """And says what to do."""
    learner, _, objective = constant_gradient(torch.nn.Parameter(torch.full((1,), torch.inf, dtype=torch.bfloat16)))
    with pytest.raises(CoterieError, match="the loss became inf; use a smaller --lr"):
        learner.step(objective, [torch.zeros(1, 1)], 1e-3)


# --- interruption --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "step"),
    [("closed form", 1), ("local", 3), ("distill", 1), ("distill", 5)],
)
def test_a_resumed_run_ends_with_the_same_bytes(student, tiny_checkpoint, tmp_path, data, stage, step):
    """Interrupted before a state was saved, after one, at a stage's end and before the end; saved every 2 steps."""
    options = {"teacher": tiny_checkpoint("qwen2_moe"), "data": data, "save_every": 2, **QUICK, "steps": 5}
    whole = recover(student(), tmp_path / "whole", **options)

    def interrupt(what, done, total):
        if (what, done) == (f"recovering ({stage})", step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(student(), tmp_path / "out", on_progress=interrupt, **options)
    assert not (tmp_path / "out").exists()
    again = recover(student(), tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert again.report["curve"] == whole.report["curve"] and again.report["stages"] == whole.report["stages"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_a_resumed_run_must_be_the_same_run(student, tiny_checkpoint, tmp_path, data):
    """Other options or another teacher are refused; a complete OUT is what it is."""
    out, options = tmp_path / "out", {"data": data, "stage": "lm", **QUICK}

    def interrupt(what, done, total):
        if what == "recovering (lm)":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(student(), out, on_progress=interrupt, **options)
    (tmp_path / "out.partial" / "training.safetensors").write_bytes(b"damaged")
    with pytest.raises(CoterieError, match=r"damaged .*start anew with --overwrite"):
        recover(student(), out, resume=True, **options)
    (tmp_path / "out.partial" / "training.safetensors").unlink()
    for other in ({"seed": 1}, {"teacher": tiny_checkpoint("qwen2_moe")}):
        with pytest.raises(CoterieError, match="was begun with another source, plan or option"):
            recover(student(), out, resume=True, **options | other)
    made = recover(student(), out, resume=True, **options)
    assert recover(student(), out, resume=True, **options).report == json.loads(json.dumps(made.report))
    with pytest.raises(CoterieError, match="was made with another source, plan or option"):
        recover(student(), out, resume=True, **options | {"lr": 0.5})


# --- the record ----------------------------------------------------------------------------------------------------


def test_what_was_done_is_recorded(student, tiny_checkpoint, tmp_path, data):
    """The source's plan is kept, so that later verbs know the condensed layers; losses, curves, and whence it came."""
    report = recover(student(), tmp_path / "out", teacher=tiny_checkpoint("qwen2_moe"), data=data, **QUICK)
    record = json.loads((tmp_path / "out" / "coterie.json").read_text())
    source = json.loads((student() / "coterie.json").read_text())
    assert record == json.loads(json.dumps(report.as_dict())) and record["command"] == "recover"
    assert record["plan"] == source["plan"]
    found = record["report"]
    assert found["recovered"] == {"command": "apply", "source": source["source"]}
    assert set(found["trained"]["tensors"]) == TRAINED and found["trained"]["layers"] == [1, 3]
    assert [stage["stage"] for stage in found["stages"]] == ["local", "distill"]
    assert all([step for step, _ in curve] == [0, 1, 2] for curve in found["curve"].values())
    assert found["held_out"]["samples"] == 2 and found["data"]["texts"]["samples"] == 16
    assert found["before"] == found["after"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "coterie recover" in text and "layers 1, 3" in text and "nan" not in text


def test_a_dry_run_reads_no_data_and_writes_nothing(student, tiny_checkpoint, tmp_path):
    """What would be trained, and the memory that takes: 16 bytes a trained weight, 4 of every one, logits, a fit."""
    report = recover(
        student(), tmp_path / "out", teacher=tiny_checkpoint("qwen2_moe"), data=["x=hub:nobody/nothing"], dry_run=True
    ).report
    sizes = [Checkpoint.open(f).num_parameters for f in (student(), tiny_checkpoint("qwen2_moe"))]
    assert report["trained"]["parameters"] == 2 * 3 * 56 * tiny.HIDDEN
    expected = 4 * sum(sizes) + 16 * 2 * 3 * 56 * 32 + 16 * 8 * 256 * tiny.VOCABULARY + 40 * 56**2
    assert report["memory_bytes"] == expected
    assert not list(tmp_path.iterdir())


def test_few_samples_judge_what_they_teach(student, tmp_path):
    """Seven leave none over; that is said."""
    report = recover(student(), tmp_path / "out", data=write_data(tmp_path, texts((20,) * 7)), stage="lm", steps=1)
    assert any("too few to hold some out" in note for note in report.report["warnings"])


def test_dropped_layers_stay_empty(student, tiny_checkpoint, tmp_path, data):
    """An MLP of zeros has no gradient: it is left out, said aloud, and refused where nothing else is condensed."""
    empty = {"condensed": {"experts": [], "gates": [], "shared_gate": 0.0}}
    folder = student("qwen2_moe", {"1": empty, "3": PLAN["3"]})
    report = recover(folder, tmp_path / "out", teacher=tiny_checkpoint("qwen2_moe"), data=data, **QUICK)
    assert {name.split(".")[2] for name in changed(folder, tmp_path / "out")} == {"3"}
    assert any("layers 1 were dropped" in note for note in report.report["warnings"])
    with pytest.raises(CoterieError, match="all empty"):
        recover(student("qwen2_moe", {"1": empty}), tmp_path / "b", data=data, stage="lm")


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "sft"}, "--stage 'sft': unknown"),
        ({}, "--stage all: needs --teacher"),
        ({"stage": "distill"}, "--stage distill: needs --teacher"),
        ({"stage": "lm", "steps": 0}, "--steps 0: expected a whole number, at least 1"),
        ({"stage": "lm", "batch_size": 0}, "--batch-size 0"),
        ({"stage": "lm", "accumulate": 1.5}, "--accumulate 1.5"),
        ({"stage": "lm", "save_every": 0}, "--save-every 0"),
        ({"stage": "lm", "lr": 0}, "--lr 0: expected a learning rate"),
        ({"stage": "lm", "lr": float("nan")}, "--lr nan: expected a learning rate"),
        ({"stage": "lm", "dtype": "float16"}, "--dtype 'float16': expected auto, float32 or bfloat16"),
        ({"stage": "lm", "layer_ids": [4]}, "--layer-ids 4: the model's 4 layers end at 3"),
        ({"stage": "lm", "layer_ids": [1, 1]}, "expected distinct layers"),
        ({"stage": "lm", "layer_ids": "x"}, "expected decoder layer numbers"),
        ({"stage": "local", "layer_ids": [1]}, "--layer-ids is for --stage lm alone"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(student, tmp_path, options, message):
    """Without reading data, and with nothing written."""
    with pytest.raises(CoterieError, match=message):
        recover(student(), tmp_path / "out", data=["x=hub:nobody/nothing"], **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "what"),
    [("vocab_size", "vocabulary"), ("hidden_size", "hidden size"), ("num_hidden_layers", "number of layers")],
)
def test_another_models_teacher_is_refused(student, tiny_checkpoint, tmp_path, key, what):
    """Whose vocabulary, hidden size or number of layers differs; from headers alone."""
    teacher = with_config(tiny_checkpoint("qwen2_moe"), tmp_path / "teacher", **{key: 5})
    with pytest.raises(CoterieError, match=f"its {what} is 5"):
        recover(student(), tmp_path / "out", teacher=teacher, data=["x=hub:nobody/nothing"])


def test_models_that_cannot_teach_or_learn_are_refused(student, tiny_checkpoint, tmp_path):
    """No condensed layers on record, a teacher that is the student or has no stock class, weights made sparse."""
    whole, data = tiny_checkpoint("qwen2_moe"), ["x=hub:nobody/nothing"]
    with pytest.raises(CoterieError, match="records no condensed layers"):
        recover(whole, tmp_path / "out", teacher=student(), data=data)
    with pytest.raises(CoterieError, match="is MODEL itself"):
        recover(student(), tmp_path / "out", teacher=student(), data=data)
    with pytest.raises(CoterieError, match="repackage it first"):
        recover(student(), tmp_path / "out", teacher=tiny_checkpoint("deepseek"), data=data)
    sparse = shutil.copytree(whole, tmp_path / "sparse")
    plan = {"layers": {"1": {"sparsity": {"expert": 0.5}}}, "budget": {}}
    (sparse / "coterie.json").write_text(json.dumps({"plan": plan}))
    with pytest.raises(CoterieError, match="it was made sparse"):
        recover(sparse, tmp_path / "out", data=data, stage="lm", layer_ids=[1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "message"), [("2", "layer 2 has experts"), ("x", "no layer 'x'"), ("9", "no layer")])
def test_a_record_that_is_not_of_this_model_is_refused(student, tmp_path, key, message):
    """Layers recorded as condensed that have experts, or do not exist."""
    folder = shutil.copytree(student(), tmp_path / "small")
    plan = {"layers": {**PLAN, key: PLAN["1"]}}
    (folder / "coterie.json").write_text(json.dumps({"plan": plan}))
    with pytest.raises(CoterieError, match=message):
        recover(folder, tmp_path / "out", data=["x=hub:nobody/nothing"], stage="lm")


@pytest.mark.parametrize(
    ("sample", "message"),
    [([5, 200, 6], "token 200 is not among the model's 128"), ([5], "found one token; expected two at least")],
)
def test_samples_that_do_not_fit_are_refused(student, tmp_path, sample, message):
    """Before anything is written."""
    data = write_data(tmp_path, [*texts(), sample])
    with pytest.raises(CoterieError, match=message):
        recover(student(), tmp_path / "out", data=data, stage="lm")
    assert [p.name for p in tmp_path.iterdir()] == ["texts.jsonl"]


def test_damaged_weights_are_named(student, tmp_path, data):
    """NaN in an MLP that would be trained: refused, with nothing written."""
    folder = shutil.copytree(student(), tmp_path / "bad")
    tensors, config = tiny.read(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    tiny.write(folder, tensors, config)
    with pytest.raises(CoterieError, match="holds NaN"):
        recover(folder, tmp_path / "out", data=data, stage="lm")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_model_that_is_not_loaded_as_stored_is_refused(student, tmp_path, data):
    """Masters begin as what the model computes with, or not at all."""
    checkpoint = Checkpoint.open(student())
    model = load(student())
    job = trainee_of(checkpoint, Training(stage="lm"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(CoterieError, match="not loaded as it is stored"):
        mlp(model, checkpoint, mlp_names(job.model, 1))


def test_memory_that_is_not_there_is_asked_for_in_vain(student, tmp_path, data):
    """Said with the numbers, before anything is loaded."""
    with pytest.raises(CoterieError, match=r"training takes about .* GB of memory"):
        recover(student(), tmp_path / "out", data=data, stage="lm", batch_size=10**9)


def test_lm_is_judged_as_language_modelling(student):
    """-log p of every token but the first, summed in nats."""
    model, _ = load_stock(student(), "float32")
    ids = torch.tensor(texts((20, 20)))
    with torch.no_grad():
        loss, count = language_modelling(model)(ids)
        p = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    expected = -sum(float(p[b, t, ids[b, t + 1]]) for b in range(2) for t in range(19))
    assert count == 38 and float(loss) == pytest.approx(expected, rel=1e-5)
