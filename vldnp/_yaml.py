"""YAML files as checked data; what is wrong with one is said in one line that names it."""

import re
import reprlib
from dataclasses import fields
from functools import cache
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from vldnp._files import unknown


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; a key written twice is a mistake."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                line = node.value[position][0].start_mark.line + 1
                raise yaml.YAMLError(f"{key!r} stands twice, the second time in line {line}")
        return super().construct_mapping(node, deep)


_adapter = cache(TypeAdapter)


def read_yaml(path: Path, kind: str) -> dict:
    """The mapping in a file.

    Raises:
        FileNotFoundError, ValueError: there is none; one line with the `kind` of file.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        raise FileNotFoundError(f"no {kind} {path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"{kind} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{kind} {path} is not UTF-8: {error.reason}") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter for a date such as 2026-13-01
        raise ValueError(f"{kind} {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{kind} {path} must be a mapping")
    return data


def checked(kind: type, data: dict, path: Path, what: str, *also: str):
    """The dataclass `kind` made of what a file says; pydantic checks it.

    Args:
        what: the kind of file, in words.
        also: keys that the file may have besides.

    Raises:
        ValueError: what is wrong first, in the file's terms.
    """
    try:
        return _adapter(kind).validate_python(data, context=path.parent)
    except ValidationError as error:
        found = error.errors()
    if missing := [repr(wrong["loc"][0]) for wrong in found if wrong["type"] == "missing"]:
        raise ValueError(f"{what} {path.name} is missing {', '.join(missing)}")
    key = [*found[0]["loc"], ""][0]  # what concerns several keys has no place
    # Of the ways to read a value, the one that got farthest tells most.
    wrong = max((w for w in found if key in (*w["loc"], "")), key=lambda w: len(w["loc"]))
    if wrong["type"] == "unexpected_keyword_argument":
        raise unknown(f"key in {what} {path.name}", key, {f.name for f in fields(kind)} | {*also})
    if wrong["type"] == "value_error":  # in our own words
        raise ValueError(f"{what} {path.name}: {key} {wrong['ctx']['error']}".replace("  ", " "))
    said = re.sub("^(Input|Tuple|String)", "it", wrong["msg"].partition(" after")[0])
    said = said.replace("tuple", "list").replace("dictionary", "mapping")
    raise ValueError(f"{what} {path.name}: {key}: {said}, not {reprlib.repr(wrong['input'])}")
