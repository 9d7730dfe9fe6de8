"""YAML with places: where each key stands, keys that are set twice, and errors as one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import ConfigError


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The YAML mapping in `path` and the line of every key. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader)
        raw = string_keys(yaml.load(text, Loader))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; a YAML file was expected") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply, or an alias inside its own anchor") from None
    if raw is None:
        return {}, {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(raw).__name__}")
    lines: dict[tuple[str, ...], int] = {}
    duplicates: list[str] = []

    def walk(mapping: yaml.Node | None, prefix: tuple[str, ...]) -> None:
        if not isinstance(mapping, yaml.MappingNode):
            return
        for key_node, value_node in mapping.value:
            key = (*prefix, str(key_node.value))
            line = key_node.start_mark.line + 1
            if key in lines:
                duplicates.append(f"{path}:{line}: `{'.'.join(key)}` is set twice (first on line {lines[key]})")
            lines[key] = line
            walk(value_node, key)

    walk(node, ())
    if duplicates:
        raise ConfigError(duplicates)
    return raw, lines


class Loader(yaml.SafeLoader):
    """SafeLoader, but a scalar of the wrong form (the date 2020-13-45, `!!int x`) is an error of the YAML, with its place."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The node's value. Raises yaml.MarkedYAMLError."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            problem = f"{str(node.value)[:40]!r} is no valid {kind}; put it in quotes if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def string_keys(value: Any) -> Any:
    """`value` with every key of its mappings, at any depth, as text."""
    if isinstance(value, dict):
        return {str(key): string_keys(item) for key, item in value.items()}
    return [string_keys(item) for item in value] if isinstance(value, list) else value
