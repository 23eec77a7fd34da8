"""Batches in many processes, by joblib: a job holds a batch and the way to open its models."""

import io
import itertools
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache

import cloudpickle
import joblib
import torch
from filelock import FileLock, Timeout

from vldnp._files import first_line
from vldnp.models import load
from vldnp.models.backbone import Backbone
from vldnp.models.hub import live, networks
from vldnp.models.vlm import TransformersVLM, describe

ATTEMPTS = 3
_busy = threading.Lock()  # a Dask worker may have several threads, but a model serves one at a time
_claimed: list[FileLock] = []


def finished(
    compute: Callable, jobs: Sequence[tuple], workers: int | None, backend: str | None
) -> Iterator[int]:
    """Compute jobs, tuples of arguments, and yield the number of each when it is done; a
    `ChildProcessError` where one failed (its traceback is a note), or workers died too often."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be 1 or more, not {workers}")
    if backend is None and workers in (None, 1):
        for number, job in enumerate(jobs):
            compute(*job)
            yield number
        return
    known: dict = {}
    left = {number: _packed((compute, *job), known) for number, job in enumerate(jobs)}
    died, failed = 0, None
    while left:
        parallel = _parallel(workers, backend or "loky")
        try:  # a job returns its error, so an exception here is a worker's death
            for number, failed in parallel(joblib.delayed(_work)(*job) for job in [*left.items()]):
                if failed:
                    break
                del left[number]
                died = 0
                yield number
        except Exception as death:
            died += 1
            if died == ATTEMPTS:
                reason = f"{died} times in a row one died ({first_line(death)})"
                failed = ChildProcessError(f"workers failed: {reason}")
        if failed:
            raise failed


def _parallel(workers: int | None, backend: str) -> joblib.Parallel:
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named and count else list(map(str, range(count)))
    how, yields = {}, "generator_unordered"
    if backend == "loky":  # a process for each GPU or core
        workers = min(workers or len(gpus), len(gpus)) if gpus else workers
        claims = tempfile.mkdtemp(prefix="vldnp-gpus-") if gpus else ""
        how = {"initializer": _begin, "initargs": (os.getpid(), gpus, claims)}
        how["inner_max_num_threads"] = 1
    elif backend == "ray":
        how, yields = {"ray_remote_args": {"num_gpus": int(bool(gpus))}}, "list"
    try:
        with joblib.parallel_config(backend, n_jobs=workers or -1, **how):
            return joblib.Parallel(return_as=yields, batch_size=1)
    except ValueError as error:  # none of that name is registered, or Dask has no client
        raise ValueError(f"backend {backend!r} cannot be used: {first_line(error)}") from error


def _begin(parent: int, gpus: Sequence[str], claims: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its workers
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    for gpu in itertools.cycle(gpus):  # the system unlocks a GPU when its worker dies
        lock = FileLock(f"{claims}/{gpu}.lock")
        with suppress(Timeout):
            lock.acquire(timeout=0.1)
            _claimed.append(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            return


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(number: int, pickled: bytes) -> tuple[int, ChildProcessError | None]:
    try:
        with _busy, one_thread():
            compute, *job = pickle.loads(pickled)
            compute(*job)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        failed = ChildProcessError(f"workers failed: {reason}")
        failed.add_note(traceback.format_exc())
        return number, failed
    return number, None


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread of PyTorch, because float32 rounds differently with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Pickler(cloudpickle.Pickler):
    """Pickles the names of models that `vldnp.load…` opened; functions may be local."""

    def reducer_override(self, thing):
        if (how := getattr(thing, "__dict__", {}).get("opened_as")) is not None:
            if id(thing) not in self.known:  # weights are hashed once
                self.known[id(thing)] = cloudpickle.dumps((how, _identity(thing)))
            return _opened, (self.known[id(thing)],)
        if isinstance(thing, Backbone | TransformersVLM):
            raise TypeError(f"the model {thing.name!r} was not opened by its name or folder")
        return super().reducer_override(thing)


def _packed(things: tuple, known: dict | None = None) -> bytes:
    try:
        pickler = _Pickler(file := io.BytesIO())
        pickler.known = {} if known is None else known
        pickler.dump(things)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        what = "a model or method cannot be sent to other processes"
        raise ValueError(f"{what}: {first_line(error)}; omit workers and backend") from error
    return file.getvalue()


@lru_cache(maxsize=4)  # a backbone, and the VLMs of an ablation
def _opened(pickled: bytes):
    (opener, model, args, options), identity = pickle.loads(pickled)
    found = getattr(load, opener)(model, *args, **options)
    if (here := _identity(found)) != identity:
        raise ValueError(f"a worker has opened another {model}: {here}, not {identity}")
    return found


def _identity(model):
    said = describe(model) if callable(model) else (model.name, model.revision)
    weights = isinstance(model, Backbone) and (model.dtype, model.fingerprint())
    return said, weights or live(networks(model))
