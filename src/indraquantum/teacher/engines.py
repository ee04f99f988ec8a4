"""The engines that capture shards: this process, several processes of this machine, or a Ray cluster.

Every engine takes the same jobs and gives the same shards, in any order, if --threads is given. By default, several
workers share the processor's cores, and the number of threads decides the last bits. A worker that ends unexpectedly is
replaced, and its successor continues after the last batch in the journal.

    indra capture --workers 4
    indra capture --engine ray --workers 16
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from indraquantum.config import CaptureSettings
from indraquantum.errors import UserError, are_options_named, optional_package, refused_by_system
from indraquantum.progress import command_line, warn
from indraquantum.teacher.manifest import ShardEntry
from indraquantum.teacher.served import ServedAsker
from indraquantum.teacher.shard_worker import Asker, Job, Plan, Progressed, ShardResult, ShardWorker
from indraquantum.teacher.teacher_files import TeacherFiles, find_teacher

if TYPE_CHECKING:
    from indraquantum.data.prepared import PreparedDataset

_DEATHS = 3  # in a row, without a finished shard in between


def open_data(settings: CaptureSettings, files: TeacherFiles | None, verify: bool) -> PreparedDataset:
    """Open the dataset of the settings. A pickle has no tokenizer, so it gets the teacher's."""
    if files is None and settings.data.is_file():
        raise UserError(
            "--data", settings.data, "must be the packed folder, because neither a pickle nor a server has a tokenizer"
        )
    from indraquantum.data.dataset import open_dataset
    from indraquantum.data.tokenizer import load_tokenizer

    theirs = load_tokenizer(files.field, files.tokenizer) if files and settings.data.is_file() else None
    return open_dataset("--data", settings.data, theirs, verify=verify)


def run_jobs(
    plan: Plan, files: TeacherFiles | None, dataset: PreparedDataset, jobs: list[Job], progress: Progressed
) -> Iterator[ShardResult]:
    """Capture the jobs with the engine that the settings ask for.

    Args:
        plan: what every worker must know.
        files: the teacher; None for a server.
        dataset: the dataset, open in this process. Other processes open `plan.settings.data` themselves.
        jobs: the shards to capture.
        progress: called with a number of positions that are done, and how many of them an earlier run did.

    Yields:
        A result for each job, in any order.

    Raises:
        UserError: a worker failed, workers keep ending unexpectedly, or Ray is not installed.
    """
    settings = plan.settings
    if settings.engine == "local" and settings.workers == 1:
        with contextlib.closing(_worker(plan, files, dataset, 0, progress)) as worker:
            yield from map(worker.shard, jobs)
        return
    if files is not None and settings.workers > 1 and not settings.threads:
        plan = replace(plan, threads=threads_of_each(settings.workers))
    for result in _ray(plan, jobs) if settings.engine == "ray" else _processes(plan, jobs):
        progress(result.entry.positions, result.entry.positions - result.positions_asked)
        yield result


def threads_of_each(workers: int) -> int:
    """Return the threads of each of `workers` that share those of torch in this process.

    torch counts the cores that this process may use, and heeds OMP_NUM_THREADS. An actor of Ray would count 1.
    """
    import torch

    return max(1, torch.get_num_threads() // workers)


def _worker(
    plan: Plan, files: TeacherFiles | None, dataset: PreparedDataset, number: int, progress: Progressed
) -> ShardWorker:
    def load() -> Asker:
        if files is None:
            return ServedAsker(plan, dataset)
        import torch

        from indraquantum.device import choose_device
        from indraquantum.teacher.loading import load_teacher
        from indraquantum.teacher.teacher_model import ModelAsker

        settings = plan.settings
        if plan.threads:
            torch.set_num_threads(plan.threads)
        device = choose_device(settings)
        if device.type == "cuda":
            device = torch.device("cuda", number % torch.cuda.device_count())
        return ModelAsker(load_teacher(files, dataset, device, settings.precision), dataset, plan)

    return ShardWorker(plan, dataset, load, progress)


def _remote_worker(plan: Plan, number: int) -> ShardWorker:
    """Return a worker for another process, which opens everything itself."""
    files = find_teacher("--teacher", plan.settings.teacher)
    dataset = open_data(plan.settings, files, verify=False)
    if dataset.content_sha256 != plan.manifest.dataset_sha256:
        raise UserError("--data", plan.settings.data, "must be the same dataset for every worker")
    return _worker(plan, files, dataset, number, lambda positions, before: None)


# If this process is one of `_processes`: its worker, or the error of its start, which each of its jobs raises. An error
# in `_begin_process` itself would only tell the parent that the process ended.
_process_worker: ShardWorker | Exception | None = None


def _begin_process(plan: Plan, counter: Any, of_a_command: bool) -> None:
    """Make this process a worker that ends when its parent does, and writes notes as that one does."""
    global _process_worker
    if of_a_command:
        command_line().__enter__()  # for as long as the process lives
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    try:
        _process_worker = _remote_worker(plan, number)
    except Exception as error:
        _process_worker = error


def _do_job(job: Job) -> ShardResult:
    if isinstance(_process_worker, Exception):
        raise _process_worker
    return _process_worker.shard(job)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C waits. The processes that start inside never get it: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Inside, new processes don't run the program again that called this package, as multiprocessing would have it.

    They need only this package. The program may have no `if __name__ == "__main__":`.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _processes(plan: Plan, jobs: list[Job]) -> Iterator[ShardResult]:
    """Run the jobs in processes of this machine. If one ends unexpectedly, all are replaced and open jobs restart."""
    context, left, deaths = multiprocessing.get_context("spawn"), set(jobs), 0
    others = set(multiprocessing.active_children())
    while left:
        counter = context.Value("i", 0)
        pool = ProcessPoolExecutor(plan.settings.workers, context, _begin_process, (plan, counter, are_options_named()))
        try:
            with _without_ctrl_c(), _without_main():
                futures = {pool.submit(_do_job, job): job for job in jobs if job in left}
            for future in as_completed(futures):
                result = future.result()
                left.discard(futures[future])
                deaths = 0
                yield result
        except BrokenProcessPool:
            deaths += 1
            if deaths == _DEATHS:
                allowed = "must be fewer: workers end before they finish a shard, perhaps because memory ran out"
                raise UserError("--workers", plan.settings.workers, allowed) from None
            warn("capture: a worker ended unexpectedly; another one continues its work")
        except BaseException:  # an error of one worker, or a signal
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()  # its shard may take another hour; the journal has what it captured
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class _RayWorker:
    """The same worker as an actor of Ray Data."""

    def __init__(self, plan: Plan) -> None:
        try:
            self._worker = _remote_worker(plan, 0)  # Ray shows an actor its own devices only
        except UserError as error:
            self._worker, self._error = None, error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Do one job and return its result as plain values, because Ray would wrap an error beyond recognition."""
        try:
            if self._worker is None:
                raise self._error
            result = self._worker.shard(Job(row["split"], row["number"], row["first_row"], row["last_row"]))
        except (UserError, OSError) as error:
            told = error if isinstance(error, UserError) else refused_by_system(error)
            if told is None:
                raise
            return {"error": [told.field, str(told.value), told.allowed], "entry": "", "asked": 0, "packed": -1}
        packed = -1 if result.packed is None else int(result.packed)
        entry = result.entry.model_dump_json()
        return {"error": [], "entry": entry, "asked": result.positions_asked, "packed": packed}


def _ray(plan: Plan, jobs: list[Job]) -> Iterator[ShardResult]:
    """Run the jobs in Ray Data's actors, on the cluster of $RAY_ADDRESS or on this machine, bound to loopback."""
    with optional_package("--engine", "ray", "ray", "indraquantum[ray]"):
        import ray
        import ray.data
    from indraquantum.device import choose_device

    settings = plan.settings
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False)
        else:
            choose_device(settings)  # Ray would wait for a GPU that this machine does not have
            ray.init(
                address="local", _node_ip_address="127.0.0.1", include_dashboard=False, log_to_driver=False,
                num_cpus=max(settings.workers + 1, os.cpu_count() or 1),
            )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    # The device of this machine has decided on precision and batch, so the actors take it too.
    if settings.device == "auto":
        settings = settings.model_copy(update={"device": choose_device(settings).type})
        plan = replace(plan, settings=settings)
    resources = {"num_gpus": 1} if settings.device == "cuda" else {"num_cpus": 1}
    rows = ray.data.from_items([job._asdict() for job in jobs], override_num_blocks=len(jobs))
    results = rows.map(_RayWorker, fn_constructor_args=(plan,), concurrency=settings.workers, **resources)
    for row in results.iter_rows():
        if len(row["error"]):
            raise UserError(*row["error"])
        entry = ShardEntry.model_validate_json(row["entry"])
        yield ShardResult(entry, row["asked"], None if row["packed"] < 0 else bool(row["packed"]))
