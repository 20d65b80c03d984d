"""Dataclasses <-> YAML <-> command line, through jsonargparse; unknown names are answered with the nearest one."""

import argparse
import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NamedTuple, get_args

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from prior.base import PriorConfig
from tokenizer.base import TokenizerConfig
from tokenizer.registry import lookup, nearest_known, options_holder

# What a model's surroundings determine (data, codes, another model) is never typed by a user.
IMPLIED = {field.name for config in (TokenizerConfig, PriorConfig) for field in fields(config)}

# By field: (section or part, those of its types that have the field)
Owners = dict[str, tuple[str, list[str]]]


class HelpFormatter(DefaultHelpFormatter):
    """Keeps the lines of a script's docstring, with the commands in it, as they are."""

    def _fill_text(self, text, width, indent):
        return text.strip()


class Parser(ArgumentParser):
    """An `ArgumentParser` whose errors are one line and name the nearest known field or value.

    owners: who has fields, of the types that are not chosen too.
    """

    owners: Owners = {}  # noqa: RUF012 (read only)

    def error(self, message, ex=None):
        self.exit(2, f"{self.prog}: error: {explain(str(message), self.known_names(), self.owners)}\n")

    def known_names(self) -> list[str]:
        return [name.removeprefix("--") for action in self._actions for name in action.option_strings]


def explain(message: str, known: list[str], owners: Owners) -> str:
    """A parser's message on one line, with the nearest known name where the message is about an unknown one."""
    message = " ".join(message.split())
    if found := re.search(r"unrecognized arguments: (?!--)(\S+)", message):
        name, equals, _ = found[1].partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", name):
            return f"'{found[1]}' belongs to no option; a list is written '[a.png, b.png]'"
        if name in known:
            return f"'{found[1]}' belongs to no option; write --{found[1]}"
        return f"'{found[1]}' belongs to no option: they start with --; {_unknown_field(name, known, owners)}"
    if found := re.search(r"unrecognized arguments: --([\w.-]+)|Option '([\w.]+)' is not accepted", message):
        return _unknown_field(found[1] or found[2], known, owners)
    if found := re.search(
        r"(?:Group '([\w.]+)' does not accept|does not accept) (?:option|nested key) '([\w.]+)'", message
    ):
        return _unknown_field(".".join(part for part in found.groups() if part), known, owners)
    if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
        choices = re.findall(r"[\w.-]+", found[2])
        field = re.search(r"argument --([\w.]+)", message)
        return _unknown_value(found[1], f" for {field[1]}" if field else "", choices)
    union = r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: (.*)"
    if found := re.search(rf'key "([\w.]+)": (?:Expected a (.*?)\. Got value: (.*)|{union})', message):
        name, kinds, value = found[1], found[2] or found[4], found[3] or found[5]
        if literal := re.search(r"typing\.Literal\[(.*?)\]", kinds):
            choices = re.findall(r"[\w.-]+", literal[1])
            others = [kind for kind in _in_words(kinds.replace(literal[0], "name")) if kind != "name"]
            choices += ["null"] * ("null" in others)
            others = [kind for kind in others if kind != "null"]
            return _unknown_value(value, f" for {name}", choices) + "".join(f"; or give {kind}" for kind in others)
        return f"{name} must be {' or '.join(_in_words(kinds))}, got {value}"
    return message


def _unknown_value(value: str, where: str, choices: list[str]) -> str:
    if value == "False" and "no" in choices:
        return f"unknown value 'False'{where}: YAML reads a bare no as false; write \"no\" in quotes"
    if value.lower() == "none" and "null" in choices:
        return f"unknown value '{value}'{where}; write null for none"
    return f"unknown value '{value}'{where}{nearest_known(value, choices)}"


def _in_words(kinds: str) -> list[str]:
    """Types as a user may type them: "tuple[int, int], <class 'NoneType'>" -> ["[int, int]", "null"]."""
    kinds = re.sub(r"<class '(\w+)'>", r"\1", kinds)
    kinds = re.sub(r"\btuple(\[[^]]*\])", r"\1", kinds)
    kinds = re.sub(r"\blist\[([^]]*)\]", r"[\1, ...]", kinds)
    words = {
        "int": "an integer",
        "float": "a finite number",
        "bool": "true or false",
        "str": "text",
        "NoneType": "null",
    }
    return [words.get(kind, kind) for kind in re.split(r", (?![^\[]*\])", kinds)]


def _unknown_field(name: str, known: list[str], owners: Owners) -> str:
    if name not in owners:
        return f"unknown field '{name}'{_nearest_field(name, known)}"
    section, types = owners[name]
    listed = " or ".join(f"'{name}'" for name in types)
    mend = f"add --{section}.type {types[0]}" if len(types) == 1 else f"take one of them as --{section}.type"
    return f"unknown field '{name}': it is a field of {section.rpartition('.')[2]} {listed}; {mend}"


def _nearest_field(name: str, known: list[str]) -> str:
    # Compared without the section: 'learning_rate' alone should lead to 'training.learning_rate'
    section, _, field = name.rpartition(".")
    close = difflib.get_close_matches(field, {full.rpartition(".")[2] for full in known}, cutoff=0.65)
    found = [full for near in close for full in known if full.rpartition(".")[2] == near]
    found.sort(key=lambda full: full.rpartition(".")[0] != section)  # the same section first
    return f"; did you mean '{found[0]}'? --help lists every field" if found else "; --help lists every field"


class Polymorphic(NamedTuple):
    """A section whose fields depend on its "type": one model of a registry, with the parts it is made of.

    Args:
        registry: name -> model class, each with a dataclass `Config` and optionally `parts`.
        default: the type when none is given.
    """

    registry: dict[str, type]
    default: str


def parse(
    description: str,
    sections: dict[str, type | Polymorphic],
    options: type,
    argv: list[str] | None = None,
    *,
    defaults: Callable[[], dict] = dict,
) -> dict:
    """Reads YAML and command line into one plain nested dict.

    Args:
        description: the first lines of --help.
        sections: name -> dataclass or `Polymorphic`.
        options: a dataclass of fields outside any section (--output and the like).
        argv: arguments; None takes those of the process.
        defaults: gives {section: {field: value}}, a recipe in place of the dataclasses' own defaults; what it says
            of other types than those chosen is passed over. If it fails, --help does without.
    Returns:
        {option: value, section: {field: value}} with every default filled in; made of what YAML can hold.
    Exits:
        with status 2 and one line on standard error for an unknown field or value; with 0 after --help.
    """
    parser = Parser(
        description=description,
        usage="%(prog)s [--config FILE] [--FIELD VALUE ...]",
        formatter_class=HelpFormatter,
        default_env=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of any of the fields below")
    parser.add_argument("--json", type=bool, nargs="?", const=True, default=False, help="end with JSON, not a table")
    try:
        recipe = defaults()
    except (ValueError, OSError):
        if not {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
            raise
        recipe = {}
    parser.add_class_arguments(options)
    try:
        chosen = _chosen_types(argv, sections, recipe)
        for name, section in sections.items():
            if isinstance(section, Polymorphic):
                _add_model(parser, name, section, chosen)
            else:
                _add_fields(parser, name, section)
    except ValueError as error:  # a broken file, or an unknown type
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    parser.owners = _find_owners(sections, chosen)
    known = parser.known_names()
    parser.set_defaults({name: value for name, value in flatten(recipe).items() if name in known})
    argv = _without_other_types(sys.argv[1:] if argv is None else argv, chosen, set(known))
    parsed = parser.parse_args(argv).as_dict()
    del parsed["config"], parsed["json"]  # see `wants_json`
    for name, section in sections.items():
        if not isinstance(section, Polymorphic):
            _refuse_blanks(parser, name, section, parsed[name])
    for name, kind in inspect.get_annotations(options).items():
        if parsed[name] is None or isinstance(parsed[name], (list, str)):
            parsed[name] = _as_typed(parsed[name], kind, peek(name, argv))
    return plain(parsed)


def _as_typed(value, kind, typed: str | None):
    """A value as the command line has it, where text is allowed and YAML read it as something else.

    YAML takes '#1 dad' for a comment and '~' for nothing, both none, and 010 in a list for a number.
    """
    kinds = get_args(kind)
    if not isinstance(typed, str):  # not given, or by a file
        return value
    if value is None:
        return typed if str in kinds and typed.strip().lower() != "null" else None
    if isinstance(value, str):  # a list of words some of which YAML reads as numbers, which is none of words to it
        words = _read_list(typed) if list[str] in kinds else None
        return value if words is None else words
    if any(str in of for item in kinds for of in map(get_args, get_args(item))):
        words = yaml.load(typed, yaml.BaseLoader)
        return [word if isinstance(item, int) and str(item) != word else item for item, word in zip(value, words)]
    return value


def _read_list(typed: str) -> list[str] | None:
    """The words of a list as YAML has it, as they stand there; None for anything else."""
    try:
        words = yaml.load(typed, yaml.BaseLoader)
    except yaml.YAMLError:
        return None
    return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None


def _without_other_types(argv: list[str], chosen: dict[str, str], known: set[str]) -> list[str]:
    """The arguments, with files whose types the command line changes in place without what only those types have."""
    argv = list(argv)
    for i, argument in enumerate(argv):
        option, equals, path = argument.partition("=")
        if option != "--config" or not (equals or i + 1 < len(argv)):
            continue
        path = path if equals else argv[i + 1]
        if not Path(path).is_file():
            continue  # is reported by the parser proper
        values, types = flatten(read_yaml(path)), {}
        _collect_types(read_yaml(path), "", types)
        changed = [key for key, name in types.items() if chosen.get(key, name) != name]
        if changed:
            of_others = {
                name for name in values for key in changed
                if name == f"{key}.type" or (name.startswith(f"{key}.") and name not in known)
            }  # fmt: skip
            kept = json.dumps({name: value for name, value in values.items() if name not in of_others})
            argv[i if equals else i + 1] = f"{option}={kept}" if equals else kept
    return argv


def _refuse_blanks(parser: Parser, name: str, section: type, values: dict) -> None:
    """A field without a value is none in YAML, which the parser takes for "not given"."""
    for field in fields(section):
        optional = field.default is None or type(None) in get_args(field.type)
        if values[field.name] is None and not optional:
            parser.exit(
                2, f"{parser.prog}: error: {name}.{field.name} has no value; give one, or leave the field out\n"
            )


def _add_model(parser: Parser, name: str, section: Polymorphic, chosen: dict[str, str]) -> None:
    model_type = chosen.get(name, section.default)
    model = lookup(name, section.registry, model_type)
    _add_type(parser, name, section.registry, section.default, f"which {name}; its own fields are listed below")
    parts = getattr(model, "parts", {})
    _add_fields(parser, name, model.Config, skip=IMPLIED | set(parts))
    parser.groups[name].title = f"{name} = {model_type}"
    for part, registry in parts.items():
        key = f"{name}.{part}"
        defaults = next(f for f in fields(model.Config) if f.name == part).default_factory()
        part_type = chosen.get(key, defaults["type"])
        cls = lookup(part, registry, part_type)
        _add_type(parser, key, registry, defaults["type"], f"which {part}; its own fields are listed below")
        _add_fields(parser, key, options_holder(cls), skip=_implied_arguments(options_holder(cls)))
        parser.groups[key].title = f"{key} = {part_type}"
        if part_type == defaults["type"]:
            parser.set_defaults({f"{key}.{option}": value for option, value in defaults.items()})


def _add_fields(parser: Parser, name: str, holder: type, skip: set[str] = frozenset()) -> None:
    parser.add_class_arguments(holder, name, skip=set(skip))
    for action in parser._actions:
        if action.option_strings == [f"--{name}"]:  # for the parser a file, which `_check_holders` refuses
            action.metavar, action.help = "'{FIELD: VALUE, ...}'", "several of these fields at once"


def _add_type(parser: Parser, key: str, registry: dict[str, type], default: str, meaning: str) -> None:
    parser.add_argument(f"--{key}.type", choices=sorted(registry), default=default, help=meaning)


def _implied_arguments(cls: type) -> set[str]:
    """Parameters without a default, and those of any model: what the surroundings determine."""
    return {name for name, p in inspect.signature(cls).parameters.items() if p.default is p.empty or name in IMPLIED}


def _find_owners(sections: dict, chosen: dict[str, str]) -> Owners:
    owners: Owners = {}
    for field, section, type_name in _fields_of_all_types(sections, chosen):
        nearest, types = owners.setdefault(field, (section, []))
        if nearest == section and type_name not in types:
            types.append(type_name)
    return owners


def _fields_of_all_types(sections: dict, chosen: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(field, section or part, its type that has the field). Parts of the chosen model come before other models."""
    for name, section in sections.items():
        if not isinstance(section, Polymorphic):
            continue
        chosen_type = chosen.get(name, section.default)
        for model_type, model in sorted(section.registry.items(), key=lambda item: item[0] != chosen_type):
            for field in {field.name for field in fields(model.Config)} - IMPLIED:
                yield f"{name}.{field}", name, model_type
            for part, registry in getattr(model, "parts", {}).items():
                for part_type, cls in registry.items():
                    key, holder = f"{name}.{part}", options_holder(cls)
                    for option in {"type", *inspect.signature(holder).parameters} - _implied_arguments(holder):
                        yield (
                            f"{key}.{option}",
                            *((key, part_type) if model_type == chosen_type else (name, model_type)),
                        )


def peek(name: str, argv: list[str] | None = None) -> str | None:
    """The value of a field as the command line or the YAML file gives it, for defaults that depend on it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", dest="files", action="append", nargs="?", default=[])
    first.add_argument(f"--{name}", dest="value", nargs="?")  # that a value is missing is the parser proper's to say
    section, _, field = name.rpartition(".")
    if section:
        first.add_argument(f"--{section}", dest="section", nargs="?")  # --section '{field: value}'
    known, _ = first.parse_known_args(argv)
    files = [path for path in known.files if path is not None and Path(path).is_file()]
    given = {key: value for path in files for key, value in flatten(read_yaml(path)).items()}
    if known.value is not None:
        return known.value
    inline = getattr(known, "section", None) or ""
    fields_given = _yaml(inline, f"--{section}") if inline.lstrip().startswith("{") else {}
    return fields_given.get(field, given.get(name))


def has_config_file() -> bool:
    """Whether --config is given."""
    return any(argument.split("=")[0] == "--config" for argument in sys.argv[1:])


def wants_json(argv: list[str] | None = None) -> bool:
    """Whether --json is given."""
    arguments = [*(sys.argv[1:] if argv is None else argv), "--"]
    given = [argument for argument in arguments if argument.split("=")[0] == "--json"]
    if not given:
        return False
    value = given[-1].partition("=")[2] or arguments[arguments.index(given[-1]) + 1]
    return value.lower() not in ("false", "no", "0")


def _chosen_types(argv: list[str] | None, sections: dict, defaults: dict) -> dict[str, str]:
    """The types named in the defaults, the YAML file and on the command line, which decide what fields there are."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", nargs="?", default=[])
    known, rest = first.parse_known_args(argv)
    chosen: dict[str, str] = {}
    holders = _holders(sections)
    _collect_types(defaults, "", chosen)
    for path in known.config:
        if path is not None and Path(path).is_file():  # a missing file is reported by the parser proper
            values = read_yaml(path)
            _check_holders(values, holders, f"{path}: ")
            _collect_types(values, "", chosen)
    for position, argument in enumerate(rest):
        if found := re.fullmatch(r"--([\w.]+?)(\.type)?(?:=(.*))?", argument, re.DOTALL):
            value = found[3] if found[3] is not None else next(iter(rest[position + 1 :]), "")
            if found[2]:
                chosen[found[1]] = value
            elif found[1] in holders:
                given = _yaml(value, argument) if value.lstrip().startswith("{") else value  # --section '{type: name}'
                _check_holders({found[1]: given}, holders, "--")
                _collect_types(given, found[1], chosen)
    return chosen


def _holders(sections: dict) -> set[str]:
    """What holds fields: the sections, and the parts of all models that they can be of."""
    holders = set(sections)
    for name, section in sections.items():
        for model in section.registry.values() if isinstance(section, Polymorphic) else ():
            holders |= {f"{name}.{part}" for part in getattr(model, "parts", {})}
    return holders


def _check_holders(values: dict, holders: set[str], where: str) -> None:
    """The parser would pass over a section that is a number, and enter the path of a file among a part's fields."""
    for name, value in flatten(values).items():
        if name in holders and not isinstance(value, dict):
            files = "; a file of fields is for --config" if isinstance(value, str) else ""
            raise ValueError(f"{where}{name} must hold fields and their values, got {value!r}{files}")


def read_yaml(path: str | Path) -> dict:
    """The fields of a YAML file. Raises ValueError, naming the file, where it holds something else."""
    values = _yaml(Path(path).read_bytes(), path)
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ValueError(f"{path} must hold fields and their values, it holds {found}")
    return values


class _Loader(yaml.SafeLoader):
    """YAML's own, but for a field given twice, of which it would keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"'{twice}' is given twice, the first time in{node.start_mark}")
        return super().construct_mapping(node, deep)


def _yaml(text: str | bytes, where: str | Path):
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def _collect_types(values, key: str, chosen: dict[str, str]) -> None:
    if isinstance(values, dict):
        for name, value in values.items():
            if name == "type":
                chosen[key] = str(value)
            _collect_types(value, f"{key}.{name}" if key else str(name), chosen)


def plain(value):
    """`value` with only dicts, lists and scalars in it, as YAML and JSON hold them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flatten(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value  # an empty one is a value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def differences(old: dict, new: dict) -> dict[str, tuple]:
    """{dotted field: (old value, new value)} wherever two nested dicts differ."""
    old, new = flatten(old), flatten(new)
    return {
        name: (old.get(name, "(absent)"), new.get(name, "(absent)"))
        for name in sorted(old.keys() | new.keys())
        if old.get(name, MISSING) != new.get(name, MISSING)
    }
