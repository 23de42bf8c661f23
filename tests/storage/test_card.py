"""README.md of a result, and its way to the hub: front matter, commands without local paths, quality, `push`."""

import json
from types import SimpleNamespace

import pytest
import yaml

import coterie
from coterie.errors import CoterieError
from coterie.storage.card import front_matter, is_local, licence_of, own_front_matter, public, with_quality
from handmade import qwen

OWN = """---
license: apache-2.0
language: [en, de]
tags: [chat, mixture-of-experts]
base_model: some/base
pipeline_tag: text-generation
---
# The original
"""


def matter(folder):
    return own_front_matter(folder)


@pytest.fixture
def model(tmp_path):
    """A small model with a card of its own."""
    folder = qwen(tmp_path / "secret" / "model")
    (folder / "README.md").write_text(OWN)
    return folder


def test_front_matter_is_the_sources_and_ours(model, tmp_path):
    """Licence, language, tags and base stay; what was done, and that transformers loads it, are added."""
    coterie.prune(model, tmp_path / "out", experts=4)
    assert matter(tmp_path / "out") == {
        "license": "apache-2.0",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "base_model": "some/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["chat", "mixture-of-experts", "coterie", "prune"],
    }
    assert (tmp_path / "out" / "README.source.md").read_text() == OWN


def test_without_a_card_the_base_is_left_out(tmp_path):
    """A local folder is no name on the hub; its licence file says which one it is."""
    folder = qwen(tmp_path / "model")
    (folder / "LICENSE").write_text("\n   Apache License\n  Version 2.0, January 2004")
    coterie.prune(folder, tmp_path / "out", experts=4)
    found = matter(tmp_path / "out")
    assert "base_model" not in found and found["license"] == "apache-2.0"
    (folder / "LICENSE").write_text("Do what you like on Tuesdays.")
    assert licence_of(folder) == "other"


def test_a_hub_id_is_the_base(tmp_path):
    """Given as owner/name, whatever its revision."""
    folder = qwen(tmp_path / "model")
    report = coterie.prune(folder, tmp_path / "out", experts=4)
    report.source["path"] = "owner/name@v1"
    assert front_matter(folder, report, {})["base_model"] == "owner/name"


def test_the_card_names_no_local_path(model, tmp_path):
    """Neither of the model, nor of data or statistics; every command from the original on is there, in order."""
    coterie.prune(model, tmp_path / "first", experts=6)
    coterie.sparsify(tmp_path / "first", tmp_path / "second", method="magnitude", sparsity=0.5)
    card = (tmp_path / "second" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert card.index("coterie prune MODEL OUT") < card.index("coterie sparsify MODEL OUT")
    assert "44.4 % of the routed experts' weights are zero" in card
    assert (tmp_path / "second" / "README.source.md").read_text() == OWN


def test_a_packed_folder_says_how_it_is_loaded(tiny_checkpoint, tmp_path):
    """By coterie; unpacked, by anybody again."""
    coterie.sparsify(tiny_checkpoint("qwen3_moe"), tmp_path / "zeros", method="magnitude", sparsity=0.5)
    coterie.pack(tmp_path / "zeros", tmp_path / "packed")
    coterie.unpack(tmp_path / "packed", tmp_path / "back")
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("zeros", "packed", "back")}
    assert "import coterie" in cards["packed"] and "vllm serve" not in cards["packed"]
    assert matter(tmp_path / "packed")["library_name"] == "coterie"
    assert cards["back"] == cards["zeros"] and "vllm serve" in cards["zeros"]


def test_a_public_record_has_names_for_paths(model, tmp_path):
    """What stands for a path on this machine, wherever it is; the rest is as it was."""
    coterie.prune(model, tmp_path / "out", experts=4, public=True)
    record = json.loads((tmp_path / "out" / "coterie.json").read_text())
    assert record["source"]["path"] == "model" and str(tmp_path) not in json.dumps(record)
    assert coterie.prune(model, tmp_path / "out", experts=4, public=True, resume=True).source == record["source"]


def test_names_stand_for_paths_alone(tmp_path, monkeypatch):
    """Hub ids, fractions and sentences are no paths; what exists from here, or is absolute, is one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("")
    assert public({"x": ["owner/name", "a/b", "/root/c.txt", "1/2", 3, None]}) == {
        "x": ["owner/name", "b", "c.txt", "1/2", 3, None]
    }
    assert is_local("./x/y") and not is_local("what / is this") and not is_local("hub:owner/name")


def test_quality_is_written_once(model, tmp_path):
    """A second measurement takes the place of the first, and nothing else changes."""
    coterie.prune(model, tmp_path / "out", experts=4)
    card = (tmp_path / "out" / "README.md").read_text()
    entry = {"perplexity": {"prose": {"value": 9.5, "low": 9, "high": 10}}, "exact_match": {}}
    once = with_quality(card, entry)
    assert "| prose | perplexity | 9.50 [9.00, 10.00] |" in once and once.index("## Quality") < once.index("## Use")
    entry["perplexity"]["prose"]["value"] = 8.5
    twice = with_quality(once, entry)
    assert "8.50" in twice and "9.50" not in twice and twice.replace("8.50", "9.50") == once


def test_a_hostile_card_is_no_front_matter(tmp_path):
    """Python objects in YAML, what is no mapping, and bytes that are no text give nothing."""
    folder = qwen(tmp_path / "model")
    for text in (b"---\n!!python/object/apply:os.system ['true']\n---\n", b"---\n- a\n---\n", b"---\n\xff\n---\n"):
        (folder / "README.md").write_bytes(text)
        assert own_front_matter(folder) == {}
    (folder / "README.md").write_text("---\nlicense: 'x: y'\ntags: 3\n---\n")
    coterie.prune(folder, tmp_path / "out", experts=4)
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "x: y"


class Hub:
    """Notes what is uploaded, with the names that huggingface_hub's client has."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *given, **options: self.calls.append((name, given, options))


def test_push_verifies_and_uploads(tmp_path, model, monkeypatch):
    """The folder without its log, then the record, in which paths are names."""
    monkeypatch.setattr("coterie.verbs.push.verify", lambda *a, **k: {"checks": [{"ok": True}]})
    coterie.prune(model, tmp_path / "out", experts=4)
    hub = Hub()
    found = coterie.push(tmp_path / "out", "me/mine", api=lambda: hub)
    assert [name for name, _, _ in hub.calls] == ["create_repo", "upload_folder", "upload_file"]
    assert hub.calls[1][2]["ignore_patterns"] == ["coterie.json", "coterie.log"]
    record = json.loads(hub.calls[2][2]["path_or_fileobj"])
    assert record["source"]["path"] == "model" and str(model) in found["reduced"]
    assert found["url"] == "https://huggingface.co/me/mine" and "model.safetensors" in found["files"]
    assert json.loads((tmp_path / "out" / "coterie.json").read_text())["source"]["path"] == str(model)


def test_a_dry_run_uploads_nothing(tmp_path, model, monkeypatch):
    """It verifies, and says what would go where."""
    monkeypatch.setattr("coterie.verbs.push.verify", lambda *a, **k: {"checks": [{"ok": True}]})
    coterie.prune(model, tmp_path / "out", experts=4)
    found = coterie.push(tmp_path / "out", "me/mine", dry_run=True, api=lambda: pytest.fail("asked"))
    assert found["url"] is None and found["bytes"] == sum(found["files"].values())


def test_what_may_not_be_pushed(tmp_path, model, monkeypatch):
    """A stranger's folder, a name that is none, a result with a fault: one line each, and nothing goes out."""
    coterie.prune(model, tmp_path / "out", experts=4)
    stranger = {"api": lambda: pytest.fail("asked")}
    with pytest.raises(CoterieError, match=r"no coterie\.json"):
        coterie.push(model, "me/mine", **stranger)
    with pytest.raises(CoterieError, match="expected owner/name"):
        coterie.push(tmp_path / "out", "mine", **stranger)
    check = {"name": "files", "ok": False, "detail": "a tensor is gone"}
    monkeypatch.setattr("coterie.verbs.push.verify", lambda *a, **k: {"checks": [check]})
    with pytest.raises(CoterieError, match="a tensor is gone; nothing uploaded"):
        coterie.push(tmp_path / "out", "me/mine", **stranger)
    monkeypatch.setattr("coterie.verbs.push.verify", lambda *a, **k: {"checks": []})
    refusing = SimpleNamespace(create_repo=lambda *a, **k: (_ for _ in ()).throw(OSError("no token")))
    with pytest.raises(CoterieError, match=r"the hub did not take it \(no token\)"):
        coterie.push(tmp_path / "out", "me/mine", api=lambda: refusing)
