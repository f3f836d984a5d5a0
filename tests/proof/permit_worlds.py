"""Worlds in which only a permit keeps a run from being started twice, and a record from going backwards.

A person resolves, a clerk prunes, a clock is wrong, a write hangs, the Prefect server takes a process for dead: each
while the owner of a claim is alive. They are judged without the oracle's excuses.
"""

from __future__ import annotations

from proof.sim.scenario import Call, CrewRun, Prune, Scenario

__all__ = ["WORLDS"]

LIMITED = ("kickoff:429-before-accept=15@1",)
LIMITED_TWICE = ("kickoff:429-before-accept@1-2",)
BUSY = ("kickoff:503-before-accept=3@1",)
SLOW_INPUTS = ("inputs:latency=4@1",)
SLOW_KICKOFF = ("kickoff:latency=4@1",)

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
        calls=(Call(freeze_at=9, freeze_for=5.0, crashed_at=1.0), Call(at=3.0)), resolve_every=0.5
    ),
    "an owner that is said to have crashed falls asleep over its claim": Scenario(
        calls=(Call(freeze_at=5, freeze_for=30.0, crashed_at=1.0), Call(at=3.0)), resolve_every=0.5
    ),
    "an owner that is said to have crashed falls asleep after a 429": Scenario(
        calls=(Call(freeze_at=11, freeze_for=30.0, crashed_at=1.0), Call(at=0.3, again=(15.0,))),
        faults=LIMITED_TWICE,
        resolve_every=2.0,
    ),
    "a forced run is started while an owner that is said to have crashed and sleeps": Scenario(
        calls=(Call(freeze_at=8, freeze_for=30.0, crashed_at=1.0), Call(at=2.0, force_new=True), Call(at=20.0)),
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
        calls=(Call(skew=-600.0, skew_at=11), Call(at=0.3)), faults=LIMITED, resolve_every=0.5, order=1
    ),
    "a caller whose clock is two minutes fast meets a kickoff that takes its time": Scenario(
        calls=(Call(), Call(at=1.0, skew=120.0)), faults=SLOW_KICKOFF
    ),
    "a caller whose clock is two minutes fast meets a pause for a 429": Scenario(
        calls=(Call(), Call(at=0.3, skew=120.0)), faults=LIMITED
    ),
    "a caller whose clock is two minutes slow meets an owner that died": Scenario(
        calls=(Call(flow=False, kill_at=8), Call(at=1.0, skew=-120.0, again=(50.0, 50.0))), resolve_every=2.0
    ),
    "an owner sleeps over the renewal of its claim, and one with a slow clock goes on": Scenario(
        calls=(Call(freeze_at=9, freeze_for=100.0), Call(at=0.3, skew=-120.0)),
        faults=LIMITED_TWICE,
        resolve_every=2.0,
        seed=1,
    ),
    # Writes hang, and land late.
    "a machine sleeps over the pause for a 429, and writes its claim over what was resolved": Scenario(
        calls=(Call(flow=False, freeze_at=12, freeze_for=400.0), Call(at=1.0, flow=False, again=(15.0, 50.0))),
        faults=("kickoff:429-before-accept@1",),
        resolve_after=0.0,
    ),
    "a machine sleeps over the pause for a 429 that hid a run, and writes its claim over it": Scenario(
        calls=(Call(flow=False, freeze_at=12, freeze_for=400.0), Call(at=1.0, flow=False, again=(15.0, 50.0))),
        faults=("kickoff:429-after-accept@1",),
        resolve_after=0.0,
    ),
    "a cancelled caller gives its claim back, and the write that kept it goes out after that": Scenario(
        calls=(Call(cancel_at=11, asked=True),),
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
    "a key is pruned while the owner sleeps over its end, and started anew": Scenario(
        calls=(Call(freeze_at=23, freeze_for=100.0), Call(at=0.3, skew=120.0, again=(15.0, 90.0))),
        runs=(CrewRun(end="fails", seconds=1.0),),
        prunes=(Prune(at=85.0),),
    ),
    "a claim that lands late meets a key that was pruned": Scenario(
        calls=(Call(cancel_at=6, again=(60.0,)), Call(at=75.0)),
        prefect_faults=(("write@3", "timeout"),),
        prunes=(Prune(at=70.0, freeze_at=9, freeze_for=30.0),),
    ),
    "one whose clock is a day fast prunes the claim of an owner that is said to have crashed, and sleeps": Scenario(
        calls=(Call(freeze_at=11, freeze_for=30.0, crashed_at=1.0), Call(at=2.0), Call(at=25.0)),
        runs=(CrewRun(seconds=1.0), CrewRun(seconds=100.0)),
        prunes=(Prune(at=10.0, older_than=3600.0, skew=86400.0),),
    ),
}
"""Each by its name in words."""

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
        f"an owner that is said to have crashed falls asleep while its claim is voided and pruned{at}": Scenario(
            calls=(Call(freeze_at=step, freeze_for=30.0, crashed_at=1.0), Call(at=2.0), Call(at=25.0)),
            runs=(CrewRun(seconds=1.0), CrewRun(seconds=100.0)),
            prunes=(Prune(at=10.0),),
        ),
    }
