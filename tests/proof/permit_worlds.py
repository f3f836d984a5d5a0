"""Worlds in which only a permit keeps a run from being started twice, and a record from going backwards.

A person resolves, a clerk prunes, a clock is wrong, a write hangs, the Prefect server takes a process for dead: each
while the owner of a claim is alive. They are judged without the oracle's excuses.
"""

from __future__ import annotations

from proof.sim.scenario import Call, CrewRun, Prune, Root, Scenario

__all__ = ["WORLDS"]

LIMITED = ("kickoff:429-before-accept=15@1",)
LIMITED_TWICE = ("kickoff:429-before-accept@1-2",)
BUSY = ("kickoff:503-before-accept=3@1",)
SLOW_INPUTS = ("inputs:latency=4@1",)
SLOW_KICKOFF = ("kickoff:latency=4@1",)

SUBFLOWS = (Call(root=0), Call(at=100.0, root=0))
"""A subflow, and the one that a retry of its root makes anew: both have the same key."""

WORLDS = {
    # The Prefect server says Crashed, and the process lives.
    "an owner that is said to have crashed asks for the inputs, and a person resolves": Scenario(
        calls=(Call(crashed_at=1.0), Call(at=3.0, again=(15.0,))), faults=SLOW_INPUTS, resolve_every=0.5
    ),
    "an owner that is said to have crashed pauses for a 429, and a person resolves": Scenario(
        calls=(Call(crashed_at=1.0), Call(at=3.0)), faults=LIMITED, resolve_every=0.5
    ),
    "an owner that is said to have crashed pauses twice for a 429, and a person resolves": Scenario(
        calls=(Call(crashed_at=1.0),), faults=LIMITED_TWICE, resolve_every=2.0
    ),
    "the kickoff of an owner that is said to have crashed takes its time, and a person resolves": Scenario(
        calls=(Call(crashed_at=1.0), Call(at=3.0)), faults=SLOW_KICKOFF, resolve_every=0.5
    ),
    "the retry of a flow run that is said to have crashed resolves nothing while the first attempt lives": Scenario(
        calls=(Call(crashed_at=1.0, again=(1.0, 15.0)),), faults=SLOW_KICKOFF, resolve_every=0.5
    ),
    "an owner that is said to have crashed falls asleep before its kickoff": Scenario(
        calls=(Call(freeze_at=7, freeze_for=5.0, crashed_at=1.0), Call(at=3.0)), resolve_every=0.5
    ),
    "an owner that is said to have crashed falls asleep over its claim": Scenario(
        calls=(Call(freeze_at=4, freeze_for=30.0, crashed_at=1.0), Call(at=3.0)), resolve_every=0.5
    ),
    "an owner that is said to have crashed falls asleep after a 429": Scenario(
        calls=(Call(freeze_at=9, freeze_for=30.0, crashed_at=1.0), Call(at=0.3, again=(15.0,))),
        faults=LIMITED_TWICE,
        resolve_every=2.0,
    ),
    "a forced run is started while an owner that is said to have crashed and sleeps": Scenario(
        calls=(Call(freeze_at=6, freeze_for=30.0, crashed_at=1.0), Call(at=2.0, force_new=True), Call(at=20.0)),
        runs=(CrewRun(seconds=50),),
        resolve_every=0.5,
    ),
    # Clocks differ.
    "an owner whose clock is ten minutes slow asks for the inputs, and a person resolves": Scenario(
        calls=(Call(skew=-600.0), Call(at=3.0)), faults=SLOW_INPUTS, resolve_every=2.0
    ),
    "an owner whose clock is ten minutes slow pauses for a 429, and a person resolves": Scenario(
        calls=(Call(skew=-600.0), Call(at=3.0)), faults=LIMITED, resolve_every=2.0
    ),
    "the kickoff of an owner whose clock is two minutes slow takes its time, and a person resolves": Scenario(
        calls=(Call(skew=-120.0), Call(at=3.0)), faults=SLOW_KICKOFF, resolve_every=2.0
    ),
    "the clock of an owner is set back ten minutes while it pauses for a 429": Scenario(
        calls=(Call(skew=-600.0, skew_at=9), Call(at=0.3)), faults=LIMITED, resolve_every=0.5, order=1
    ),
    "a caller whose clock is two minutes fast meets a kickoff that takes its time": Scenario(
        calls=(Call(), Call(at=1.0, skew=120.0)), faults=SLOW_KICKOFF
    ),
    "a caller whose clock is two minutes fast meets a pause for a 429": Scenario(
        calls=(Call(), Call(at=0.3, skew=120.0)), faults=LIMITED
    ),
    "a caller whose clock is two minutes slow meets an owner that died": Scenario(
        calls=(Call(flow=False, kill_at=6), Call(at=1.0, skew=-120.0, again=(50.0, 50.0))), resolve_every=2.0
    ),
    "an owner sleeps over the renewal of its claim, and one with a slow clock goes on": Scenario(
        calls=(Call(freeze_at=7, freeze_for=100.0), Call(at=0.3, skew=-120.0)),
        faults=LIMITED_TWICE,
        resolve_every=2.0,
        seed=1,
    ),
    # Writes hang, and land late.
    "a machine sleeps over the pause for a 429, and writes its claim over what was resolved": Scenario(
        calls=(Call(flow=False, freeze_at=10, freeze_for=400.0), Call(at=1.0, flow=False, again=(15.0, 50.0))),
        faults=("kickoff:429-before-accept@1",),
        resolve_after=0.0,
    ),
    "a machine sleeps over the pause for a 429 that hid a run, and writes its claim over it": Scenario(
        calls=(Call(flow=False, freeze_at=10, freeze_for=400.0), Call(at=1.0, flow=False, again=(15.0, 50.0))),
        faults=("kickoff:429-after-accept@1",),
        resolve_after=0.0,
    ),
    "a cancelled caller gives its claim back, and the write that kept it goes out after that": Scenario(
        calls=(Call(cancel_at=9, asked=True),),
        faults=("kickoff:503-before-accept@1",),
        prefect_faults=((3, "timeout"),),
    ),
    "a claim is renewed for a 429 and that write lands when the run has ended": Scenario(
        calls=(Call(),), faults=LIMITED, prefect_faults=(("write@2", "late"),)
    ),
    "the end of a pause is written late, after a second owner has begun": Scenario(
        calls=(Call(), Call()), faults=BUSY, prefect_faults=(("write@3", "timeout"),), resolve_every=0.5
    ),
    "a person's verdict hangs while the owner, said to have crashed, posts": Scenario(
        calls=(Call(crashed_at=1.0), Call(at=1.0)),
        faults=BUSY,
        prefect_faults=(("write@4", "slow"),),
        resolve_every=0.5,
    ),
    "the id of a run is written late, over its end": Scenario(calls=(Call(),), prefect_faults=(("write@2", "late"),)),
    # Old records are pruned.
    "a key is pruned while the owner, without a flow, sleeps over its end, and started anew": Scenario(
        calls=(Call(flow=False, freeze_at=18, freeze_for=100.0), Call(at=0.3, skew=120.0, again=(15.0, 90.0))),
        runs=(CrewRun(end="fails", seconds=1.0),),
        prunes=(Prune(at=85.0),),
    ),
    "a key is not pruned while the owner's flow run sleeps over its end": Scenario(
        calls=(Call(freeze_at=18, freeze_for=100.0), Call(at=0.3, skew=120.0, again=(15.0, 90.0))),
        runs=(CrewRun(end="fails", seconds=1.0),),
        prunes=(Prune(at=85.0),),
    ),
    "a claim that lands late meets a key that was pruned, without a flow": Scenario(
        calls=(Call(flow=False, cancel_at=5, again=(60.0,)), Call(at=75.0)),
        prefect_faults=(("write@3", "timeout"),),
        prunes=(Prune(at=70.0, freeze_at=9, freeze_for=30.0),),
    ),
    "a claim that lands late meets a key that is not pruned, since its flow run was retried": Scenario(
        calls=(Call(cancel_at=5, again=(60.0,)), Call(at=75.0)),
        prefect_faults=(("write@3", "timeout"),),
        prunes=(Prune(at=70.0, freeze_at=9, freeze_for=30.0),),
    ),
    "one whose clock is a day fast prunes the claim of an owner that is said to have crashed, and sleeps": Scenario(
        calls=(Call(freeze_at=9, freeze_for=30.0, crashed_at=1.0), Call(at=2.0), Call(at=25.0)),
        runs=(CrewRun(seconds=1.0), CrewRun(seconds=100.0)),
        prunes=(Prune(at=10.0, older_than=3600.0, skew=86400.0),),
    ),
    # A flow run that completed is retried, and asks for its run again.
    "a subflow has ended long ago, and its root runs on": Scenario(
        calls=SUBFLOWS, roots=(Root(((0.0, 110.0),)),), prunes=(Prune(at=64.0, older_than=20.0),)
    ),
    "a root has ended a moment before its subflow's record could go, and is retried": Scenario(
        calls=SUBFLOWS, roots=(Root(((0.0, 60.0), (95.0, 110.0))),), prunes=(Prune(at=64.0, older_than=20.0),)
    ),
    "an owner that is said to have crashed falls asleep as it posts, and reports a kickoff of a pruned key": Scenario(
        calls=(Call(freeze_at=21, freeze_for=400.0, crashed_at=1.0),),
        faults=("kickoff:redirect-before-accept@1",),
        prefect_faults=((3, "lost"),),
        rotate_at=0.1,
        resolve_after=100.0,
        resolve_every=2.0,
        prunes=(Prune(at=170.0),),
    ),
    "a root has ended long ago, and is being retried while records are pruned": Scenario(
        calls=SUBFLOWS, roots=(Root(((0.0, 1.0), (60.0, 110.0))),), prunes=(Prune(at=64.0, older_than=20.0),)
    ),
    "a root was retried and has ended again a moment ago, and is retried once more": Scenario(
        calls=SUBFLOWS,
        roots=(Root(((0.0, 1.0), (50.0, 60.0), (95.0, 110.0))),),
        prunes=(Prune(at=64.0, older_than=20.0),),
    ),
    "a root has ended long ago": Scenario(
        calls=SUBFLOWS, roots=(Root(((0.0, 1.0), (95.0, 110.0))),), prunes=(Prune(at=64.0, older_than=20.0),)
    ),
    "a root was deleted": Scenario(
        calls=SUBFLOWS, roots=(Root(((0.0, 50.0),), deleted_at=55.0),), prunes=(Prune(at=64.0, older_than=20.0),)
    ),
}
"""Each by its name in words."""

for fate in ("refused", "500", "503", "lost", "500-after", "timeout", "slow", "late", "twice"):
    WORLDS |= {
        f"two wait for a run that fails, and the request of the first end is {fate}": Scenario(
            calls=(Call(), Call(at=0.3), Call(at=20.0)),
            runs=(CrewRun(end="fails", seconds=1.0), CrewRun(seconds=3.0)),
            prefect_faults=(("write@5", fate),),
        ),
        f"a run that is over its time is stopped by both who wait for it, and the request of the first end is {fate}": (
            Scenario(
                calls=(Call(), Call(at=0.3)),
                runs=(CrewRun(end="stuck"), CrewRun(seconds=3.0)),
                prefect_faults=(("write@6", fate),),
                stop_on_timeout=True,
            )
        ),
    }

for step in range(1, 24):
    WORLDS[f"the Prefect API is away for 40 s, {0.02 * step:.2f} s after a call has begun"] = Scenario(
        calls=(Call(),), runs=(CrewRun(seconds=3.0),), outages=((0.02 * step, 40.0),), budget=1
    )

for write, what in ((1, "claim"), (2, "permit")):
    for fate in ("lost", "500-after", "timeout", "late"):
        for refused in (1, 2, 20, 40):
            name = f"the answer about a {what} is {fate}, and the next {refused} changes are refused"
            WORLDS[name] = Scenario(
                calls=(Call(), Call(at=100.0)),
                runs=(CrewRun(seconds=3.0),),
                prefect_faults=(
                    (f"write@{write}", fate),
                    *((f"write@{write + number}", "refused") for number in range(1, refused + 1)),
                ),
            )

for step in range(23, 40):
    at = f", before its step {step}"
    WORLDS |= {
        f"an owner falls asleep over an end that another wait has seen{at}": Scenario(
            calls=(Call(freeze_at=step, freeze_for=60.0), Call(at=0.3), Call(at=30.0)),
            runs=(CrewRun(end="fails", seconds=1.0), CrewRun(seconds=3.0)),
        ),
        f"an owner is killed over an end that another wait has seen{at}": Scenario(
            calls=(Call(kill_at=step, crashed_after=0.5, again=(15.0,)), Call(at=0.3)), runs=(CrewRun(seconds=3.0),)
        ),
    }

for step in range(1, 18):
    at = f", before its step {step}"
    WORLDS |= {
        f"an owner that is said to have crashed falls asleep while others ask{at}": Scenario(
            calls=(Call(freeze_at=step, freeze_for=60.0, crashed_at=1.0), Call(at=2.0, again=(15.0, 50.0))),
            runs=(CrewRun(seconds=3),),
            resolve_every=0.5,
        ),
        f"an owner that is said to have crashed falls asleep around a 429 while others ask{at}": Scenario(
            calls=(Call(freeze_at=step, freeze_for=60.0, crashed_at=1.0), Call(at=2.0, again=(15.0, 50.0))),
            runs=(CrewRun(seconds=3),),
            faults=("kickoff:429-before-accept=3@1",),
            resolve_every=0.5,
        ),
        f"an owner that is said to have crashed falls asleep while its claim is voided and pruned{at}": Scenario(
            calls=(Call(freeze_at=step, freeze_for=30.0, crashed_at=1.0), Call(at=2.0), Call(at=25.0)),
            runs=(CrewRun(seconds=1.0), CrewRun(seconds=100.0)),
            prunes=(Prune(at=10.0),),
        ),
    }

for step in range(1, 33):
    at = f", before its step {step}"
    WORLDS |= {
        f"prune falls asleep while a failed run is started again{at}": Scenario(
            calls=(Call(), Call(at=65.0), Call(at=80.0)),
            runs=(CrewRun(end="fails", seconds=1.0), CrewRun(seconds=100.0)),
            prunes=(Prune(at=64.0, freeze_at=step, freeze_for=10.0),),
        ),
        f"prune falls asleep while the key is pruned by another and started anew{at}": Scenario(
            calls=(Call(), Call(at=68.0), Call(at=85.0)),
            runs=(CrewRun(seconds=1.0), CrewRun(seconds=100.0)),
            prunes=(Prune(at=64.0, freeze_at=step, freeze_for=15.0), Prune(at=66.0)),
        ),
    }
    if step % 2 == 0:
        continue  # a request has several steps
    WORLDS |= {
        f"prune falls asleep while a root that has ended long ago is retried{at}": Scenario(
            calls=(Call(root=0), Call(at=67.0, root=0)),
            roots=(Root(((0.0, 1.0), (66.0, 80.0))),),
            prunes=(Prune(at=64.0, older_than=20.0, freeze_at=step, freeze_for=10.0),),
        ),
        f"prune is killed, and another one goes on{at}": Scenario(
            calls=(Call(), Call(key=1), Call(key=2, flow=False)),
            prunes=(Prune(at=64.0, kill_at=step + 1), Prune(at=84.0)),
        ),
        f"prune falls asleep while another one prunes and counts other runs of the day{at}": Scenario(
            calls=(Call(), Call(at=30.0, key=1), Call(at=50.0, key=2)),
            prunes=(Prune(at=64.0, freeze_at=step, freeze_for=60.0), Prune(at=90.0), Prune(at=112.0)),
        ),
        f"prune finds the Prefect API away, {0.06 * step:.2f} s after it began": Scenario(
            calls=(Call(), Call(root=0, key=1), Call(key=2, flow=False), Call(at=150.0, root=0, key=1)),
            roots=(Root(((0.0, 160.0),)),),
            prunes=(Prune(at=64.0), Prune(at=100.0)),
            outages=((64.0 + 0.06 * step, 20.0),),
        ),
        f"two prune at the same time{at}": Scenario(
            calls=(Call(), Call(key=1), Call(key=2, flow=False)), prunes=(Prune(at=64.0), Prune(at=64.0)), order=step
        ),
    }
