"""Conversion of weights from one format to another, and a view of what is in them."""

import argparse
import collections
import dataclasses
import logging
import math
import sys
from typing import TYPE_CHECKING, Any

from models import terminal

if TYPE_CHECKING:
    from models.model import Model
    from models.weights.transfer import Params, Stored

_FROM = (
    "a directory of Winnow weights, a training run, a Hugging Face or sentence-transformers "
    "directory, a T5X checkpoint, or a name on the Hugging Face hub (owner/model[@revision])"
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Return the exit status."""
    options = _parser().parse_args(arguments)
    terminal.guard()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(terminal.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("jax", "absl", "orbax", "httpx", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    read = options.source if options.command == "convert" else options.model
    terminal.say(f"reading {read} ...", error=True)  # the imports alone can take seconds
    try:
        if options.command == "convert":
            _convert(options)
        else:
            _inspect(options.model)
    except (OSError, ValueError) as error:
        terminal.say(f"error: {error}", error=True)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="write a model's weights in another format")
    convert.add_argument("--from", dest="source", required=True, metavar="MODEL", help=_FROM)
    convert.add_argument("--to", required=True, metavar="DIR", help="directory to write; new")
    convert.add_argument("--format", required=True, choices=("huggingface", "winnow"))
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the written parameters; by default the one they are stored in",
    )
    convert.add_argument("--vocabulary", metavar="FILE", help="SentencePiece model to put beside")
    inspect = commands.add_parser("inspect", help="show a model's configuration and parameters")
    inspect.add_argument("model", metavar="MODEL", help=_FROM)
    return parser


def _convert(options: argparse.Namespace) -> None:
    from models import weights
    from models.weights import huggingface, tokenizer_files, winnow

    path, kind = weights.locate(options.source)
    if kind == "run":
        step = weights.split_step(options.source)[1]
        model, params = winnow.load_run(path, step, dtype=options.dtype)
    else:
        model, params = _open(weights.look(path, kind), options.dtype)
    companions = huggingface.companions(path)
    vocabulary = options.vocabulary or tokenizer_files.find_sentencepiece(path)
    if options.format == "winnow":
        winnow.save(options.to, model, params, vocabulary_file=vocabulary)
    else:
        huggingface.save(
            options.to, model, params, companions=companions, vocabulary_file=vocabulary
        )
    terminal.say(f"{options.to}: {options.format}, {_summary(model)}")


def _open(stored: "Stored", dtype: str | None) -> tuple["Model", "Params"]:
    """Return a model and its parameters, read when they are written where the layout allows it."""
    from models.model import Model
    from models.weights import transfer

    dtype = dtype or _dtypes(stored)[0]
    if stored.stacked:  # a stack would be read anew for each of its layers
        return transfer.load(stored, dtype=dtype)
    return Model(stored.config), transfer.lazily(stored, dtype)


def _inspect(name: str) -> None:
    import rich

    from models import weights
    from models.model import Model
    from models.weights import winnow

    path, kind = weights.locate(name)
    notes: dict[str, object] = {}
    if kind == "run":
        config = winnow.read_config(path)
    else:
        stored = weights.look(path, kind)
        stored.check()
        config = stored.config
        notes = {**stored.notes, "stored as": ", ".join(_dtypes(stored))}
    model = Model(dataclasses.replace(config, scan_layers=True))
    terminal.say(f"{path} ({kind}): {_summary(model)}")
    for note, value in notes.items():
        terminal.say(f"  {note}: {value}")
    rich.print(*_tables(model))


def _tables(model: "Model") -> list[Any]:
    """Return the tables of a model's configuration and parameters."""
    import rich.box
    import rich.table
    from rich.markup import escape

    from models.weights import transfer

    settings = rich.table.Table("setting", "value", box=rich.box.SIMPLE, title="Configuration")
    for field, value in model.config.to_dict().items():
        settings.add_row(field, escape(terminal.escaped(str(value))))
    parameters = rich.table.Table(box=rich.box.SIMPLE, title="Parameters")
    parameters.add_column("parameter", overflow="fold")
    for column in ("shape", "numbers", "share"):
        parameters.add_column(column, justify="right")
    total = model.parameter_count()
    for leaf_path, leaf in transfer.flatten(model.shapes()).items():
        count = math.prod(leaf.shape)
        shape = " x ".join(map(str, leaf.shape))
        parameters.add_row(
            escape(terminal.escaped(leaf_path)), shape, f"{count:,}", f"{count / total:.1%}"
        )
    return [settings, parameters]


def _summary(model: "Model") -> str:
    """Return one line: family, depth, width, parameters."""
    config = model.config
    depth = f"{config.decoder_layers} layers"
    if config.has_encoder:
        depth = f"{config.encoder_layers}+{depth}"
    count = f"{model.parameter_count():,} parameters"
    return f"{config.family}, {depth}, d_model {config.d_model}, {count}"


def _dtypes(stored: "Stored") -> list[str]:
    """Return the types of the tensors, the one with the most numbers first."""
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in stored.tensors.values():
        sizes[str(tensor.dtype)] += math.prod(tensor.shape)
    return [name for name, _ in sizes.most_common()]


if __name__ == "__main__":
    sys.exit(main())
