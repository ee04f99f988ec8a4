"""Kills and workers: the bytes are the same after any kill and with any workers, and no question is asked twice."""

import dataclasses
import errno
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import time
from concurrent.futures import Future
from multiprocessing.spawn import get_preparation_data
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import survival
from indraquantum.config import CaptureSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import UserError
from indraquantum.progress import Progress
from indraquantum.teacher import capture as capture_module
from indraquantum.teacher import engines, shard_worker
from indraquantum.teacher.capture import capture
from indraquantum.teacher.journal import Journal, Record, journal_path
from indraquantum.teacher.manifest import read_manifest
from indraquantum.teacher.sampling import PositionSignals
from indraquantum.teacher.signals import open_signals
from indraquantum.teacher.teacher_model import Teacher
from teacher_world import stop_after_a_shard

SHARD = 480  # ten rows of 48


@pytest.fixture
def settings(world, tmp_path):
    return CaptureSettings(
        data=world.data, teacher=str(world.teacher), output=tmp_path / "signals", device="cpu",
        batch_tokens=96, threads=1,
    )  # fmt: skip


def changed(settings, **changes):
    return CaptureSettings(**settings.model_dump() | changes)


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The files of an undisturbed capture by one process."""
    output = tmp_path_factory.mktemp("whole") / "signals"
    capture(
        CaptureSettings(data=world.data, teacher=str(world.teacher), output=output, batch_tokens=96, threads=1,
                        device="cpu"), None, SHARD
    )  # fmt: skip
    files = files_of(output)
    assert len(files) > 5
    return files


@pytest.fixture
def quick_workers(monkeypatch):
    """Workers are forks of a process that has torch, instead of new ones that load it. Real ones are in a slow test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["indraquantum.teacher.loading", "indraquantum.training.loop"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: context)


@pytest.mark.parametrize(("answers", "shards"), [(7, 1), (3, 0)])
def test_a_killed_capture_goes_on_with_the_next_question(settings, whole, tmp_path, monkeypatch, answers, shards):
    """Within its second shard, or within its first, when the manifest lists none yet."""

    def killed():
        survival.at(Teacher, "logits", "before", answers + 1, survival.die)
        capture(settings, None, SHARD)

    said = tmp_path / "said"
    assert survival.in_fork(killed, said) == -signal.SIGKILL, said.read_text()
    assert len(read_manifest("--output", settings.output).shards) == shards
    journals = list(settings.output.glob("*.journal"))
    assert len(journals) == 1
    batches, logits = [], Teacher.logits
    monkeypatch.setattr(Teacher, "logits", lambda self, batch: batches.append(batch) or logits(self, batch))
    counted, update = [], Progress.update
    monkeypatch.setattr(
        Progress,
        "update",
        lambda self, count, before: counted.append((count, before)) or update(self, count, before=before),
    )
    report = capture(settings, None, SHARD)
    assert files_of(settings.output) == whole
    assert sum(count - before for count, before in counted) == report.positions_asked  # what the speed shown counts
    rows = [
        open_dataset("--data", settings.data).train.num_rows,
        open_dataset("--data", settings.data).validation.num_rows,
    ]
    all_batches = sum(-(-min(10, count - first) // 2) for count in rows for first in range(0, count, 10))
    assert len(batches) == all_batches - answers
    assert report.positions_asked == sum(int((batch.segments >= 0).sum()) for batch in batches)


@pytest.mark.parametrize("answers", [3, 7, 10])
def test_a_folder_that_is_removed_under_a_capture_stops_it_in_one_line(settings, monkeypatch, answers):
    """Before the first shard, inside the second, and in the last batch of that, before it is written."""
    logits, count = Teacher.logits, []

    def removing(self, batch):
        count.append(batch)
        if len(count) == answers:
            shutil.rmtree(settings.output)
        return logits(self, batch)

    monkeypatch.setattr(Teacher, "logits", removing)
    with pytest.raises(UserError, match=r"--output: got \S+; was removed while the capture wrote to it$"):
        capture(settings, None, SHARD)
    assert len(count) == answers  # nothing more is asked in vain
    assert not settings.output.exists()


def test_workers_give_the_same_bytes_and_one_may_be_killed(settings, whole, monkeypatch, capsys, quick_workers):
    write, killed = capture_module.write_manifest, []

    def murderous(folder, manifest):
        write(folder, manifest)
        if manifest.shards and not killed:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)
            (folder / f".train-000009.safetensors.{killed[0]}.tmp").write_bytes(b"half")  # as if it had died writing

    monkeypatch.setattr(capture_module, "write_manifest", murderous)
    report = capture(changed(settings, workers=2), None, SHARD)
    assert killed
    assert "a worker ended unexpectedly" in capsys.readouterr().err
    assert files_of(settings.output) == whole
    assert report.packed is True
    assert report.coverage == {"train": 1.0, "validation": 1.0}


def test_workers_do_not_run_the_program_again_that_called(settings, monkeypatch):
    """multiprocessing would tell a new process to run it, and a script without a guard would capture once more."""
    told = []

    class Pool:
        def __init__(self, *_):
            pass

        def submit(self, *_):
            told.append(get_preparation_data("worker"))
            return Future()

        def shutdown(self, **_):
            pass

    def stop(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(engines, "as_completed", stop)
    main = ModuleType("__main__")
    main.__file__ = "script.py"
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert {"init_main_from_name", "init_main_from_path"} & get_preparation_data("worker").keys()
    with pytest.raises(KeyboardInterrupt):
        capture(changed(settings, workers=2), None, SHARD)
    assert told
    assert not any({"init_main_from_name", "init_main_from_path"} & data.keys() for data in told)
    assert sys.modules["__main__"] is main


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
@pytest.mark.parametrize("workers", [1, 4])
def test_ray_gives_the_same_bytes(settings, whole, workers):
    pytest.importorskip("ray")
    capture(changed(settings, workers=workers, engine="ray"), None, SHARD)
    assert files_of(settings.output) == whole


def test_the_workers_of_a_cluster_may_have_a_device_that_this_machine_lacks(settings, whole, monkeypatch):
    """This process stands for an actor, and its CPU for a GPU."""

    def actor(plan, jobs):
        there = dataclasses.replace(plan, settings=changed(plan.settings, device="cpu"))
        return map(engines._remote_worker(there, 0).shard, jobs)

    monkeypatch.setattr(engines, "_ray", actor)
    far = changed(settings, engine="ray", device="cuda", precision="float32")
    for auto in ({"precision": "auto"}, {"batch_tokens": "auto"}):
        with pytest.raises(UserError, match=r"^--device: got cuda; .* give --precision and --batch-tokens$"):
            capture(changed(far, **auto), None, SHARD)
        assert files_of(settings.output) == {}
    stop_after_a_shard(far, None, SHARD)
    capture(changed(far, precision="auto", batch_tokens="auto"), None, SHARD)  # which it then knows
    assert files_of(settings.output) == whole


@pytest.mark.parametrize(
    ("asked", "here", "given"),
    [("auto", "cuda", "cuda"), ("auto", "cpu", "cpu"), ("cuda", "cpu", "cuda"), ("cpu", "cuda", "cpu")],
)
def test_actors_use_the_device_that_decided_on_their_batches(monkeypatch, tmp_path, asked, here, given):
    found = {}

    class Blocks:
        def map(self, worker, **options):
            found.update(options)
            return self

        def iter_rows(self):
            return iter(())

    context = SimpleNamespace(get_current=SimpleNamespace)
    data = SimpleNamespace(DataContext=context, from_items=lambda items, override_num_blocks: Blocks())
    ray = SimpleNamespace(is_initialized=lambda: True, data=data)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    monkeypatch.setattr("indraquantum.device.choose_device", lambda settings: torch.device(here))
    plan = engines.Plan(CaptureSettings(engine="ray", device=asked, workers=3), tmp_path, None, 0, 0, "")
    assert list(engines._ray(plan, [])) == []
    assert found["fn_constructor_args"][0].settings.device == given
    assert (found.get("num_gpus"), found.get("num_cpus")) == ((1, None) if given == "cuda" else (None, 1))


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_device_that_no_worker_has_is_one_line(settings, monkeypatch, engine):
    ray = SimpleNamespace(is_initialized=lambda: False, data=None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # so it would start here
    with pytest.raises(UserError, match=r"^--device: got cuda; must be a device of this machine: auto, cpu$"):
        capture(changed(settings, engine=engine, device="cuda", precision="float32"), None, SHARD)
    assert files_of(settings.output) == {}


@pytest.mark.slow
def test_four_new_workers_give_the_same_bytes(settings, whole):
    capture(changed(settings, workers=4), None, SHARD)
    assert files_of(settings.output) == whole


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'ray'"), RuntimeError("built for another")])
def test_a_missing_or_broken_ray_is_one_line(settings, without_package, error):
    without_package("ray", error)
    with pytest.raises(
        UserError, match=rf"^--engine: got ray; needs the package ray, .*{error}.*'indraquantum\[ray\]'"
    ):
        capture(changed(settings, engine="ray"), None, SHARD)
    assert files_of(settings.output) == {}


def begin_nothing(*_):
    pass


def nap(folder, job):
    (folder / f"napping.{os.getpid()}").touch()
    time.sleep(60)


def test_a_capture_that_is_stopped_stops_its_workers_within_their_shard(settings, tmp_path, monkeypatch, quick_workers):
    workers, napping = [], functools.partial(nap, tmp_path)

    def stop(futures):
        workers.extend(multiprocessing.active_children())
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("napping.*"))) < 2:
            assert time.monotonic() < deadline, "the workers have not begun after a minute"
            time.sleep(0.01)
        sys.exit(143)

    for name, function in {"_begin_process": begin_nothing, "_do_job": napping, "as_completed": stop}.items():
        monkeypatch.setattr(engines, name, function)
    with pytest.raises(SystemExit):
        capture(changed(settings, workers=2), None, SHARD)
    assert [worker.exitcode for worker in workers] == [-signal.SIGTERM] * 2


def fail_or_nap(folder, job):
    if (job.split, job.number) == ("validation", 0):
        raise UserError("--teacher", "x", "must be y")
    nap(folder, job)


def test_the_error_of_one_worker_does_not_wait_for_the_others(settings, tmp_path, monkeypatch, quick_workers):
    workers, completed = [], engines.as_completed

    def watched(futures):
        workers.extend(multiprocessing.active_children())
        return completed(futures)

    failing = functools.partial(fail_or_nap, tmp_path)
    changes = {"_begin_process": begin_nothing, "_do_job": failing, "as_completed": watched}
    for name, function in changes.items():
        monkeypatch.setattr(engines, name, function)
    with pytest.raises(UserError, match=r"^--teacher: got x; must be y$"):
        capture(changed(settings, workers=2), None, SHARD)
    assert [worker.exitcode for worker in workers] == [-signal.SIGTERM] * 2


def test_an_error_in_the_start_of_a_worker_is_told_as_it_is(settings, tmp_path, monkeypatch, quick_workers):
    data, processes = shutil.copytree(settings.data, tmp_path / "mixed"), engines._processes

    def without_data(plan, jobs):
        shutil.rmtree(data)
        return processes(plan, jobs)

    monkeypatch.setattr(engines, "_processes", without_data)
    with pytest.raises(UserError, match=r"^--data: got \S+mixed; does not exist"):
        capture(changed(settings, workers=2, data=data), None, SHARD)


def test_workers_share_the_threads_of_their_parent(settings, monkeypatch):
    """Not the machine's cores, of which this process may have a few, or OMP_NUM_THREADS may ask for fewer."""
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    given = []
    monkeypatch.setattr(engines, "_processes", lambda plan, jobs: given.append(plan.threads) or [])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        for changes in ({"threads": 0, "workers": 3}, {"threads": 0, "workers": 9}, {"threads": 2, "workers": 3}):
            plan = shard_worker.Plan(changed(settings, **changes), settings.output, None, 1, 1, "")
            assert list(engines.run_jobs(plan, SimpleNamespace(), None, [], lambda positions, before: None)) == []
    finally:
        torch.set_num_threads(before)
    assert given == [2, 1, 0]  # 0: --threads says it


def test_ctrl_c_reaches_no_worker_which_would_print_a_traceback(settings, monkeypatch):
    """The parent ends them. A process that starts while a signal is blocked has it blocked for good."""
    blocked = []

    class Watched:
        def __init__(self, *arguments):
            pass

        def submit(self, *arguments):
            blocked.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            signal.raise_signal(signal.SIGINT)

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(engines, "ProcessPoolExecutor", Watched)
    with pytest.raises(KeyboardInterrupt):
        capture(changed(settings, workers=2), None, SHARD)
    assert len(blocked) > 1
    assert all(blocked)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_an_error_crosses_from_worker_to_parent(settings):
    """As pickled by the pool: a class whose arguments were lost would break it."""
    import pickle

    error = pickle.loads(pickle.dumps(UserError("--teacher", Path("x"), "must be y")))
    assert (str(error), error.field) == ("--teacher: got x; must be y", "--teacher")


def test_a_shard_that_does_not_fit_on_the_disk_is_one_line(settings, whole, tmp_path):
    def limited():
        survival.at(shard_worker, "write_shard", "before", 2, lambda: survival.fill_disk(1000))
        capture(settings, None, SHARD)

    assert survival.in_fork(limited, tmp_path / "said") == 2
    said = (tmp_path / "said").read_text()
    assert "indra: error: output: got File too large; must be on a writable disk with free space\n" in said
    assert not list(settings.output.glob(".*"))
    capture(settings, None, SHARD)
    assert files_of(settings.output) == whole


def test_a_full_disk_of_a_ray_actor_is_one_line_too():
    def shard(job):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "signals")

    actor = object.__new__(engines._RayWorker)
    actor._worker = SimpleNamespace(shard=shard)
    answer = actor({"split": "train", "number": 0, "first_row": 0, "last_row": 1})
    assert answer["error"] == [
        "signals", "No space left on device", "must be on a writable disk with free space"
    ]  # fmt: skip


def test_workers_that_keep_dying_are_given_up(settings, monkeypatch):
    class Dying:
        def __init__(self, *arguments):
            pass

        def submit(self, *arguments):
            raise engines.BrokenProcessPool

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(engines, "ProcessPoolExecutor", Dying)
    with pytest.raises(UserError, match="--workers: got 2; must be fewer"):
        capture(changed(settings, workers=2), None, SHARD)
    assert files_of(settings.output) == {}


def batch_of(first, last):
    count = last - first
    draw = np.random.default_rng(first)
    figures = [draw.random(count, np.float32) for _ in range(4)]
    return Record(first, last, "float32", PositionSignals(*draw.integers(0, 9, (3, count)), *figures))


@pytest.mark.parametrize("spoil", ["cut", "flip"])
def test_a_torn_journal_keeps_every_whole_record_before_the_tear(tmp_path, spoil):
    records = [batch_of(3, 5), batch_of(5, 9), batch_of(9, 10)]
    ends = [0]
    journal = Journal(tmp_path, "train-000000.safetensors", 3, 11)
    path = journal_path(tmp_path, "train-000000.safetensors")
    for record in records:
        journal.append(record)
        ends.append(path.stat().st_size)
    journal.close()
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        torn = (
            content[:place] if spoil == "cut" else content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        )
        path.write_bytes(torn)
        again = Journal(tmp_path, "train-000000.safetensors", 3, 11)
        again.close()
        whole = sum(end <= place for end in ends[1:])
        assert [record[:3] for record in again.records] == [record[:3] for record in records[:whole]]
        for ours, theirs in zip(again.records, records, strict=False):
            for a, b in zip(ours.signals[:7], theirs.signals[:7], strict=True):
                np.testing.assert_array_equal(a, b)
        assert path.stat().st_size == ends[whole]  # what is appended next follows the last whole record


@pytest.mark.parametrize(("first", "last"), [(4, 11), (3, 8)])
def test_a_journal_of_other_rows_is_not_used(tmp_path, first, last):
    journal = Journal(tmp_path, "x.safetensors", 3, 11)
    journal.append(batch_of(3, 9))
    journal.close()
    other = Journal(tmp_path, "x.safetensors", first, last)
    other.close()
    assert other.records == []


@pytest.mark.parametrize("kind", ["topk", "full"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kinds_against_the_teacher_itself(settings, kind, temperature):
    """The likeliest tokens, or all, with the probabilities of the softmax, through the reader that training uses."""
    import torch

    capture(changed(settings, kind=kind, top_k=5, temperature=temperature), None, SHARD)
    dataset = open_dataset("--data", settings.data)
    signals = open_signals("--signals", settings.output, dataset).batch("train", np.arange(40))
    vocabulary = dataset.tokenizer.vocabulary_size
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(settings.teacher)
    batch = dataset.train.batch(np.arange(1))
    first = int((batch.segments[0] == 0).sum())
    with torch.inference_mode():
        logits_TV = model(torch.from_numpy(batch.input_ids[:, :first])).logits[0, :, :vocabulary]
    probs_TV = (logits_TV / temperature).softmax(-1)
    for place in range(min(first, 40)):
        ids, probs = signals.ids_NK[place], signals.probs_NK[place]
        if kind == "full":
            assert ids.tolist() == list(range(vocabulary))
            torch.testing.assert_close(probs, probs_TV[place], rtol=1e-3, atol=1e-7)
        else:
            assert set(ids.tolist()) == set(probs_TV[place].topk(5).indices.tolist())
            assert ids.tolist() == sorted(ids.tolist())
            torch.testing.assert_close(probs, probs_TV[place][ids], rtol=2e-3, atol=1e-7)
        assert probs.sum() <= 1 + 1e-5
    entropy_T = torch.distributions.Categorical(logits=logits_TV).entropy()
    torch.testing.assert_close(signals.entropy_N[:first], entropy_T[:40], rtol=2e-3, atol=1e-3)


def test_another_kind_is_refused_and_k_must_fit(settings):
    capture(changed(settings, kind="topk", top_k=5), None, SHARD)
    with pytest.raises(UserError, match=r"^--kind: got sampled;.* kind topk, not sampled"):
        capture(settings, None, SHARD)
    with pytest.raises(UserError, match=r"^--top-k: got 6;.* top_k 5, not 6"):
        capture(changed(settings, kind="topk", top_k=6), None, SHARD)
    with pytest.raises(UserError, match=r"^--top-k: got 60000; must be at most"):
        capture(changed(settings, kind="topk", top_k=60_000, output=settings.output / "other"), None, SHARD)
