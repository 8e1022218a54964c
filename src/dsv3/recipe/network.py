"""The recipe's `[model]` section, made from `ModelConfig`'s own fields so that there is one list of them."""

from dataclasses import fields, is_dataclass
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    field_validator,
    model_serializer,
)

from dsv3.errors import nearest
from dsv3.model.config import PRESETS, ModelConfig
from dsv3.recipe.section import Section

ELSEWHERE = {"extra", "initializer_range"}
"""Fields of `ModelConfig` that are no keys of this section."""


class Network(Section):
    """`[model]`: a preset, and any field of `ModelConfig` that shall differ from it.

    A field that the recipe does not mention is None here: read the network's shape from `config()`. For a field that
    may be None (`q_lora_rank`, `rope_scaling`), TOML says `"none"`. The standard deviation of the initial weights
    has its key in `[training]`.
    """

    preset: str = "tiny"
    """The named shape to start from: `deepseek-v3` is the report's (section 4.2)."""

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PRESETS:
            raise ValueError(f"expected a preset; {nearest(name, PRESETS)}")
        return name

    def config(self) -> ModelConfig:
        """The network; `UserError` naming the preset or field that is wrong."""
        changes = self.model_dump(exclude={"preset"}, exclude_unset=True)
        return ModelConfig.preset(self.preset, **changes)

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept = self.model_fields_set | {"preset"}
        return {key: value for key, value in handler(self).items() if key in kept}


def _keys() -> dict[str, Any]:
    """Field definitions for `create_model`: every one optional, `"none"` read as None where None is legal."""
    keys: dict[str, Any] = {}
    for name, hint in get_type_hints(ModelConfig).items():
        if name in ELSEWHERE:
            continue
        inner = next((part for part in get_args(hint) if part is not NoneType), hint)
        if isinstance(inner, type) and is_dataclass(inner):
            inner = create_model(inner.__name__, __base__=Section, **_defaults_of(inner))
        if NoneType in get_args(hint):
            inner = Annotated[inner | None, BeforeValidator(lambda value: None if value == "none" else value)]
        keys[name] = (inner, Field(default=None, validate_default=False))
    return keys


def _defaults_of(dataclass: Any) -> dict[str, Any]:
    return {field.name: (get_type_hints(dataclass)[field.name], field.default) for field in fields(dataclass)}


if TYPE_CHECKING:
    ModelSection = Network
else:
    ModelSection = create_model(
        "ModelSection",
        __base__=Network,
        __doc__=Network.__doc__,
        **_keys(),
    )
