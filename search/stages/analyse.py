"""Stage 2: how redundant each block of the teacher is."""

from __future__ import annotations

from collections.abc import Sequence

from search.analyse import AnalyseConfig, load_analysis, save_analysis
from search.report import words
from search.stages.place import Site, place
from search.stages.stage import Outcome, Stage
from search.sweep import Sweep
from trainers.progress import Progress
from trainers.students.plan import BlockPlan
from trainers.teacher import Teacher


def run(sweep: Sweep, progress: Progress) -> Outcome:
    from search.redundancy import wanted_maps
    from search.statistics import memory

    place(
        sweep,
        _measure,
        progress,
        teacher=sweep.teacher,
        encoded=sweep.encoded_prefix,
        candidates=sweep.candidates,
        config=sweep.config.analyse,
        seed=sweep.config.seed,
        out=sweep.analysis_prefix,
    )
    family, config = sweep.teacher.family, sweep.teacher.config
    taken = memory(
        config, family, wanted_maps(family, config, sweep.candidates), sweep.config.analyse.tokens
    )
    said = (
        f"{sweep.teacher_blocks} blocks, {len(sweep.candidates)} candidate replacements, "
        f"statistics of {words.memory(taken)}"
    )
    analysis = load_analysis(sweep.store, sweep.analysis_prefix)
    if analysis is not None and analysis.ridged:
        said += f"; singular probes, ridged: {analysis.ridged} (more analyse.pictures help)"
    return Outcome(said, {})


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
    placed=True,
)
