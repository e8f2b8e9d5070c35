"""The table of families: what follows from it, and who must not ask which family it is."""

import ast
from pathlib import Path

import pytest

from diffusion.families import family_of
from diffusion.families.config import (
    FAMILIES,
    FamilyConfig,
    ModelConfig,
    effective_sampling,
    sampling_conflict,
    training_conflict,
)
from diffusion.families.pretrained.config import PIPELINES
from diffusion.presets import complete_from_preset
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.identity import identity_fields

ROOT = Path(__file__).parents[3] / "diffusion"


@pytest.mark.parametrize("config", [kind() for kind in FAMILIES.values()], ids=list(FAMILIES))
def test_model_class_lies_in_the_folder_of_its_configuration(config: FamilyConfig) -> None:
    assert family_of(config).__module__ == type(config).__module__.replace(".config", ".model")


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_of_families_are_valid(name: str) -> None:
    sections = complete_from_preset({"model": {"family": name}}, "fast")
    TrainingConfig.model_validate(sections.get("training", {}))


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        *((family, {"weighting": "plain"}) for family in ("vae", "gan", "autoregressive")),
        ("vae", {"learned_uncertainty": True}),
        ("vae", {"gradient_checkpointing": True}),
        ("vae", {"condition_dropout": 0.2}),
        ("gan", {"keep_best": 2}),
        ("gan", {"gradient_checkpointing": True}),
        ("gan", {"init_from": "runs/digits/final.safetensors"}),
        ("autoregressive", {"timestep_sampling": "uniform"}),
        *(("diffusers", setting) for setting in ({"optimizer": "adamw"}, {"guide": None})),
    ],
)
def test_training_settings_without_effect_are_named(family: str, setting: dict[str, object]) -> None:
    words = f"training.{next(iter(setting))} means nothing to model.family = {family}: leave it out"
    config = TrainingConfig.model_validate(setting)
    assert training_conflict(FAMILIES[family](), config) == words
    assert training_conflict(ModelConfig(), config) is None
    assert next(iter(setting)) not in identity_fields(config, FAMILIES[family]())


@pytest.mark.parametrize("family", ["vae", "gan", "autoregressive"])
@pytest.mark.parametrize("setting", [{"steps": 20}, {"sampler": "heun"}, {"guidance": 3.0}, {"autoguidance": 2.0}])
def test_sampling_settings_without_effect_are_named(family: str, setting: dict[str, object]) -> None:
    model, sampling = FAMILIES[family](), sampling_config(compute_batch=8, **setting)
    words = f"sampling.{next(iter(setting))} means nothing to model.family = {family}: leave it out"
    assert sampling_conflict(model, sampling) == words
    assert effective_sampling(model, sampling) == sampling_config(compute_batch=8)
    assert effective_sampling(ModelConfig(), sampling) == sampling


def test_training_asks_for_no_family() -> None:
    kinds = {kind.__name__ for kind in FAMILIES.values()} | {family_of(kind()).__name__ for kind in FAMILIES.values()}
    kinds |= {"DiffusionModel", "UNet", "PipelineNetwork"}
    for path in (ROOT / "training").glob("*.py"):
        used = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not used & (kinds), path
        assert not [name for name in FAMILIES if f'"{name}"' in path.read_text()], path


def test_pipelines_are_named_in_their_own_files_alone() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        named = [name for name in PIPELINES if f'"{name}"' in text]
        assert not named or path.parts[-2:] == ("diffusers_format", "export.py"), (path, named)
