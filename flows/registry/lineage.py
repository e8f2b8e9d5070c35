"""Versions that a version was made from: its autoencoder, its initial model, and theirs; and what they learned from."""

from collections.abc import Iterable, Iterator

from mlflow.client import MlflowClient

from diffusion.common.files import canonical_json
from flows.registry.model_versions import Version, registered_version
from flows.storage.tags import parse_model_uri, parse_tags

ANCESTORS = "darkroom.ancestors"
"""Tag of a version: the data that those it was made from learned from, by which a takedown finds it without them."""


def walk_lineage(client: MlflowClient, uris: Iterable[str | None]) -> Iterator[Version]:
    """Yield the versions ``uris`` and, transitively, their autoencoders and initial models, if they are registered."""
    queue, seen = [uri for uri in uris if uri], set[str]()
    while queue:
        if (uri := queue.pop(0)) in seen:
            continue
        seen.add(uri)
        name, number = parse_model_uri(uri)
        if (version := registered_version(client, name, int(number))) is not None:
            yield version
            tags = parse_tags(version.tags, uri)
            queue += [parent for parent in (tags.start, tags.autoencoder) if parent]


def ancestors_tag(client: MlflowClient, uris: Iterable[str | None]) -> str | None:
    """Value of the tag ``ANCESTORS`` of a version that is made from the versions ``uris``; None without any."""
    contents = set[tuple[str, str]]()
    for version in walk_lineage(client, uris):
        contents |= parse_tags(version.tags, version.uri).contents
    return canonical_json(sorted(contents)) if contents else None


def describe_ancestors(client: MlflowClient, version: Version) -> list[str]:
    """Describe the models that ``version`` was made from, the nearest first, and what deleted ones learned from."""
    own, contents = parse_tags(version.tags, version.uri), set[tuple[str, str]]()
    known, texts = {(own.content_digest, own.dataset)}, list[str]()
    for member in walk_lineage(client, [version.uri]):
        tags = parse_tags(member.tags, member.uri)
        contents |= tags.contents
        if member.uri != version.uri:
            known.add((tags.content_digest, tags.dataset))
            texts.append(f"{member.uri}, trained on " + _describe_data(tags.content_digest, tags.dataset))
    return texts + [f"a model trained on {_describe_data(*content)}" for content in sorted(contents - known)]


def _describe_data(digest: str | None, dataset: str | None) -> str:
    return f"data set {dataset}, content SHA-256 {digest}" if dataset and digest else "data that are unknown here"
