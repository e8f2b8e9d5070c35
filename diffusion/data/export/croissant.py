"""Description of an export as Croissant 1.1 of MLCommons, with the properties for responsible AI (RAI 1.0).

https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html and croissant-rai-spec.html. What the manifest says is
filled in; what only people know is marked, for them to fill in.
"""

from typing import Any

from diffusion.common.files import digest_of
from diffusion.data.export.base import ExportDetails, ExportFormat, Node
from diffusion.data.manifest import Manifest

UNKNOWN = "Not recorded: to be filled in by the publisher."
"""Value of what no manifest can say."""
CONTEXT: Node = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The standard context of the specification."""
SPLIT_URLS = {"train": "cr:TrainingSplit", "test": "cr:TestSplit"}


def export_identity(data_format: ExportFormat, details: ExportDetails) -> str:
    """Return ``urn:darkroom:`` and the digest of all that determines an export, but for the day."""
    manifest = data_format.manifest
    content = [1, data_format.name, manifest.content_digest, manifest.layout_digest, manifest.licence, manifest.sources]
    return f"urn:darkroom:{digest_of([*content, details.model_dump(mode='json')])}"


def describe_licence(manifest: Manifest, details: ExportDetails) -> str:
    """Return the licence, or that it is unknown."""
    return details.licence or manifest.licence or "unknown"


def describe_as_croissant(
    data_format: ExportFormat, details: ExportDetails, digests: dict[str, str], published: str
) -> Node:
    """Return the JSON-LD of an export first made on the day ``published``; ``digests`` are the SHA-256 of its files."""
    manifest = data_format.manifest
    distribution, fields = data_format.croissant(digests)
    splits = [{"splits/name": name, "splits/url": SPLIT_URLS[name]} for name in data_format.splits.values()]
    optional: dict[str, Any] = {
        "url": details.url,
        "creator": details.creator and {"@type": "sc:Organization", "name": details.creator},
    }
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": details.title or manifest.name,
        "description": describe(manifest),
        "license": describe_licence(manifest, details),
        "version": f"1.0.0+{manifest.content_digest[:12]}",
        "datePublished": published,
        "identifier": export_identity(data_format, details),
        "isLiveDataset": False,
        **{key: value for key, value in optional.items() if value},
        **_responsible_ai(manifest),
        "distribution": distribution,
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "splits",
                "dataType": "cr:Split",
                "key": {"@id": "splits/name"},
                "field": [
                    {"@type": "cr:Field", "@id": "splits/name", "dataType": "sc:Text"},
                    {"@type": "cr:Field", "@id": "splits/url", "dataType": "sc:URL"},
                ],
                "data": splits,
            },
            {"@type": "cr:RecordSet", "@id": "images", "description": "One record for each image.", "field": fields},
        ],
    }


def describe(manifest: Manifest) -> str:
    """Describe a data set in a sentence or two."""
    counts = ", ".join(
        f"{count:,} {'to train on' if name == 'train' else 'held out'}" for name, count in manifest.counts.items()
    )
    channels = "grey" if manifest.channels == 1 else "RGB"
    classes = f", of {len(manifest.labels):,} classes" if manifest.labels else ""
    return (
        f"{manifest.kept:,} images ({counts}) of {manifest.stored_as}, {channels}{classes}. Content of the data set "
        f"{manifest.name}: SHA-256 {manifest.content_digest}."
    )


def _responsible_ai(manifest: Manifest) -> Node:
    """Describe collection, preparation and annotation, with what is not recorded marked."""
    storage, outcomes = manifest.storage, dict[str, int]()
    for part in manifest.parts:
        for outcome, count in part.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
    left_out = [
        f"{outcomes[name]:,} {name}"
        for name in ("duplicate", "quarantined", "dropped", "removed")
        if outcomes.get(name)
    ]
    preparation = [
        f"Resized to {manifest.stored_as} ({storage.fit}), stored as PNG without loss.",
        f"Left out: {', '.join(left_out) or 'nothing'} (removed: taken down).",
        f"Held out by a digest of the pixels: a share of {storage.held_out:g}.",
    ]
    captioners = [f"{name}: {count:,} captions" for name, count in manifest.captioners.items()]
    sources = f"From {', '.join(manifest.sources)}." if manifest.sources else UNKNOWN
    return {
        "rai:dataCollection": sources,
        "rai:dataPreprocessingProtocol": preparation,
        **({"rai:machineAnnotationTools": captioners} if captioners else {}),
        "rai:dataBiases": [UNKNOWN],
        "rai:dataLimitations": [UNKNOWN],
        "rai:dataUseCases": [UNKNOWN],
        "rai:dataSocialImpact": UNKNOWN,
        "rai:personalSensitiveInformation": [UNKNOWN],
        "rai:dataReleaseMaintenancePlan": UNKNOWN,
    }
