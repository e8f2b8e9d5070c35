"""Generate the reference pages that follow from the code, and ``params.schema.json``.

    python docs/generate.py

``tests/docs/test_reference.py`` fails if a page is not what this would write.
"""

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import typer

import diffusion
from diffusion.common.errors import DarkroomError
from diffusion.evaluation.metrics import METRICS
from diffusion.presets import PresetName, preset
from flows import environment
from flows.cli import app
from flows.config import flatten_sections, params_schema

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
SCHEMA = ROOT / "params.schema.json"
WEBHOOKS = (
    "Set for `darkroom up`: where [webhooks](../how-to/notify.md) of the local MLflow may lead; by default `https` and "
    "public addresses only."
)
NOTE = "<!-- Written by docs/generate.py: change the code that it describes, and run it again. -->\n"
Schema = Mapping[str, Any]


def main() -> None:
    """Write everything."""
    for path, text in generated().items():
        path.write_text(text)
        print(path.relative_to(ROOT))


def generated() -> dict[Path, str]:
    """Return the text of each generated file."""
    schema = params_schema()
    pages = {
        "command-line": command_line(),
        "configuration": configuration(schema),
        "environment": environment_variables(),
        "metrics": metrics(),
        "python-api": python_api(),
    }
    texts = {REFERENCE / f"{name}.md": page for name, page in pages.items()}
    return texts | {SCHEMA: json.dumps(schema, indent=1, ensure_ascii=False) + "\n"}


# Configuration


def configuration(schema: Schema) -> str:
    """Return the page of ``params.yaml``."""
    lines = [
        "# Configuration",
        "",
        NOTE,
        "The settings of `params.yaml`, one table for each section. Every field may be left out. `--set "
        "SECTION.FIELD=VALUE` overrides the file: `--set training.batch_size=128`. Unknown fields, contradictions and "
        "options without effect are errors.",
        "",
        "`darkroom config show` prints every field of the effective configuration, and whether it is from the file, an "
        "option, the preset or the defaults; `darkroom config validate` checks the file.",
        "",
        "Editors complete and check the file by `params.schema.json` in the checkout; in a folder of your own, "
        "`darkroom config schema > params.schema.json` writes one. With the YAML language server (VS Code's extension "
        "*YAML*, Neovim, Helix …) this line at the head of `params.yaml` does it; `darkroom init` writes it:",
        "",
        "```yaml",
        "# yaml-language-server: $schema=params.schema.json",
        "```",
        "",
        f"`preset` (`{'`, `'.join(get_args(PresetName))}`; default `fast`) sets the defaults of the sections `model`, "
        "`training` and `sampling`: [presets](#presets).",
        "",
    ]
    for name, section in schema["properties"].items():
        if name == "preset":
            continue
        kinds = [_resolved(each, schema) for each in section.get("anyOf", [section])]
        lines += [f"## {name}", ""]
        if len(kinds) == 1:
            lines += [_prose(kinds[0]["description"]), "", *_table(kinds[0], schema, name), ""]
            continue
        tag = {"model": "family", "sampling": "sampler"}[name]
        shared = _shared(kinds) if name == "sampling" else {}
        if shared:
            lines += ["Options of all samplers:", "", *_table({"properties": shared}, schema, name), ""]
        for kind in kinds:
            own = {key: value for key, value in kind["properties"].items() if key not in shared and key != tag}
            value = kind["properties"][tag].get("const")
            lines += [f"### {tag}: {value}", "", _prose(kind["description"]), ""]
            lines += [*_table({**kind, "properties": own}, schema, name), ""] if own else []
    names = [*get_args(PresetName)]
    sections = {name: flatten_sections(preset(name)) for name in names}
    lines += ["## Presets", "", "Fields that a preset sets; *default* is that of the tables above.", ""]
    lines += _rows(["field", *names])
    fields_set = dict.fromkeys(field for fields in sections.values() for field in fields)
    for field in sorted(fields_set, key=lambda field: ["model", "training", "sampling"].index(field.split(".")[0])):
        cells = [_code(fields[field]) if field in fields else "default" for fields in sections.values()]
        lines += _rows([f"`{field}`", *cells])[:1]
    return "\n".join(lines) + "\n"


def _resolved(schema: Schema, root: Schema) -> Schema:
    """Follow a reference."""
    if "$ref" in schema:
        target: Schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
        return {**target, **{name: value for name, value in schema.items() if name not in ("$ref", "default")}}
    return schema


def _shared(kinds: list[Schema]) -> dict[str, Schema]:
    """Return the properties that are equal in most kinds, and exist in all; the others are listed with their kind."""
    first = kinds[0]["properties"]
    return {
        name: field
        for name, field in first.items()
        if sum(kind["properties"].get(name) == field for kind in kinds) > len(kinds) // 2
        and all(name in kind["properties"] for kind in kinds)
    }


def _table(section: Schema, root: Schema, path: str) -> list[str]:
    lines = _rows(["field", "value", "default", "meaning"])
    return [*lines, *(row for row in _fields(section, root, path))]


def _fields(section: Schema, root: Schema, path: str) -> Iterator[str]:
    required = section.get("required", ())
    for name, field in section["properties"].items():
        parts = [_resolved(each, root) for each in field.get("anyOf", [_resolved(field, root)])]
        default = "required" if name in required and "default" not in field else _code(field.get("default"))
        values = " or ".join(dict.fromkeys(", ".join(filter(None, (_type(part), _range(part)))) for part in parts))
        about = _prose(field.get("description", ""))
        yield _rows([f"`{path}.{name}`", values, default, about])[0]
        for part in parts:
            # What several kinds of a section share is listed once.
            kinds = [_named(_resolved(kind, root)) for kind in part.get("anyOf", [part])]
            sections = [kind for kind in kinds if kind.get("properties")]
            yield from dict.fromkeys(row for kind in sections for row in _fields(kind, root, f"{path}.{name}"))


def _named(kind: Schema) -> Schema:
    """Describe the field with the name of a kind, which has no text of its own, as the kind."""
    properties = {
        name: {"description": kind.get("description", ""), **field} if "const" in field else field
        for name, field in kind.get("properties", {}).items()
    }
    return {**kind, "properties": properties}


def _type(field: Schema) -> str:
    if "const" in field:
        return _code(field["const"])
    if "enum" in field:
        return ", ".join(map(_code, field["enum"]))
    if "anyOf" in field:
        return "section"
    if field.get("type") == "array":
        items = field.get("items") or field.get("prefixItems", [{}])[0]
        return "list of " + " or ".join(
            _type(each) if "const" in each else f"{_type(each)}s" for each in items.get("anyOf", [items])
        )
    names = {
        "integer": "integer",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "object": "section",
    }
    return "path" if field.get("format") == "path" else names.get(field.get("type", ""), field.get("type", ""))


def _range(field: Schema) -> str:
    if field.get("type") == "array":
        items = field.get("items") or field.get("prefixItems", [{}])[0]
        most = field.get("maxItems")
        count = f"{'' if field.get('minItems') == most else '≤ '}{most} values" if most else ""
        return "; ".join(filter(None, [count, _range(items)]))
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    words = [f"{sign} {field[name]:,}" for name, sign in bounds.items() if name in field]
    words += [f"a multiple of {field['multipleOf']}"] if "multipleOf" in field else []
    return ", ".join(words) + (f"matches `{_cell(field['pattern'])}`" if "pattern" in field else "")


# Command line


def command_line() -> str:
    """Return the page of all commands, from the application itself."""
    root: Any = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        NOTE,
        "Progress goes to standard error, and `-q` leaves it out. Standard output has the result, with `--json` as one "
        "JSON object. `--dataset`, `--params` and `--set` choose the [configuration](configuration.md); the "
        "[environment](environment.md) names the servers.",
        "",
        "## Exit codes",
        "",
        *_rows(["code", "meaning"]),
        *_rows(["0", "Done."])[:1],
    ]
    for error in sorted([DarkroomError, *DarkroomError.__subclasses__()], key=lambda error: error.exit_code):
        words = {1: "A fault of Darkroom, of a server or of the machine; `-v` shows where."}
        others = {3: " Also: the gate held or rejected the candidate."}
        text = words.get(error.exit_code) or _prose(inspect.getdoc(error) or "") + others.get(error.exit_code, "")
        row = _rows([str(error.exit_code), text])[0]
        if row not in lines:
            lines.append(row)
    for code, signal in (("130", "Ctrl-C"), ("143", "SIGTERM")):
        lines += _rows([code, f"Stopped by {signal}; the same command continues."])[:1]
    if options := [option for option in root.params if option.name != "help"]:
        lines += ["", "## darkroom", "", *_parameters(options)]
    for name, each in root.commands.items():
        lines += ["", f"## darkroom {name}", ""]
        if hasattr(each, "commands"):
            lines.append(_prose(each.help or ""))
            for sub, command in each.commands.items():
                lines += ["", f"### darkroom {name} {sub}", "", *_command(f"{name} {sub}", command)]
        else:
            lines += _command(name, each)
    return "\n".join(lines) + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    parameters = [each for each in command.params if not getattr(each, "hidden", False) and each.name != "help"]
    arguments = [_argument(each) for each in parameters if each.param_type_name == "argument"]
    yield from ("```", " ".join(["darkroom", name, *arguments, "[OPTIONS]"]), "```", "")
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        title, _, example = paragraph.partition(":  ")
        if example:
            yield from (f"{title}:", "", "```sh", " ".join(example.split()), "```", "")
        else:
            yield from (_prose(paragraph), "")
    yield from _parameters(parameters)


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    name += "..." if argument.nargs != 1 else ""
    return name if argument.required else f"[{name}]"


def _parameters(parameters: Iterable[Any]) -> Iterator[str]:
    yield from _rows(["option", "meaning", "default"])
    for each in parameters:
        if each.param_type_name == "argument":
            name = f"`{_cell(each.metavar or each.name.upper())}`"
        else:
            value = "" if each.is_flag else f" {each.metavar or each.opts[0].strip('-').upper()}"
            name = ", ".join(f"`{_cell(option + value)}`" for option in (*each.opts, *each.secondary_opts))
        limits = {"≥": getattr(each, "min", None), "≤": getattr(each, "max", None)}
        bounds = [f"{sign} {limit}" for sign, limit in limits.items() if limit]
        about = _prose(each.help or "") + (" Repeatable." if each.multiple else "")
        about += f" {', '.join(bounds)}." if bounds else ""
        default = (
            "required" if each.required else "" if each.default in (None, False, [], ()) else _code(str(each.default))
        )
        yield _rows([name, about, default])[0]


# Environment


def environment_variables() -> str:
    """Return the page of environment variables."""
    own = environment.Settings.model_fields
    lines = [
        "# Environment variables",
        "",
        NOTE,
        "## Darkroom's own",
        "",
        *_rows(["variable", "default", "meaning"]),
        *(
            _rows([f"`DARKROOM_{name.upper()}`", _code(str(field.default)), _prose(field.description or "")])[0]
            for name, field in own.items()
        ),
        "",
        "## Servers",
        "",
        "If one of the variables of a server is set, the commands use that server, and `darkroom up` starts none of "
        "its kind. If none is, they use the local server that `darkroom up` started. `darkroom env` prints the "
        "variables of the local servers.",
        "",
        *_rows(["server", "named by any of", "password or key"]),
    ]
    for server in environment.SERVERS:
        names = ", ".join(f"`{name}`" for name in environment.SERVER_VARIABLES[server])
        lines += _rows([environment.SERVER_TITLES[server], names, f"`{environment.SECRET_VARIABLE[server]}`"])[:1]
    lines += [
        "",
        "Prefect, MLflow and boto3 also read all their other variables, such as `MLFLOW_TRACKING_USERNAME`, "
        "`AWS_DEFAULT_REGION` and `AWS_CA_BUNDLE`.",
        "",
        "## Defaults that Darkroom sets",
        "",
        "Unless you set them yourself:",
        "",
        *_rows(["variable", "value"]),
        *(_rows([f"`{name}`", f"`{value}`"])[0] for name, value in environment.DEFAULTS.items()),
        "",
        "## Others that have an effect",
        "",
        *_rows(["variable", "meaning"]),
        *_rows(["`RAY_ADDRESS`", "Ray cluster for `ingest.runner=ray` and `sampling_batch.runner=ray`."])[:1],
        *_rows(["`MLFLOW_WEBHOOK_ALLOWED_SCHEMES`, `MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS`", WEBHOOKS])[:1],
        *_rows(["`HTTPS_PROXY`, `NO_PROXY`", "Proxy for downloads; the loopback address is never behind it."])[:1],
        *_rows(["`WORLD_SIZE`, `RANK`, `LOCAL_RANK`", "Set by `torchrun` for training in several processes."])[:1],
    ]
    return "\n".join(lines) + "\n"


# Metrics


def metrics() -> str:
    """Return the page of evaluation metrics."""
    lines = [
        "# Metrics",
        "",
        NOTE,
        "`darkroom evaluate` and the gate compute these from features of generated and of held-out images. Their names "
        "end in that of the features: `kid_efflite0`, `fd_inception`; in MLflow they begin with `eval/`, and those of "
        "`darkroom monitor` with `monitor/` ([all prefixes](mlflow.md#metrics)). Values with different features, sizes "
        "of the network's input or numbers of images are not comparable; the Fréchet distance falls as images get "
        "more, and KID is unbiased.",
        "",
        *_rows(["metric", "meaning"]),
        *(_rows([f"`{each.name}`", each.definition])[0] for kind in METRICS.values() for each in kind.figures),
        "",
        "The *real-vs-real baseline* is the same metric of training images in the place of generated ones. A model "
        "cannot be expected to be closer.",
        "",
        "Autoencoders are evaluated by reconstructions of held-out images instead: `psnr` (peak signal-to-noise ratio, "
        "dB, higher is better), `ssim` (structural similarity, 1 is best) and the Fréchet distance. Super-resolution "
        "models have these as well, beside those of bicubic and Lanczos interpolation. *Bits per dimension* of "
        "held-out images is a likelihood: lower is better; it is an upper bound for ddpm and vae, and exact for "
        "autoregressive.",
        "",
        "*Text-image agreement* says whether images show what their prompts say: the mean cosine of the embeddings of "
        "image and prompt, as CLIPScore has it (arXiv 2104.08718), by the encoder that `evaluation.text_image_encoder` "
        "names. It is measured for models of captions, and where no encoder is set, reports say so. Names end in the "
        "encoder's digest, as cosines of two encoders do not compare:",
        "",
        *_rows(["metric", "meaning"]),
        *_rows(
            ["`text_image_agreement_clip_1a2b3c4d`, `…_low`, `…_high`", "Of images and their prompts; 95 % interval."]
        )[:1],
        *_rows(["`text_image_agreement_real_…`", "Of the held-out images that the prompts are captions of."])[:1],
        *_rows(["`text_image_agreement_shuffled_…`", "Of the same images and the prompts of others: chance."])[:1],
        *_rows(["`text_image_agreement_above_chance_…`", "The first less the last, which the gate compares."])[:1],
        "",
        "| features (`evaluation.extractor`) | network |",
        "|---|---|",
        "| `efflite0` | EfficientNet-Lite0 trained on ImageNet; comes with the package, and is the default |",
        '| `inception` | Inception-v3, as in the literature\'s "FID" |',
        "| `labels` | a small classifier that is trained on the labels of the data set |",
        "| `file` | your own network in ONNX (`evaluation.extractor_weights`) |",
    ]
    return "\n".join(lines) + "\n"


# Python


def python_api() -> str:
    """Return the page of the package ``diffusion``: what its ``__all__`` names."""
    lines = ["# Python API", "", NOTE, _docstring(inspect.getdoc(diffusion) or ""), ""]
    lines += ["[Use Darkroom in Python](../how-to/use-in-python.md) is a guide to it.", ""]
    for name in filter(lambda name: not name.startswith("__"), getattr(diffusion, "__all__", ())):
        lines += _object(name, getattr(diffusion, name), 2)
    return "\n".join(lines).rstrip() + "\n"


def _object(name: str, value: Any, level: int) -> Iterator[str]:
    yield from (f"{'#' * level} `{name}`", "")
    if callable(value):
        yield from ("```python", f"{name.rpartition('.')[2]}{_signature(value)}", "```", "")
    yield from (_docstring(inspect.getdoc(value) or ""), "")
    if inspect.isclass(value):
        for member, of_class in vars(value).items():
            if not member.startswith("_") and (inspect.isfunction(of_class) or isinstance(of_class, property)):
                yield from _object(f"{name}.{member}", of_class, level + 1)


def _signature(function: Any) -> str:
    """Return parameters and result of a function, without addresses of objects and quotes around annotations."""
    signature = inspect.signature(function)
    parts: list[str] = []
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        if each.name != "self":
            parts.append(str(each))
    result = "" if inspect.isclass(function) else str(signature.replace(parameters=())).removeprefix("()")
    text = f"({', '.join(parts)})" if len(", ".join(parts)) < 80 else "(\n    " + ",\n    ".join(parts) + ",\n)"
    text = re.sub(r"<(?:function|class) '?(?:\w+\.)*(\w+)[^>]*>", r"\1", text + result)
    return re.sub(r"""((?<=: )|(?<=-> ))(["'])(.*?)\2(?=[,)\n ]|$)""", r"\3", text)


def _docstring(text: str) -> str:
    """Turn a docstring in Google's style into Markdown."""
    lines, section, code = [], "", False
    for line in [*inspect.cleandoc(text).replace("``", "`").splitlines(), ""]:
        if match := re.fullmatch(r"(Args|Returns|Raises|Yields|Attributes|Examples?):", line):
            section = match[1]
            lines += [f"**{section}**", ""]
            continue
        if line and not line.startswith(" "):
            section = ""
        line = line.removeprefix("    ") if section else line
        if (not code and line.startswith(">>> ")) or (code and not line):
            code = not code
            lines.append("```python" if code else "```")
        match = re.match(r"(\*{0,2}\w[\w.]*)(?: \([^)]*\))?: (.*)", line)
        lines.append(f"- `{match[1]}`: {match[2]}" if match and section in ("Args", "Raises", "Attributes") else line)
    return "\n".join(lines).rstrip()


# Markdown


def _rows(cells: list[str]) -> list[str]:
    """Return a row of a table, and the rule to put below it if it is the head."""
    return [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]


def _prose(text: str) -> str:
    return _cell(" ".join(text.replace("``", "`").split()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(value: Any) -> str:
    return f"`{_cell(value if isinstance(value, str) else json.dumps(value, default=str))}`"


if __name__ == "__main__":
    main()
