"""Units of work on many machines: the same bytes as in one process, whatever is lost on the way."""

import gc
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest

import coterie
import tiny
from coterie import engine as engines
from coterie.decide.stun import Split
from coterie.engine import Engine, perform
from coterie.errors import CoterieError
from coterie.storage import movers
from coterie.storage.copying import Move
from coterie.verbs.prune import prune
from coterie.verbs.sparsify import sparsify
from coterie.verbs.stun import stun
from handmade import file_bytes, qwen

TIMES = ("seconds", "peak_rss_bytes")
EXPERTS = {"experts": 5}


class Task:
    """A function and, in time, its answer."""

    def __init__(self, cluster, function):
        self.cluster, self.function, self.answer = cluster, function, None

    def options(self, **asked):
        self.cluster.asked.append(asked)
        return self

    def remote(self, *arguments):
        self.arguments, self.number = arguments, len(self.cluster.tasks)
        self.cluster.tasks.append(self)
        return self


class FakeRay:
    """What `engine` uses of Ray, in this process: tasks run in the reverse of their order; some are lost."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

    def __init__(self, *nodes, lost=()):
        self.resources, self.lost = nodes or ({"CPU": 2.0, "disk": 4.0},), lost
        self.tasks, self.asked, self.cancelled = [], [], []

    def is_initialized(self):
        return True

    def nodes(self):
        return [{"Alive": True, "Resources": resources} for resources in self.resources]

    def remote(self, function):
        return Task(self, function)

    def get(self, task):
        if task.number in self.lost:
            raise self.exceptions.RayError("the worker died")
        for other in reversed(self.tasks):
            if other.answer is None and other.number not in self.lost:
                other.answer = other.function(*other.arguments)
        return task.answer

    def cancel(self, task, force):
        self.cancelled.append(task.number)

    def wait(self, tasks, num_returns, timeout):
        return tasks, []


@pytest.fixture
def fake(monkeypatch):
    """A cluster of one node, which the caller may change before the run; windows of 300 bytes."""
    cluster = FakeRay()
    monkeypatch.setattr(engines, "_import_ray", lambda: cluster)
    monkeypatch.setattr(movers, "WINDOW", 300)
    movers.check_source.cache_clear()
    return cluster


@pytest.fixture
def model(tmp_path):
    return qwen(tmp_path / "model", num_shards=3)


@pytest.fixture
def undisturbed(model, tmp_path):
    """The files of a run in this process."""
    prune(model, tmp_path / "undisturbed", **EXPERTS)
    return weights(tmp_path / "undisturbed")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 samples of 64 token ids."""
    return tiny.id_lines(tmp_path_factory.mktemp("data") / "ids.jsonl", 24)


def weights(folder):
    """Every file but the log, which tells times."""
    return {name: raw for name, raw in file_bytes(folder).items() if name != "coterie.log"}


def findings(report):
    """A report without times, and without what says where the work was done."""
    return {k: v for k, v in report.report.items() if k not in (*TIMES, "io", "engine", "warnings")}


def same_both_ways(verb, source, folder, **options):
    """Runs a verb in both ways; the report of the spread run, after all else was found equal."""
    here = verb(source, folder / "here", **options)
    there = verb(source, folder / "there", engine="ray", **options)
    assert weights(folder / "here") == weights(folder / "there")
    assert findings(here) == findings(there) and here.options == there.options and here.plan == there.plan
    return there


# --- the same bytes ------------------------------------------------------------------------------------------------


def test_windows_cut_moves_at_multiples_of_the_target():
    """Bytes 0:10 of a go to 5:15 and 20:24 of b to 15:19: in windows of 8 bytes, each byte in the one it belongs to."""
    a, b = Path("a"), Path("b")
    found = list(movers.windows([Move(a, 0, 10, 5), Move(b, 20, 24, 15)], 8))
    assert found == [[Move(a, 0, 3, 5)], [Move(a, 3, 10, 8), Move(b, 20, 21, 15)], [Move(b, 21, 24, 16)]]


@pytest.mark.parametrize("io", ["auto", "plain"])
def test_pruning_by_units_gives_the_same_bytes(model, tmp_path, fake, io):
    """Windows copied in any order make the files that one process writes; the report says who did it, and how."""
    report = same_both_ways(prune, model, tmp_path, io=io, **EXPERTS).report
    assert report["engine"] == {"name": "ray", "nodes": 1, "units": len(fake.tasks), "resubmitted": 0}
    assert len(fake.tasks) > 6 and sum(report["io"]["bytes"].values()) > 6 * 300
    assert all(a["resources"] == {"disk": 1.0} and a["max_retries"] == engines.RETRIES for a in fake.asked)


def test_averaged_experts_are_made_by_the_driver(model, tmp_path, fake):
    """What no byte run holds is computed before units fill the rest."""
    report = same_both_ways(prune, model, tmp_path, experts=2, kappa=3)
    assert any(layer.get("merged") for layer in report.plan["layers"].values()) and fake.tasks


def test_applying_a_plan_by_units_gives_the_same_bytes(model, tmp_path, fake):
    """`apply` spreads as `prune` does."""
    prune(model, tmp_path / "first", **EXPERTS)
    fake.tasks.clear()
    same_both_ways(partial(_applied, tmp_path / "first"), model, tmp_path)
    assert fake.tasks


def _applied(plan, source, out, **options):
    return coterie.apply(source, plan, out, **options)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_magnitude_by_units_gives_the_same_bytes(tiny_checkpoint, tmp_path, fake, model_type):
    """Numbered and fused experts: one unit each; sums over them are the same to the last bit."""
    options = {"method": "magnitude", "sparsity": 0.37}
    report = same_both_ways(sparsify, tiny_checkpoint(model_type), tmp_path, **options).report
    assert sum(a["resources"] == {"disk": 0.5} for a in fake.asked) >= 2 * 8
    assert report["expert_zeros"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"second": "owl"},
        {"second": "wanda", "one_pass": True},
        {"second": "sparsegpt", "expert_ratio": 0},
        {"second": "moe-pruner", "dtype": "bfloat16", "min_tokens": 128},
    ],
    ids=lambda options: options["second"],
)
def test_stun_by_units_gives_the_same_bytes(tiny_checkpoint, tmp_path, fake, data, options):
    """Inputs and outputs that pass through files change no bit, with cold experts among them or not."""
    asked = {"sparsity": 0.5, "data": data, "samples": 8, **options}
    report = same_both_ways(stun, tiny_checkpoint("qwen3_moe"), tmp_path, **asked).report
    assert len(report["cold_experts"]) < 4 * 8 and (report["cold_experts"] or "min_tokens" not in options)


def test_activations_in_files_are_spread_as_well(tiny_checkpoint, tmp_path, fake, data, monkeypatch):
    """Where hidden states do not fit into memory, they go from one file to the other."""
    from coterie.forward.stream import Stream

    monkeypatch.setitem(Stream.embed.__wrapped__.__kwdefaults__, "budget", 0)
    same_both_ways(sparsify, tiny_checkpoint("qwen3_moe"), tmp_path, method="wanda", data=data, samples=8)


def test_what_stays_on_one_machine_is_said(tiny_checkpoint, tmp_path, fake, data):
    """With --also, experts are calibrated by the driver: the same bytes, and a note."""
    report = same_both_ways(
        sparsify, tiny_checkpoint("qwen3_moe"), tmp_path, data=data, samples=8, also="router"
    ).report
    assert any("driver's machine alone" in note for note in report["warnings"])


def test_the_split_search_is_said_to_stay_on_one_machine(model, tmp_path, fake, monkeypatch):
    """Trials of --expert-ratio auto write nothing, and are not spread."""
    found = [Split(experts=6, removed=0.25, zeros=0.25, loss=1.0)]
    monkeypatch.setattr(sys.modules["coterie.decide.stun"], "search", lambda *_: found)
    asked = {"sparsity": 0.5, "expert_ratio": "auto", "second": "magnitude"}
    report = stun(model, tmp_path / "out", engine="ray", **asked).report
    assert any("splits of --expert-ratio auto" in note for note in report["warnings"])


# --- what is lost, and what refuses ---------------------------------------------------------------------------------


def test_lost_units_are_given_out_again(model, undisturbed, tmp_path, fake):
    """A unit that Ray gives up is submitted anew; the bytes do not show it, the report does."""
    fake.lost = (0, 4)
    report = prune(model, tmp_path / "out", engine="ray", **EXPERTS).report
    assert weights(tmp_path / "out") == undisturbed and report["engine"]["resubmitted"] == 2


def test_a_unit_that_is_lost_again_and_again_ends_the_run(model, undisturbed, tmp_path, fake):
    """Nothing stands under OUT's name, units under way are cancelled, and a local resume ends with the same bytes."""
    fake.lost = range(3, 1000)
    with pytest.raises(CoterieError, match=r"lost 3 times with all retries .* add --resume"):
        prune(model, tmp_path / "out", engine="ray", **EXPERTS)
    assert not (tmp_path / "out").exists() and fake.cancelled
    prune(model, tmp_path / "out", resume=True, **EXPERTS)
    assert weights(tmp_path / "out") == undisturbed


def test_scratch_of_a_killed_run_does_not_reach_the_result(model, undisturbed, tmp_path, fake):
    """A driver that was killed leaves files that only units read; a local resume removes them."""

    def stop(stage, done, total):
        if stage == "writing" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, tmp_path / "out", engine="ray", on_progress=stop, **EXPERTS)
    left = tmp_path / "out.partial" / engines.SCRATCH
    assert not left.exists()
    (left / "abc").mkdir(parents=True)
    prune(model, tmp_path / "out", resume=True, **EXPERTS)
    assert weights(tmp_path / "out") == undisturbed and not (tmp_path / "out" / engines.SCRATCH).exists()


def test_a_spread_run_goes_on_where_a_local_one_stopped(tiny_checkpoint, tmp_path, fake, data):
    """Which engine ran is no part of what a resume must repeat."""
    source, asked = tiny_checkpoint("qwen3_moe"), {"method": "wanda", "data": data, "samples": 8}
    sparsify(source, tmp_path / "whole", **asked)

    def stop(stage, done, total):
        if stage == "pruning layers" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparsify(source, tmp_path / "out", on_progress=stop, **asked)
    sparsify(source, tmp_path / "out", engine="ray", resume=True, **asked)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole") and fake.tasks


def test_a_node_with_another_version_refuses(tmp_path):
    """Two versions might write different bytes."""
    answer = json.loads(perform("0.0.0", str(tmp_path), "math:sqrt", "{}"))
    assert "install the same everywhere" in answer["refused"]


def test_a_node_that_does_not_see_out_refuses(tmp_path):
    """A folder that is not shared, or that a finished run took away, is never written around."""
    answer = json.loads(perform(coterie.__version__, str(tmp_path / "absent"), "math:sqrt", "{}"))
    assert "must lie where all nodes see them" in answer["refused"]


def test_a_node_with_another_model_refuses(model, tmp_path, fake, monkeypatch):
    """A checkpoint of the same name with other weights is told by its fingerprint."""
    monkeypatch.setattr(movers, "describe_source", lambda scratch, source: _lie(scratch, source))
    with pytest.raises(CoterieError, match="is another checkpoint than on the driver's machine"):
        prune(model, tmp_path / "out", engine="ray", **EXPERTS)


def _lie(scratch, source):
    (scratch / movers.SOURCE).write_text(json.dumps({"path": str(source.path), "hash": "0" * 64}))


def test_a_full_disk_on_a_node_is_our_error(model, tmp_path, fake, monkeypatch):
    """What the system says there is one line here, with the node's name."""

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(movers, "copy", full)
    with pytest.raises(CoterieError, match=r"node .*No space left on device; .*--resume"):
        prune(model, tmp_path / "out", engine="ray", **EXPERTS)


# --- clusters and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [[{"CPU": 2.0}], [{"CPU": 2.0}, {"CPU": 8.0, "disk": 1.0}]])
def test_nodes_without_the_resource_disk_are_named(model, undisturbed, tmp_path, fake, nodes):
    """Without it nothing limits a disk's units; where only some have it, the others are not used. Both are said."""
    fake.resources = nodes
    report = prune(model, tmp_path / "out", engine="ray", **EXPERTS).report
    assert weights(tmp_path / "out") == undisturbed
    assert any("resource `disk`" in note for note in report["warnings"])
    assert all(bool(asked["resources"]) == (len(nodes) == 2) for asked in fake.asked)


def test_a_cluster_without_processors_is_refused(model, tmp_path, fake):
    """Units would wait for ever."""
    fake.resources = ({"disk": 1.0},)
    with pytest.raises(CoterieError, match="no node of the cluster offers a CPU"):
        prune(model, tmp_path / "out", engine="ray", **EXPERTS)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("address", "answer"), [("auto", "nobody answers"), ("127.0.0.1:1", ".*refused"), ("6379", ""), ("host:x", "")]
)
def test_a_cluster_that_cannot_be_reached(model, tmp_path, fake, monkeypatch, address, answer):
    """Where nothing listens, Ray is not even asked; whatever it raises is one line, and nothing is begun."""

    def init(**asked):
        assert asked["address"] == "auto"
        raise ConnectionError("nobody answers")

    for name, value in (("is_initialized", lambda: False), ("init", init), ("shutdown", lambda: None)):
        monkeypatch.setattr(fake, name, value, raising=False)
    with pytest.raises(CoterieError, match=rf"{address} cannot be reached or started \({answer}"):
        prune(model, tmp_path / "out", engine="ray", ray_address=address, **EXPERTS)
    assert not list(tmp_path.glob("out*"))


def test_ray_that_is_not_installed(model, tmp_path, monkeypatch):
    """One line says what to install, before anything is done."""
    monkeypatch.setitem(sys.modules, "ray", None)
    for verb, options in ((prune, EXPERTS), (sparsify, {"method": "magnitude"}), (stun, {"second": "magnitude"})):
        with pytest.raises(CoterieError, match=r"pip install 'coterie\[ray\]'"):
            verb(model, tmp_path / "out", engine="ray", **options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("spark",), "unknown; expected one of local, ray"),
        (("local", "host:6379"), "--ray-address would be ignored"),
        (("ray", "ray://host:10001"), "expected HOST:PORT"),
        (("ray", ""), "expected HOST:PORT"),
    ],
)
def test_engine_options_that_cannot_be(options, error):
    """No option is ignored or guessed."""
    with pytest.raises(CoterieError, match=error):
        Engine(*options)


def test_an_address_beside_a_connection_is_refused(fake):
    """The process can be on one cluster only."""
    with pytest.raises(CoterieError, match="connected to a Ray cluster already"), Engine("ray", "h:1").connected():
        pass


def test_the_local_engine_makes_no_units(model, tmp_path, monkeypatch):
    """Without --engine, Ray is neither imported nor named in the report."""
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "engine" not in prune(model, tmp_path / "out", **EXPERTS).report
    assert "work" not in {path.name for path in (tmp_path / "out").iterdir()}


def test_the_command_line_passes_the_engine_on(model, tmp_path, capsys):
    """`--engine` and `--ray-address` reach the verbs."""
    from coterie.cli import main

    plan = tmp_path / "plan.json"
    plan.write_text('{"layers": {}}')
    for arguments in (["prune"], ["stun"], ["sparsify"], ["apply", str(plan)]):
        verb, *rest = arguments
        with pytest.raises(SystemExit) as stopped:
            main([verb, str(model), *rest, str(tmp_path / "out"), "--ray-address", "h:1"])
        assert stopped.value.code == 2 and "--ray-address would be ignored" in capsys.readouterr().err


# --- a real cluster -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes on this machine, which find the units of `lethal.py`."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        engines._import_ray()
        ray.init(
            address="local", num_cpus=2, resources={"disk": 2}, object_store_memory=engines.OBJECT_STORE,
            include_dashboard=False, log_to_driver=False, configure_logging=False,
        )  # fmt: skip
        yield ray
        with warnings.catch_warnings():  # Ray forgets the processes that it started, and ends them by itself
            warnings.simplefilter("ignore", ResourceWarning)
            ray.shutdown()
            gc.collect()


@pytest.mark.slow
def test_a_killed_worker_changes_no_byte(cluster, model, undisturbed, tmp_path, monkeypatch):
    """A worker garbles its window and gets SIGKILL in the middle: Ray runs the unit again, and the bytes are right."""
    monkeypatch.setattr(movers, "UNIT", "lethal:copy")
    monkeypatch.setattr(movers, "WINDOW", 300)
    died = []
    prune(model, tmp_path / "out", engine="ray", on_progress=_watch(tmp_path, died), **EXPERTS)
    assert weights(tmp_path / "out") == undisturbed and died


@pytest.mark.slow
def test_a_worker_killed_while_it_prunes_changes_no_byte(cluster, tiny_checkpoint, tmp_path, data, monkeypatch):
    """Calibrated work inside a layer, with a worker that dies after it wrote: the bytes of one process."""
    from coterie.decide import spread as pruning

    monkeypatch.setattr(pruning, "UNIT", "lethal:prune_expert")
    died = []
    source, asked = tiny_checkpoint("qwen3_moe"), {"method": "wanda", "data": data, "samples": 8}
    here = sparsify(source, tmp_path / "here", **asked)
    there = sparsify(source, tmp_path / "out", engine="ray", on_progress=_watch(tmp_path, died), **asked)
    assert weights(tmp_path / "here") == weights(tmp_path / "out") and findings(here) == findings(there) and died


@pytest.mark.slow
def test_a_unit_that_always_dies_ends_the_run(cluster, model, undisturbed, tmp_path, monkeypatch):
    """When Ray's retries and the driver's are used up, the run stops; what it left is gone on from."""
    monkeypatch.setattr(movers, "UNIT", "lethal:always")
    monkeypatch.setattr(engines, "RETRIES", 0)
    monkeypatch.setattr(engines, "RESUBMITTED", 1)
    with pytest.raises(CoterieError, match=r"lost 2 times with all retries \(WorkerCrashedError\)"):
        prune(model, tmp_path / "out", engine="ray", **EXPERTS)
    prune(model, tmp_path / "out", resume=True, **EXPERTS)
    assert weights(tmp_path / "out") == undisturbed


def _watch(folder, died):
    """A progress callback that looks for the mark of a worker that killed itself."""

    def on_progress(*_):
        died.extend(folder.glob(f"out.partial/{engines.SCRATCH}/*/died"))

    return on_progress
