"""Batches in many processes, by joblib: what travels is a batch, and how models were opened."""

import io
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import cloudpickle
import joblib
import torch
from filelock import FileLock, Timeout

from vldnp._files import first_line, unknown
from vldnp.models import load
from vldnp.models.backbone import Backbone
from vldnp.models.vlm import TransformersVLM, describe

ATTEMPTS = 3
"""So many times in a row may workers die before any of them has finished a batch."""


def finished(
    compute: Callable, jobs: Sequence[tuple], workers: int | None, backend: str | None
) -> Iterator[int]:
    """Compute jobs, tuples of arguments, and yield the number of each when it is done.

    A worker that dies loses its job, which new workers do again.

    Raises:
        ValueError: no such number of workers or backend, or a job that cannot be sent; one line.
        ChildProcessError: workers died again and again; one line.
        Exception: what a job raised, with the worker's traceback as a note.
    """
    if backend is not None and backend not in POOLS:
        raise unknown("backend", backend, POOLS)
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be 1 or more, not {workers}")
    if backend is None and workers in (None, 1) or not jobs:
        for number, job in enumerate(jobs):
            compute(*job)
            yield number
        return
    left = {number: packed((compute, *job)) for number, job in enumerate(jobs)}
    count, settings, deaths = POOLS[backend or "loky"](workers)
    died = 0
    while left:
        with joblib.parallel_config(n_jobs=count, **settings):
            parallel = joblib.Parallel(
                return_as="generator_unordered", batch_size=1, pre_dispatch=count
            )
        try:
            for number, error in parallel(joblib.delayed(_work)(*job) for job in [*left.items()]):
                if error is not None:
                    raise error
                del left[number]
                died = 0
                yield number
        except deaths as error:
            died += 1
            if died == ATTEMPTS:
                raise ChildProcessError(
                    f"workers died {died} times in a row before one had finished a batch "
                    f"({first_line(error)}); if memory is short, lower workers or batch_size"
                ) from error


def _loky(workers: int | None):
    """Processes of this machine with one thread each: one per core, or one per GPU."""
    gpus = _visible_gpus()
    if gpus and workers is not None and workers > len(gpus):
        raise ValueError(f"workers must be at most {len(gpus)}, one per GPU, not {workers}")
    claims = tempfile.mkdtemp(prefix="vldnp-gpus-") if gpus else None
    settings = {"inner_max_num_threads": 1, "initializer": _begin}
    settings |= {"backend": "loky", "initargs": (os.getpid(), gpus, claims)}
    return workers or len(gpus) or joblib.cpu_count(), settings, BrokenExecutor


def _ray(workers: int | None):
    """Ray's workers, where `RAY_ADDRESS` says, or on this machine; Ray assigns the GPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray, joined = _imported("ray", "ray"), _imported("ray.util.joblib.ray_backend", "ray")

    class Backend(joined.RayBackend):
        supports_return_generator = True  # inherited from multiprocessing, which has none

    joblib.register_parallel_backend("ray", Backend)
    if not ray.is_initialized():
        local = {"address": "local", "num_cpus": workers or joblib.cpu_count()}
        ray.init(logging_level="warning", **({} if "RAY_ADDRESS" in os.environ else local))
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    settings = {"backend": "ray", "ray_remote_args": {"num_gpus": int(gpus > 0)}}
    return min(workers or gpus or cpus, gpus or cpus), settings, ray.exceptions.RayError


def _dask(workers: int | None):
    """The current Dask client's workers; else where `DASK_SCHEDULER_ADDRESS` says, or here."""
    distributed = _imported("distributed", "dask")
    try:
        client = distributed.default_client()
    except ValueError:  # there is none; the new one stays open for the next run
        local = {"n_workers": workers or joblib.cpu_count(), "threads_per_worker": 1}
        address = "DASK_SCHEDULER_ADDRESS" in os.environ
        client = distributed.Client(**({} if address else local | {"dashboard_address": None}))
    workers = workers or sum(client.ncores().values()) or 1
    return workers, {"backend": "dask", "client": client}, distributed.KilledWorker


POOLS = {"loky": _loky, "ray": _ray, "dask": _dask}
"""Backend → function of the number of workers → their number, joblib's settings, its deaths."""


def _imported(module: str, extra: str):
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"backend {extra!r} needs: pip install 'vldnp[{extra}]'") from error


_busy = threading.Lock()
"""Held while a batch is computed: a Dask worker may have several threads, a model serves one."""

_claimed: list[FileLock] = []


def _begin(parent: int, gpus: tuple[str, ...], claims: str | None) -> None:
    """Set a process of this machine up: it ends after its parent, and has a GPU of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends its workers
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = claimed(gpus, Path(claims))


def claimed(gpus: Sequence[str], claims: Path) -> str:
    """The first GPU that no other worker has locked; the system unlocks it when a worker dies."""
    while True:
        for gpu in gpus:
            lock = FileLock(claims / f"{gpu}.lock")
            with suppress(Timeout):
                lock.acquire(timeout=0)
                _claimed.append(lock)
                return gpu
        time.sleep(0.1)  # the worker whose place this one takes is about to end


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    with _busy:
        os._exit(1)


def _visible_gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    return tuple(names) if torch.cuda.is_available() else ()


def _work(number: int, pickled: bytes) -> tuple[int, Exception | None]:
    """Do a job; what it raises is returned, and not taken for the death of a worker."""
    with _busy, one_thread():
        try:
            compute, *job = unpacked(pickled)
            compute(*job)
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))
            try:
                pickle.loads(pickle.dumps(error))
                return number, error.with_traceback(None)
            except Exception:  # it does not survive the way
                return number, RuntimeError(f"{type(error).__name__}: {first_line(error)}")
    return number, None


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes with one thread: with another number, float32 rounds differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Pickler(cloudpickle.Pickler):
    def persistent_id(self, thing):
        if (how := getattr(thing, "__dict__", {}).get("opened_as")) is not None:
            return cloudpickle.dumps((how, _identity(thing)))
        if isinstance(thing, Backbone | TransformersVLM):
            raise ValueError(
                f"the model {thing.name!r} was not opened by its name or folder, so that other "
                "processes cannot open it; save it in a folder, or leave workers and backend out"
            )
        return None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, how: bytes):
        return _opened(how)


def packed(things: tuple) -> bytes:
    """What a worker is sent; models that `vldnp.load…` opened are named, functions may be local."""
    file = io.BytesIO()
    try:
        _Pickler(file).dump(things)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ValueError(
            f"a method or its VLM cannot be sent to other processes ({first_line(error)}); "
            "leave workers and backend out"
        ) from error
    return file.getvalue()


def unpacked(pickled: bytes) -> tuple:
    return _Unpickler(io.BytesIO(pickled)).load()


@lru_cache(maxsize=4)  # a backbone, and the VLMs of an ablation
def _opened(how: bytes):
    (opener, model, args, options), identity = pickle.loads(how)
    found = getattr(load, opener)(model, *args, **options)
    if _identity(found) != identity:
        raise ValueError(
            f"a worker has opened another {model} than the parent: {_identity(found)}, not "
            f"{identity}; leave models as they were opened, and let all workers see the same files"
        )
    return found


def _identity(model) -> dict:
    if not isinstance(model, Backbone):
        return describe(model)
    return {"name": model.name, "revision": model.revision, "dtype": str(model.dtype)}
