"""A graph as lines of characters, which every interface of Prefect shows alike: only the newest draws Mermaid. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

__all__ = ["draw_graph"]

_CORNERS = {  # what joins above, below, on the left; all of them go on to the right
    (True, True, False): "├",
    (True, False, False): "└",
    (False, True, False): "┌",
    (True, True, True): "┼",
    (True, False, True): "┴",
    (False, True, True): "┬",
}


def draw_graph(
    order: Sequence[str], needs: Mapping[str, Set[str]], labels: Mapping[str, str] | None = None
) -> list[str]:
    """Return one line for each name of `order`, in which what a name needs comes before it.

    `labels` are what stands there in place of the names.

    A line leads from each name down to those that need it:

        ┌───── research
        │ ┌─── prices
        └─┴─┬▶ write
            └▶ review
    """
    last = {need: row for row, name in enumerate(order) for need in needs[name]}
    lanes: list[str | None] = []
    rows: list[tuple[list[str], bool]] = []
    for row, name in enumerate(order):
        into = {lanes.index(need) for need in needs[name]}
        before = [lane is not None for lane in lanes]
        own: int | None = None
        if name in last:
            own = lanes.index(None) if None in lanes else len(lanes)
            lanes[own:] = [name, *lanes[own + 1 :]]
            before += [False] * (len(lanes) - len(before))
        for at in into:
            if last[str(lanes[at])] == row:
                lanes[at] = None
        after = [lane is not None for lane in lanes]
        rows.append((_lanes(before, after, into if own is None else {*into, own}), bool(into)))
    width = max((len(cells) for cells, _ in rows), default=0)
    shown = [(labels or {}).get(name, name) for name in order]
    return [_line(cells, width, label, arrow=arrow) for (cells, arrow), label in zip(rows, shown, strict=True)]


def _lanes(before: Sequence[bool], after: Sequence[bool], joined: Set[int]) -> list[str]:
    """Return one cell for each lane: its own character, and what leads on to the next one."""
    first = min(joined, default=len(before))
    cells: list[str] = []
    for lane, (above, below) in enumerate(zip(before, after, strict=True)):
        if lane in joined:
            sign = _CORNERS[above, below, lane > first]
        elif above and below:
            sign = "│"
        else:
            sign = "─" if lane > first else " "
        cells.append(sign + ("─" if lane >= first else " "))
    return cells


def _line(cells: Sequence[str], width: int, name: str, *, arrow: bool) -> str:
    led = "".join(cells)
    fill = "─" if led.endswith("─") else " "
    led += fill * 2 * (width - len(cells))
    end = "▶" if arrow else fill
    return f"{led[:-1]}{end} {name}" if width else name
