"""The base of every configuration section: frozen, closed, documented field by field."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One named part of a configuration or record, kept beside the code that uses it.

    Unknown keys are refused; the docstring under a field is its description in `espalier config`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
