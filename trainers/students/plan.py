"""The plan: a whole student on paper, as a partition of the teacher's blocks into spans.

Frozen and serialisable. Its JSON travels with every student, and its digest names everything that
is derived from it.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import (
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from storage.digest import digest_json
from storage.document import read_document
from storage.errors import EspalierError
from storage.section import Section

Start = Literal["first", "middle", "average", "library"]
Kept = Annotated[float, Field(gt=0, le=1)]
Ffn = Kept | Literal["linear"]
Text = Literal["dual", "projected", "shared"]


class PlanError(EspalierError):
    """A plan that describes no student of its teacher."""


class BlockPlan(Section):
    """One block of the student: the span it stands for and how it is made."""

    span: tuple[int, int]
    """First and last teacher block that this block replaces, both included, counted from 0."""

    ffn: Ffn = 1.0
    """Fraction of the hidden channels of each feed-forward network that is kept, or `linear`: one
    linear map of the state after attention in place of each (PPCL)."""

    text: Text = "dual"
    """How the block treats text. `dual`: a stream of its own, as in the teacher. `projected`: the
    text state is held, and attention reads a residual linear map of what the last block with a
    text branch fed its own attention (PPCL). `shared`: one set of weights for the joint sequence
    of text and image, the image branch's (Amber-Image)."""

    text_map: bool = False
    """Whether the held text state goes through one more residual linear map, at the end of a run
    of projected blocks (PPCL)."""

    # After the others, whose values the validator below reads.
    start: Start = "first"
    """First weights: those of the span's `first` block, of the `middle` one (at (u+v)//2), the
    plain `average` of all, or a replacement trained for the `library`."""

    @field_validator("start")
    @classmethod
    def _one_name_for_one_block(cls, start: Start, info: ValidationInfo) -> Start:
        # In a span of one block the starts agree, and an untouched block needs no training: one
        # spelling, so that equal blocks are equal keys and equal plans have equal digests.
        first, last = info.data.get("span", (0, 1))
        alone = first == last
        whole = info.data.get("ffn") == 1.0 and info.data.get("text") == "dual"
        if alone and (start != "library" or whole):
            return "first"
        return start

    @model_validator(mode="after")
    def _only_held_text_is_mapped(self) -> Self:
        if self.text_map and self.text != "projected":
            raise PlanError(
                f"span {list(self.span)}: text_map is for projected text; this block's is "
                f"{self.text}"
            )
        return self

    @property
    def length(self) -> int:
        return self.span[1] - self.span[0] + 1

    @property
    def kept(self) -> float:
        """The fraction of its FFN's hidden channels; 0 for a linear one."""
        return 0.0 if self.ffn == "linear" else self.ffn

    @property
    def depth_only(self) -> bool:
        """Whether it has the shape of the teacher's blocks."""
        return self.ffn == 1.0 and self.text == "dual"

    @property
    def untouched(self) -> bool:
        """Whether this is the teacher's own block, kept as it is."""
        return self.length == 1 and self.depth_only

    @property
    def starts(self) -> frozenset[Start]:
        """Its start, and the others that would make the very same block: of one teacher block all
        but `library` do, and of two the middle one is the first."""
        alike: dict[int, tuple[Start, ...]] = {
            1: ("first", "middle", "average"),
            2: ("first", "middle"),
        }
        same = alike.get(self.length, ())
        return frozenset(same if self.start in same else (self.start,))

    @property
    def untrained(self) -> bool:
        """Whether it is cut from the teacher's weights, though it is not the teacher's own."""
        return self.start != "library" and not self.untouched

    def __str__(self) -> str:
        said = f"span [{self.span[0]}, {self.span[1]}]"
        if self.ffn != 1.0:
            said += f", ffn {self.ffn if self.ffn == 'linear' else format(self.ffn, 'g')}"
        if self.text != "dual":
            said += f", text {self.text}" + (" and mapped" if self.text_map else "")
        return f"{said}, start {self.start}" if self.untrained else said


class Plan(Section):
    """A student: spans that follow one another from the teacher's first block to its last."""

    family: str
    """Model family of teacher and student, a key of trainers.students.families.FAMILIES."""

    teacher_blocks: PositiveInt
    """Number of blocks of the teacher."""

    blocks: tuple[BlockPlan, ...]
    """The student's blocks, in order."""

    @model_validator(mode="after")
    def _spans_partition_the_teacher(self) -> Self:
        last = self.teacher_blocks - 1
        if not self.blocks:
            raise PlanError(f"the plan has no blocks; spans must cover the blocks 0 to {last}")
        expected, previous = 0, "the start"
        for i, block in enumerate(self.blocks):
            start, end = block.span
            span = f"block {i}: span [{start}, {end}]"
            rule = f"spans must follow one another from 0 to {last}"
            if end < start:
                raise PlanError(f"{span} is reversed; write the lower teacher block first")
            if end > last:
                raise PlanError(f"{span} goes past the teacher's last block, {last}; {rule}")
            if start > expected:
                raise PlanError(f"{span} leaves a gap after {previous}; {rule}")
            if start < expected:
                raise PlanError(f"{span} overlaps {previous}; {rule}")
            expected, previous = end + 1, f"[{start}, {end}]"
        if expected <= last:
            raise PlanError(
                f"block {len(self.blocks) - 1}: span {previous} ends the plan before the "
                f"teacher's last block, {last}; spans must follow one another from 0 to {last}"
            )
        self._check_text()
        return self

    def _check_text(self) -> None:
        for i, block in enumerate(self.blocks):
            follower = self.blocks[i + 1] if i + 1 < len(self.blocks) else None
            if i == 0 and block.text == "projected":
                raise PlanError(
                    "block 0: its text cannot be projected, no block before it has a text branch"
                )
            if block.text_map and follower is not None and follower.text == "projected":
                raise PlanError(
                    f"block {i}: text_map stands at the end of a run of projected blocks, and "
                    f"block {i + 1} is projected too"
                )

    @property
    def digest(self) -> str:
        """16 hex digits; equal exactly for plans of the same student, however they were written."""
        return digest_json(self.model_dump(mode="json", exclude_defaults=True))

    @property
    def untouched(self) -> bool:
        """Whether this is the teacher itself."""
        return all(block.untouched for block in self.blocks)

    @property
    def depth_only(self) -> bool:
        """Whether every block has the teacher's shape, so that the stock class can hold them."""
        return all(block.depth_only for block in self.blocks)

    def to_json(self) -> str:
        """JSON text, defaults left out, one block a line."""
        dumped = self.model_dump(mode="json", exclude_defaults=True)
        blocks = ",\n".join(f"    {json.dumps(block)}" for block in dumped["blocks"])
        return (
            f'{{\n  "family": {json.dumps(self.family)},\n'
            f'  "teacher_blocks": {self.teacher_blocks},\n'
            f'  "blocks": [\n{blocks}\n  ]\n}}\n'
        )

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "plan.json") -> Plan:
        """Reads what `to_json` wrote. PlanError names `where` and the field or block."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"{where}: not JSON: {error}") from error
        return plan_of(data, where)


def plan_of(data: object, where: str) -> Plan:
    """The plan that parsed JSON or YAML describes. PlanError names `where` and the field."""
    if not isinstance(data, Mapping):
        raise PlanError(f"{where}: a plan is a mapping with family, teacher_blocks and blocks")
    try:
        return Plan.model_validate(data)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    except ValidationError as error:
        raise PlanError(f"{where}: {_told(error)}") from error


def _told(error: ValidationError) -> str:
    """The first field that is wrong and why, by all kinds of values that it may have."""
    first = error.errors()[0]
    # blocks, number, field; what comes below names a kind.
    place, *kinds = [e for e in error.errors() if e["loc"][:3] == first["loc"][:3]]
    shown = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"][:3])
    if first["type"] == "extra_forbidden":
        known = [*(Plan if len(first["loc"]) == 1 else BlockPlan).model_fields]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        return f"{shown.lstrip('.')}: no such field; {meant}"
    if first["type"] == "missing":
        return f"{shown.lstrip('.')}: is required"
    said = (e["msg"].replace("Input should be", "must be") for e in (place, *kinds))
    given = "" if isinstance(first["input"], Mapping) else f", got {first['input']!r}"
    return f"{shown.lstrip('.')}: {', or '.join(dict.fromkeys(said))}{given}"


def load_plan(path: str | Path) -> Plan:
    """Reads a plan in JSON or YAML, or the plan of a recipe: YAML with the plan under `plan`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot read the plan: {error}") from error
    try:
        data = read_document(text)
    except yaml.YAMLError as error:
        raise PlanError(f"{path}: neither JSON nor YAML: {' '.join(str(error).split())}") from error
    if isinstance(data, Mapping) and "plan" in data:
        return plan_of(data["plan"], f"{path}: plan")
    if isinstance(data, Mapping) and "teacher" in data:
        raise PlanError(
            f"{path}: this recipe names no plan, its sweep finds one; give the folder of a student "
            "that the sweep has published, or a plan"
        )
    return plan_of(data, str(path))


def identity_plan(family: str, teacher_blocks: int) -> Plan:
    """The teacher itself."""
    return uniform_plan(family, teacher_blocks, teacher_blocks)


def uniform_plan(
    family: str, teacher_blocks: int, student_blocks: int, start: Start = "first"
) -> Plan:
    """Spans of lengths that differ by at most one, the longer ones spread evenly."""
    if not 1 <= student_blocks <= teacher_blocks:
        raise PlanError(
            f"a teacher of {teacher_blocks} blocks has no student of {student_blocks}; "
            f"ask for 1 to {teacher_blocks}"
        )
    edges = [i * teacher_blocks // student_blocks for i in range(student_blocks + 1)]
    return Plan(
        family=family,
        teacher_blocks=teacher_blocks,
        blocks=tuple(BlockPlan(span=(u, v - 1), start=start) for u, v in itertools.pairwise(edges)),
    )
