"""Read a config: a YAML file and `key=value` overrides, checked against a dataclass and turned into it."""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stdit.legacy import renamed_config
from stdit.variants import pick

T = TypeVar("T")

# Bounds of a config file; YAML's readers recurse per level, and an alias repeats all of what it stands for.
MAX_BYTES, MAX_DEPTH, MAX_VALUES = 1_000_000, 32, 10_000


def config_folder() -> Path:
    """The folder of the package's configs: stdit/configs in a wheel, configs/ of the repository in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[1] / "configs"


def find_config(name: str | Path, subfolder: str = "") -> Path:
    """Find the file of a config by its path, or by a name in the package such as "quickstart".

    name: a name may have the prefix "configs/" and the suffix ".yaml". subfolder: the subfolder of the package's
    configs that is searched first. Raises ValueError that lists the configs if there is no such file.
    """
    if Path(name).is_file():
        return Path(name)
    folder, bare = config_folder(), str(name).removeprefix("configs/").removesuffix(".yaml")
    for root in (folder / subfolder, folder):
        found = root / f"{bare}.yaml"
        if found.is_file() and found.resolve().is_relative_to(folder.resolve()):  # a name must stay in the folder
            return found
    here = [str(path) for path in sorted(Path("configs").glob("*.yaml"))]
    packaged = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    raise ValueError(
        f"The config {str(name)!r} does not exist; there are: {', '.join(here) or 'none in configs/'}; "
        f"by name: {', '.join(packaged) or 'none'}."
    )


def load_typed(schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read a config (see `find_config`; None: the defaults) and `key=value` overrides into the dataclass `schema`.

    Raises ValueError, in one line, with the key, what was expected, and the nearest name of a misspelled key.
    """
    files = [] if path is None else [renamed_config(_read(find_config(path)))]
    sources = [*files, renamed_config(_read_overrides(overrides))]
    for source in sources:
        _check(schema, source, "")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), *sources)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(key + str(error).splitlines()[0]) from error  # its further lines name Python's types


def _read(path: Path) -> dict:
    """The values of a YAML file."""
    what = f"The config {str(path)!r}"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{what} has {path.stat().st_size} bytes, more than {MAX_BYTES}; it is not a config.")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error}; give another.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text ({error}); save it as UTF-8.") from error
    if not text.strip():
        raise ValueError(f"{what} is empty; see configs/ for examples, or name one of them.")
    return _parsed(text, what, OmegaConf.create)


def _read_overrides(overrides: Sequence[str]) -> dict:
    """The values of `key=value`, as nested dictionaries."""
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ValueError(f"{override!r} is not an override; write key=value, for example train.steps=1000.")
        if key.count(".") + key.count("[") > MAX_DEPTH:
            raise ValueError(f"the key {key[:40]!r}... has too many parts; no config is nested so deep.")
        if "${" in override:  # refused before it is parsed
            _refuse_interpolation(key)
        _parsed(value, f"the value of {key}", lambda value, key=key: OmegaConf.from_dotlist([f"{key}={value}"]))  # type: ignore[misc]
    try:
        given = OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, TypeError) as error:
        key = getattr(error, "full_key", None) or "a key"
        raise ValueError(f"{key} is given twice, as a list and as a mapping; give it once.") from error
    return OmegaConf.to_container(given, resolve=False)  # type: ignore[return-value]


def _parsed(text: str, what: str, parse: Callable[[str], Any]) -> dict:
    """What `parse` makes of a YAML text of bounded depth and size; ValueError unless it is a mapping."""
    try:
        bounded = _is_bounded(text)
        found = parse(text) if bounded else None
    except Exception as error:  # those of PyYAML, OmegaConf and int() have no common class
        raise ValueError(
            f"{what} is not YAML that a config can hold{_reason(error)}; see configs/ for examples."
        ) from error
    if not bounded:
        raise ValueError(f"{what} has more than {MAX_DEPTH} levels or {MAX_VALUES} values; it is not a config.")
    if not isinstance(found, DictConfig):
        raise ValueError(f"{what} is not a mapping of keys to values; see configs/ for examples.")
    return OmegaConf.to_container(found, resolve=False)  # type: ignore[return-value]


def _reason(error: Exception) -> str:
    """What an error of PyYAML or OmegaConf says, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f": {error.problem} (line {error.problem_mark.line + 1})"
    text = str(error).split("    full_key")[0].split()
    return f": {' '.join(text)}" if text else ""


def _is_bounded(text: str) -> bool:
    """Whether YAML is neither nested too deep nor large once its aliases are replaced; it is read as a stream."""
    sizes: dict[str, int] = {}  # values of each anchor
    open_nodes: list[list] = []  # [anchor, values so far] of every list and mapping that is not closed yet
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor, size = getattr(event, "anchor", None), 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            anchor, size = None, sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        if anchor and size:
            sizes[anchor] = size
        if open_nodes:
            open_nodes[-1][1] += size
        if len(open_nodes) > MAX_DEPTH or size > MAX_VALUES or (open_nodes and open_nodes[-1][1] > MAX_VALUES):
            return False
    return True


def _refuse_interpolation(key: str) -> None:
    # An interpolation could read the environment, and print it.
    raise ValueError(f"{key} is an interpolation (${{...}}), which is not allowed in a config; write the value.")


def _check(kind: Any, value: Any, key: str, further: str = "") -> None:
    """Raise ValueError, with the key and what was expected, if a value cannot become a `kind` (a type annotation).

    further: what a single value may be besides.
    """
    if isinstance(value, str) and "${" in value:
        _refuse_interpolation(key)
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        _check_section(get_type_hints(kind), value, key)
    elif origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return
        plain, names = _split_names([one for one in arguments if one is not type(None)])
        if not (names and isinstance(value, str) and value in names):
            _check(plain, value, key, f", or {', '.join(names)}" if names else "")
    elif origin is Literal:
        if not isinstance(value, str):
            raise ValueError(f"{key} must be one of {', '.join(arguments)}, got {_shown(value)}.")
        pick(dict.fromkeys(arguments), value, key)
    elif origin is list:
        _expect(isinstance(value, list), key, "a list, such as [a, b]", value)
        for number, item in enumerate(value):
            _check(arguments[0], item, f"{key}[{number}]")
    elif origin is dict or kind is Any:
        _check_free(Any if kind is Any else arguments[1], value, key, mapping=origin is dict)
    elif kind in _SCALARS:
        what, is_valid = _SCALARS[kind]
        _expect(value is not None and is_valid(value), key, what + further, value)


def _split_names(kinds: Sequence[Any]) -> tuple[Any, list[str]]:
    """Split the members of a union into its one type and the names that may stand for it: `bool | Literal["x"]`."""
    names = [name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    types_ = [kind for kind in kinds if get_origin(kind) is not Literal]
    if not types_:
        return kinds[0], []
    (kind,) = types_
    return kind, names


def _check_section(hints: Mapping[str, Any], value: Any, key: str) -> None:
    """Check a mapping of the fields of a dataclass."""
    _expect(isinstance(value, Mapping), key or "the config", "a mapping of keys to values", value)
    for name, item in value.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in hints:
            try:
                pick(hints, str(name), "key")
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        _check(hints[name], item, path)


def _check_free(kind: Any, value: Any, key: str, mapping: bool) -> None:
    """Check a mapping with keys of any name, or, without `mapping`, a value of any type."""
    if mapping:
        _expect(isinstance(value, Mapping), key, "a mapping, such as {name: value}", value)
    if isinstance(value, Mapping):
        for name, item in value.items():
            _expect(isinstance(name, str), key, "a mapping whose keys are names", value)
            _check(kind, item, f"{key}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check(kind, item, f"{key}[{number}]")
    elif isinstance(value, float):
        _expect(math.isfinite(value), key, "a finite number", value)


def _expect(ok: bool, key: str, what: str, value: Any) -> None:
    if not ok:
        raise ValueError(f"{key} must be {what}, got {_shown(value)}.")


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_whole(value: Any) -> bool:
    try:
        return not isinstance(value, bool | float) and abs(int(value)) < 2**63
    except (TypeError, ValueError):
        return False


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no", "on", "off", "0", "1")


# Types of single values: what a message calls them, and which values OmegaConf can convert to them.
_SCALARS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number", _is_whole),
    float: ("a finite number", _is_finite),
    bool: ("true or false", _is_bool),
    str: ("text", lambda value: isinstance(value, str | int | float) and value != "???"),
}


def to_plain(config: Any) -> dict:
    """Convert a config to plain dictionaries, lists, texts and numbers."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]
