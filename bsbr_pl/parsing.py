"""Command lines that answer a mistake in one sentence that says what to do."""

import contextlib
import difflib
import inspect
import itertools
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace, set_loader
from yaml import YAMLError

from .other_names import OTHER_COMMANDS, OTHER_NAMES, OTHER_VALUES
from .patches import actions_of, wrap_reading
from .plain_yaml import LONGEST, LimitError, load
from .values import did_you_mean

#: The names of types in answers.
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list like [1,2]",
    "dict": "options like {name: 1}",
}
NO_CLASS = "Expected a dot import path string: "
NO_OPTION = r"unrecognized arguments: (\S+?)(?:=|\s|$)|ption '([\w.]+\+?)'(?: is not accepted)?"
#: What Python says where jsonargparse takes a number or a list for the name of a class or for its options.
NO_SPEC = "a subclass spec|is not iterable|unhashable type|object has no attribute|Not a valid subclass of"
SPEC = "a class is given as {class_path: NAME, init_args: {option: value}}"
MOST_NAMES = 20  # of classes in an answer
LONGEST_SENTENCE = 400  # characters
PLAIN_YAML = "plain_yaml"  # a mode of jsonargparse's parsers
set_loader(PLAIN_YAML, load, (YAMLError,))


def _at_most(read: Callable[[], str], path: Any) -> str:
    """The text of a file that any option names. What is longer than a configuration is not read whole."""
    if str(path) == "-":
        return read()
    with open(path.absolute, "rb") as stream:
        content = stream.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise LimitError(f"{path} has more than {LONGEST:,} bytes, as no configuration has")
    return content.decode()


wrap_reading(_at_most)


class Parser(ArgumentParser):
    """A parser that names the mistake, its file and the most similar known name. Options cannot be abbreviated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        defaults: dict[str, Any] = {"allow_abbrev": False, "parser_mode": PLAIN_YAML}
        super().__init__(*args, **defaults | options)
        self.current_file = ""
        self.short_names: dict[str, list[str]] = {}  # option -> the names that it takes besides those of classes

    def parse_args(self, *args: Any, **options: Any) -> Any:
        try:
            config = super().parse_args(*args, **options)
        except LimitError as error:
            self.error(str(error), error)
        for name, value in _leaves("", config):
            if isinstance(value, int) and abs(value) >= 2**63:
                self.error(
                    f"{name}: a whole number of {len(str(abs(value)))} digits is beyond 64 bits, as no option is"
                )
        return config

    def parse_path(self, path: Any, *args: Any, **options: Any) -> Any:
        self.current_file = str(path)
        try:
            return super().parse_path(path, *args, **options)
        except LimitError as error:
            raise LimitError(f"{path}: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error}") from error
        finally:
            self.current_file = ""

    def parse_string(self, *args: Any, **options: Any) -> Any:
        config = super().parse_string(*args, **options)
        for section in {name.split(".")[0] for name in actions_of(self) if "." in name}:
            if section in config and not isinstance(config[section], Namespace):
                self.error(f"{section}: must hold options or be left out, got {config[section]}")
        return config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser within a parser
            super().error(message, ex)
        parser: Parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        where = f"{self.current_file}: " if self.current_file else ""
        answer = message if isinstance(ex, LimitError) else sentence(message) + suggestion(message, parser)
        name = command.removeprefix("python -m ").split()[0]
        self.exit(2, f"{name}: error: {where}{answer}\n`{command} --help` shows every option\n")


def open_streams() -> None:
    """Connect closed standard streams to nowhere: libraries write to them, and no other file may get their numbers.

    Characters that an open one cannot show are replaced.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if number and hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError):  # a closed pipe
                stream.reconfigure(errors="replace")
        if stream is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


@contextlib.contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Warnings without the file and the line of code that they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def trusted_packages(args: Sequence[str]) -> list[str]:
    """The packages that a command line trusts, by `--trust=PACKAGE`: repeated, or several with commas."""
    given = [value for name, value in itertools.pairwise(args) if name == "--trust"]
    given += [arg.removeprefix("--trust=") for arg in args if arg.startswith("--trust=")]
    return [name for name in ",".join(given).split(",") if name]


def sentence(message: str) -> str:
    """An error's message on one line of at most `LONGEST_SENTENCE` characters, without the middle of a longer one.

    jsonargparse reports every type that it tried; only the one that matters is kept.
    """
    line = " ".join(_cause(message).split()).rstrip(".")
    if len(line) <= LONGEST_SENTENCE:
        return line
    return f"{line[: LONGEST_SENTENCE // 2]} ... {line[-LONGEST_SENTENCE // 2 :]}"


def out_of_memory(error: BaseException) -> str | None:
    """A sentence for an allocator's error; None for any other one."""
    message = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not re.search(
        r"alloc\w* memory|out of memory|not enough memory", message
    ):
        return None
    asked = f" ({found[0]})" if (found := re.search(r"[\d.,]+ ?(bytes|[KMGTPE]i?B)", message)) else ""
    return f"there is not enough memory{asked}: lower batch_size, context_length, hidden_dim or num_layers"


def unknown_metric(error: BaseException) -> str | None:
    """A sentence for a callback that waits for a metric which is not measured; None for any other error."""
    found = re.match(r"Early stopping conditioned on metric `(.*?)` which .*?: (.*)", str(error))
    return f"monitor={found[1]}: no such metric, there are {found[2]}" if found else None


def _cause(message: str) -> str:
    if yaml := re.match(r"Problems parsing config: (.*)", message, re.DOTALL):
        return _yaml_problem(yaml[1])
    if message.startswith("Unexpected config: "):
        return "a configuration must hold sections, `trainer:`, `model:` or `data:`, with options in them"
    if seed := re.match(r"(\S+) is not in bounds, numpy accepts from (\d+) to (\d+)", message):
        return f"seed_everything={seed[1]}: must be a whole number from {seed[2]} to {seed[3]}"
    if linked := re.match(r'Linked "(.*)" must be given via "(.*)"', message):
        return f"{linked[1]} follows from {linked[2]}: leave it out"
    if required := re.match(r"the following arguments are required: (?:\w+\.)?(\S+)", message):
        how = f": --{required[1]}=..., or a --config that sets it" if "." in required[1] else ""
        return f"{required[1]} must be given{how}"
    if file := re.search(r"(?:Importing '|Unexpected import path format: )(\S+\.ya?ml)\b", message):
        return f"{file[1]} is a file and no class: use --config={file[1]}"
    if denied := re.search(r"Importing '((\w+)\S*)' is not allowed, denied", message):
        return f"{denied[1]} is of a package that is not trusted: add --trust={denied[2]} to allow it"
    key, body = re.match(r'(?:Parser key "(.*?)":)?(.*)', message, re.DOTALL).groups()  # type: ignore[union-attr]
    if option := re.search(NO_OPTION, body):
        return f"there is no option {key + '.' if key else ''}{option[1] or option[2]}"
    return _value_problem(key, body)


def _yaml_problem(report: str) -> str:
    mark = r'\s*in "<unicode string>", (line \d+, column \d+|position \d+)'
    *_, position = re.findall(mark, report) or [""]
    *_, problem = re.sub(mark, "", report).strip().split("\n")
    return f"no valid YAML at {position}: {problem} (indent with spaces, alike within a section)"


def _value_problem(key: str | None, body: str) -> str:
    if inner := re.search(r'Parser key "(.*?)":\s*(.*?)(?:\s*Got value: Namespace.*|\n    - .*)?$', body, re.DOTALL):
        return _value_problem(f"{key}.{inner[1]}", inner[2].rstrip(".\n "))
    tried = re.findall(r"- (.*?)(?=\n\s*- |\n\s*Given value|$)", body, re.DOTALL) if "- " in body else [body.strip()]
    tried = [reason for reason in tried if not reason.startswith(("Does not validate", "Expected a path"))]
    if others := [reason for reason in tried if not reason.startswith("Expected a ")]:
        reason = re.sub(r"Type \S.* expects a function or a callable class: ", "", others[0])
        reason = SPEC if re.search(NO_SPEC, reason) else reason
        return f"{key}: {reason}" if key else reason
    if unknown := [reason.removeprefix(NO_CLASS) for reason in tried if reason.startswith(NO_CLASS)]:
        return f"{key}: no class is called {unknown[0]!r}"
    value = re.findall(r"(?:Given value|Got value): (.*)", body)
    types = list(dict.fromkeys(itertools.chain(*map(_type_names, tried))))
    if not (value and types):
        return body
    if TYPES["list"] in types and re.fullmatch(r"[\d.,-]+|[A-Za-z_.,]+", value[-1]):
        meant = f": did you mean [{value[-1]}]?"
    else:
        choices = [name for name in types if name not in TYPES.values()]
        other = [name for name in OTHER_VALUES.get(value[-1].lower(), ()) if name in choices]
        meant = did_you_mean(other[0] if other else value[-1], choices, 0.8)
    *others, last = types
    listed = f"{', '.join(others)} or {last}" if others else last
    return f"{key}={value[-1]}: must be {listed}{meant}"


def _type_names(reason: str) -> list[str]:
    """The expected type, or choices, in words; none for containers, whose items are named as well."""
    if choice := re.match(r"Expected a typing\.Literal\[(.*)\]", reason):
        return choice[1].replace("'", "").split(", ")
    found = re.match(r"Expected a <class '(.*?)'>", reason)
    return [TYPES[found[1]]] if found and found[1] in TYPES else []


def suggestion(message: str, parser: Parser) -> str:
    """The known name that a misspelt one resembles, to add to the sentence."""
    key = found[1] if (found := re.match('Parser key "(.*?)"', message)) else ""
    if file := re.search(r"File does not exist: '(.*)'", message):
        return did_you_mean(Path(file[1]).stem, {path.stem: str(path) for path in _files_like(Path(file[1]))})
    if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
        if choice[1].endswith((".yaml", ".yml")):
            return f": did you mean fit --config={choice[1]}?"
        return did_you_mean(OTHER_COMMANDS.get(choice[1], choice[1]), re.findall("'(.*?)'", choice[2]))
    if option := re.search(NO_OPTION, message):
        return _option_like(".".join(filter(None, (key, (option[1] or option[2]).lstrip("-")))), parser)
    if missing := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return did_you_mean(missing[2], dir(sys.modules.get(missing[1])))
    if "no class is called" in sentence(message):
        name = message.split(NO_CLASS, 1)[1].split()[0]
        short, classes = parser.short_names.get(key, []), list(map(_leaf, _classes(actions_of(parser).get(key))))
        names = short or classes
        known_names = f": use one of {', '.join(names)}" if 0 < len(names) <= MOST_NAMES else ""
        return did_you_mean(name, short) or did_you_mean(name, classes) or known_names
    return ""


def _option_like(asked: str, parser: Parser) -> str:
    """What to write in the place of an option that there is not."""
    known = {name: of for name, of in _options(parser) if not of or _may_mean(asked, name)}
    if known.get(asked):
        return f" here, but of {known[asked]}"
    if asked.endswith((".yaml", ".yml")):
        return f": did you mean --config={asked}?"
    if asked.startswith("model.") and not any(name.startswith("model.") for name in known):
        return ": the command comes first, as in `fit --config=FILE`"
    typed = _leaf(asked).replace("-", "_").lower()
    leaf, leaves = OTHER_NAMES.get(typed, typed), {_leaf(name) for name in known}
    near = [leaf] if leaf in leaves else difflib.get_close_matches(leaf, leaves, 1, 0.75)
    options = {name: f"--{name}" for name in known if _leaf(name) in near}
    return did_you_mean(asked, options, 0)


def _may_mean(asked: str, option: str) -> bool:
    """Whether an option of a class may be meant: those of callbacks, loggers and the like only within `trainer`."""
    return asked.startswith("trainer.") or not option.startswith("trainer.")


def _files_like(path: Path) -> list[Path]:
    """The files beside a missing one, with their shorter path, and the configurations of this folder."""
    found = [one for one in path.parent.glob("*") if one.is_file()]
    beside = [min(one, Path(os.path.relpath(one)), key=lambda path: len(str(path))) for one in found]
    return [*beside, *Path("configs").rglob("*.yaml")]


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The single values of a parsed configuration, with the names of their options."""
    if isinstance(value, Namespace | dict):
        for key, part in vars(value).items() if isinstance(value, Namespace) else value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(name, part)
    else:
        yield name, value


def _options(parser: ArgumentParser) -> Iterator[tuple[str, str]]:
    """Every option without dashes; those of the classes that an option may name come with the name of the class."""
    for action in actions_of(parser).values():
        for path in _classes(action):
            with contextlib.suppress(ImportError, AttributeError, ValueError):  # a class that is not there any more
                for option in inspect.signature(pkgutil.resolve_name(path)).parameters:
                    yield f"{action.dest}.{option}", _leaf(path)
        yield from ((name[2:], "") for name in action.option_strings if name.startswith("--"))


def _classes(action: Any) -> list[str]:
    """The import paths of the classes that an option may name."""
    _, known, paths = (action.extra_help() if hasattr(action, "extra_help") else "").partition("known subclasses: ")
    return paths.split(", ") if known else []
