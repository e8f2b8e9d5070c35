"""Configuration of curation: rules by which images are dropped; without any nothing is measured or dropped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, SerializeAsAny, ValidationError, WithJsonSchema, field_validator, model_validator

from diffusion.common.config import Config, is_unset
from diffusion.curation.rules import RULES, Bound, Rule, all_rules

Verdict = Literal["largest", "one_per_class", "report"]
"""What becomes of a group of near-duplicates: the largest original stays, or the largest of each class, or all."""


MIN_RECALL = 0.95
"""Share of copies of each kind that semantic near-duplicates should find; below, a warning says so."""


class SemanticCalibration(Config):
    """The distance of semantic near-duplicates, and what it finds in this data set."""

    distance: float
    """Largest distance of near-duplicates, given or calibrated: see ``CurationConfig.semantic_distance``."""
    recall: dict[str, float]
    """Share found of copies of the data set's own images, by the kind of change, in [0, 1]."""
    mistaken: float | None
    """Estimated share of distinct images that have another one as near, in [0, 1]; None: too few images."""

    @property
    def line(self) -> str:
        """Describe the distance and what it finds."""
        found = ", ".join(f"{share:.0%} {kind}" for kind, share in self.recall.items())
        mistaken = "" if self.mistaken is None else f", and about {self.mistaken:.1%} of distinct images"
        return f"distance {self.distance:.4g} finds of copies {found}{mistaken}"

    @property
    def warning(self) -> str | None:
        """Describe which copies the distance misses; None: it finds MIN_RECALL of each kind."""
        missed = ", ".join(f"{1 - share:.0%} {kind}" for kind, share in self.recall.items() if share < MIN_RECALL)
        if not missed:
            return None
        return (
            f"curation.semantic_duplicates misses of copies {missed} (distance {self.distance:.4g}): a larger "
            "curation.semantic_distance finds more, and takes more distinct images for near-duplicates"
        )


class NsfwModel(Config):
    """A classifier in an ONNX file, and the input that it takes: no code comes from the file."""

    path: Path
    """Path of the file, all in one, at most 1 GB. It takes one tensor of float32 images and gives scores (N, K)."""
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    """Order of the input's dimensions: images, channels, height and width."""
    channels: Literal["RGB", "BGR"] = "RGB"
    """Order of the channels."""
    size: int | None = Field(None, ge=8, le=1024, exclude_if=is_unset)
    """Height and width of the input in pixels, to which images are resized; null: the network's own."""
    mean: tuple[float, float, float] = (0, 0, 0)
    """What is subtracted from the 8-bit values of each channel, in the order of ``channels``."""
    std: tuple[float, float, float] = (255, 255, 255)
    """What they are then divided by; all above 0."""
    output: int = -1
    """Which of the K scores is the score of NSFW, in [0, 1]; −1: the last one."""

    @model_validator(mode="after")
    def _divides(self) -> "NsfwModel":
        if min(self.std) <= 0:
            raise ValueError(f"std = {list(self.std)} divides, so that each must be above 0")
        return self


class Limit(NamedTuple):
    """A threshold of a rule on single images."""

    setting: str
    """Key in the section ``curation``: ``min_sharpness``, or ``rules.NAME.max``."""
    name: str
    """Name of the rule, and of what it measures."""
    bound: Bound
    value: float


class CurationConfig(Config):
    """Rules by which images are dropped after an ingest; null: no such rule.

    Measures are of the stored pixels, which are what training sees; only ``min_side`` and ``max_aspect`` are of the
    image as it came. Dropped images keep their bytes: they come back when the rules allow.
    """

    min_side: int | None = Field(None, ge=1)
    """Smallest shorter side of the image as it came, in pixels."""
    max_aspect: float | None = Field(None, ge=1)
    """Largest ratio of the longer to the shorter side of the image as it came."""
    min_sharpness: float | None = Field(None, ge=0)
    """Smallest variance of the 3×3 Laplacian of the luma, in squared 8-bit levels; blurred images have little."""
    min_entropy: float | None = Field(None, ge=0, le=8)
    """Smallest entropy of the histogram of the luma, in bits, 0 to 8; flat images and line art have little."""
    max_border: float | None = Field(None, ge=0, le=1)
    """Largest share of the area in rows and columns of one colour along the edges: letterboxes, frames, and plain
    backgrounds around an object."""
    max_text: float | None = Field(None, ge=0, le=1)
    """Largest share of the area in windows that look like lines of text: two-toned, with many upright strokes. It reads
    nothing, and takes fences, stripes and foliage of high contrast for text."""
    min_brightness: float | None = Field(None, ge=0, le=255)
    """Smallest mean luma in 8-bit levels."""
    max_brightness: float | None = Field(None, ge=0, le=255)
    """Largest mean luma in 8-bit levels."""
    min_contrast: float | None = Field(None, ge=0, le=128)
    """Smallest standard deviation of the luma in 8-bit levels."""
    max_nsfw: float | None = Field(None, ge=0, le=1)
    """Largest score of the classifier ``nsfw``."""
    max_outlier: float | None = Field(None, ge=0, le=100)
    """Largest outlier score: per cent of the images whose fifth neighbour, in the features of evaluation.extractor, is
    nearer than this image's. 99.5 drops the most unusual 0.5 %."""
    near_duplicates: Verdict | None = None
    """What becomes of images that look alike to a perceptual hash: largest keeps one of a group, the largest as it
    came, one_per_class the largest of each class, and report all. Every dropped image is a near-duplicate of the one
    that is kept for it: there are no chains."""
    near_duplicate_bits: int = Field(24, ge=0, le=48)
    """Bits of 256 in which the hashes of near-duplicates may differ, as in ingest.near_duplicates."""
    semantic_duplicates: Verdict | None = None
    """The same for other compressions and sizes, crops down to nine tenths of each side, and mirror images. Candidates
    are nearest by the features of evaluation.extractor and by thumbnails, and registered onto each other."""
    semantic_distance: float | None = Field(None, gt=0)
    """Largest difference that registration of a near-duplicate leaves anywhere, in standard deviations of the image;
    null: calibrated by altered copies of the data set's own images, of which the share found is reported."""
    nsfw: NsfwModel | None = None
    """Classifier whose score ``max_nsfw`` limits."""
    # Settings of packages are not in the schema by which editors check the file.
    rules: dict[str, Annotated[SerializeAsAny[Rule], WithJsonSchema({"type": "object"})]] = Field(
        {}, exclude_if=lambda rules: not rules
    )
    """Rules of other packages by name, each with its thresholds ``min`` and ``max`` and settings of its own: {redness:
    {max: 0.5}}. Without a threshold it is only measured for the page."""
    max_dropped: float = Field(0.5, gt=0, le=1)
    """Share of the images above which nothing is dropped, and curation fails."""

    @field_validator("rules", mode="before")
    @classmethod
    def _look_up(cls, rules: object) -> object:
        """Validate each rule by its own class."""
        if not isinstance(rules, Mapping):
            return rules
        kinds = {name: kind for name, kind in all_rules().items() if not threshold_fields(name)} if rules else {}
        return {name: _validate(name, settings, kinds) for name, settings in rules.items()}

    @model_validator(mode="after")
    def _has_a_classifier(self) -> "CurationConfig":
        if self.max_nsfw is not None and self.nsfw is None:
            raise ValueError("max_nsfw limits the score of a classifier: set nsfw.path to its .onnx file")
        return self

    @property
    def limits(self) -> list[Limit]:
        """Return the thresholds of the rules on single images, in the order in which they are applied."""
        settings = {field: setting for name in RULES for field, setting in threshold_fields(name).items()}
        fields = [
            (field, *settings[field], getattr(self, field)) for field in type(self).model_fields if field in settings
        ]
        others = [
            (f"rules.{name}.{bound}", name, bound, getattr(rule, bound))
            for name, rule in self.rules.items()
            for bound in get_args(Bound)
        ]
        return [Limit(*limit) for limit in (*fields, *others) if limit[-1] is not None]

    @property
    def compares_features(self) -> bool:
        """Whether a rule needs the features of all images."""
        return self.max_outlier is not None or self.semantic_duplicates is not None

    @property
    def drops(self) -> bool:
        """Whether any rule may drop images."""
        verdicts = self.near_duplicates, self.semantic_duplicates
        return bool(self.limits) or any(verdict not in (None, "report") for verdict in verdicts)


def threshold_fields(name: str) -> dict[str, tuple[str, Bound]]:
    """Return the fields of ``CurationConfig`` that are thresholds of the rule ``name``, with it and their bounds."""
    fields: dict[str, tuple[str, Bound]] = {f"{bound}_{name}": (name, bound) for bound in get_args(Bound)}
    return {field: setting for field, setting in fields.items() if field in CurationConfig.model_fields}


def _validate(name: str, settings: Any, kinds: Mapping[str, type[Rule]]) -> Rule:
    if name not in kinds:
        alternatives = f"there is {', '.join(kinds)}" if kinds else "no installed package adds any"
        raise ValueError(f"{name} is not a rule: {alternatives}")
    try:
        return kinds[name].model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, (name, *first['loc'])))}: {first['msg']}") from error
