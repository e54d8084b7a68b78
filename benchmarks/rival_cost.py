"""Training time of today's rivals against one-by-one, in one run, counted as in `method_cost`.

A round is the first of its training. Selective updates cost more the more groups there are: their
first batch has every task alone, later ones the groups of the day.
"""

from pathlib import Path

from mas.paper.experiments import RIVALS, ask, rivals, tour
from mas_core.records.store import open_store

from .method_cost import RECORDS, timed
from .scenes import prepared
from .timing import Row, main


def measure(quick: bool, folder: Path) -> list[Row]:
    preset, rooms = prepared(quick, folder)
    store = open_store("small", RECORDS)
    recorded = ask(tour, store) | ask(rivals, store, partial=True)
    wanted = ["one-by-one", "all-in-one", *(["FAMO"] if quick else ["MAS-2", *RIVALS])]
    chosen = {key: r for key, r in recorded.items() if key[0] in wanted and key[1] == "sdnkt"}
    return timed(chosen, preset, store, rooms, 1 if quick else 3)


if __name__ == "__main__":
    main(measure)
