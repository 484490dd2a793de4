"""Stage 2: how redundant each block of the teacher is."""

from __future__ import annotations

from collections.abc import Sequence

from search.analyse import AnalyseConfig, load_analysis, save_analysis
from search.report import words
from search.stages.place import Site, place
from search.stages.stage import Outcome, Stage
from search.sweep import Sweep
from trainers.placement import PlacementError, room_for
from trainers.progress import Progress
from trainers.students.plan import BlockPlan
from trainers.teacher import Teacher


def run(sweep: Sweep, progress: Progress) -> Outcome:
    from search.measuring import measure_apart

    config, memory = sweep.config.analyse, _memory(sweep)
    if config.workers > 1:
        measure_apart(sweep, progress, memory)
    else:
        place(
            sweep,
            _measure,
            progress,
            memory=memory,
            teacher=sweep.teacher,
            encoded=sweep.encoded_prefix,
            candidates=sweep.analysed,
            config=config,
            seed=sweep.config.seed,
            out=sweep.analysis_prefix,
        )
    said = (
        f"{sweep.teacher_blocks} blocks, {len(sweep.analysed)} candidate replacements, "
        f"statistics of {words.memory(memory)} in host memory"
    )
    analysis = load_analysis(sweep.store, sweep.analysis_prefix)
    if analysis is not None and analysis.ridged:
        said += f"; singular fits, ridged: {analysis.ridged} (more analyse.pictures help)"
    return Outcome(said, {})


def _memory(sweep: Sweep) -> int:
    """Bytes of its machine's own memory that each worker needs at least."""
    from search.redundancy import wanted_maps
    from search.statistics import memory

    family, settings = sweep.teacher.family, sweep.teacher.config
    wanted = wanted_maps(family, settings, sweep.analysed)
    return memory(settings, family, wanted, sweep.config.analyse.tokens)


def _check_cluster(sweep: Sweep) -> None:
    """PlacementError when the statistics do not fit into the cluster's machines."""
    workers, memory = sweep.config.analyse.workers, _memory(sweep)
    if not room_for(workers, memory):
        raise PlacementError(
            f"analyse: the statistics of this teacher take {words.memory(memory)} of a machine's "
            f"own memory for each worker (analyse.workers: {workers}), more than the machines of "
            "the Ray cluster offer; ask for fewer, or add a machine with more memory"
        )


def _measure(
    site: Site,
    teacher: Teacher,
    encoded: str,
    candidates: Sequence[BlockPlan],
    config: AnalyseConfig,
    seed: int,
    out: str,
) -> None:
    from search.redundancy import analyse
    from trainers.data.latents import open_latents

    analysis = analyse(
        teacher.transformer(device=site.device),
        teacher.family,
        open_latents(site.store, encoded),
        candidates,
        config,
        seed,
        site.progress,
    )
    save_analysis(site.store, out, analysis)


ANALYSE = Stage(
    name="analyse",
    digest=lambda sweep: sweep.analysis_digest,
    shared=lambda sweep: sweep.analysis_prefix,
    run=run,
    check_cluster=_check_cluster,
    placed=lambda sweep: sweep.config.analyse.workers == 1,
    workers=lambda sweep: sweep.config.analyse.workers,
)
