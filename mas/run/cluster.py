"""Workers on several machines: those of a Dask scheduler, or Slurm jobs started here.

A worker trains one trajectory at a time. Records and prepared data lie in folders that all
machines mount under the same path. Dask hands the job of a worker that died to another, which
resumes; a job that raised is not run again. A driver that dies may be started again.

Two processes are kept off one trajectory by flock: on NFS 4, NFS 3 with lockd (no nolock, no
local_lock) and Lustre with -o flock. Elsewhere it may be trained twice at once, to equal results.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mas_core.config import UserError

# Executor, how many jobs it can hold now, errors that mean a lost worker.
Workers = Iterator[tuple[Executor, Callable[[], int], tuple[type[BaseException], ...]]]


@contextmanager
def dask_workers(address: str, device: str, results: Path, data: Path) -> Workers:
    """The workers of the scheduler at `address` (tcp://host:port, or its scheduler file).

    With device "cuda" only workers that offer the resource GPU are given jobs, one each; with
    "cpu" all of them. Raises UserError where there is no scheduler, no such worker, or a worker
    that cannot train: it does not see both folders, or not exactly one GPU.
    """
    distributed, gpu = _dask(device)
    where = {"scheduler_file" if Path(address).is_file() else "address": address}
    try:
        client = distributed.Client(**where)
    except (OSError, ValueError) as error:
        raise UserError(f"--dask {address}: no scheduler answers, no such file ({error})") from None
    with client:
        workers = _workers(distributed, client, gpu, results, data)
        if not workers[1]():
            what, how = (" offers the resource GPU", " --resources GPU=1") if gpu else ("", "")
            raise UserError(f"--dask {address}: no worker{what}; start: dask worker {address} "
                            f"--nthreads 1{how}" + "; or add --device cpu" * gpu)  # fmt: skip
        yield workers


@contextmanager
def slurm_workers(partition: str, jobs: int, device: str, results: Path, data: Path) -> Workers:
    """`jobs` Slurm jobs, each one worker with one GPU (none with device "cpu").

    A job that ends, at its time limit or otherwise, is submitted again until this context ends.
    """
    distributed, gpu = _dask(device)
    from dask_jobqueue import SLURMCluster

    opened = SLURMCluster(**_slurm_options(partition, gpu))
    with opened as cluster, distributed.Client(cluster) as client:
        executor, slots, lost = _workers(distributed, client, gpu, results, data)

        def refilled() -> int:
            cluster.scale(jobs=jobs)  # adapt() does not know resources
            return slots()

        yield executor, refilled, lost


def slurm_job_script(partition: str, device: str = "cuda") -> str:
    """The script that `slurm_workers` submits; SCHEDULER and WORKER stand for what comes later.

    Account, time limit, memory, network interface: jobqueue.slurm in ~/.config/dask/jobqueue.yaml.
    """
    _, gpu = _dask(device)
    from dask_jobqueue.slurm import SLURMJob

    return SLURMJob("SCHEDULER", "WORKER", **_slurm_options(partition, gpu)).job_script()


def _slurm_options(partition: str, gpu: bool) -> dict[str, Any]:
    import dask

    site = dask.config.get("jobqueue.slurm")
    return {
        "queue": partition, "job_name": "mas", "processes": 1, "cores": 1,  # cores: jobs at once
        "job_cpu": site["job-cpu"] or 4, "memory": site["memory"] or "16 GiB",
        "death_timeout": max(300, site["death-timeout"]),  # a slow start is not submitted again
        "job_extra_directives": [*site["job-extra-directives"], *["--gres=gpu:1"] * gpu],
        "worker_extra_args": [*site["worker-extra-args"], *["--resources", "GPU=1"] * gpu],
    }  # fmt: skip


def _dask(device: str) -> tuple[Any, bool]:  # the module; whether workers need a GPU
    try:
        import dask_jobqueue  # noqa: F401  (adds jobqueue.slurm to Dask's configuration)
        import distributed
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing; run: pip install -e '.[dask]'") from None
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device {device} on workers elsewhere; allowed: cuda, cpu")
    return distributed, device == "cuda"


def _workers(distributed: Any, client: Any, gpu: bool, results: Path, data: Path) -> tuple:
    """Look at every worker once, when it first appears; count those that take jobs."""
    known: dict[str, bool] = {}  # address -> whether it takes jobs

    def slots() -> int:
        try:
            present = client.nthreads()
            if new := [a for a in present if a not in known]:
                results.mkdir(parents=True, exist_ok=True)
                # A fresh file tells the same folder from another one under the same path.
                with tempfile.NamedTemporaryFile(dir=results, prefix=".seen-") as fresh:
                    paths = [str(Path(p).resolve()) for p in (fresh.name, data)]
                    seen = client.run(_look, paths, workers=new, on_error="return")
                came = {a: found for a, found in seen.items() if not isinstance(found, OSError)}
                known.update({a: _takes_jobs(f"worker {a}", came[a], gpu) for a in came})
        except OSError as error:
            raise RuntimeError(f"the scheduler or {results} is lost ({error}); run again") from None
        return sum(known.get(address, False) for address in present)

    # No `retries`: they would run again what raised. A lost worker's job Dask moves by itself.
    executor = client.get_executor(pure=False, **({"resources": {"GPU": 1}} if gpu else {}))
    return executor, slots, (distributed.KilledWorker,)


def _look(paths: list[str], dask_worker: Any) -> tuple[str, float, int, list[str]]:
    """Runs on a worker: its host, GPUs it offers, GPUs it sees, and the paths it does not see."""
    import torch

    offers = dask_worker.state.total_resources.get("GPU", 0)
    unseen = [path for path in paths if not Path(path).exists()]
    return socket.gethostname(), offers, torch.cuda.device_count(), unseen


def _takes_jobs(name: str, found: Any, gpu: bool) -> bool:
    if isinstance(found, Exception):
        raise UserError(f"{name} cannot run mas_core ({found}); install it there")
    host, offers, sees, unseen = found
    if gpu and not offers:
        return False
    if unseen:
        raise UserError(f"{name} on {host} does not see {unseen[0]}; all workers must share it")
    if gpu and sees != 1:
        raise UserError(f"{name} on {host} offers a GPU and sees {sees}; allowed: 1. Dask only "
                        "counts: give each worker its own CUDA_VISIBLE_DEVICES")  # fmt: skip
    return True
