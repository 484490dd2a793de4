from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from cluster.cli.common import StageError, endings, open_config, user_error
from cluster.cli.main import app
from cluster.cli.run import run_stages
from cluster.configfile import keys_of
from search.config import SweepConfig
from search.stages import STAGES, stage_named, stages_of
from storage import layout
from storage.errors import EspalierError
from storage.lease import holding
from tests.cluster.verbs import commands
from tests.hub import COMMIT, Hub
from trainers.placement import PlacementError
from trainers.students.counts import plan_parameters
from trainers.students.families import family_named
from trainers.students.plan import BlockPlan, Plan, identity_plan, uniform_plan

PPCL_SPANS = [
    (3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30), (42, 43), (45, 47), (48, 49),
    (52, 53), (54, 55), (56, 57),
]  # fmt: skip


def espalier(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ppcl_plan(folder: Path) -> Path:
    covered = {i for first, last in PPCL_SPANS for i in range(first, last + 1)}
    spans = sorted([*PPCL_SPANS, *((i, i) for i in range(60) if i not in covered)])
    path = folder / "plan.json"
    plan = {
        "family": "qwen_image",
        "teacher_blocks": 60,
        "blocks": [{"span": span} for span in spans],
    }
    path.write_text(json.dumps(plan))
    return path


def sweep_file(folder: Path, teacher: Path, **changes: object) -> Path:
    config = {
        "name": "tiny",
        "teacher": str(teacher),
        "storage": str(folder / "runs"),
        "budgets": ["60%"],
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(config))
    return path


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, cluster.cli.main\n"
        "heavy = {'torch', 'ray', 'diffusers', 'transformers', 'optuna', 's3fs'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_an_interruption_waits_for_no_store() -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from cluster.cli.common import endings
from storage.retry import Patience, retried

def answer():
    print("asked", flush=True)
    raise OSError("the store is out")

with endings(), ThreadPoolExecutor() as pool:
    pool.submit(retried, answer, lambda error: True, Patience(1, 3600.0)).result()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as asking:
        try:
            assert asking.stdout is not None
            assert asking.stdout.readline() == "asked\n"
            asking.send_signal(signal.SIGINT)
            _, said = asking.communicate(timeout=120)
        finally:
            asking.kill()
    assert said.startswith("espalier: interrupted\n")


def test_an_interruption_of_a_wait_that_begins_does_not_hang() -> None:
    code = """
import signal, sys, threading
from cluster.cli.common import endings
from storage.retry import Patience, retried

def interrupt(frame, event, argument):
    # Called by Event.wait, which holds the event's lock here.
    if event == "call" and frame.f_code is threading.Condition.wait.__code__:
        signal.raise_signal(signal.SIGINT)

def answer():
    sys.setprofile(interrupt)
    raise OSError("the store is out")

with endings():
    retried(answer, lambda error: True, Patience(1, 3600.0))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.startswith("espalier: interrupted\n")


def test_an_ignored_interrupt_stays_ignored() -> None:
    code = """
import signal
from cluster.cli.common import endings

with endings():
    signal.raise_signal(signal.SIGINT)
    print("went on")
"""
    # As a shell starts a background job of a script.
    done = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, code],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


@pytest.mark.parametrize("words", [words for words, _ in commands()], ids=" ".join)
def test_help_has_an_example(words: tuple[str, ...]) -> None:
    shown = espalier(*words, "--help")
    assert shown.exit_code == 0
    _, _, after = " ".join(shown.output.split()).partition("Example")
    assert f"espalier {' '.join(words)}" in after


def test_help_lists_the_stages_in_their_order() -> None:
    shown = " ".join(espalier("--help").output.split())
    assert f"each also a command: {', '.join(stage.name for stage in STAGES)}." in shown


def test_help_of_the_library_says_that_it_measures() -> None:
    assert "and measure each." in " ".join(espalier("library", "--help").output.split())


def test_the_published_ppcl_plan_has_its_published_size(tmp_path: Path) -> None:
    done = espalier("plan", ppcl_plan(tmp_path), "--json")
    said = json.loads(done.output)
    assert said["parameters"] == 11_934_618_688
    assert said["teacher"]["parameters"] == 20_430_401_088
    assert said["memory"]["weights"] == 2 * 11_934_618_688
    assert len(said["blocks"]) == 35


def test_a_plan_is_a_table_for_people(tmp_path: Path) -> None:
    done = espalier("plan", ppcl_plan(tmp_path))
    assert "35 blocks from 60, 11,934,618,688 parameters" in done.output.replace("\n", " ")
    assert "15–24" in done.output


def test_a_recipe_says_what_training_it_takes() -> None:
    recipe = Path("examples/recipes/ppcl-qwen-image-10b.yaml")
    said = json.loads(espalier("plan", recipe, "--train", "--json").output)["training"]
    assert (said["gpus"], said["resolution"]) == (8, 1328)
    span, velocity = said["phases"]
    assert (span["loss"], velocity["loss"]) == ("span", "velocity")
    assert velocity["memory"]["weights"] == 4 * 10_575_332_416 // 8
    assert velocity["memory"]["total"] == sum(
        size for part, size in velocity["memory"].items() if part != "total"
    )
    assert span["fits"]
    assert velocity["fits"]
    library = said["library"]
    assert (library["batch_size"], library["micro_batch"], library["fits"]) == (32, 2, True)
    assert library["memory"]["teacher"] == 2 * 20_430_401_088
    assert said["seconds"] == pytest.approx(span["seconds"] + velocity["seconds"])
    faster = json.loads(
        espalier("plan", recipe, "--train", "--gpu", "B200-180GB", "--json").output
    )["training"]  # fmt: skip
    assert faster["seconds"] == pytest.approx(said["seconds"] * 989 / 2250)


def test_training_is_a_table_for_people(tmp_path: Path) -> None:
    done = espalier("plan", ppcl_plan(tmp_path), "--train", "--gpus", "4", "--gpu-memory", "40")
    shown = done.output.replace("\n", " ")
    assert "training on 4 × H100-80GB (40.0 GiB)" in shown
    assert "at 40% of the GPU's 989 TFLOP/s" in shown
    assert "30 s of notice save every step where each GPU sends 1." in shown  # GiB a second


def test_a_library_is_made_by_the_workers_of_the_stage(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = Path("examples/recipes/ppcl-qwen-image-12b.yaml").read_text()
    recipe.write_text(text.replace("\nworkers: 8\n", "\nworkers: 4\n"))

    def trained(*settings: str) -> tuple[int, dict[str, Any]]:
        said = json.loads(espalier("plan", recipe, "--train", "--json", *settings).output)
        return said["training"]["gpus"], said["training"]["library"]

    recovering, made = trained()
    assert (recovering, made["gpus"]) == (8, 4)
    recovering, made_by_eight = trained("--gpus", "8")
    assert (recovering, made_by_eight["gpus"]) == (8, 8)
    assert made["seconds"] > made_by_eight["seconds"]
    shown = espalier("plan", recipe, "--train").output.replace("\n", " ")
    assert "library on 4 × H100-80GB: " in shown


def test_a_library_too_large_for_a_gpu_is_told_before_one_is_paid_for() -> None:
    recipe = Path("examples/recipes/ppcl-qwen-image-12b.yaml")
    shown = espalier("plan", recipe, "--train").output.replace("\n", " ")
    assert "at a time on each, 2 of 32 pictures at a time" in shown
    small = espalier("plan", recipe, "--train", "--gpu", "A100-40GB")
    # The teacher alone is larger than this card: smaller batches do not help.
    assert "too much; lower library.micro_batch, then library.batch_size, or take a larger GPU" in (
        small.output.replace("\n", " ")
    )
    said = json.loads(
        espalier("plan", recipe, "--train", "--gpu", "A100-40GB", "--json").output
    )["training"]  # fmt: skip
    assert not said["library"]["fits"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("--gpu", "abacus"), "--gpu abacus: not known; give one of A100-40GB"),
        (("--gpus", "33"), "--gpus 33: 32 pictures a step cannot be shared by so many"),
    ],
)
def test_training_that_cannot_be_is_refused(
    tmp_path: Path, settings: tuple[str, str], reason: str
) -> None:
    done = espalier("plan", ppcl_plan(tmp_path), "--train", *settings)
    assert done.exit_code == 1
    assert reason in done.stderr


def test_a_plan_with_a_gap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "{family: qwen_image, teacher_blocks: 60, blocks: [{span: [0, 0]}, {span: [2, 59]}]}"
    )
    done = espalier("plan", path)
    assert done.exit_code == 1
    assert "block 1: span [2, 59] leaves a gap" in done.stderr


def test_a_plan_of_an_unknown_teacher_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"family": "qwen_image", "teacher_blocks": 3, "blocks": [{"span": [0, 2]}]}')
    done = espalier("plan", path)
    assert done.exit_code == 1
    assert "--teacher" in done.stderr


def test_a_plan_of_57_flux_blocks_is_counted_by_flux_1_dev(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(identity_plan("flux", 57).to_json())
    said = json.loads(espalier("plan", path, "--json").output)
    assert said["parameters"] == said["teacher"]["parameters"] == 11_901_408_320
    path.write_text(uniform_plan("flux", 57, 28).to_json())
    done = espalier("plan", path)
    assert done.exit_code == 1
    assert "crosses the border between the dual blocks, 0 to 18" in done.stderr


def test_a_students_folder_says_what_its_teacher_was(tmp_path: Path) -> None:
    blocks = tuple(BlockPlan(span=span) for span in ((0, 9), (10, 18), (19, 56)))
    plan = Plan(family="flux", teacher_blocks=57, blocks=blocks)
    family = family_named("flux")
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "transformer").mkdir()
    config = family.student_config(family.published, plan)
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    said = json.loads(espalier("plan", tmp_path, "--json").output)
    assert said["parameters"] == plan_parameters(plan, family.published)
    assert said["teacher"]["parameters"] == 11_901_408_320


def test_a_plan_for_another_family_is_refused(tmp_path: Path, tiny_pipeline: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(identity_plan("flux", 6).to_json())
    done = espalier("plan", path, "--teacher", tiny_pipeline)
    assert done.exit_code == 1
    assert "is of family qwen_image, and the plan is for flux" in done.stderr


def test_a_plan_for_another_teacher_is_refused(tmp_path: Path, tiny_pipeline: Path) -> None:
    done = espalier("plan", ppcl_plan(tmp_path), "--teacher", tiny_pipeline)
    assert done.exit_code == 1
    assert "has 6 blocks" in done.stderr


def test_a_plan_of_a_teacher_in_a_store_is_counted(tiny_pipeline: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_pipeline / "transformer" / "config.json").read_text())
    plan = tmp_path / "plan.json"
    plan.write_text(uniform_plan("qwen_image", 6, 3).to_json())
    shutil.copytree(tiny_pipeline, tmp_path / "models" / "tiny")
    url = f"{(tmp_path / 'models').as_uri()}/tiny"
    counted = json.loads(espalier("plan", plan, "--teacher", url, "--json").stdout)["parameters"]
    assert counted == plan_parameters(uniform_plan("qwen_image", 6, 3), config)
    gone = espalier("plan", plan, "--teacher", f"{url}-gone")
    assert gone.exit_code == 1
    assert "tiny-gone: no transformer/config.json there" in gone.stderr


@pytest.mark.parametrize("revision", ["", "@v1", f"@{COMMIT}"])
def test_a_teacher_of_the_hub_is_asked_for_its_sizes_alone(
    revision: str, hub: Hub, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(uniform_plan("qwen_image", 6, 3).to_json())
    said = json.loads(espalier("plan", path, "--teacher", f"owner/tiny{revision}", "--json").output)
    assert said["teacher"]["blocks"] == 6
    wanted = f"/{revision[1:] or 'main'}/transformer/config.json"
    assert any(asked.endswith(wanted) for asked in hub.asked)
    assert not [asked for asked in hub.asked if asked.endswith(".safetensors")]


def test_a_revision_that_the_hub_does_not_have_is_refused(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(uniform_plan("qwen_image", 6, 3).to_json())
    done = espalier("plan", path, "--teacher", "owner/tiny@gone")
    assert done.exit_code == 1
    assert done.stderr.startswith("espalier: teacher owner/tiny@gone: neither a folder nor to be")
    assert hub.asked


def test_every_key_of_a_configuration_is_explained() -> None:
    keys = list(keys_of(SweepConfig))
    assert [key.path for key in keys if not key.text] == []
    shown = espalier("config").output
    assert "teacher:  (required)\n    The model to compress: " in shown
    assert "store.endpoint: null\n    Address of an S3-compatible server" in shown
    assert "recover.space.phases[].loss:  (required)" in shown
    assert "budgets.count" not in shown
    assert all(f"{key.path}:" in shown for key in keys)


def test_wrong_usage_is_2() -> None:
    assert espalier("sweep").exit_code == 2
    assert espalier("swepe").exit_code == 2


def test_a_plans_teacher_that_is_no_folder_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(identity_plan("qwen_image", 6).to_json())
    done = espalier("plan", path, "--teacher", tmp_path / "absent")
    assert done.exit_code == 1
    assert "no such folder" in done.stderr


def test_an_output_that_is_a_folder_is_told(tmp_path: Path, tiny_pipeline: Path) -> None:
    (tmp_path / "out.png").mkdir()
    prompt = ("--prompt", "a red circle", "--size", "64", "--steps", "2")
    done = espalier("generate", tiny_pipeline, *prompt, "--out", tmp_path / "out.png")
    assert done.exit_code == 1
    assert "out.png: Is a directory" in done.stderr


def test_a_sweep_that_is_being_run_is_not_run_twice(tmp_path: Path, tiny_pipeline: Path) -> None:
    path = sweep_file(tmp_path, tiny_pipeline)
    sweep = open_config(path, [])
    with holding(sweep.store, layout.leases(sweep.name), "sweep tiny"):
        for command in ("sweep", "encode"):
            done = espalier(command, path)
            assert done.exit_code == 1
            assert f"sweep tiny: process {os.getpid()} on " in done.output
            assert "is running it; wait until that has ended, or stop it" in done.output
        assert espalier("status", path).exit_code == 0
    assert not list(sweep.store.keys(layout.leases(sweep.name)))


def test_a_budget_below_every_plan_is_refused(tmp_path: Path, tiny_pipeline: Path) -> None:
    done = espalier("sweep", sweep_file(tmp_path, tiny_pipeline, budgets=["1%"]))
    assert done.exit_code == 1
    assert "budget 1%" in done.stderr
    assert "smallest reachable" in done.stderr


def test_a_missing_teacher_is_refused(tmp_path: Path) -> None:
    done = espalier("sweep", sweep_file(tmp_path, tmp_path / "absent"))
    assert done.exit_code == 1
    assert "no such folder" in done.stderr


def test_pictures_without_captions_are_named(tmp_path: Path, tiny_pipeline: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "lonely.png").write_bytes(b"")
    data = {"source": "folder", "path": str(tmp_path / "data")}
    done = espalier("sweep", sweep_file(tmp_path, tiny_pipeline, data=data))
    assert done.exit_code == 1
    assert "lonely.png: a picture without a caption" in done.stderr
    assert not (tmp_path / "runs" / "sweeps").exists()


def test_a_stage_without_its_input_says_what_to_run(tmp_path: Path, tiny_pipeline: Path) -> None:
    done = espalier("library", sweep_file(tmp_path, tiny_pipeline))
    assert done.exit_code == 1
    assert "run `espalier encode` first" in done.stderr


def test_status_of_a_sweep_that_has_not_begun(tmp_path: Path, tiny_pipeline: Path) -> None:
    said = json.loads(espalier("status", sweep_file(tmp_path, tiny_pipeline), "--json").output)
    assert {stage["state"] for stage in said["stages"]} == {"missing"}
    assert said["registry"] == []


def test_training_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(identity_plan("qwen_image", 60).to_json())
    done = espalier("plan", path, "--train")
    assert done.exit_code == 1
    assert "the plan replaces no block" in done.stderr


def test_a_sweep_of_a_plan_that_replaces_nothing_is_refused_at_once(
    tmp_path: Path, tiny_pipeline: Path
) -> None:
    plan = identity_plan("qwen_image", 6).to_json()
    settings = "--set", f"plan={json.dumps(json.loads(plan))}", "--set", "budgets=[100%]"
    done = espalier("status", sweep_file(tmp_path, tiny_pipeline), *settings)
    assert done.exit_code == 1
    assert "recover.space.phases: the plan replaces no block" in done.stderr


@pytest.mark.parametrize("span", ["²", "3-", "-4", "3-4-5", "a"])
def test_a_span_that_is_none_is_named(tmp_path: Path, span: str) -> None:
    given = ("--restore", span, "--teacher", tmp_path, "--out", tmp_path / "out")
    done = espalier("plug", tmp_path, *given)
    assert done.exit_code == 1
    assert f"--restore {span}: not a span" in done.stderr


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    done = espalier("generate", tmp_path / "absent", "--prompt", "a red circle")
    assert done.exit_code == 1
    assert "no such folder" in done.stderr


@pytest.mark.parametrize("verb", [("generate", "--prompt", "a red circle"), ("judge",)])
def test_a_size_that_a_pipeline_would_round_is_refused(tmp_path: Path, verb: tuple[str]) -> None:
    done = espalier(verb[0], tmp_path, *verb[1:], "--size", "50")
    assert done.exit_code == 1
    assert "--size 50: must be a multiple of 16" in done.stderr
    assert "give 48 or 64" in done.stderr


def test_interruption_says_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, endings("espalier sweep a.yaml"):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert "resumes with: espalier sweep a.yaml" in capsys.readouterr().err


def test_an_unexpected_failure_is_3(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, endings("espalier sweep a.yaml"):
        raise StageError("search: failed: no room") from MemoryError("no room")
    assert caught.value.exit_code == 3
    assert "espalier: search: failed: no room" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "left on device; free some space, or",
        ),
        (OSError("cannot load the processor"), 1, "espalier: cannot load the processor\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), 1, "espalier: a.png: No such"),
        (ValueError("sizes differ\nby 3"), 3, "not by your doing: ValueError: sizes differ\n"),
        (MemoryError(), 3, "espalier: failed, and not by your doing: MemoryError\n"),
    ],
)
def test_whatever_a_command_raises_ends_in_a_sentence(
    capsys: pytest.CaptureFixture[str], raised: Exception, code: int, said: str
) -> None:
    with pytest.raises(typer.Exit) as caught, endings():
        raise raised
    assert caught.value.exit_code == code
    last = capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert last.startswith("espalier: ")
    assert said in last


def test_wrong_usage_is_left_to_typer() -> None:
    with pytest.raises(typer.BadParameter), endings():
        raise typer.BadParameter("no such size")


def test_a_check_that_breaks_is_a_failed_stage(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_pipeline: Path
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("the hub is down")

    opened = open_config(sweep_file(tmp_path, tiny_pipeline), [])
    stage = replace(stage_named("encode"), check=broken)
    with pytest.raises(typer.Exit) as caught, endings():
        run_stages(opened, [stage], as_json=False)
    assert caught.value.exit_code == 3
    assert "espalier: encode: failed: the hub is down" in capsys.readouterr().err


def test_a_stage_without_room_is_refused_before_those_before_it_run(
    tmp_path: Path, tiny_pipeline: Path
) -> None:
    # Sampled states of some terabytes.
    opened = open_config(sweep_file(tmp_path, tiny_pipeline), ["analyse.tokens=10000000000"])
    with pytest.raises(PlacementError, match="analyse: the statistics of this teacher take"):
        run_stages(opened, stages_of(opened), as_json=False)
    assert stage_named("encode").state(opened) == "missing"


def test_an_error_that_ray_carried_is_still_one_sentence() -> None:
    import ray.exceptions

    plain = EspalierError("picture.png: cannot be read; remove it")
    carried = ray.exceptions.RayTaskError("work", "Traceback ...", plain).as_instanceof_cause()
    assert isinstance(carried, EspalierError)
    assert str(user_error(carried)) == "picture.png: cannot be read; remove it"
    wrapped = RuntimeError("stage failed")
    wrapped.__cause__ = carried
    assert str(user_error(wrapped)) == "picture.png: cannot be read; remove it"
    assert user_error(ValueError("ours")) is None


def test_the_outermost_error_is_told_because_it_knows_the_file() -> None:
    outer = EspalierError("plan.json: block 1 leaves a gap")
    outer.__cause__ = EspalierError("block 1 leaves a gap")
    assert user_error(outer) is outer
