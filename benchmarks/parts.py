"""What `run.py` measures, part by part, and the goals. Each measurement is a process of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from figures import number

Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of the table: `value` is what the goal is about, `of` what it was made of.

    `goal` is None for what is only told. A value meets it that is not above it, or with `at_least` not below it.
    """

    work: str
    figure: str
    value: float
    goal: float | None = None
    at_least: bool = False
    of: str = ""

    @property
    def is_met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def as_dict(self) -> Figures:
        return {**asdict(self), "met": self.is_met}


class Bench(Protocol):
    """What a part has of `run.py`.

    Attributes:
        small: Whether everything is to be tiny.
        repeat: How often each measurement is made.
        folder: For files.
    """

    small: bool
    repeat: int
    folder: Path

    def measure(self, script: str, *arguments: Any, on: str = "postgres") -> list[Figures]:
        """Run a benchmark in a process of its own; return what it reported. `on`: a server of `run.py`, or "none".

        The last figures also have the CPU seconds of the Prefect server and of PostgreSQL.
        """
        ...

    def ledger_url(self) -> str:
        """Return the URL of a new PostgreSQL database, without a password."""
        ...


class Medians:
    """The medians of several measurements of one kind."""

    def __init__(self, several: Sequence[Figures]) -> None:
        self.several = several

    def __getattr__(self, name: str) -> float:
        return float(median(one[name] for one in self.several))

    def shown(self, name: str) -> str:
        """Return a median for people."""
        return number(getattr(self, name))


def alternating(
    bench: Bench, ways: Mapping[str, Sequence[Any]], *, on: str | Mapping[str, str] = "postgres"
) -> dict[str, Medians]:
    """Measure several ways in turn, so that all meet the same machine. A way: the script and its arguments.

    `on`: the server of all, or that of each way.
    """
    found: dict[str, list[Figures]] = {way: [] for way in ways}
    for _ in range(bench.repeat):
        for way, (script, *arguments) in ways.items():
            (figures,) = bench.measure(script, *arguments, on=on if isinstance(on, str) else on[way])
            found[way].append(figures)
    return {way: Medians(several) for way, several in found.items()}


def _batch(way: str, rows: int, in_flight: int, seconds: float, latency: float = 0.0) -> Sequence[Any]:
    return "batch", way, "--rows", rows, "--in-flight", in_flight, "--seconds", seconds, "--latency", latency


def late(bench: Bench) -> list[Row]:
    rows, in_flight = (40, 20) if bench.small else (1000, 500)
    found = alternating(bench, {way: _batch(way, rows, in_flight, 1.0, 0.2) for way in ("loop", "empty", "batch")})
    loop, empty, batch = (found[way].seconds for way in ("loop", "empty", "batch"))
    work = f"{rows:,} rows of a 1 s crew, each answer 0.2 s late, {in_flight} in flight"
    of = f"{number(batch)} s; loop {number(loop)} s, empty flow {number(empty)} s"
    return [Row(work, "wall, times the best loop and an empty flow", batch / (loop + empty), 1.4, of=of)]


def rows_5k(bench: Bench) -> list[Row]:
    rows, in_flight, seconds = (100, 50, 0.2) if bench.small else (5000, 2000, 2.0)
    found = alternating(bench, {way: _batch(way, rows, in_flight, seconds) for way in ("clients", "batch")})
    loop, batch = found["clients"], found["batch"]
    work = f"{rows:,} rows of a {seconds:g} s crew on localhost, {in_flight:,} in flight"
    of = f"{batch.shown('seconds')} s; loop with 8 httpx clients {loop.shown('seconds')} s"
    cpu = f"loop {loop.shown('row_cpu_ms')} ms"
    return [
        Row(work, "wall, times the loop with 8 httpx clients", batch.seconds / loop.seconds, 1.4, of=of),
        Row(work, "CPU a row, ms", batch.row_cpu_ms, 1.3, of=cpu),
        Row(work, "peak memory, MB", batch.memory_mb, 160, of=f"loop {loop.shown('memory_mb')} MB"),
    ]


def rows_100k(bench: Bench) -> list[Row]:
    few_rows, many_rows = (50, 200) if bench.small else (10_000, 100_000)
    before = bench.measure(*_batch("batch", few_rows, 1000, 0.0))
    (many,) = bench.measure(*_batch("batch", many_rows, 1000, 0.0))
    few = Medians([*before, *bench.measure(*_batch("batch", few_rows, 1000, 0.0))])
    work = f"{many_rows:,} rows of an instant crew, compared with {few_rows:,}"
    memory = f"{number(many['memory_mb'])} and {few.shown('memory_mb')} MB"
    cpu = f"{number(many['row_cpu_ms'])} and {few.shown('row_cpu_ms')} ms a row"
    # Flat: what a busy machine adds is below it, and what grows with the rows is far above.
    return [
        Row(work, "peak memory, times that of the fewer rows", many["memory_mb"] / few.memory_mb, 1.15, of=memory),
        Row(work, "CPU a row, times that of the fewer rows", many["row_cpu_ms"] / few.row_cpu_ms, 1.15, of=cpu),
    ]


def ledger(bench: Bench) -> list[Row]:
    rows = 1000 if bench.small else 1_000_000
    many, tiny = bench.folder / "ledger-many", bench.folder / "ledger-tiny"
    (made,) = bench.measure("ledger", "make", many, "--rows", rows)
    bench.measure("ledger", "make", tiny, "--rows", 10)
    (first,) = bench.measure("ledger", "again", many)
    ways = {"inspect": ("ledger", "inspect", many), "tiny": ("ledger", "inspect", tiny)}
    found = alternating(bench, {**ways, "again": ("ledger", "again", many)})
    work = f"a ledger of {rows:,} rows"
    inspect, again = found["inspect"], found["again"]
    of = f"of 10 rows {found['tiny'].shown('seconds')} s; CPU {inspect.shown('cpu_seconds')} s"
    return [
        Row(work, "prefect-crew batch inspect, s", inspect.seconds, 1.2, of=of),
        Row(work, "batch inspect, peak memory, MB", inspect.memory_mb, of=f"the ledger has {made['ledger_mb']:.0f} MB"),
        Row(work, "a done batch called again, s", again.seconds, 10, of=f"CPU {again.shown('cpu_seconds')} s"),
        Row(work, "called again, peak memory, MB", again.memory_mb, 200),
        Row(work, "the call that writes the output, s", first["seconds"], of=f"{number(first['memory_mb'])} MB"),
    ]


def ranges(bench: Bench) -> list[Row]:
    rows, soon = (60, 4) if bench.small else (10_000, 10)
    options = ("--rows", rows, "--ledger", bench.ledger_url(), "--soon", soon)
    found = alternating(bench, {way: ("crew_worker", "ranges", "--workers", way, *options) for way in ("1", "2")})
    one, two = found["1"], found["2"]
    cpu = ", ".join(f"{name} {two.shown(f'{name}_cpu_seconds')}" for name in ("server", "postgres", "workers", "crew"))
    of = f"one {one.shown('seconds')} s, two {two.shown('seconds')} s; CPU s with two: {cpu}"
    work = f"two ranges of {rows:,} rows of an instant crew, on two crew workers"
    return [Row(work, "one worker's wall, times that of two", one.seconds / two.seconds, 1.6, at_least=True, of=of)]


def worker(bench: Bench) -> list[Row]:
    taken, stopped = (5, 5) if bench.small else (200, 50)
    rows: list[Row] = []
    for by, who, goal in (("bench", "the same worker", 30), ("another", "another one", 90)):
        (found,) = bench.measure("crew_worker", "killed", "--runs", taken, "--by", by)
        of = f"CPU of the worker {found['run_cpu_ms']:.0f} ms a flow run"
        rows.append(Row(f"{taken} flow runs, killed", f"waited for again by {who}, s", found["seconds"], goal, of=of))
    (found,) = bench.measure("crew_worker", "cancelled", "--runs", stopped)
    of = f"crews stopped: {found['stops']}"
    return [*rows, Row(f"{stopped} flow runs", "cancelled at once, s", found["seconds"], 30, of=of)]


def worker_waiting(bench: Bench) -> list[Row]:
    held, hold = ((5, 10), 2) if bench.small else ((2000, 5000), 60)
    *several, ended = bench.measure("crew_worker", "waiting", "--held", *held, "--hold", hold)
    rows: list[Row] = []
    for found in several:
        work = f"{found['runs']:,} flow runs that wait in one crew worker"
        of = f"{found['memory_mb']:.0f} MB in all; {number(found['core_percent'])} % of a core"
        begun = f"CPU of the worker {found['run_begun_cpu_ms']:.0f} ms"
        rows += [
            Row(work, "memory of a flow run, KB", found["run_kb"], of=of),
            Row(work, "longest lag of the event loop, s", found["longest_lag_seconds"], 1),
            Row(work, "threads", found["threads"], 20, of=f"handles {found['handles']}"),
            Row(work, "to begin one more, s", found["run_begun_seconds"], of=begun),
        ]
    of = f"CPU of the Prefect server {1000 * ended['server_cpu_seconds'] / ended['runs']:.0f} ms a flow run in all"
    work = f"{ended['runs']:,} flow runs that end at once in one crew worker"
    return [*rows, Row(work, "completed within 1,200 s", ended["completed"], ended["runs"], at_least=True, of=of)]


def worker_short(bench: Bench) -> list[Row]:
    runs = 6 if bench.small else 3000
    (found,) = bench.measure("crew_worker", "short", "--runs", runs)
    work = f"{runs:,} short flow runs, one after the other"
    rows: list[Row] = []
    for name in ("memory_mb", "threads", "handles"):
        half, last = found[f"{name}_half"], found[f"{name}_last"]
        of = f"{number(half)} and {number(last)}"
        rows.append(Row(work, f"{name}, times that after half of them".replace("_mb", ""), last / half, 1.1, of=of))
    return [*rows, Row(work, "s each", found["run_seconds"])]


def webhooks(bench: Bench) -> list[Row]:
    found: list[Row] = []
    for runs, goal in ((5, 0.25), (10, 0.5)) if bench.small else ((100, 0.25), (1000, 0.5)):
        options = ("--way", "webhooks", "--runs", runs, "--settle", 1 if bench.small else 5)
        lag = alternating(bench, {"lag": ("waiting", "lag", *options)})["lag"]
        work = f"{runs:,} runs that end at once, webhooks on"
        of = f"p50 {lag.shown('p50_seconds')} s; CPU of the waiting process {lag.shown('run_cpu_ms')} ms a run"
        seen = f"p50 {lag.shown('seen_p50_seconds')} s"
        found += [
            Row(work, "crew end to result, p95, s", lag.p95_seconds, goal, of=of),
            Row(work, "crew end to the status that shows it, p95, s", lag.seen_p95_seconds, of=seen),
            Row(work, "status calls a run", lag.run_calls),  # polls go on as the policy says
        ]
    return found


def burst(bench: Bench) -> list[Row]:
    runs, seconds = (5, 0.5) if bench.small else (100, 8.0)
    options = ("--runs", runs, "--seconds", seconds, "--at-once", runs)
    ways = {way: ("waiting", "lag", *options, "--way", way) for way in ("prefect", "polling", "webhooks")}
    found = alternating(bench, ways, on="as-it-comes")
    least, polling, webhooks = found["prefect"], found["polling"], found["webhooks"]
    work = f"{runs} runs of an {seconds:g} s crew at once in one flow, SQLite server as it comes"
    of = f"{polling.shown('seconds')} s; Prefect's own {least.shown('seconds')} s"
    later = f"{webhooks.shown('seconds')} s"
    cpu = {way: 1000 * measured.server_cpu_seconds / runs for way, measured in found.items()}
    others = f"with webhooks {number(cpu['webhooks'])} ms; Prefect's own {number(cpu['prefect'])} ms"
    # Not later than without them; two measurements of one thing differ by as much.
    return [
        Row(work, "wall, times two tasks of Prefect's own", polling.seconds / least.seconds, 1.6, of=of),
        Row(work, "wall with webhooks, times that of polling", webhooks.seconds / polling.seconds, 1.1, of=later),
        Row(work, "CPU of the Prefect server, ms a run", cpu["polling"], of=others),
    ]


def polling(bench: Bench) -> list[Row]:
    runs, seconds = (5, 3.0) if bench.small else (100, 60.0)
    (lag,) = bench.measure("waiting", "lag", "--way", "polling", "--runs", runs, "--seconds", seconds)
    work, of = f"{runs} runs of {seconds:g} s, polling", f"p50 {number(lag['p50_seconds'])} s"
    return [
        Row(work, "crew end to result, p95, s", lag["p95_seconds"], 1 + seconds / 10, of=of),
        Row(work, "status calls a run", lag["run_calls"], 25),
    ]


def one_run(bench: Bench) -> list[Row]:
    times, seconds = (1, 0.5) if bench.small else (5, 2.0)
    options = ("one", "--times", times, "--seconds", seconds)
    found = alternating(bench, {"time": ("runs", *options), "count": ("runs", *options, "--count")})
    work = f"arun_crew in a running flow, {seconds:g} s crew, webhooks on"
    shapes = found["count"].several[0]["shapes"]
    kinds = "; ".join(f"{number(count)} {shape.replace('/api/', '')}" for shape, count in shapes.items())
    return [
        Row(work, "on top of the crew's own time, s", found["time"].extra_seconds, 0.25),
        Row(work, "requests to Prefect", found["count"].requests, 8, of=kinds),
        Row(work, "connections to the crew's server", found["time"].connections, 1),
    ]


def concurrent(bench: Bench) -> list[Row]:
    few, many = (3, 5) if bench.small else (8, 100)
    options = ("many", "--runs", few, many, "--seconds", 0.5 if bench.small else 1.0)
    options = (*options, "--times", 1 if bench.small else 3)
    rows: list[Row] = []
    for server in ("postgres", "sqlite"):
        found = alternating(bench, {"many": ("runs", *options)}, on=server)["many"]
        alone = f"one {found.shown('runs_1_seconds')} s"
        for runs, goal in ((few, 0.15 if server == "postgres" else None), (many, None)):
            work = f"{runs} runs at the same time, {'PostgreSQL' if server == 'postgres' else 'SQLite'}"
            longer = getattr(found, f"runs_{runs}_longer_seconds")
            of = f"{alone}, {runs} {found.shown(f'runs_{runs}_seconds')} s"
            rows.append(Row(work, "longer than one, s", longer, goal, of=of))
    return rows


def pipeline(bench: Bench) -> list[Row]:
    runs = ("--runs", 1 if bench.small else 5)
    layers = alternating(bench, {"layers": ("pipeline", "layers", *runs)})["layers"]
    line = alternating(bench, {"line": ("pipeline", "line")}, on="embedded")["line"]
    of = f"{layers.shown('seconds')} s; of Prefect's own tasks {layers.shown('floor_step_ms')} ms"
    work = "a pipeline of 20 steps in 5 layers, 0.2 s crew"
    three = "a pipeline of 3 steps in a line, 2 s crew, Prefect's embedded server"
    return [
        Row(work, "on top of a step of the critical path, ms", layers.step_ms, 130, of=of),
        Row(three, "wall, s", line.seconds, 6.6),
    ]


def memory(bench: Bench) -> list[Row]:
    options = ("--runs", 30, "--over", 1, "--settle", 1) if bench.small else ("--runs", 1000)
    found = alternating(bench, {what: ("waiting", what, *options) for what in ("idle", "floor")})
    idle, floor = found["idle"], found["floor"].shown("run_kb")
    shown = f"{idle.shown('memory_mb')} MB in all; {idle.shown('core_percent')} % of a core"
    of = f"of Prefect's own tasks {floor} KB; {shown}"
    return [Row(f"{options[1]:,} waiting runs in one process", "memory of a run, KB", idle.run_kb, 65, of=of)]


def real_crews(bench: Bench) -> list[Row]:
    if importlib.util.find_spec("crewai") is None:
        raise RuntimeError("it needs the extra crewai")
    runs = 4 if bench.small else 100
    found = alternating(bench, {"crews": ("real_crews", "--runs", runs)}, on="none")["crews"]
    of = f"the server's peak memory {found.shown('server_memory_mb')} MB"
    return [Row(f"{runs} real crews at once on the dev server", "wall, s", found.seconds, 4, of=of)]


def past(bench: Bench) -> list[Row]:
    records, times = (500, 1) if bench.small else (150_000, 3)
    goals = {"list_open_runs": 1.0, "costs_of_7_days": 10.0, "flow_run_of_a_deployment": None}
    rows: list[Row] = []
    for database in ("sqlite", "postgres"):
        on = {way: f"{database}/{way}" for way in ("empty", "past")}
        for way, count in (("empty", 1), ("past", records)):
            bench.measure("past", "make", "--records", count, on=on[way])
        found = alternating(bench, dict.fromkeys(on, ("past", "work", "--times", times)), on=on)
        for name in ("start", "second_call", "resolve_by_key", "look_up_by_kickoff_id", "cancel", *goals):
            work = f"{name.replace('_', ' ')}, beside {records:,} ended records, {database}"
            empty, full = (getattr(found[way], f"{name}_seconds") for way in on)
            of = f"{number(full)} s; on an empty server {number(empty)} s"
            if name in goals:
                rows.append(Row(work, "s", full, goals[name], of=of))
            else:
                rows.append(Row(work, "times an empty server", full / empty, 1.2, of=of))
    return rows


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "past": past,
    "late": late,
    "rows-5k": rows_5k,
    "rows-100k": rows_100k,
    "ledger": ledger,
    "ranges": ranges,
    "worker": worker,
    "worker-waiting": worker_waiting,
    "worker-short": worker_short,
    "webhooks": webhooks,
    "polling": polling,
    "one-run": one_run,
    "concurrent": concurrent,
    "burst": burst,
    "pipeline": pipeline,
    "memory": memory,
    "real-crews": real_crews,
}
