"""Unstructured pruning end to end on tiny models: exact sparsity, untouched rest, resume, refusals."""

from fractions import Fraction

import numpy as np
import pytest

import tiny
from coterie.errors import CoterieError
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.sparsify import show, sparsify

METHODS = ("magnitude", "wanda", "owl", "moe-pruner", "sparsegpt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 samples of 64 token ids."""
    return tiny.id_lines(tmp_path_factory.mktemp("data") / "ids.jsonl", 24)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_zeros_are_exact_and_nothing_else_changes(tiny_checkpoint, tmp_path, data, method, model_type):
    """floor(S x inputs) zeros in each row, or round(S x weights) in all, on disk; other tensors keep their bytes."""
    source, out = tiny_checkpoint(model_type), tmp_path / "out"
    report = sparsify(source, out, method=method, sparsity=0.37, data={} if method == "magnitude" else data).report
    before, after = Model.open(source), Checkpoint.open(out)
    zeros = total = floored = 0
    for name, role in before.roles.items():
        values = after.read(name)
        if role == "expert" and not name.endswith("bias"):
            inputs = before.checkpoint.tensors[name].shape[-2 if model_type == "gpt_oss" else -1]
            zeros, total = zeros + int((values == 0).sum()), total + values.size
            floored += values.size // inputs * int(Fraction("0.37") * inputs)
        else:
            assert after.raw(name) == before.checkpoint.raw(name), name
    assert zeros == report["expert_zeros"] == (round(0.37 * total) if method in ("owl", "sparsegpt") else floored)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magnitude", "sparsity": 0.5},
        {"method": "magnitude", "pattern": "2:4"},
        {"method": "wanda", "sparsity": 0.43, "also": "attention,shared"},
        {"method": "owl", "sparsity": 0.5},
    ],
    ids=["magnitude", "pattern", "also", "owl"],
)
def test_a_dry_run_foresees_the_zeros_and_the_bytes(tiny_checkpoint, tmp_path, data, options):
    """The shares are those of the run; packed bytes too, but for 8 a tensor where matrices differ in zeros."""
    source, how = tiny_checkpoint("qwen2_moe"), options | ({} if options["method"] == "magnitude" else {"data": data})
    for save in ("dense", "sparse"):
        dry, real = (
            sparsify(source, tmp_path / save, save=save, dry_run=dry_run, **how).report for dry_run in (True, False)
        )
        assert dry["sparsity"] == pytest.approx(real["sparsity"]) and dry["expert_zeros"] == real["expert_zeros"]
        slack = 0 if save == "dense" or options["method"] == "magnitude" else 8 * len(Checkpoint.open(source).tensors)
        assert dry["after"]["bytes"] == pytest.approx(real["after"]["bytes"], abs=slack)


def test_what_zeros_cost_until_they_are_packed_is_said_last(tiny_checkpoint, tmp_path):
    """Beside the share that was asked for; a packed result has nothing more to say, nor a rule that made no zeros."""
    source, asked = tiny_checkpoint("qwen3_moe"), {"out": tmp_path / "out"}
    how = {"method": "magnitude", "sparsity": 0.5}
    dry, done = (list(show(sparsify(source, tmp_path / "out", dry_run=d, **how), asked)) for d in (True, False))
    zero = (
        "50 % of the experts' weights {} zero; the files stay as large unless --save sparse (or `coterie pack`): then"
    )
    assert dry[-1].startswith(zero.format("will be")) and done[-1].startswith(zero.format("are"))
    assert all(any("50.00 %, asked for: 50 %" in line for line in lines) for lines in (dry, done))
    packed = show(sparsify(source, tmp_path / "packed", save="sparse", **how), asked)
    none = show(sparsify(source, tmp_path / "none", method="magnitude", sparsity=0.0), asked)
    assert not any("stay as large" in line for line in [*packed, *none])


def test_a_killed_run_resumes_to_the_same_bytes(tiny_checkpoint, tmp_path, data):
    """Interrupted after any layer and resumed, the weights are those of an undisturbed run."""
    source = tiny_checkpoint("qwen3_moe")
    sparsify(source, tmp_path / "whole", method="owl", sparsity=0.5, data=data)
    for layer in (1, 2, 3):
        out = tmp_path / f"out{layer}"

        def stop(stage, done, total, layer=layer):
            if (stage, done) == ("pruning layers", layer):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sparsify(source, out, method="owl", sparsity=0.5, data=data, on_progress=stop)
        sparsify(source, out, method="owl", sparsity=0.5, data=data, resume=True)
        for name in ("model.safetensors", "config.json"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "astrology"}, "expected one of"),
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"method": "magnitude", "one_pass": True}, "ignored"),
        ({"method": "owl", "pattern": "2:4"}, "wanda"),
        ({"pattern": "4:2"}, "n:m"),
        ({"dtype": "int3"}, "expected one of"),
    ],
)
def test_bad_options_are_refused(tiny_checkpoint, tmp_path, data, options, says):
    """Values out of range, and options that contradict or would be ignored."""
    given = {} if options.get("method") == "magnitude" else {"data": data}
    with pytest.raises(CoterieError, match=says):
        sparsify(tiny_checkpoint("qwen3_moe"), tmp_path / "out", **options, **given)
    assert not (tmp_path / "out").exists()


def test_options_of_data_without_effect_are_said(tiny_checkpoint, tmp_path):
    """Magnitude needs no data: how many samples there would be changes nothing."""
    report = sparsify(tiny_checkpoint("qwen3_moe"), tmp_path / "out", method="magnitude", samples=8, seed=3).report
    said = [w for w in report["warnings"] if "had no effect: magnitude needs no data" in w]
    assert [w.split()[0] for w in said] == ["--samples", "--seed"]


@pytest.mark.parametrize("share", [float("nan"), float("inf"), -0.1])
def test_a_share_that_is_none_is_refused(tiny_checkpoint, tmp_path, share):
    """Numbers that no fraction can hold among them."""
    with pytest.raises(CoterieError, match=r"--sparsity .*: the share of zeros must be in \[0, 1\)"):
        sparsify(tiny_checkpoint("qwen3_moe"), tmp_path / "out", method="magnitude", sparsity=share)


def test_attention_experts_keep_their_weights(tiny_checkpoint, tmp_path):
    """Only the layers' own experts are zeroed: attention experts (jetmoe) are written as they were."""
    source, out = tiny_checkpoint("jetmoe"), tmp_path / "out"
    sparsify(source, out, method="magnitude", sparsity=0.5)
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    attention = [name for name in before.tensors if "self_attention" in name]
    assert attention and all(after.raw(name) == before.raw(name) for name in attention)


def test_quantised_experts_keep_their_codes_and_scales(tmp_path):
    """8-bit experts are pruned by their dequantised magnitude; codes that stay, and scales, keep their bytes."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from handmade import qwen, qwen_config, read_all, save

    plain = read_all(qwen(tmp_path / "plain", experts=4, layers=1))
    tensors = {}
    for name, values in plain.items():
        tensors[name] = torch.from_numpy(values)
        if ".experts." in name:
            scale = tensors[name].abs().amax(1, keepdim=True) / 448
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    source = save(tmp_path / "model", qwen_config(num_experts=4, num_hidden_layers=1), [plain])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    sparsify(source, tmp_path / "out", method="magnitude", sparsity=0.34)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    for name, tensor in before.tensors.items():
        old, new = np.frombuffer(before.raw(name), np.uint8), np.frombuffer(after.raw(name), np.uint8)
        if tensor.dtype.startswith("F8"):
            rows = new.reshape(tensor.shape)
            assert ((rows == 0).sum(1) >= int(0.34 * tensor.shape[1])).all() and (new[new != 0] == old[new != 0]).all()
        else:
            assert (old == new).all(), name


def test_verify_knows_zeros_from_damage(tiny_checkpoint, tmp_path, data):
    """A pruned checkpoint passes; one weight changed, or one zero too many, is a fault."""
    from coterie.verbs.verify import verify

    source, out = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    sparsify(source, out, sparsity=0.5, data=data)
    assert verify(out, against=source)["ok"]
    path, tensor = (
        out / "model.safetensors",
        next(t for n, t in Checkpoint.open(out).tensors.items() if ".experts." in n),
    )
    raw = bytearray(path.read_bytes())
    place = next(i for i in range(tensor.start, tensor.end, 4) if raw[i : i + 4] != b"\0\0\0\0")
    for change, says in ((b"\x01", "neither the original's nor zero"), (None, "the plan records")):
        damaged = raw.copy()
        damaged[place : place + 4] = (
            bytes(4) if change is None else bytes([damaged[place] ^ 1]) + damaged[place + 1 : place + 4]
        )
        path.write_bytes(damaged)
        found = verify(out, against=source)
        assert not found["ok"] and any(says in check["detail"] for check in found["checks"])
