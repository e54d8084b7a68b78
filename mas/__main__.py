"""The command line: mas demo | run | plan | reproduce | campaign | unpack | status | ..."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 success, 1 something failed, 2 bad input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where my_module of --set fl.method=my_module:Name may lie
    from mas_core.config import UserError

    before = signal.signal(signal.SIGTERM, _interrupt)  # ends like Ctrl-C
    try:
        for name, least in (("workers", "1 and more"), ("timeout", "1 and more"),
                            ("threads", "1 and more"),
                            ("images_per_second", "more than 0")):  # fmt: skip
            value = getattr(arguments, name, None)  # None: the command decides
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value}; allowed: {least}")
        for seed in (getattr(arguments, "seed", 0), *(getattr(arguments, "seeds", None) or ())):
            if seed < 0:
                raise UserError(f"seed {seed}; allowed: 0 and more")
        status = arguments.function(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `mas status | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:  # a file that cannot be read or written
        print(f"mas: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mas: interrupted; what was done is kept, the same command continues",
              file=sys.stderr)  # fmt: skip
        return 130
    except RuntimeError as error:  # a diverged or failed trajectory, a lost worker
        print(f"mas: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mas", description="Merge, measure, split, continue: federated tasks trained together."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text)
        added.set_defaults(function=function)
        return added

    demo = command("demo", _demo, "render, merge, measure, split, continue: a first look")
    _records(demo)
    _compute(demo)
    _run_options(command("run", _run, "train one method and print its result"))
    _plan_options(command("plan", _plan, "what notebooks would train, what is done, the cost"))
    _reproduce_options(command("reproduce", _reproduce, "train what is missing, run the notebooks"))
    _campaign_options(command("campaign", _campaign, "train missing evidence within a time"))
    _unpack_options(command("unpack", _unpack, "add the records that a campaign has packed"))
    _site_options(command("site", _site, "the executed notebooks as static HTML"))
    _status_options(command("status", _status, "what the records hold"))
    _render_options(command("render", _render, "write procedural buildings like Taskonomy's"))
    _prepare_options(command("prepare", _prepare, "verify and decode a Taskonomy folder"))
    return parser


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="small", help="smoke, small, ... or paper")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="for example fl.local_epochs=2")  # fmt: skip


def _results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("results"))


def _records(parser: argparse.ArgumentParser) -> None:
    _results(parser)
    parser.add_argument("--data", type=Path, default=None, help="rooms or a prepared Taskonomy")


def _compute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=None, help="processes on this machine")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default: a GPU if any")
    parser.add_argument("--threads", type=int, default=None,
                        help="of each process; default: 1 for small networks, "
                        "else the cores shared out")  # fmt: skip


def _computed(arguments: argparse.Namespace, workers: int = 1) -> Any:
    """Compute, with this many workers where none are named."""
    from .run.workers import Compute

    elsewhere = {name: getattr(arguments, name, None) for name in ("dask", "slurm")}
    return Compute(arguments.workers or workers, arguments.device, arguments.threads, **elsewhere)


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    from mas_core.config import UserError

    pairs = [text.partition("=") for text in arguments.overrides]
    for key, equals, _ in pairs:
        if not equals:
            raise UserError(f"--set {key}: write KEY=VALUE, for example fl.local_epochs=2")
    return {key: value for key, _, value in pairs}


def _demo(arguments: argparse.Namespace) -> None:
    from .paper.demo import demo

    workers = min(2, os.cpu_count() or 1)
    demo(arguments.results, arguments.data, _computed(arguments, workers))


def _run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("method", help="one-by-one, all-in-one, fedprox, gradnorm, hoa, tag or mas")
    run.add_argument("--tasks", default="sdnkt", help="task letters out of sdnkterca")
    run.add_argument("--splits", type=int, default=2, metavar="X", help="groups (mas, tag, hoa)")
    run.add_argument("--seed", type=int, default=0)
    _settings(run)
    _records(run)
    _compute(run)


def _run(arguments: argparse.Namespace) -> None:
    from mas_core.config import UserError, settings
    from mas_core.methods import METHODS, TAKES_SPLITS
    from mas_core.records.store import open_store
    from mas_core.records.study import Study

    from .paper.demo import method_table
    from .run.workers import train_recipes

    if arguments.method not in METHODS:
        raise UserError(f"unknown method {arguments.method!r}; allowed: {', '.join(METHODS)}")
    overrides = _overrides(arguments)
    chosen = settings(arguments.preset, arguments.tasks, overrides)
    numbers = {"fedprox": ("prox_mu",), "gradnorm": ("gradnorm_alpha", "gradnorm_lr")}
    for name in numbers.get(arguments.method, ()):  # 0, the default, leaves them to the method
        if f"fl.{name}" in overrides and not getattr(chosen.fl, name):
            raise UserError(f"fl.{name}=0: {arguments.method} without it is all-in-one; "
                            "allowed: above 0")  # fmt: skip
    store = open_store(arguments.preset, arguments.results)
    study = Study(arguments.tasks, chosen, arguments.seed, store)
    extra = {"splits": arguments.splits} if arguments.method in TAKES_SPLITS else {}
    next(METHODS[arguments.method](study, **extra))  # the impossible is refused at once
    recipes = {arguments.method: METHODS[arguments.method](study, **extra)}
    results = train_recipes(recipes, store, chosen, arguments.data, _computed(arguments))
    print(method_table(results.values()))


def _notebooks(command: argparse.ArgumentParser) -> None:
    command.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="default: all")
    command.add_argument("--seeds", type=int, nargs="+", default=None,
                         help="default: 0; with --no-train each notebook's own")  # fmt: skip
    _settings(command)


def _plan_options(plan: argparse.ArgumentParser) -> None:
    _notebooks(plan)
    _results(plan)
    plan.add_argument("--images-per-second", type=float, default=None, metavar="N",
                      help="of five-task training, to time a preset not on record")  # fmt: skip


def _plan(arguments: argparse.Namespace) -> None:
    from .paper.plan import plan

    print(plan(arguments.notebooks, arguments.preset, arguments.seeds or [0], _overrides(arguments),
               arguments.results, arguments.images_per_second))  # fmt: skip


def _reproduce_options(reproduce: argparse.ArgumentParser) -> None:
    _notebooks(reproduce)
    _records(reproduce)
    _compute(reproduce)
    reproduce.add_argument("--figures", type=Path, default=Path("figures"))
    reproduce.add_argument("--timeout", type=int, default=3600, help="seconds a notebook may take")
    reproduce.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE",
                           help="a parameter of the notebooks")  # fmt: skip
    scale = reproduce.add_mutually_exclusive_group()
    scale.add_argument("--dask", metavar="ADDRESS", help="a Dask scheduler, or its scheduler file")
    scale.add_argument("--slurm", metavar="PARTITION",
                       help="train on --workers Slurm jobs, one GPU each")  # fmt: skip
    reproduce.add_argument("--no-train", action="store_true", help="only run what is on record")
    reproduce.add_argument("--dry-run", action="store_true", help="print the Slurm job script")


def _reproduce(arguments: argparse.Namespace) -> int:
    from mas_core.config import UserError

    from .paper.reproduce import reproduce

    if arguments.dry_run:
        from .run.cluster import slurm_job_script

        if not arguments.slurm:
            raise UserError("--dry-run prints a Slurm job script: name the --slurm PARTITION")
        print(slurm_job_script(arguments.slurm, arguments.device or "cuda"))
        return 0
    return reproduce(arguments, _overrides(arguments), _computed(arguments))


def _campaign_options(campaign: argparse.ArgumentParser) -> None:
    campaign.add_argument("--budget", required=True, help="a time such as 540s, 9m or 2h")
    campaign.add_argument("--pack", type=Path, required=True, metavar="FILE",
                          help="where records go, a .tar.gz or .zip")  # fmt: skip
    _records(campaign)
    _compute(campaign)


def _campaign(arguments: argparse.Namespace) -> int:
    from .paper.campaign import campaign, seconds_of

    budget, compute = seconds_of(arguments.budget), _computed(arguments, os.cpu_count() or 1)
    return campaign(budget, arguments.pack, arguments.results, compute, arguments.data)


def _unpack_options(unpack: argparse.ArgumentParser) -> None:
    unpack.add_argument("file", type=Path, metavar="FILE")
    _results(unpack)


def _unpack(arguments: argparse.Namespace) -> int:
    from .paper.campaign import unpack

    return unpack(arguments.file, arguments.results)


def _site_options(site: argparse.ArgumentParser) -> None:
    site.add_argument("--out", type=Path, required=True, metavar="DIR")
    site.add_argument("--preset", default="small", help="whose figures and records are linked")
    site.add_argument("--figures", type=Path, default=Path("figures"))
    _results(site)


def _site(arguments: argparse.Namespace) -> None:
    from mas_core.config import PRESETS, UserError

    from .paper.site import site

    if arguments.preset not in PRESETS:
        raise UserError(f"unknown preset {arguments.preset!r}; allowed: {', '.join(PRESETS)}")
    pages = site(arguments.out, arguments.results, arguments.figures, arguments.preset)
    print(f"{pages} notebooks; open {arguments.out / 'index.html'}")


def _status_options(status: argparse.ArgumentParser) -> None:
    status.add_argument("--preset", default=None, help="default: every preset there is")
    _results(status)


def _status(arguments: argparse.Namespace) -> None:
    from mas_core.config import PRESETS, UserError
    from mas_core.records.store import open_store

    if arguments.preset is not None and arguments.preset not in PRESETS:
        raise UserError(f"unknown preset {arguments.preset!r}; allowed: {', '.join(PRESETS)}")
    for preset in [arguments.preset] if arguments.preset else PRESETS:
        store = open_store(preset, arguments.results)
        ids = store.ids()
        complete = sum(store.result(i) is not None for i in ids)
        print(f"{preset}: {len(ids)} trajectories in {store.root}, {complete} complete")
        for id_ in ids:
            trajectory = store.trajectory(id_)
            done, R = store.rounds_done(trajectory), trajectory.fl.rounds
            start = f" from {trajectory.parent.id} at {trajectory.start_round}" if (
                trajectory.parent) else ""  # fmt: skip
            result = store.result(id_)
            total = f"  total test loss {sum(result['test_best'].values()):.3f}" if result else ""
            print(f"  {id_:30} round {done:4}/{R}{total}{start}")


def _render_options(render: argparse.ArgumentParser) -> None:
    render.add_argument("--out", type=Path, required=True)
    render.add_argument("--buildings", type=int, default=32)
    render.add_argument("--views", type=int, default=96, help="mean number of views a building")
    render.add_argument("--size", type=int, default=64, help="pixels")
    render.add_argument("--seed", type=int, default=0)
    render.add_argument("--heterogeneity", type=float, default=0.7,
                        help="0: one style for all buildings, 1: each its own")  # fmt: skip
    render.add_argument("--workers", type=int, default=None, help="processes; default: all cores")


def _render(arguments: argparse.Namespace) -> None:
    from mas_core.config import UserError
    from mas_core.data.rooms import render_rooms

    try:
        summary = render_rooms(
            arguments.out, arguments.buildings, arguments.views, arguments.size, arguments.seed,
            arguments.heterogeneity, arguments.workers,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None
    print(f"{summary['written']} views written, {summary['skipped']} were there: {arguments.out}")


def _prepare_options(prepare: argparse.ArgumentParser) -> None:
    prepare.add_argument("--root", type=Path, required=True)
    prepare.add_argument("--size", type=int, default=256, help="pixels")
    prepare.add_argument("--out", type=Path, default=None, help="default: ROOT/prepared")
    prepare.add_argument("--domains", nargs="+", default=None, help="default: all of the tasks")
    prepare.add_argument("--table", default="mas_core.tasks:TASKS", metavar="MODULE:NAME",
                         help="the tasks, where they are not the nine")  # fmt: skip
    prepare.add_argument("--skip-broken", action="store_true",
                         help="leave out views with a broken or missing file")  # fmt: skip
    prepare.add_argument("--workers", type=int, default=None, help="threads; default: all cores")


def _prepare(arguments: argparse.Namespace) -> None:
    from mas_core.config import outside
    from mas_core.data.taskonomy import prepare

    done = prepare(arguments.root, arguments.size, arguments.domains,
                   skip_broken=arguments.skip_broken, workers=arguments.workers,
                   out=arguments.out, table=outside(arguments.table))  # fmt: skip
    print(f"{sum(done.views.values())} views of {len(done.views)} buildings in {done.folder}, "
          f"{len(done.rebuilt)} buildings read anew, "
          f"{sum(map(len, done.skipped.values()))} files broken or missing")  # fmt: skip
    if left_out := sorted(done.skipped.keys() - done.views.keys()):
        print(f"left out, without a whole view: {', '.join(left_out)}")


if __name__ == "__main__":
    sys.exit(main())
