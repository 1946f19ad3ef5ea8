"""python -m models convert | inspect: weights from one format to another, and what is in them."""

import argparse
import collections
import dataclasses
import logging
import math
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.model import Model
    from models.weights.transfer import Stored

_FROM = (
    "a directory of Winnow weights, a training run, a Hugging Face or sentence-transformers "
    "directory, a T5X checkpoint, or a name on the Hugging Face hub (owner/model[@revision])"
)


def main(arguments: list[str] | None = None) -> int:
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
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("jax", "absl", "orbax", "httpx", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if options.command == "convert":
            _convert(options)
        else:
            _inspect(options.model)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _convert(options: argparse.Namespace) -> None:
    from models import weights
    from models.model import Model
    from models.weights import huggingface, transfer, winnow

    path, kind = weights.locate(options.source)
    if kind == "run":
        step = weights.split_step(options.source)[1]
        model, params = winnow.load_run(path, step, dtype=options.dtype)
    else:
        stored = weights.look(path, kind)
        model, dtype = Model(stored.config), options.dtype or _dtypes(stored)[0]
        if stored.stacked:  # a stack would be read anew for each of its layers
            _, params = transfer.load(stored, dtype=dtype)
        else:
            params = transfer.lazily(stored, dtype)
    companions = huggingface.companions(path)
    vocabulary = options.vocabulary or _vocabulary(path, companions)
    if options.format == "winnow":
        winnow.save(options.to, model, params, vocabulary_file=vocabulary)
    else:
        huggingface.save(
            options.to, model, params, companions=companions, vocabulary_file=vocabulary
        )
    print(f"{options.to}: {options.format}, {_summary(model)}")


def _inspect(name: str) -> None:
    import rich
    import rich.table

    from models import weights
    from models.model import Model
    from models.weights import transfer, winnow

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
    rich.print(f"[bold]{path}[/bold] ({kind}): {_summary(model)}")
    for note, value in notes.items():
        rich.print(f"  {note}: {value}")

    settings = rich.table.Table("setting", "value", box=rich.box.SIMPLE, title="Configuration")
    for field, value in config.to_dict().items():
        settings.add_row(field, str(value))
    parameters = rich.table.Table(box=rich.box.SIMPLE, title="Parameters")
    parameters.add_column("parameter", overflow="fold")
    for column in ("shape", "numbers", "share"):
        parameters.add_column(column, justify="right")
    total = model.parameter_count()
    for leaf_path, leaf in transfer.flatten(model.shapes()).items():
        count = math.prod(leaf.shape)
        shape = " x ".join(map(str, leaf.shape))
        parameters.add_row(leaf_path, shape, f"{count:,}", f"{count / total:.1%}")
    rich.print(settings, parameters)


def _summary(model: "Model") -> str:
    """One line: family, depth, width, parameters."""
    config = model.config
    if config.family == "t5":
        depth = f"{config.num_encoder_layers}+{config.num_decoder_layers} layers"
    else:
        depth = f"{config.num_layers} layers"
    count = f"{model.parameter_count():,} parameters"
    return f"{config.family}, {depth}, d_model {config.d_model}, {count}"


def _dtypes(stored: "Stored") -> list[str]:
    """The types that the tensors are stored in, the one with the most numbers first."""
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in stored.tensors.values():
        sizes[str(tensor.dtype)] += math.prod(tensor.shape)
    return [name for name, _ in sizes.most_common()]


def _vocabulary(path: Any, companions: dict[str, Any]) -> Any:
    """The SentencePiece model beside the weights, whatever its format calls it."""
    from models.weights import winnow

    beside = path / winnow.VOCABULARY
    if beside.exists():
        return beside
    names = ("spiece.model", "sentencepiece.model", "tokenizer.model")
    return next((companions[name] for name in names if name in companions), None)


if __name__ == "__main__":
    sys.exit(main())
