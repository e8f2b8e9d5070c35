"""The table of families: what follows from it, and who must not ask which family it is."""

import ast
from pathlib import Path

import pytest

from diffusion.families import family_of
from diffusion.families.config import FAMILIES, FamilyConfig
from diffusion.families.pretrained.config import PIPELINES
from diffusion.presets import complete_from_preset

ROOT = Path(__file__).parents[3] / "diffusion"


@pytest.mark.parametrize("config", [kind() for kind in FAMILIES.values()], ids=list(FAMILIES))
def test_model_class_lies_in_the_folder_of_its_configuration(config: FamilyConfig) -> None:
    assert family_of(config).__module__ == type(config).__module__.replace(".config", ".model")


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_of_families_are_valid(name: str) -> None:
    from diffusion.training.config import TrainingConfig

    sections = complete_from_preset({"model": {"family": name}}, "fast")
    TrainingConfig.model_validate(sections.get("training", {}))


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
