"""What each Ray Train worker runs: recovery after recovery, as trainers/desk.py has them.

It shards the student, trains it and keeps checkpoints. A job travels as plain JSON, and everything
large comes from the store, which each worker opens by its URL. Any worker may be lost at any time:
the group starts again from the latest checkpoint, whatever its size. When one has notice of it
(trainers/notice.py), all of them save and leave after the same step, and the next attempt goes on
from that very step.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from pydantic import JsonValue, NonNegativeInt, PositiveFloat, PositiveInt

from storage.errors import EspalierError
from storage.section import Section
from storage.store import Store, StoreOptions, discard_unfinished, open_store
from trainers.desk import Line, Taken
from trainers.placement import Share, import_models
from trainers.probe import ProbeConfig
from trainers.schedule import Schedule, StepConfig
from trainers.students.plan import BlockPlan, Plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from storage.stored import StoredTensors
    from trainers.distilled import Distilled
    from trainers.recovery import Position
    from trainers.teacher import Teacher

LOSSES = "losses.json"
PLAN = "plan.json"

_REPORTS = 20


class LeavingError(EspalierError):
    """A worker was told that its machine goes; all of them have saved the step before."""


class RecoveryJob(Section):
    """Everything a worker needs to know, as JSON."""

    teacher: str
    """What the teacher is opened by: folder, URL, or model and commit of the hub."""
    teacher_digest: str
    """Which it must be."""
    store: str
    """URL of the store."""
    options: StoreOptions
    """How the store is reached."""
    encoding: str
    """Prefix of the latents."""
    replacements: tuple[tuple[BlockPlan, str], ...]
    """The plan's library blocks and where they are stored."""
    plan: Plan
    """What the student is."""
    schedule: Schedule
    """How it is trained."""
    step: StepConfig
    """How each of its steps is taken."""
    until: PositiveInt
    """Steps of the schedule, from its start, after which this job measures the student and ends.
    Before the schedule's end it leaves a checkpoint, from which a job with a later end goes on."""
    probe: ProbeConfig
    """On what its fidelity is measured."""
    seed: NonNegativeInt
    """Of data order, times and noise."""
    probe_seed: NonNegativeInt
    """Of the probe; the sweep's, so that all losses of a sweep are measured on the same."""
    prefix: str
    """Where the outcome goes, which makes this job finished."""
    checkpoints: str
    """Prefix of the recovery's checkpoints."""
    student: str
    """Prefix of the student that the whole schedule ends with."""
    checkpoint_every: PositiveInt
    """Optimizer steps between checkpoints."""
    keep_checkpoints: PositiveInt
    """How many of them stay."""
    timeout: PositiveFloat
    """Seconds after which a worker that takes no step ends itself."""
    shard_teacher: bool
    """Whether the teacher, too, is spread over the workers."""
    num_cpus: float
    """Share of the cluster that the driver asked for; see trainers.placement.Share."""
    num_gpus: float
    threads: PositiveInt
    device: str


class RecoveryOutcome(Section):
    """What a finished job says of itself, in the manifest under its prefix."""

    fidelity_loss: float | None
    """Of the student as it then was; None after a failure."""
    failed: str | None = None
    """Why it ended without one, in one sentence."""
    seconds: float
    """Training time since the schedule's start, over all attempts; start-up is not part of it."""
    steps: int
    """Optimizer steps since the schedule's start."""


def train_loop(config: dict[str, Any]) -> bool:
    """Runs the jobs of the desk in `config` on every worker until the desk is closed; the body of a
    TorchTrainer.

    False when it left before the end because a machine goes: the job goes on in another run.
    """
    import_models()
    import ray.train

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    line = Line(config["desk"], rank)
    while True:
        # Sharded models hold themselves in circles, and the next job needs their memory.
        gc.collect()
        taken = _from_first_rank(line.take())
        if taken.job is not None:
            if not run_job(RecoveryJob.model_validate(taken.job), rank, world, line.tell):
                return False
            line.finish()
        elif taken.closed:
            return True


def run_job(
    job: RecoveryJob, rank: int, world: int, tell: Callable[[dict[str, Any]], None]
) -> bool:
    """One job on one of its workers; False when it left before the end.

    NaN ends the recovery with an outcome that says so, not with an exception: another attempt
    would end the same way. A worker that hangs ends its process, which Train sees.
    """
    import faulthandler

    import torch

    from storage.checkpoint import Checkpoint, Saver, latest_checkpoint, withdraw_from
    from storage.manifest import publish, withdraw
    from trainers.data.latents import open_latents
    from trainers.distilled import CALLED
    from trainers.evaluate import fidelity_loss
    from trainers.library.library import Library
    from trainers.notice import Notice
    from trainers.probe import shared_probe
    from trainers.recovery import (
        NanLossError,
        Position,
        Start,
        examples_of,
        held_tensors,
        read_held,
        recover,
        recover_steadily,
        student_weights,
    )
    from trainers.sharded import load_distilled, load_observed
    from trainers.teacher import open_very_teacher
    from trainers.weights import StreamedBlocks, fill_student

    first, total = rank == 0, job.schedule.steps
    store = open_store(job.store, job.options, patient=True)

    def clear_up(outcome: RecoveryOutcome) -> None:
        if outcome.failed or job.until == total:
            withdraw(store, job.checkpoints)

    ended = read_outcome(store, job.prefix)
    if ended is not None:  # an attempt was lost after it had come to the end
        if first:
            clear_up(ended)
        return True
    if first:  # an attempt may have been lost while it stored the student
        discard_unfinished(store, job.student)

    def alive() -> None:
        faulthandler.dump_traceback_later(job.timeout, exit=True)

    alive()
    Share(job.num_cpus, job.num_gpus, job.threads, cast("Any", job.device)).prepare()
    device = torch.device(job.device)  # the process's own GPU is already the current one

    teacher = open_very_teacher(job.teacher, job.teacher_digest, job.options)
    latents = open_latents(store, job.encoding, alive=alive)
    dtype = teacher.weights().dtype
    library = Library(store, dict(job.replacements))
    student = load_distilled(teacher, job.plan, library, device, job.step)
    observed = load_observed(teacher, device, job.shard_teacher, job.step)

    untouched = True
    """Whether the student is still what `load_distilled` made it."""
    losses: list[float] = []
    before = 0.0
    """Seconds that earlier attempts have trained."""
    started: float | None = None
    """When this attempt began to train."""
    rollbacks = 0
    gone_back: int | None = None
    """The step that training went back to, if it has not saved a checkpoint since."""
    token = _token()
    saver = Saver(
        store, job.checkpoints, rank=rank, world=world, token=token, keep=job.keep_checkpoints
    )

    def on_all_ranks(found: bool) -> bool:
        return _mean_over_ranks(torch.tensor(float(found), device=device)).item() == 1

    def latest(below: int) -> Start | None:
        nonlocal before
        saver.finish()
        tensors: dict[str, Tensor] = {}

        def load(checkpoint: Checkpoint) -> None:
            nonlocal untouched
            untouched = False  # from here on, also when the checkpoint proves damaged
            tensors.clear()  # of a newer checkpoint that another rank found damaged
            tensors.update(read_held(student, checkpoint.tensors))

        checkpoint = latest_checkpoint(store, job.checkpoints, load, _least_over_ranks, below)
        if checkpoint is None:
            return None
        state = cast("dict[str, Any]", checkpoint.state)
        losses[:] = state["losses"]
        if started is None:
            before = state["seconds"]
        # Checkpoints of the first version do not say how often a run had gone back.
        rollbacks = state.get("rollbacks", 0)
        return Start(Position(*state["at"]), tuple(losses), tensors, rollbacks)

    def start_from(below: int = sys.maxsize) -> Start:
        start = latest(below)
        if start is None and not on_all_ranks(untouched):
            losses.clear()
            student.average = None
            blocks = StreamedBlocks(teacher.family, teacher.config, teacher.weights())
            fill_student(student.student, job.plan, blocks, library)
        return start or Start(Position())

    def go_back() -> Start:
        nonlocal gone_back
        if gone_back is None:
            start = start_from()
        else:
            # That one may hold what training diverges from: then it does so again at any rate.
            if first:
                withdraw_from(store, job.checkpoints, gone_back)
            start = start_from(below=gone_back)
        gone_back = start.at.done(job.schedule)
        return start

    start = start_from()
    untouched = False
    started = time.monotonic()
    every = max(1, job.until // _REPORTS)
    notice = Notice(rank, _mean_over_ranks, device)

    def seconds() -> float:
        assert started is not None
        return before + time.monotonic() - started

    def report(at: Position, loss: float) -> None:
        alive()
        losses.append(loss)
        done = len(losses)
        if done % every == 0:
            loss_now = sum(losses[-every:]) / every
            tell({"step": done, "steps": job.until, "phase": at.phase, "loss": loss_now})

    def save(at: Position, student: Distilled, optimizer: torch.optim.Optimizer) -> None:
        nonlocal gone_back
        done, leaving = at.done(job.schedule), notice.given()
        due = done != total and (done % job.checkpoint_every == 0 or done == job.until)
        if not due and not leaving:
            return
        # Between phases the optimizer starts anew.
        held = held_tensors(student, optimizer if at.step else None)
        state = {
            "at": [at.phase, at.step], "losses": losses, "seconds": seconds(),
            "rollbacks": rollbacks,
        }  # fmt: skip
        saver.save(done, held, cast("JsonValue", state))
        gone_back = None
        if leaving:
            saver.finish()
            raise LeavingError

    def run(start: Start, rate: float, spike: float | None) -> None:
        nonlocal rollbacks
        rollbacks = start.rollbacks
        recover(
            student,
            observed,
            examples_of(latents, job.seed, rank, world, device, dtype),
            job.schedule,
            start.at,
            until=job.until,
            past=start.losses,
            rate=rate,
            spike=spike,
            optimizer_tensors=start.optimizer_tensors,
            save=save,
            report=report,
            mean=_mean_over_ranks,
        )

    failed = None
    try:
        recover_steadily(run, start, go_back, job.step, said=logging.getLogger(__name__).warning)
    except NanLossError as error:
        failed = str(error)
    except LeavingError:
        faulthandler.cancel_dump_traceback_later()
        return False
    alive()
    saver.finish()
    took, fidelity = seconds(), cast("float | None", None)
    if not failed:
        student.become_average()
        probe = shared_probe(
            store, teacher, observed, latents, job.encoding, job.probe, job.probe_seed,
            runs=CALLED, agreed=on_all_ranks, save=first,
        )  # fmt: skip
        fidelity = fidelity_loss(student, CALLED, probe)
        if not on_all_ranks(math.isfinite(fidelity)):
            failed, fidelity = "the recovered student's velocity is not finite", None
        elif job.until == total:
            alive()
            weights = student_weights(held_tensors(student, None))
            publish_student(
                store, job.student, job.plan, weights, teacher, dtype, rank=rank, world=world,
                token=token,
            )  # fmt: skip
    if first:
        outcome = RecoveryOutcome(
            fidelity_loss=fidelity, failed=failed, seconds=took, steps=len(losses)
        )
        publish(
            store,
            job.prefix,
            {LOSSES: json.dumps(losses).encode()},
            outcome.model_dump(mode="json"),
        )
        clear_up(outcome)
    faulthandler.cancel_dump_traceback_later()
    return True


def publish_student(
    store: Store,
    prefix: str,
    plan: Plan,
    weights: Mapping[str, Tensor],
    teacher: Teacher,
    dtype: torch.dtype | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    token: str = "0",
) -> None:
    """Store the student of a recovery, its floating-point weights in `dtype`; each rank its shards.

    `weights` are named as in the student's model.
    """
    from storage.shards import publish_tensors

    publish_tensors(
        store,
        prefix,
        weights,
        {PLAN: plan.to_json().encode()},
        {"teacher": teacher.digest, "plan": plan.digest},
        rank=rank,
        world=world,
        token=token,
        dtype=dtype,
    )


def load_student(
    store: Store, prefix: str, teacher: Teacher, device: torch.device | str = "cpu"
) -> tuple[torch.nn.Module, Plan]:
    """The student that a recovery stored under `prefix`, frozen, and its plan.

    Raises MissingKey when it has none, DamagedError naming a file that is not whole.
    """
    import torch

    stored, plan = open_student(store, prefix)
    model = teacher.family.build(teacher.config, plan, "meta")
    weights = {name: torch.empty_like(t, device=device) for name, t in stored.like().items()}
    stored.fill(weights)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval(), plan


def open_student(store: Store, prefix: str) -> tuple[StoredTensors, Plan]:
    """The weights of a student that a recovery stored, by name, not yet read, and its plan."""
    from storage.manifest import published, read_bytes
    from storage.stored import open_tensors

    manifest = published(store, prefix)
    plan = Plan.from_json(read_bytes(store, prefix, PLAN, manifest), f"{store.url}/{prefix}/{PLAN}")
    return open_tensors(store, prefix, manifest), plan


def stored_plan(store: Store, prefix: str) -> Plan | None:
    """The plan of the student under `prefix`, or None when it is gone."""
    from storage.errors import MissingKey
    from storage.manifest import read_bytes

    try:
        return Plan.from_json(read_bytes(store, prefix, PLAN), f"{store.url}/{prefix}/{PLAN}")
    except MissingKey:
        return None


def read_outcome(store: Store, prefix: str) -> RecoveryOutcome | None:
    """What the job with this prefix ended with, or None while it has not."""
    from storage.manifest import published

    manifest = published(store, prefix)
    return None if manifest is None else RecoveryOutcome.model_validate(manifest.meta)


def _from_first_rank(taken: Taken) -> Taken:
    """What the first rank has, on all of them."""
    import torch
    import torch.distributed

    held = [taken]
    nccl = torch.distributed.get_backend() == "nccl"
    device = torch.device("cuda" if nccl else "cpu")
    torch.distributed.broadcast_object_list(held, device=device)
    return held[0]


def _mean_over_ranks(value: Tensor) -> Tensor:
    import torch.distributed

    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()


def _least_over_ranks(value: int) -> int:
    import torch
    import torch.distributed

    least = torch.tensor(value)
    if torch.distributed.get_backend() == "nccl":
        least = least.cuda()
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least)


def _token() -> str:
    """A word that all ranks of this attempt have, and no other attempt."""
    return f"{_least_over_ranks(secrets.randbits(62)):016x}"
