"""The model card: front matter that the hub can read, and the facts a person asks for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from search.card import CardFacts, card_text, write_card
from search.stages.facts import licence
from tests.search.invented import COSTS, PROVENANCE, SCHEDULE, STUDENTS, TEACHER, TEACHER_SCORES
from trainers.teacher import open_teacher

FACTS = CardFacts(
    asked="50%",
    teacher=TEACHER,
    student=STUDENTS[0],
    schedule=SCHEDULE,
    provenance=PROVENANCE,
    teacher_scores=TEACHER_SCORES,
    costs=COSTS,
    sampling={"height": 64},
    caption="a red circle",
    base_model="Qwen/Qwen-Image",
    licence="apache-2.0",
)


def front_matter(text: str) -> Any:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads() -> None:
    front = front_matter(card_text(FACTS))
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "text-to-image"
    assert front["base_model"] == "Qwen/Qwen-Image"
    assert front["license"] == "apache-2.0"
    metrics = front["model-index"][0]["results"][0]["metrics"]
    assert metrics[0] == {"type": "judge", "name": "judge score, overall", "value": 0.92}


def test_a_teacher_that_is_not_on_the_hub_is_no_base_model() -> None:
    front = front_matter(card_text(dataclasses.replace(FACTS, base_model=None, licence=None)))
    assert not {"base_model", "base_model_relation", "license"} & set(front)


@pytest.mark.usefixtures("hub")
def test_a_teacher_that_is_fetched_from_the_hub_brings_its_licence() -> None:
    assert licence(open_teacher("owner/tiny")) == "apache-2.0"


@pytest.mark.parametrize(
    "fact",
    [
        "50% of its teacher",
        "96.8% of the teacher’s judge score",
        "| parameters | 2,000,000 | 1,000,000 |",
        "| fidelity loss, after recovery | 0 | 0.03 |",
        "| counting | 90% | 88% |",
        "| **overall** | **95%** | **92%** |",
        "| 2 | velocity | all | 180 | 0.0005 |",
        "| encode | reused | 2 |",
        "| **all** | **1 min 10 s** |",
        "transformer `0123456789abcdef`",
        f"plan `{STUDENTS[0].plan.digest}`",
        "sweep `demo <1>`",
        "](plan.png)",
    ],
)
def test_the_card_says(fact: str) -> None:
    assert fact in card_text(FACTS)


def test_every_table_has_rows_as_wide_as_its_head() -> None:
    for table in re.findall(r"(?:^\|.*\|\n?)+", card_text(FACTS), re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_student_without_a_judge_gets_no_scores() -> None:
    unjudged = dataclasses.replace(
        FACTS, student=dataclasses.replace(FACTS.student, scores=None), teacher_scores=None
    )
    text = card_text(unjudged)
    assert "judge" not in text.lower()
    assert "model-index" not in front_matter(text)


def test_the_picture_that_the_card_shows_lies_beside_it(tmp_path: Path) -> None:
    card, picture = write_card(FACTS, tmp_path)
    assert card.name == "README.md"
    shown = re.search(r"!\[[^\]]+\]\(([^)]+)\)", card.read_text(encoding="utf-8"))
    assert shown is not None
    assert tmp_path / shown[1] == picture
    with Image.open(picture) as drawn:
        drawn.verify()
