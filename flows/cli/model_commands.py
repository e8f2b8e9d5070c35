"""``darkroom model``: import, history, rollback, model card, explanation and export of models."""

from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from diffusion.common.errors import UserError
from diffusion.common.files import is_model_file, require_writable
from flows.cli.arguments import (
    check_existing,
    check_export,
    check_model,
    check_output,
)
from flows.cli.command import (
    VERBOSITY,
    Certificates,
    CommandOutput,
    Model,
    ModelUri,
    Reason,
    Seed,
    SigningKeyFile,
    command,
    connect,
    display_progress,
)

if TYPE_CHECKING:
    from mlflow.client import MlflowClient

    from flows.config import Params
    from flows.provenance.export_model import ModelExport
    from flows.registry.champion import ChampionChange
    from flows.registry.ledger import History, Ledger
    from flows.signing.keys import SigningKey

MAX_REASON = 80  # characters of a reason in the table of a history, unless -v is given
app = typer.Typer(
    name="model",
    help="Models: import, history, rollback, card, explanation, export.",
    no_args_is_help=True,
)
Exported = Annotated[
    Literal["diffusers", "adapter"],
    Option(help="A pipeline of diffusers; or adapter, that of a fine-tuned one for other tools."),
]
AdapterFormat = Annotated[
    Literal["diffusers", "kohya", "peft"] | None,
    Option("--format", help="Names in --to adapter: diffusers', kohya's (ComfyUI, Forge), or peft's, by its kind."),
]
Title = Annotated[str | None, Option(help="Title of --to adapter in its metadata; default: the folder's name.")]
Trigger = Annotated[str | None, Option(help="Trigger word of --to adapter, which its metadata names.")]
ExportFolder = Annotated[
    Path, Option("--out", metavar="FOLDER", help="Output folder, which must not exist yet.", callback=check_export)
]
PushUri = Annotated[
    str | None,
    Option(metavar="hf://OWNER/NAME", help="Push it to the Hugging Face Hub, too, with a model card; needs HF_TOKEN."),
]
Public = Annotated[bool, Option("--public", help="Make a new repository of --push public; default: private.")]
SamplePrompts = Annotated[list[str], Option(help="Prompt of the sample images of --push; several are used in turn.")]
WeightsLicence = Annotated[
    str | None, Option(help="Licence of the weights; default: in the card of --push, that of the data set.")
]
registry_command = command(app, dataset_argument=True, servers=("mlflow", "s3"))


@command(app, "import", dataset=False)
def import_(
    config: "Params",
    source: Annotated[
        str, Argument(help="Folder that diffusers' save_pretrained wrote, hf://OWNER/NAME@REVISION, or a .safetensors.")
    ],
    name: Annotated[str | None, Option("--name", help="Registered model that gets the version.")] = None,
    licence: Annotated[str | None, Option("--licence", help="Licence, where its card names none.")] = None,
    output: Annotated[
        Path | None, Option("--out", metavar="FILE", help="Write the model file alone, without a server.")
    ] = None,
    base: Annotated[
        str | None,
        Option(metavar="URI|FILE", help="Imported pipeline that a LoRA belongs to.", callback=check_model),
    ] = None,
    pipeline_config: Annotated[
        Path | None,
        Option(
            "--config",
            metavar="FOLDER",
            help="Pipeline of diffusers whose configuration a single-file checkpoint has.",
            callback=check_existing,
        ),
    ] = None,
) -> CommandOutput:
    """Register a model that was not trained here; `evaluate --model` and `promote --model` take it from there.

    The same command finds the same version. It records source, revision, licence and the digests of all files. Nothing
    is unpickled, and no code of the source is run.

    Example:  darkroom model import hf://OWNER/NAME@REVISION --name painter

    Example:  darkroom model import elsewhere/final.safetensors --name faces --licence CC-BY-4.0

    Example:  darkroom model import zwx.safetensors --base models:/painter/1 --name zwx --licence openrail

    Example:  darkroom model import sd.safetensors --config pipelines/sd --name painter --licence openrail
    """
    if (name is None) == (output is None):
        raise UserError("give --name NAME, for a version of a registered model, or --out FILE.safetensors")
    if not source.startswith("hf://") and not Path(source).exists():
        raise UserError(
            f"nothing at {source}: give a folder of save_pretrained, hf://OWNER/NAME@REVISION, or a model file"
        )
    if output is not None:
        return _import_to_file(source, output, licence, base, pipeline_config)
    _require_model_name(name)
    with connect("mlflow", "s3"):
        from flows.registry.import_model import find_parts, import_model

        parts = find_parts(base, pipeline_config)
        result = import_model(source, str(name), licence, config.sampling, parts)
    summary = f"{result.version.uri}: {result.family}, from {result.source}, licence {result.origin.licence}"
    return CommandOutput(
        result, [summary, f"evaluate it: darkroom evaluate --model {result.version.uri} --dataset NAME"]
    )


def _import_to_file(
    source: str, output: Path, licence: str | None, base: str | None, pipeline_config: Path | None
) -> CommandOutput:
    if base is not None and not is_model_file(base):
        raise UserError(f"--out writes a file without a server, and --base {base} is registered: give its .safetensors")
    if not is_model_file(str(output)):
        raise UserError(f"--out {output} does not name a model file: let it end in .safetensors")
    require_writable(output.parent, f"--out {output}")
    import shutil

    from diffusion.diffusers_format.import_model import ImportParts, import_file

    parts = ImportParts(base=Path(base) if base else None, pipeline_config=pipeline_config)
    downloads = output.with_name(f".{output.name}.downloads")
    with display_progress() as progress:
        file = import_file(source, output, licence, downloads, progress, parts)
    shutil.rmtree(downloads, ignore_errors=True)
    return CommandOutput(file, [f"{output}: {file.family}, from {file.source}, licence {file.origin.licence}"])


def _require_model_name(name: str | None) -> None:
    from flows.config import RegistryConfig

    try:
        RegistryConfig(model=name)
    except ValueError as error:
        raise UserError(f"--name {name}: use letters, digits, dots, hyphens and underscores") from error


@registry_command
def history(
    config: "Params",
    restore: Annotated[bool, Option("--restore", help="First restore missing entries from MLflow's copies.")] = False,
    sign: Annotated[bool, Option("--sign", help="Sign the newest entry, and so all before it.")] = False,
    key: SigningKeyFile = None,
) -> CommandOutput:
    """Show the ledger of champions with dates, authors and reasons; verify its hash chain and repair aliases.

    Example:  darkroom model history --dataset faces
    """
    if key is not None and not sign:
        raise UserError("--key is the key to sign with: give --sign, too, or leave it out")
    from flows.checks.models import require_model

    require_model(config)
    from mlflow.client import MlflowClient

    from flows.registry.aliases import project
    from flows.registry.aliases import restore as restore_ledger
    from flows.registry.champion import champion_problem
    from flows.registry.ledger import Ledger

    client, ledger = MlflowClient(), Ledger.of(config.model_name)
    restored_entries = restore_ledger(client, ledger) if restore else []
    if sign:
        _sign_ledger(client, ledger, key)
    current = project(client, ledger)
    problem = champion_problem(client, current)
    value = {"restored": restored_entries, "problem": problem, **_history_fields(current)}
    return CommandOutput(value, [*_table(current), *filter(None, [problem])])


def _sign_ledger(client: "MlflowClient", ledger: "Ledger", key: Path | None) -> None:
    from flows.registry.aliases import read_verified_history
    from flows.signing.keys import SigningKey

    head = read_verified_history(client, ledger).head
    if head is None:
        raise UserError(f"the ledger of {ledger.model} is empty: leave --sign out")
    ledger.sign(head, SigningKey.load(key))


def _history_fields(history: "History") -> dict[str, Any]:
    entries = history.entries
    return {
        "model": history.model,
        **history.alias_numbers.model_dump(),
        "verified": len(entries),
        "foreign": [{"name": name, "reason": reason} for name, reason in history.foreign.items()],
        "entries": [entry.model_dump(mode="json") | {"why": entry.why, "sha256": entry.digest} for entry in entries],
    }


@registry_command
def rollback(config: "Params", reason: Reason = None) -> CommandOutput:
    """Make the previous champion champion again; repeat to go back further. Needs no Prefect server.

    The gate never promotes a rolled-back version again; `darkroom promote --to` does.

    Example:  darkroom model rollback --dataset faces --reason "three eyes"
    """
    from flows.checks.models import require_model

    require_model(config)
    from flows.registry.champion import roll_back

    return describe_champion_change(roll_back(config.model_name, reason))


@registry_command
def card(
    config: "Params",
    model: ModelUri = None,
) -> CommandOutput:
    """Print the model card of a registered version, in Markdown.

    Example:  darkroom model card --model models:/faces@champion
    """
    from flows.checks.models import require_version

    require_version(model or config.champion)
    from mlflow.client import MlflowClient

    from flows.registry.model_versions import resolve

    client = MlflowClient()
    version = resolve(client, model or config.champion)
    text = client.get_model_version(version.model, str(version.number)).description or ""
    return CommandOutput({"model": version.uri, "card": text}, text.splitlines())


@command(app, servers=("prefect", "mlflow", "s3"))
def explain(
    config: "Params",
    model: ModelUri = None,
    output: Annotated[
        Path | None, Option("--out", help="Output folder; default: reports/DATASET/explain.", callback=check_output)
    ] = None,
    seed: Seed = 0,
) -> CommandOutput:
    """Plot the forward process, one training step and the reverse process of a registered model.

    Example:  darkroom model explain --model models:/faces@champion --dataset faces
    """
    from flows.checks.models import require_version

    require_version(model or config.champion)
    from flows.explain import explain

    result = explain(config, model or config.champion, output or config.report_folder / "explain", seed)
    return CommandOutput(result, map(str, result.files))


@command(app)
def export(
    config: "Params",
    to: Exported,
    folder: ExportFolder,
    model: Model = None,
    file_format: AdapterFormat = None,
    title: Title = None,
    trigger: Trigger = None,
    push: PushUri = None,
    public: Public = False,
    licence: WeightsLicence = None,
    prompt: SamplePrompts = [],  # noqa: B006
    sign: Annotated[bool, Option("--sign", help="Sign the folder; the signature lies beside it.")] = False,
    key: SigningKeyFile = None,
    certificates: Certificates = None,
) -> CommandOutput:
    """Export a model as a diffusers pipeline folder, with the sampler settings of sampling.*, and push it to the Hub.

    Example:  darkroom model export --to diffusers --model models:/faces@champion --out exports/faces

    Example:  darkroom model export --to diffusers --model runs/faces/final.safetensors --out exports/faces

    Example:  darkroom model export --to adapter --format kohya --model models:/faces@champion --out exports/faces-lora

    Example:  darkroom model export --to diffusers --out exports/faces --push hf://me/faces

    Example:  darkroom model export --to diffusers --out exports/faces --sign --key signing.key
    """
    if push is None and (public or prompt):
        raise UserError("--public and --prompt are of --push: give that as well, or leave them out")
    if not sign and (key or certificates):
        raise UserError("--key and --certificates are of --sign: give that as well, or leave them out")
    if to != "adapter" and (file_format or title or trigger):
        raise UserError("--format, --title and --trigger are of --to adapter: use it, or leave them out")
    _require_pushable(push, to)
    signer = _signing_key(key, certificates) if sign else None
    with nullcontext() if is_model_file(model) else connect("mlflow", "s3"):
        from diffusion.diffusers_format.adapter import AdapterDetails
        from flows.provenance.export_model import ExportedModel, Push, export_model

        pushed = Push(uri=push, prompts=tuple(prompt), public=public) if push else None
        if is_model_file(model):
            exported = ExportedModel(Path(model))
        else:
            from flows.checks.models import require_version

            require_version(model or config.champion)
            exported = ExportedModel.registered(model or config.champion)
        details = AdapterDetails(title=title, trigger=trigger)
        return _describe_export(
            export_model(config, exported, to, folder, licence, signer, pushed, file_format, details), to
        )


def _require_pushable(push: str | None, to: str) -> None:
    if push is not None:
        from diffusion.common.hub_push import check_push

        check_push(push)
        if to == "adapter":
            raise UserError("--push is of whole pipelines: use --to diffusers, or leave it out")


def _signing_key(key: Path | None, certificates: Path | None) -> "SigningKey":
    import_module("model_signing")
    from flows.signing.keys import SigningKey

    return SigningKey.load(key, certificates)


def _describe_export(result: "ModelExport", to: str) -> CommandOutput:
    export, upload = result.export, result.pushed
    value = export.model_dump(mode="json") | {"to": to}
    lines = [f"{export.folder}: {export.pipeline}, {len(export.files)} files"]
    if result.signature is not None:
        value["signature"] = str(result.signature)
        lines.append(f"signature: {result.signature}")
    lines.append(result.usage)
    if upload is not None:
        value["pushed"] = upload.model_dump(mode="json")
        outcome = "pushed to" if upload.created else "the same already lies in"
        lines.append(f"{outcome} {upload.repository} ({upload.files} files), commit {upload.commit}")
    return CommandOutput(value, lines)


def describe_champion_change(change: "ChampionChange") -> CommandOutput:
    """Output of a command that changed the champion."""
    note = ", which was done already" if change.already else ""
    return CommandOutput(change, [f"{change.version.uri} is champion{note}: {change.entry}"])


def _table(ledger: "History") -> Iterator[str]:
    from flows.tracking.console import align_columns

    for name, reason in ledger.foreign.items():
        yield f"foreign object among the entries, ignored (docs/operations/runbook/ledger-broken.md): {name!a} {reason}"
    if ledger.head is None:
        yield f"the ledger of {ledger.model} is empty: the first verdict of `darkroom promote` starts it"
        return
    reasons = [" ".join(entry.why.split()) for entry in ledger.entries]
    longest = max(map(len, reasons))
    length = longest if VERBOSITY.get() == "verbose" else MAX_REASON
    rows = [
        (
            str(entry.number),
            f"{entry.when:%Y-%m-%d %H:%M}",
            entry.who,
            entry.what,
            f"{entry.from_version or '–'} → {entry.to_version}" if entry.changes_champion else f"({entry.version})",
            reason if len(reason) <= length else f"{reason[:length]}…",
        )
        for entry, reason in zip(ledger.entries, reasons, strict=True)
    ]
    yield from align_columns(rows)
    yield ", ".join(f"{title} {number or 'none'}" for title, number in ledger.alias_numbers.model_dump().items())
    count = "1 entry" if len(ledger.entries) == 1 else f"{len(ledger.entries)} entries"
    yield f"{count}, each verified against the one before; the last is sha256 {ledger.head.digest}"
    if longest > length:
        yield "`darkroom model history -v` shows the reasons whole"
