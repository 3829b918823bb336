"""Describe a family: its fields in foreign `config.json` files and its tensors' names, for reading and writing.

A family is a vision tower or a decoder. Its file holds one table of fields, one table of tensors, and the few facts
that fit in neither; all code that reads, writes, completes or inspects a checkpoint looks them up there.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict

import numpy as np

from llava_jax.checkpoints.config_keys import Keys, Quantization
from llava_jax.config import TextConfig, VisionConfig, field_types
from llava_jax.json_files import check_json

# ---------------------------------------------------------------- the table of fields


class Field(NamedTuple):
    """A field of a part's object in `config.json`."""

    theirs: str
    ours: str
    default: Any = None  # of the part's class in transformers, for files that omit the field
    kind: Any = None  # the type in a file; None: that of our field


def with_defaults(fields: tuple[Field, ...], **defaults) -> tuple[Field, ...]:
    """A table of fields with the defaults of another class."""
    return tuple(field._replace(default=defaults.get(field.theirs, field.default)) for field in fields)


# ---------------------------------------------------------------- the table of tensors


def _keep(x: np.ndarray) -> np.ndarray:
    return x


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T


def _to_hwio(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 1, 0)


def _to_oihw(x: np.ndarray) -> np.ndarray:
    return x.transpose(3, 2, 0, 1)


Layout = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]  # to ours, to theirs
KEEP: Layout = (_keep, _keep)
LINEAR: Layout = (_transpose, _transpose)
CONV: Layout = (_to_hwio, _to_oihw)

# Foreign name within the part, our path, layout; {i} is a layer.
Tensors = tuple[tuple[str, str, Layout], ...]


def linear(theirs: str, ours: str) -> Tensors:
    """The table rows of a linear layer, with or without a bias."""
    return (f"{theirs}.weight", f"{ours}/kernel", LINEAR), (f"{theirs}.bias", f"{ours}/bias", KEEP)


def layer_norm(theirs: str, ours: str) -> Tensors:
    """The table rows of a norm with scale and bias."""
    return (f"{theirs}.weight", f"{ours}/scale", KEEP), (f"{theirs}.bias", f"{ours}/bias", KEEP)


# ---------------------------------------------------------------- families


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """What vision towers and decoders have in common.

    name        `family` in our configuration
    model_type  of its object in transformers' files
    fields      the table of fields, which copies values between our fields and foreign ones
    more        fields that only `read` and `write` handle: name -> type in a file
    read        (function that gets a field or its default) -> our fields that are not in the table
    write       our part -> foreign fields that are not in the table; raises `InputError` if they cannot express it
    ignored     fields that have no effect; `only`: fields that are supported with these values only
    tensors     the table of tensors
    computed    suffixes of the names of tensors that older files hold and the model computes itself
    """

    name: str
    model_type: str
    fields: tuple[Field, ...]
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Callable[[str], Any]], dict[str, Any]] = lambda get: {}
    write: Callable[[Any], dict[str, Any]] = lambda part: {}
    ignored: frozenset[str]
    only: Mapping[str, tuple]
    tensors: Tensors
    computed: tuple[str, ...] = ()

    config: ClassVar[type]

    @functools.cached_property
    def types(self) -> dict[str, Any]:
        """Name of each field that is read -> its type in a file."""
        ours = field_types(self.config)
        own = {field.theirs: field.kind or ours[field.ours] for field in self.fields}
        return {"model_type": str | None, "quantization_config": Quantization | None} | own | dict(self.more)

    @functools.cached_property
    def keys(self) -> Keys:
        return Keys(frozenset(self.types), self.ignored, self.only)

    def check(self, theirs: Any, file: str, key: str = "") -> None:
        """Raise an `InputError` if a field of a part's object, the whole file or the one under `key`, has the wrong
        type."""
        schema: Any = TypedDict(self.name, self.types, total=False)  # type: ignore[misc]  # known only at run time
        if key:
            theirs, schema = {key: theirs}, TypedDict(self.name, {key: schema})  # type: ignore[misc, operator]  # likewise
        check_json(theirs, schema, file)

    def read_fields(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Convert a part's foreign object, which `check` accepts, to the fields of our configuration."""
        get = ({field.theirs: field.default for field in self.fields} | dict(theirs)).get
        return {field.ours: get(field.theirs) for field in self.fields} | self.read(get) | {"family": self.name}

    def write_fields(self, part: Any) -> dict[str, Any]:
        """Convert a part of our configuration to its object in a foreign file.

        Raises:
          InputError: the family's class has no fields for it.
        """
        fields = {field.theirs: getattr(part, field.ours) for field in self.fields}
        return {"model_type": self.model_type} | fields | self.write(part)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Decoder(Family):
    """A decoder.

    originals   its model types in files of the original and of plain language models; exports use the first
    classes     its classes in these files; exports use the first
    """

    originals: tuple[str, ...]
    classes: tuple[str, ...]

    config = TextConfig


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tower(Family):
    """A vision tower.

    title       its name in errors
    classes     its class in transformers
    inner       an optional prefix of the class's tensor names
    unused      our configuration -> path and shape of tensors that the class has and LLaVA does not use
    whole       model type of a directory that also holds a text model; `other_half` matches the names of its tensors
    published   name by which the original fetches a tower -> the fields of its own config.json
    processor   the class of its image processor; `pixels` are its default settings
    """

    title: str
    classes: tuple[str, ...]
    inner: str
    unused: Callable[[VisionConfig], dict[str, tuple[int, ...]]]
    whole: str
    other_half: str
    published: Mapping[str, dict[str, Any]]
    processor: str
    pixels: Mapping[str, Any]

    config = VisionConfig
