"""Settings keyed by expert or layer number: renumbered in whatever JSON travels, or refused with the line quoted."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

import tiny
from coterie.errors import CoterieError
from coterie.verbs.apply import apply
from handmade import qwen

KEEP = {"0": {"kept": [1, 3, 4]}, "1": {"kept": [0, 1, 5]}}  # of eight
EXPERT = "model.layers.{}.mlp.experts.{}.up_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return qwen(tmp_path_factory.mktemp("original") / "model", num_attention_heads=2, num_key_value_heads=2)


def applied(original, folder, settings=None, files=None, plan=None, **config):
    """A copy of the original with settings and files, after a plan: its config's settings, and the files."""
    source, out = folder / "source", folder / "out"
    shutil.copytree(original, source)
    said = json.loads((source / "config.json").read_text()) | config
    said |= {"quantization_config": settings} if settings else {}
    (source / "config.json").write_text(json.dumps(said))
    for name, content in (files or {}).items():
        (source / name).write_text(content if isinstance(content, str) else json.dumps(content))
    apply(source, {"layers": KEEP} if plan is None else plan, out)
    found = json.loads((out / "config.json").read_text())
    return found.get("quantization_config"), {name: (out / name).read_text() for name in files or {}}


def ignoring(original, folder, *lines, plan=None):
    found, _ = applied(original, folder, {"quant_method": "compressed-tensors", "ignore": list(lines)}, plan=plan)
    return found["ignore"]


def test_names_of_experts_are_renumbered_and_those_that_go_are_taken_out(original, tmp_path):
    """Each layer by the experts that it keeps; names without an expert's number stay."""
    lines = ["lm_head", "model.layers.1.mlp.gate", *(EXPERT.format(layer, e) for layer in (0, 1) for e in range(8))]
    expected = ["lm_head", "model.layers.1.mlp.gate", *(EXPERT.format(layer, i) for layer in (0, 1) for i in range(3))]
    assert ignoring(original, tmp_path, *lines) == expected
    found = ignoring(
        original, tmp_path / "one", "layers.0.mlp.experts.3", "model.language_model.layers.1.mlp.experts.5."
    )
    assert found == ["layers.0.mlp.experts.1", "model.language_model.layers.1.mlp.experts.2."]


def test_names_of_layers_move_up(original, tmp_path):
    """Where layer 0 goes, what is said of it goes too, and what is said of layer 1 is said of layer 0."""
    lines = ["model.layers.0.mlp.gate", "model.layers.1", EXPERT.format(1, 5), "re:.*mlp.gate$", "visual.blocks.1.mlp"]
    plan = {"layers": {}, "dropped": [0]}
    with pytest.raises(CoterieError, match=r"ignore: 'visual\.blocks\.1\.mlp' .* does not say which layers"):
        ignoring(original, tmp_path, *lines, plan=plan)
    expected = ["model.layers.0", EXPERT.format(0, 5), "re:.*mlp.gate$"]
    assert ignoring(original, tmp_path / "two", *lines[:-1], plan=plan) == expected


def test_other_stacks_of_layers_keep_their_numbers(original, tmp_path):
    """A tower's layers are not the decoder's; a pattern that may mean either is refused."""
    tensors, config = tiny.read(original)
    tensors["visual.blocks.1.mlp.weight"] = np.ones((2, 2), np.float32)
    source = tiny.write(tmp_path / "tower", tensors, config)
    plan = {"layers": {}, "dropped": [0]}
    lines = ["visual.blocks.1.mlp", "model.visual.blocks.0", "re:visual\\.blocks\\.1\\..*"]
    assert ignoring(source, tmp_path / "a", *lines, plan=plan) == lines
    with pytest.raises(CoterieError, match=r"'re:\.\*layers\\\\\.1\\\\\.mlp' .* does not say which layers"):
        ignoring(source, tmp_path / "b", "re:.*layers\\.1\\.mlp", plan=plan)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("+:model\\.layers\\.1\\.mlp\\.experts\\.5\\..*", "+:model\\.layers\\.1\\.mlp\\.experts\\.2\\..*"),
        ("-:.*layers\\.1\\..*experts\\.5\\.(gate|up)_proj$", "-:.*layers\\.1\\..*experts\\.2\\.(gate|up)_proj$"),
        ("model.layers.1.mlp.experts.5.*", "model.layers.1.mlp.experts.2.*"),
        ("re:.*experts\\.1\\.up_proj", None),  # 0 in one layer, 1 in the other
        ("re:.*layers\\.0\\..*experts\\.5\\..*", ""),  # goes
        ("re:.*experts\\.7\\.(gate|up)_proj", None),  # goes in both, but so does what it names besides
        ("re:.*experts\\.2\\.up_proj", ""),  # goes in both
        ("re:.*experts\\.(3|7)\\..*", None),
        ("re:.*experts\\.1\\d\\..*", None),
        ("re:.*experts\\.[0-3]\\..*", None),
        ("re:.*experts\\.5.*", None),
        ("-:.*\\.5\\..*", None),
        ("model.layers.1.mlp.experts.5*", None),
        ("model.layers.1.mlp.experts.[0-4].*", None),
    ],
)
def test_patterns_with_an_experts_number(original, tmp_path, before, after):
    """A number written out is renumbered; what tells numbers apart in another way is refused, and quoted."""
    if after is None:
        with pytest.raises(CoterieError) as caught:
            ignoring(original, tmp_path, before)
        assert repr(before) in str(caught.value) and "config.json: quantization_config: ignore" in str(caught.value)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out*"))
        return
    assert ignoring(original, tmp_path, before) == ([after] if after else [])


@pytest.mark.parametrize(
    "pattern",
    [
        "-:.*self_attn.*", "-:.*mlp\\.gate$", "re:.*mlp.gate$", "re:.*experts\\.\\d+\\.(gate|up|down)_proj$",
        "re:.*experts.[0-9]+.[a-z_]+", "model.layers.*.self_attn", "re:^(?!.*experts).*$", "re:(?:(?!experts).)*$",
        "re:.*layers\\.(0|1)\\.mlp.*", "re:.*layers\\.[0-9]\\..*experts.*", "model.layers.1*", "re:.*[qkv]_proj",
        "*w1*", "re:.*experts\\.[^.]+\\.w2$",
    ],
)  # fmt: skip
def test_patterns_that_match_any_expert_stay(original, tmp_path, pattern):
    """They mean the same of the experts' new numbers; layers' numbers are the old ones."""
    assert ignoring(original, tmp_path, pattern, EXPERT.format(0, 3)) == [pattern, EXPERT.format(0, 1)]


def test_keys_are_renumbered_as_lines_are(original, tmp_path):
    """GPTQ's `dynamic`, groups by name, and values below a name that goes."""
    rule = "+:model\\.layers\\.1\\.mlp\\.experts\\.{}\\..*"
    settings = {
        "quant_method": "gptq",
        "version": "0.13.1+cu121",
        "dynamic": {"-:.*self_attn.*": {}, rule.format(5): {"bits": 8}, rule.format(7): {"bits": 2}},
        "extra_config": {EXPERT.format(0, 4): {"bits": 16}, EXPERT.format(0, 0): {"bits": 16}},
        "config_groups": {"group_0": {"targets": ["Linear", EXPERT.format(1, 5)]}},
        "modules_to_not_convert": None,
    }
    found, _ = applied(original, tmp_path, settings)
    assert found == settings | {
        "dynamic": {"-:.*self_attn.*": {}, rule.format(2): {"bits": 8}},
        "extra_config": {EXPERT.format(0, 2): {"bits": 16}},
        "config_groups": {"group_0": {"targets": ["Linear", EXPERT.format(1, 2)]}},
    }


def test_other_files_are_renumbered_too_or_stay_as_they_are(original, tmp_path):
    """What names modules in JSON beside the weights; texts that look like names are a tokenizer's words."""
    quantised = {"quantization": {"exclude_modules": ["lm_head", EXPERT.format(1, 5)], "n": [1, 2]}}
    files = {
        "hf_quant_config.json": quantised,
        "measured.json": [{"layer": EXPERT.format(1, 1), "pattern": "experts\\.(3|7)"}, None],
        "tokenizer.json": {"model": {"vocab": {EXPERT.format(1, 5): 0}}},
        "plain.json": '{"a":   1}',
        "broken.json": "{",
    }
    _, found = applied(original, tmp_path, files=files)
    renumbered = {"exclude_modules": ["lm_head", EXPERT.format(1, 2)], "n": [1, 2]}
    assert json.loads(found["hf_quant_config.json"]) == {"quantization": renumbered}
    assert json.loads(found["measured.json"])[0]["layer"] == EXPERT.format(1, 1)
    assert json.loads(found["tokenizer.json"]) == files["tokenizer.json"]
    assert (found["plain.json"], found["broken.json"]) == ('{"a":   1}', "{")


def test_a_file_of_settings_that_cannot_be_read_is_refused(original, tmp_path):
    """It may name what is renumbered. So is a pattern in it, by the file's name."""
    with pytest.raises(CoterieError, match=r"quantize_config\.json: not valid JSON"):
        applied(original, tmp_path / "a", files={"quantize_config.json": "{"})
    with pytest.raises(CoterieError, match=r"quantize_config\.json: dynamic: '\+:\.\*experts"):
        applied(original, tmp_path / "b", files={"quantize_config.json": {"dynamic": {"+:.*experts\\.(1|2)": {}}}})


def test_what_goes_but_is_no_entry_is_refused(original, tmp_path):
    """A setting whose value names a module that goes."""
    with pytest.raises(CoterieError, match=r"first: 'model\.layers\.0\.mlp\.experts\.0\.up_proj' .*what it names goes"):
        applied(original, tmp_path, {"first": EXPERT.format(0, 0)})


def test_numbers_that_no_expert_has_name_nothing(original, tmp_path):
    """However many digits they have."""
    lines = ["model.layers.0.mlp.experts." + "1" * 5000, "re:.*layers\\." + "1" * 4000 + "\\.mlp", "experts.\u0663"]
    assert ignoring(original, tmp_path, *lines) == lines


def test_a_plan_that_renumbers_nothing_leaves_every_pattern(original, tmp_path):
    """All experts stay."""
    lines = ["re:.*experts\\.(3|7)\\..*", EXPERT.format(0, 7)]
    assert ignoring(original, tmp_path, *lines, plan={"layers": {"0": {"kept": list(range(8))}}}) == lines


def test_long_patterns_are_refused_and_none_is_run(original, tmp_path):
    """They come with untrusted files: one that backtracks for ever costs nothing."""
    bad = "re:(" + "a*" * 30 + ")*b"
    assert ignoring(original, tmp_path / "a", bad) == [bad]
    with pytest.raises(CoterieError, match="more than 4096 characters"):
        ignoring(original, tmp_path / "b", "re:" + "(x|y)" * 1000)


def test_prediction_layers_that_go_take_their_settings_along(original, tmp_path):
    """DeepSeek numbers them on, behind the decoder's."""
    tensors, config = tiny.read(original)
    source = tmp_path / "source"
    source.mkdir()
    tensors |= {n.replace("layers.1.", "layers.2."): v for n, v in tensors.items() if "layers.1." in n}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    lines = [EXPERT.format(1, 5), EXPERT.format(2, 5), "model.layers.2.eh_proj"]
    plan = {"layers": KEEP, "drop_mtp": True}
    assert ignoring(source, tmp_path / "a", *lines, plan=plan) == [EXPERT.format(1, 2)]
