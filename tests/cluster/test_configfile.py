from __future__ import annotations

from pathlib import Path

import pytest

from cluster.configfile import ConfigError, load_config
from search.config import SweepConfig

GOOD = """
name: small
teacher: somewhere
budgets: [50%, 10B]
library: {lr: 2e-3, steps: 5}
recover:
  space:
    phases:
      - {loss: span, steps: [2, 4], lr: [1e-4, 1e-3]}
      - {loss: velocity, train: all, steps: 3, lr: 1e-3}
"""


def test_a_key_that_is_there_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    twice = "name: one\nrecover:\n  finalists: 1\n  finalists: 2\n"
    assert complaint(tmp_path, twice) == (
        "sweep.yaml:4:3: not valid YAML: the key 'finalists' is there twice"
    )


def load(folder: Path, text: str, *settings: str) -> SweepConfig:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return load_config(path, settings, SweepConfig)


def complaint(folder: Path, text: str, *settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *settings)
    return str(caught.value)


def test_reads_a_sweep(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert [budget.label for budget in config.budgets] == ["50pct", "10B"]
    assert config.library.lr == 0.002
    assert config.recover.space.phases[0].lr == (1e-4, 1e-3)
    assert config.recover.space.phases[1].steps == (3, 3)


def test_settings_override_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD, "storage=s3://b/p", "search.trials=3", "budgets=[30%]")
    assert config.storage == "s3://b/p"
    assert config.search.trials == 3
    assert [budget.label for budget in config.budgets] == ["30pct"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("library.steps=0", "sweep.yaml: library.steps: must be greater than 0, got 0"),
        ("libary.steps=1", "sweep.yaml: libary: unknown key; did you mean `library`?"),
        ("library.step=1", "sweep.yaml: library.step: unknown key; did you mean `steps`?"),
        (
            "recover.space.phases=[{loss: span, stepz: 1, steps: 1, lr: 1}]",
            "sweep.yaml: recover.space.phases[0].stepz: unknown key; did you mean `steps`?",
        ),
        (
            "recover.space.phases=[{loss: span, steps: 0, lr: 1}]",
            "sweep.yaml: recover.space.phases[0].steps: must be greater than 0, got 0",
        ),
        ("accelerator=tpu", "sweep.yaml: accelerator: must be 'cpu' or 'gpu', got 'tpu'"),
        (
            "judge.task=shape",
            "sweep.yaml: judge.task: no task is called 'shape'; known are shapes, or null",
        ),
        ("data.held_out=0", "sweep.yaml: data.held_out: must be greater than 0;"),
        (
            "recover.workers=33",
            "sweep.yaml: recover.space.phases[0].batch_size: must be at least "
            "recover.workers, 33, got 32",
        ),
        (
            "recover.workers=[3, 2]",
            "sweep.yaml: recover.workers: [3, 2] is reversed; write the fewest first",
        ),
        ("measure.resolutions=[64, 70]", "measure.resolutions[1]: must be a multiple of 16"),
        ("data.resolution=70", "data.resolution: must be a multiple of 16"),
        ("judge.steps=1", "judge.steps: must be at least 2, got 1"),
        ("search.trials=1", "search.trials: 1 for 2 budgets; each needs a plan of its own"),
        ("data.held_out=9999", "9999 of 1500 pictures leave none to train on"),
        ("budgets=[50%, 0.5]", "budgets: 50pct is asked for twice; remove one"),
        ("budgets=[lots]", "sweep.yaml: budgets[0]: 'lots': not a size"),
        ("budgets=[]", "sweep.yaml: budgets: must have at least 1, got 0"),
        ("budgets=50%", "sweep.yaml: budgets: must be a list in brackets, got '50%'"),
        (
            "library.widths=[0]",
            "sweep.yaml: library.widths[0]: must be greater than 0.0, or must be 'linear', got 0",
        ),
        ("search", "--set search: must be KEY=VALUE"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, setting: str, said: str) -> None:
    assert said in complaint(tmp_path, GOOD, setting)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hidden@bucket/prefix",
        "https://user:hidden@host/pictures.tar",
        "https://user:hid/den@host/pictures.tar",
        "https://hidden@host",
        "https://host/pictures.tar?X-Amz-Signature=hidden",
        "https://host/pictures.tar?sv=1&sig=hidden",
        "https://host/pictures.tar?api_key=hidden",
    ],
)
@pytest.mark.parametrize(
    "key", ["teacher", "storage", "store.endpoint", "data.path", "search.study", "track.mlflow"]
)
def test_a_credential_is_refused_and_not_shown(tmp_path: Path, key: str, url: str) -> None:
    said = complaint(tmp_path, GOOD, f"{key}={url}")
    assert f"sweep.yaml: {key}: a password does not belong" in said
    assert "hid" not in said


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a:b@c",
        "http://127.0.0.1:9000",
        "https://host:9000/a@b",
        "owner/model@v1.0",
        "https://host/x.tar?versionId=1&key=2",
    ],
)
def test_an_address_without_a_credential_is_taken(tmp_path: Path, url: str) -> None:
    assert load(tmp_path, GOOD, f"data.path={url}").data.path == url


def test_a_section_of_comments_alone_is_as_if_left_out(tmp_path: Path) -> None:
    text = GOOD + "search:\n  # trials: 5\nmeasure:\n"
    assert load(tmp_path, text) == load(tmp_path, GOOD)
    assert load(tmp_path, text, "search.probe.pictures=3").search.probe.pictures == 3


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "sweep.yaml: teacher: is missing" in complaint(tmp_path, "{name: x, budgets: [1B]}")


def test_every_wrong_field_has_a_line(tmp_path: Path) -> None:
    assert len(complaint(tmp_path, GOOD, "workers=0", "seed=-1").splitlines()) == 2


def test_what_is_no_configuration_is_refused(tmp_path: Path) -> None:
    assert "sweep.yaml:3:" in complaint(tmp_path, "name: x\nbudgets: [1B\n")
    assert "must hold `key: value` lines" in complaint(tmp_path, "- a list")
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / "absent.yaml", [], SweepConfig)


def test_the_example_is_a_configuration() -> None:
    example = Path(__file__).parents[2] / "examples" / "miniature.yaml"
    config = load_config(example, [], SweepConfig)
    assert config.name == "miniature"
