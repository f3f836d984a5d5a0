"""Worlds in which a start that is refused takes its claim back, and in which two kickoffs are answered with one id.

The request that deletes a claim arrives in time, late, twice or never, while others have decided by that claim, take
its number anew, prune, force a start or resolve. They are judged as those of `permit_worlds.py`.
"""

from __future__ import annotations

from proof.sim.scenario import Call, CrewRun, Prune, Scenario

__all__ = ["WORLDS"]

SLOW_INPUTS = ("inputs:latency=4@1",)
LONG = (CrewRun(seconds=50.0),)
LONGER = (CrewRun(seconds=90.0),)
FAILS = (CrewRun(end="fails", seconds=1.0), CrewRun(seconds=50.0))
REFUSED = Call(crashed_at=1.0, again=(15.0,))
"""It gives its claim back, since it cannot confirm it. Its flow run is said to have crashed, so that others take the
claim for given up while it asks for the inputs."""
UNCONFIRMED = (("read@1", "500"),)

WORLDS = {
    f"a start is refused again and again, and the deletion of its first claim is {fate}": Scenario(
        calls=(Call(incomplete=True, again=(1.0,)), Call(at=0.3, incomplete=True, again=(2.0,)), Call(at=4.0)),
        runs=LONG,
        prefect_faults=(("delete@1", fate),),
    )
    for fate in ("refused", "503", "500", "500-after", "lost", "timeout", "slow", "late", "twice")
}
"""Each by its name in words."""

WORLDS["a claim is deleted while a later run fails, and its number is taken anew"] = Scenario(
    calls=(REFUSED, Call(at=2.0), Call(at=8.0, again=(3.0,))),
    runs=FAILS,
    faults=SLOW_INPUTS,
    prefect_faults=UNCONFIRMED,
)

for fate in ("lost", "timeout", "slow", "late", "twice"):
    WORLDS |= {
        f"a refused start is voided by another that starts, and the deletion of its claim is {fate}": Scenario(
            calls=(REFUSED, Call(at=2.0, again=(15.0,)), Call(at=50.0), Call(at=96.0)),
            runs=LONGER,
            faults=SLOW_INPUTS,
            prefect_faults=(*UNCONFIRMED, ("delete@1", fate)),
            resolve_every=0.5,
        ),
        f"a key is pruned and started anew, and the deletion of its first claim is {fate}": Scenario(
            calls=(Call(incomplete=True, flow=False), Call(at=75.0), Call(at=92.0)),
            runs=LONG,
            prefect_faults=(("delete@1", fate),),
            prunes=(Prune(at=70.0), Prune(at=89.8, freeze_at=8, freeze_for=5.0)),
        ),
    }

for step in range(1, 18):
    at = f", before its step {step}"
    WORLDS |= {
        f"one that has voided a refused start sleeps while a third one starts{at}": Scenario(
            calls=(REFUSED, Call(at=2.0, freeze_at=step, freeze_for=30.0), Call(at=10.0)),
            runs=LONG,
            faults=SLOW_INPUTS,
            prefect_faults=UNCONFIRMED,
            resolve_every=0.5,
        ),
        f"one that has voided a claim sleeps while the same owner claims its number anew{at}": Scenario(
            calls=(Call(crashed_at=1.0), Call(at=2.0, freeze_at=step, freeze_for=6.0)),
            runs=LONG,
            faults=SLOW_INPUTS,
            prefect_faults=UNCONFIRMED,
        ),
        f"one whose start is refused sleeps while others void its claim and start{at}": Scenario(
            calls=(
                Call(crashed_at=1.0, freeze_at=step, freeze_for=60.0),
                Call(at=2.0, again=(15.0,)),
                Call(at=25.0),
            ),
            runs=LONGER,
            prefect_faults=UNCONFIRMED,
            resolve_every=0.5,
        ),
        f"a caller is cancelled over its claim while another one waits{at}": Scenario(
            calls=(Call(cancel_at=step, asked=True), Call(at=0.2, again=(3.0,)), Call(at=3.0)),
            runs=LONG,
            faults=SLOW_INPUTS,
        ),
        f"two kickoffs of two keys are answered with one id, and one of the callers sleeps{at}": Scenario(
            calls=(Call(), Call(key=1, freeze_at=step + 5, freeze_for=30.0), Call(at=2.0, key=1), Call(at=2.0)),
            runs=LONG,
            same_id_for=20.0,
            order=step,
        ),
    }
    if step % 2 == 0:
        continue  # a request has several steps
    WORLDS |= {
        f"one that has voided a refused start sleeps until the deletion of that claim arrives late{at}": Scenario(
            calls=(REFUSED, Call(at=2.0, freeze_at=step, freeze_for=92.0), Call(at=88.0), Call(at=93.5)),
            runs=LONG,
            faults=SLOW_INPUTS,
            prefect_faults=(*UNCONFIRMED, ("delete@1", "late")),
        ),
        f"one forces a start and sleeps while a refused start takes its claim back{at}": Scenario(
            calls=(REFUSED, Call(at=0.3, force_new=True, freeze_at=step, freeze_for=20.0), Call(at=10.0)),
            runs=LONG,
            faults=SLOW_INPUTS,
            prefect_faults=UNCONFIRMED,
            resolve_every=0.5,
        ),
        f"one sleeps over a run that fails while the claim before it is deleted{at}": Scenario(
            calls=(REFUSED, Call(at=2.0, freeze_at=step, freeze_for=6.0), Call(at=8.0, again=(3.0,))),
            runs=FAILS,
            faults=SLOW_INPUTS,
            prefect_faults=UNCONFIRMED,
        ),
        f"two kickoffs of two keys are answered with one id at the same moment{at}": Scenario(
            calls=(Call(), Call(key=1), Call(at=0.2, key=1), Call(at=0.2)),
            runs=LONG,
            faults=("kickoff:latency=0.5@1",),
            same_id_for=20.0,
            order=step,
            seed=step,
        ),
        f"two kickoffs of two keys are answered with one id, and one of the callers dies{at}": Scenario(
            calls=(Call(kill_at=step + 12, crashed_after=0.5), Call(key=1), Call(at=3.0), Call(at=3.0, key=1)),
            runs=LONG,
            same_id_for=20.0,
            seed=step,
        ),
    }
