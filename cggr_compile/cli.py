"""The command line: `explain` shows what routing does to a model, `demo` trains one with and without it.

`explain` needs a configuration only. The model is built on the meta device, so nothing is downloaded but the
configuration and no memory is taken by weights.
"""

from __future__ import annotations

import ast
import math
from contextlib import suppress
from importlib.util import find_spec
from json import loads
from pathlib import Path
from typing import Annotated, Any, NoReturn

import huggingface_hub
import torch
import transformers
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

import cggr_compile as cggr
from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize, VerificationError
from cggr_compile.torch_internals.dynamo_errors import TorchDynamoException
from cggr_compile.values import ConfigError, nearest

app = typer.Typer(
    help="Confidence-gated gradient routing as a compiler pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class UnusableModel(ValueError):
    """The argument names no language model that can be built from a configuration."""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(
            f"cggr-compile {cggr.__version__} (torch {torch.__version__}, transformers {transformers.__version__})"
        )
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions.")
    ] = False,
) -> None:
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_CONFIG", help="Hub id, folder, config.json or model type (e.g. llama)."),
    ],
    ratio: Annotated[
        float | None, typer.Option(help="Fraction kept, in (0, 1]; without, all is, or half where something selects.")
    ] = None,
    router_layers: Annotated[str, typer.Option(help="Layers of the router, or auto.")] = "auto",
    scoring: Annotated[str, typer.Option(help="loss, entropy, margin or combined.")] = "loss",
    selection: Annotated[str | None, typer.Option(help="A rule by name: topk, random, ...; trimmed without.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other of docs/options.md; repeatable.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the explained batch.")] = 8,
    sequence: Annotated[int, typer.Option(min=2, help="Tokens of each row.")] = 512,
    memory: Annotated[float | None, typer.Option(min=0, help="GiB of a card: say which batch fits.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the page with the full diff here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON here.")] = None,
) -> None:
    """Show what routing would do to a model, from its configuration alone (no weights, no memory)."""
    try:
        if memory is not None and not 0 < memory < math.inf:
            raise ConfigError(f"--memory {memory:g} is no card's; pass a finite number of GiB above 0")
        config = RoutingConfig.from_options(
            {
                "ratio": ratio,
                "router_layers": int(router_layers) if router_layers.isdecimal() else router_layers,
                "scoring": scoring,
                "selection": selection,
                **dict(map(_option, option or [])),
            }
        )
        built = build_on_meta(read_config(model))
        ids = torch.zeros(batch, sequence, dtype=torch.long, device="meta")
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        explanation = cggr.explain(built, inputs, config)
        typer.echo(str(explanation))
        if memory is not None:
            typer.echo("\npredicting the memory of several batches …", err=True)
            if find_spec("triton") is None:
                typer.echo("of torch's kernels: Triton, as CUDA has it, is missing: pip install triton", err=True)
            fitting = explanation.batch_that_fits(memory)
            typer.echo(
                f"\nfits at batch {fitting.rows}, {fitting.peak:.3g} GiB ({next(built.parameters()).dtype}, AdamW)"
            )
        if html is not None:
            html.write_text(explanation.diff().to_html(), encoding="utf-8")
        if json is not None:
            json.write_text(explanation.report().to_json(), encoding="utf-8")
    except (CannotOptimize, ConfigError, UnusableModel, VerificationError, OSError) as error:
        _fail(error)
    except TorchDynamoException as error:
        _fail(UnusableModel(f"torch.compile cannot trace {model} on the meta device: {_reason(error)}"))


@app.command()
def demo(
    text: Annotated[Path | None, typer.Option(help="UTF-8 file to train on; the packaged book without.")] = None,
    device: Annotated[str, typer.Option(help="cpu (fp32) or cuda (bf16 autocast).")] = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for diff, report, plot and results.")] = Path("demo-output"),
    seconds: Annotated[float, typer.Option(help="Seconds that each arm trains.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Windows a step.")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Bytes a window.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of order and initialisation.")] = 0,
) -> None:
    """Train one model from scratch twice, plainly and by growing depth, for equally many seconds."""
    try:
        from cggr_compile.demo.main import demo as run
    except ModuleNotFoundError as error:
        _fail(UnusableModel(f"the demo needs {error.name}: pip install 'cggr-compile[demo]'"))
    try:
        run(text, device, output, seconds, batch_size, sequence_length, seed)
    except (CannotOptimize, ConfigError, OSError) as error:
        _fail(error)


def _option(text: str) -> tuple[str, Any]:
    """The name and the value of an option, which is a literal of Python or JSON, or a string.

    Raises:
        ConfigError: it has no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--option {text} has no value; write NAME=VALUE, e.g. --option route=token")
    for read in (ast.literal_eval, loads):
        with suppress(ValueError, SyntaxError):
            return name, read(value)
    return name, value


def read_config(name: str) -> PretrainedConfig:
    """The configuration that a hub id, folder, config.json or model type names.

    Raises:
        UnusableModel: there is none, or it cannot be read.
    """
    path = Path(name)
    if not path.exists() and name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]()
    try:
        return AutoConfig.from_pretrained(path if path.exists() else name)
    except (OSError, ValueError, KeyError) as error:
        if path.exists():
            raise UnusableModel(f"{name} is not a readable model configuration: {_first_line(error)}") from error
        close = nearest(name, list(CONFIG_MAPPING.keys()))
        raise UnusableModel(
            f"{name!r} is no file, model type or reachable hub id{close}: {_first_line(error)}"
        ) from error


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The language model of a configuration, on the meta device; the auto-mappings of transformers choose its class.

    A type that has a masked-LM class is built as one unless its `architectures` or `is_decoder` say otherwise.

    Raises:
        UnusableModel: transformers has no language-model class for the configuration, or cannot build it.
    """
    masked = MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if masked is None and causal is None:
        raise UnusableModel(
            f"{type(config).__name__} has no language-model head: transformers maps it to neither a causal "
            "nor a masked language model"
        )
    named = set(config.architectures or ())
    wants_causal = getattr(config, "is_decoder", False) or (causal is not None and causal.__name__ in named)
    auto = AutoModelForCausalLM if causal is not None and (masked is None or wants_causal) else AutoModelForMaskedLM
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except (ValueError, ImportError, OSError) as error:
        raise UnusableModel(f"{type(config).__name__} cannot be built: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _reason(error: TorchDynamoException) -> str:
    """Dynamo's own explanation where it gives one, else the first line."""
    explained = [line for line in str(error).splitlines() if line.strip().startswith("Explanation: ")]
    return explained[0].strip().removeprefix("Explanation: ") if explained else _first_line(error)


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {_first_line(error)}", err=True)
    raise typer.Exit(1) from error
