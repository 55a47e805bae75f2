"""The ground every recipe section stands on: strict, frozen, described settings."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """One section of a recipe. Unknown keys are errors; values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, populate_by_name=True)


def setting(default: Any = ..., description: str = "", *, unit: str = "", result: bool = True, alias: str | None = None, **rules: Any) -> Any:
    """A recipe field.

    description, unit: shown by `trimline explain`.
    result: whether the value can change what the stage makes. False for what only says where or how visibly
        it runs (ranks, logging): such a field is left out of the stage's fingerprint.
    rules: pydantic constraints (`ge`, `gt`, `le`, `lt`, ...).
    """
    if alias is not None:
        rules["alias"] = alias
    return Field(default, description=description, json_schema_extra={"unit": unit, "result": result}, **rules)
