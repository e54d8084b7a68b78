"""MAS on Flower: clients train by `local_update`, a server merges, measures, splits, continues.

    pip install -e ".[flower]"
    python flower/mas_flower.py --preset smoke --tasks sdnkt --splits 2 --out DIR

runs Flower's simulation. On a deployed federation `client` and `server` are the ClientApp and the
ServerApp that flower/pyproject.toml names; every node needs the data at the same path, and its
number ("partition-id") says which building is its own.

Everything that decides a number is the package's: which clients take part (`select_clients`), their
batches, their steps, the average (`weighted_mean` over the replies in order of the clients:
Flower's own strategies add in order of arrival and turn counters into floats), Eq. 3 and Eq. 4. A
run gives the same weights as `mas run mas` on one machine, bit for bit.
"""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save_file

from mas_core.config import UserError, settings
from mas_core.data.clients import open_clients
from mas_core.data.rooms.folder import ensure_rooms
from mas_core.fedavg import rule_of
from mas_core.federated import check_finite, client_batches, load_state, select_clients
from mas_core.local import local_update
from mas_core.methods import check_measured
from mas_core.models import State, restrict_state
from mas_core.records.evaluate import evaluate
from mas_core.records.store import Store
from mas_core.records.study import Study
from mas_core.records.training import build
from mas_core.records.trajectory import Trajectory
from mas_core.split import best_split

DEFAULTS = {"preset": "smoke", "tasks": "sdnkt", "splits": 2, "seed": 0, "set": "", "data": "",
            "out": "flower-run"}  # fmt: skip

client = ClientApp()


def study_of(run: dict[str, Any]) -> Study:
    """The study that a run's settings describe; "set" holds KEY=VALUE words as `mas run` does."""
    words = [word.partition("=") for word in run["set"].split()]
    if wrong := [key for key, equals, _ in words if not equals]:
        raise UserError(f"--set {wrong[0]}: write KEY=VALUE, for example fl.local_epochs=2")
    overrides = {key: value for key, _, value in words}
    chosen = settings(run["preset"], run["tasks"], overrides)
    return Study(run["tasks"], chosen, int(run["seed"]), Store(run["out"], run["preset"]))


@lru_cache(2)
def _opened(words: str, group: str, branch: bool) -> tuple[Trajectory, Any, Any]:
    """A process's trajectory, data and network; made once, used by all clients that it plays."""
    torch.set_num_threads(1)
    run = json.loads(words)
    study = study_of(run)
    trajectory = study.from_all_in_one(group) if branch else study.all_in_one()
    data = open_clients(trajectory.data, Path(run["data"]), trajectory.tasks)
    return trajectory, data, build(trajectory).to(memory_format=torch.channels_last)


@client.query()
def who(message: Message, context: Context) -> Message:
    """Which client this node is."""
    number = MetricRecord({"partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"who": number}), reply_to=message)


@client.train()
def fit(message: Message, context: Context) -> Message:
    """One client's local epochs from the server's state."""
    asked = message.content["asked"]
    trajectory, data, net = _opened(asked["run"], asked["group"], asked["branch"])
    k, r = int(context.node_config["partition-id"]), asked["round"]
    state = message.content["state"].to_torch_state_dict()
    own = load_state(net, state)
    measure = r < trajectory.fl.measure_rounds and rule_of(trajectory.fl).measures
    batches = client_batches(trajectory, data, k, r, torch.device("cpu"))
    done = local_update(net, batches, trajectory.fl, trajectory.lr(r), measure, state,
                        client=k)
    for losses in done.step_losses.tolist():
        check_finite(losses, net.tasks, f"client {data.names[k]}", r, trajectory.lr(r))
    told: dict[str, Any] = {"partition": k, "images": data.count(k, "train")}
    if done.affinity is not None:
        told["affinity"] = done.affinity.flatten().tolist()
    content = {"state": ArrayRecord(own | done.travelling), "told": MetricRecord(told)}
    return Message(RecordDict(content), reply_to=message)


def nodes_of(grid: Grid, count: int) -> dict[int, int]:
    """Client -> node; waits until every node has said which client it is."""
    found: dict[int, int] = {}
    while len(found) < count:
        asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        for reply in grid.send_and_receive(asked):
            if reply.has_content():
                found[reply.content["who"]["partition"]] = reply.metadata.src_node_id
    return found


def one_round(
    grid: Grid, nodes: dict[int, int], run: dict[str, Any], trajectory: Trajectory, r: int,
    state: State,
) -> tuple[State, np.ndarray | None]:  # fmt: skip
    """The state after round r, and the clients' affinities (K, n, n) where they measure."""
    asked = ConfigRecord({"run": json.dumps(run), "group": trajectory.tasks, "round": r,
                          "branch": trajectory.parent is not None})  # fmt: skip
    sent = RecordDict({"state": ArrayRecord(state), "asked": asked})
    clients = select_clients(trajectory, len(nodes), r)
    replies = list(grid.send_and_receive([Message(sent, nodes[k], "train") for k in clients]))
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"round {r}: a client failed: {reply.error.reason}")
    replies.sort(key=lambda reply: reply.content["told"]["partition"])
    told = [reply.content["told"] for reply in replies]
    images = sum(t["images"] for t in told)
    states = ((reply.content["state"].to_torch_state_dict(), t["images"] / images)
              for reply, t in zip(replies, told, strict=True))  # fmt: skip
    n = len(trajectory.tasks)
    S = [np.reshape(t["affinity"], (n, n)) for t in told if "affinity" in t]
    return rule_of(trajectory.fl).average(states), np.stack(S) if S else None


def merge_and_split(grid: Grid, run: dict[str, Any]) -> dict[str, Any]:
    """Algorithm 1 over a grid of nodes; writes the last states and returns what came out."""
    study = study_of(run)
    check_measured(study, min(study.settings.mas.affinity_rounds, study.split_round))
    if study.settings.fl.arithmetic != "single":
        raise UserError("Flower's clients train apart; set fl.arithmetic=single")
    data = open_clients(study.settings.data, Path(run["data"]), study.tasks)
    nodes, mas = nodes_of(grid, len(data.names)), study.settings.mas
    out = Path(run["out"])
    out.mkdir(parents=True, exist_ok=True)

    def train(t: Trajectory, state: State, until: int) -> tuple[State, list[np.ndarray]]:
        measured = []
        for r in range(t.start_round, until):
            state, S = one_round(grid, nodes, run, t, r, state)
            measured += [] if S is None else [S.mean(0)]
        save_file({k: v.contiguous() for k, v in state.items()}, out / f"{t.tasks}.safetensors")
        return state, measured

    trunk = study.all_in_one()
    net = build(trunk)
    start = net.state_dict() | rule_of(trunk.fl).start(net, trunk.fl)
    merged, measured = train(trunk, start, mas.merge_rounds)
    read = measured[: mas.affinity_rounds]
    S = read[-1].copy() if mas.affinity_at == "last" else np.mean(read, 0)
    np.fill_diagonal(S, 0.0)
    groups = [study.letters(g) for g in best_split(S, int(run["splits"])).groups]
    losses: dict[str, float] = {}
    for group in groups:
        branch = study.from_all_in_one(group)
        net, rule = build(branch).to(memory_format=torch.channels_last), rule_of(branch.fl)
        begin = restrict_state(merged, branch.tasks) | rule.start(net, branch.fl)
        state, _ = train(branch, begin, study.rounds)
        load_state(net, state)
        rule.before_test(net, branch.fl, data)
        losses |= evaluate(net, data.evaluation("test", branch.tasks, 64, "cpu"))
    found = {"groups": groups, "test_losses": losses, "total": sum(losses.values())}
    (out / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def server_of(run: dict[str, Any]) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        torch.set_num_threads(1)
        told = merge_and_split(grid, DEFAULTS | run | dict(context.run_config))
        print(f"{' '.join(told['groups'])}: total test loss {told['total']:.4f}")

    return app


server = server_of({})


def simulate(run: dict[str, Any]) -> None:
    """Flower's simulation of a run, a node a client; rooms are rendered where there are none."""
    from flwr.simulation import run_simulation

    run = DEFAULTS | run
    study = study_of(run)
    run["data"] = str(ensure_rooms(study.settings.data, run["data"] or None).resolve())
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_of(run), client, study.settings.data.buildings, backend_config=resources)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    try:
        simulate(vars(parser.parse_args()))
    except UserError as error:
        parser.error(str(error))
