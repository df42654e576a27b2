"""The program `glade`: one verb, one function. Reads arguments, shows help, turns errors into one readable message.

Imports nothing heavy until a verb runs, so that `glade --help` and a mistyped key answer at once. What a verb does is
in the function that `VERBS` names; what it can be told is in that verb's config.
"""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib import import_module
from itertools import groupby
from typing import Any, get_origin, get_type_hints

from glade import __version__
from glade.config import REQUIRED, Key, describe, load, parse_overrides, replace, section_class
from glade.errors import ConfigError, GladeError
from glade.explain import disk_full, explain, is_disk_full


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb of the program; `run` and `config` are written `module:name` and imported when the verb is used."""

    run: str  # the function, called with the config
    config: str  # its config class
    help: str  # one line
    positional: tuple[str, ...] = ()  # keys that arguments without -- set, in order; a list takes all that are left
    recipe: bool = False  # the argument without -- names a recipe
    # key -> `module:name` of a function of the overrides, called when the key is among them: the config that they
    # are applied to, or None
    bases: Mapping[str, str] = field(default_factory=dict)
    base: str = ""  # `module:name` of a function of the overrides that may give the config they are applied to
    output: str | None = None  # the key that says where it writes
    examples: tuple[str, ...] = ()


VERBS = {
    "prepare": Verb(
        run="glade.data.config:run_prepare",
        config="glade.data.config:PrepareConfig",
        help="turn text into token files for training",
        positional=("corpus",),
        output="out",
        examples=("glade prepare notes.txt --out=data/notes", "glade prepare shakespeare --tokenizer=bpe:4096"),
    ),
    "train": Verb(
        run="glade.train.pretrain:run",
        config="glade.train.config:TrainRun",
        help="train a model; with nothing else, a small one on the built-in corpus",
        recipe=True,
        bases={"resume": "glade.train.start:resumed", "train.init_from": "glade.train.start:initialised"},
        output="run",
        examples=(
            "glade train",
            "glade train --model.mixer=kla --train.max_minutes=4 --run=runs/kla",
            "glade train gdn_1_3b --data.corpus=books/ --data.tokenizer=mistral",
            "glade train runs/kla/config.yaml --seed=2 --run=runs/kla2",
            "glade train --run=runs/kla --resume --train.max_minutes=8",
            "glade train --train.init_from=runs/kla --data.corpus=letters.txt --train.max_steps=200",
        ),
    ),
    "sft": Verb(
        run="glade.train.sft:run",
        config="glade.train.align_config:SftRun",
        help="fine-tune a model on answers: instructions, conversations, prompts with completions",
        positional=("model", "data.file"),
        bases={"resume": "glade.train.start:resumed_sft"},
        output="run",
        examples=(
            "glade sft runs/demo answers.jsonl",
            "glade sft runs/demo chats.jsonl --lora.rank=8 --train.epochs=3 --run=runs/demo-sft",
            "glade sft --run=runs/demo-sft --resume",
        ),
    ),
    "dpo": Verb(
        run="glade.train.dpo:run",
        config="glade.train.align_config:DpoRun",
        help="train a model to prefer the better of two answers",
        positional=("model", "data.file"),
        bases={"resume": "glade.train.start:resumed_dpo"},
        output="run",
        examples=(
            "glade dpo runs/demo pairs.jsonl",
            "glade dpo runs/demo pairs.jsonl --dpo.beta=0.3 --train.epochs=2 --lora.rank=16 --run=runs/demo-dpo",
            "glade dpo runs/demo pairs.jsonl --dpo.loss=simpo",
            "glade dpo --run=runs/demo-dpo --resume",
        ),
    ),
    "generate": Verb(
        run="glade.infer.generate:run",
        config="glade.infer.config:GenerateConfig",
        help="continue a prompt",
        positional=("checkpoint", "prompt"),
        examples=(
            'glade generate runs/demo "ROMEO:" --temperature=0.7 --top_p=0.95',
            "glade generate runs/demo --prompt_file=start.txt --num=3 --seed=1 --stop='[\"\\n\\n\"]'",
        ),
    ),
    "chat": Verb(
        run="glade.infer.chat:run",
        config="glade.infer.config:ChatConfig",
        help="talk to a model in the terminal",
        positional=("checkpoint",),
        examples=("glade chat runs/demo --max_new_tokens=100",),
    ),
    "score": Verb(
        run="glade.infer.score:run",
        config="glade.infer.config:ScoreConfig",
        help="the log-probability of a text, and the most likely next tokens",
        positional=("checkpoint", "text"),
        examples=('glade score runs/demo "To be, or not to be" --top=5', "glade score runs/demo --file=a.txt --json"),
    ),
    "serve": Verb(
        run="glade.serve.server:run",
        config="glade.serve.config:ServeConfig",
        help="an OpenAI-compatible API and a web page",
        positional=("checkpoints",),
        examples=(
            "glade serve runs/demo",
            "glade serve runs/base runs/aligned --names=base,aligned --serve.port=8000",
        ),
    ),
    "prefer": Verb(
        run="glade.train.prefer:run",
        config="glade.train.prefer_config:PreferConfig",
        help="make preference pairs from a model's own samples",
        positional=("checkpoint",),
        output="out",
        examples=(
            "glade prefer runs/demo --out=pairs.jsonl",
            "glade prefer runs/demo --out=pairs.jsonl --prompts=prompts.txt --scorer=repetition --num=8",
            "glade prefer runs/small --out=pairs.jsonl --corpus=books/ --scorer=logprob --judge=runs/large",
        ),
    ),
    "compare": Verb(
        run="glade.train.compare:run",
        config="glade.train.compare:CompareConfig",
        help="several runs in one table and one plot; with prompts, what two models answer",
        positional=("runs",),
        examples=(
            "glade compare runs/gdn2 runs/kla runs/softmax",
            "glade compare runs/base runs/aligned --prompts=prompts.txt --text=heldout.txt --out=reports/dpo",
        ),
    ),
    "bench": Verb(
        run="glade.bench:run",
        config="glade.bench:BenchConfig",
        help="find the GPU kernels' block sizes for this machine",
        positional=("what",),
        examples=("glade bench tune", "glade bench tune --corners=gdn,gdn2 --dims=128x128,256x256"),
    ),
    "doctor": Verb(
        run="glade.doctor:run",
        config="glade.doctor:DoctorConfig",
        help="what runs on this machine, and how far each backend is from the reference",
        examples=("glade doctor",),
    ),
}


class UsageError(ConfigError):
    """Arguments that name no verb, or do not fit it; the exit status is 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit status.

    0: done, 1: it failed, 2: the arguments do not fit, 130: interrupted, 141: the reader of the output went away.
    """
    _let_threads_sleep()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        _command(words)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # what is still buffered has no reader either: without this, Python complains about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        print(f"glade: {explain(error)}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, UsageError) else 1


def _let_threads_sleep() -> None:
    """Have OpenMP's idle threads spin for microseconds, not for milliseconds, before they sleep.

    torch's default spins on: beside one other busy process on two cores, a small model then trains at a quarter of the
    speed (docs/log.md). It is read when torch is loaded, so it is set here; what the user has set stays.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["GOMP_SPINCOUNT"] = "1000"  # GNU OpenMP, loop turns
        os.environ["KMP_BLOCKTIME"] = "1"  # LLVM's and Intel's, ms


def _command(words: list[str]) -> None:
    if not words or (words[0] in ("help", "--help", "-h") and len(words) == 1):
        print(_overview())
        return
    if words == ["--version"]:
        print(f"glade {__version__}")
        return
    if words[0] in ("help", "--help", "-h"):
        words = [*words[1:], "--help"]
    name, *rest = words
    if name not in VERBS:
        near = get_close_matches(name, VERBS, n=1, cutoff=0.5)
        raise UsageError(
            f"unknown verb {name!r}; "
            + (f"did you mean '{near[0]}'? " if near else "")
            + "`glade help` lists the verbs"
        )
    if "--help" in rest or "-h" in rest:
        print(_verb_help(name, [word for word in rest if word not in ("--help", "-h")]))
        return
    verb = VERBS[name]
    try:
        config = read_config(verb, rest)
    except ConfigError as error:
        raise UsageError(f"{error}\n`glade {name} --help` lists every key") from error
    try:
        _resolve(verb.run)(config)
    except Exception as error:
        # a failed write does not say which file it was, but the verb says where it writes
        if is_disk_full(error) and not getattr(error, "filename", None) and verb.output:
            raise GladeError(disk_full(getattr(config, verb.output))) from error
        raise


def read_config(verb: Verb, words: Sequence[str]) -> Any:
    """The config of `verb` from its arguments: recipe or values without --, a yaml file, `--a.b=c` overrides."""
    cls = _resolve(verb.config)
    flags, files, plain = _sort(words)
    if len(files) > 1:
        raise ConfigError(f"{len(files)} config files are given ({', '.join(files)}); give one")
    base = None
    if verb.recipe and plain:
        base = _recipe(cls, plain.pop(0))
    overrides = parse_overrides(flags)
    for key, value in _positional(cls, verb.positional, plain, flags).items():
        if key in overrides:
            raise ConfigError(f"{key} is given twice, as {value!r} and as --{key}; give it once")
        overrides[key] = value
    return load(cls, files[0] if files else None, overrides, base=_base(verb, overrides) or base)


def _base(verb: Verb, overrides: Mapping[str, Any]) -> Any:
    """The config that the first of the verb's `bases` with a key among the overrides gives."""
    found = (_resolve(function)(overrides) for key, function in verb.bases.items() if key in overrides)
    return next((config for config in found if config is not None), None)


def _sort(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The settings, the yaml files and the other arguments among `words`; a lone - is an argument."""
    flags = [word for word in words if word.startswith("-") and word != "-"]
    files = [word for word in words if word not in flags and word.endswith((".yaml", ".yml"))]
    return flags, files, [word for word in words if word not in flags and word not in files]


def _positional(cls: type, keys: tuple[str, ...], words: list[str], flags: list[str]) -> dict[str, Any]:
    """The values of `keys` from the arguments without --."""
    values: dict[str, Any] = {}
    left = list(words)
    for key in keys:
        if left and get_origin(get_type_hints(cls).get(key)) in (tuple, list):
            values[key], left = left, []
        elif left:
            values[key] = left.pop(0)
    if left:
        bare = next((flag for flag in flags if "=" not in flag), None)
        hint = f"; write {bare}={left[0]}, with the =" if bare else "; settings are written --key=value"
        raise ConfigError(f"unexpected argument {left[0]!r}{hint}")
    return values


def _recipe(cls: type, name: str) -> Any:
    """The config that the recipe `name` gives: a whole `cls`, or the section of one, such as its model."""
    recipe = import_module("glade.recipes").get(name)
    if isinstance(recipe, cls):
        return recipe
    hints = get_type_hints(cls)
    section = next((f.name for f in fields(cls) if section_class(hints[f.name]) is type(recipe)), None)
    if section is None:
        raise ConfigError(f"recipe {name!r} is a {type(recipe).__name__}, which a {cls.__name__} has no place for")
    return replace(cls(), {section: recipe})


def _resolve(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(module), name)


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"glade {__version__}: from raw text to a language model whose memory does not grow",
            "",
            "usage: glade VERB [recipe or path ...] [--section.key=value ...]",
            "",
            *lines,
            "",
            "`glade VERB --help` shows what a verb can be told, with defaults. --debug adds tracebacks to errors.",
            "Start with `glade train`: it needs nothing else.",
        ]
    )


def _verb_help(name: str, words: list[str]) -> str:
    verb, cls = VERBS[name], _resolve(VERBS[name].config)
    arguments = _sort(words)[2]
    base = _recipe(cls, arguments[0]) if verb.recipe and arguments else None
    keys = list(describe(cls, base))
    needed = {key.name for key in keys if key.default is REQUIRED}
    plain = [word.upper() if word in needed else f"[{word.upper()}]" for word in verb.positional]
    plain += ["[RECIPE]"] if verb.recipe else []
    lines = [f"usage: glade {name} {' '.join([*plain, '[FILE.yaml]', '[--key=value ...]'])}", "", verb.help, ""]
    lines += ["examples:", *(f"  {example}" for example in verb.examples)]
    lines += _recipes_help() if verb.recipe else []
    # keys without a section first, whatever their place in the config
    for section in dict.fromkeys(["", *(key.section for key in keys)]):
        lines += ["", f"{section or 'keys'}:"]
        lines += [line for key in keys if key.section == section for line in _key_help(key)]
    lines += ["", "A yaml file holds the same keys, nested. A later one wins: default, recipe, file, --key=value."]
    lines += ["--key alone means true; none is None; lists are a,b or [a, b]."]
    return "\n".join(lines)


def _recipes_help() -> list[str]:
    """The recipes, those of one kind together, and what they are."""
    recipes = import_module("glade.recipes")
    lines = ["", "recipes (one that is named sets the defaults below):"]
    for summary, names in groupby(recipes.RECIPES, recipes.summary):
        lines += [f"  {' '.join(names)}", f"      {summary}"]
    return lines


def _key_help(key: Key) -> list[str]:
    """`--name=default  type`, and the meaning below it."""
    if key.default is REQUIRED:
        head = f"  --{key.name}=...  ({key.type}, needed)"
    else:
        head = f"  --{key.name}={_shown(key.default)}  ({key.type})"
    width = min(shutil.get_terminal_size().columns, 110) - 6
    return [head, *textwrap.wrap(key.help, max(width, 30), initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _shown(default: Any) -> str:
    """A default as it would be typed."""
    if default is None or isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, (list, tuple)):
        return ",".join(map(_shown, default)) or "[]"
    return str(default)
