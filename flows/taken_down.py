"""What learned from images that were taken down, asked anew of the catalogue: a data set here, and registered versions.

A takedown marks runs and versions in MLflow, but it may be under way, or have been killed. Its record in the catalogue
is there first, so whoever is about to train or promote reads the records.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow.client import MlflowClient
from mlflow.exceptions import MlflowException

from diffusion.data.holders import holders
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.data.removals import Removal
from diffusion.data.versions import known_versions
from diffusion.errors import UserError
from flows import catalogue, registry
from flows.catalogue import Catalogue
from flows.derived import TAKEDOWN, Derived, DerivedModel, DerivedRun, joined_names, mark, names_of
from flows.environment import data_source
from flows.heads import Heads
from flows.kept_files import KeptFiles
from flows.params import dataset_folder
from flows.registry import Version
from flows.tags import parse_tags
from flows.tracking import RunTracker


def require_current(folder: Path, tracker: RunTracker | None = None) -> None:
    """Raise UserError if the data set in ``folder`` holds images that were taken down, on whatever machine.

    The run that ``tracker`` writes to, if one is given, is marked first.
    """
    source = data_source()
    held = catalogue.learn_removals(folder, source)
    if not held:
        return
    if tracker is not None:
        marked = tracker.client.get_run(tracker.run_id).data.tags.get(TAKEDOWN)
        tracker.tag({TAKEDOWN: joined_names(marked, *(removal.name for removal in held))})
    here, newest = read_manifest(folder).digest, Heads(Catalogue.of(folder.name, source)).newest()
    way = (
        f"`darkroom ingest SOURCE --dataset {folder.name}` makes a version without them"
        if newest in (None, here)
        else f"go on with the newest, `darkroom data checkout {newest[:12]} --dataset {folder.name}`"
    )
    raise UserError(
        f"version {here[:12]} of data set {folder.name} holds images that were taken down ({held[0].reason}; takedown "
        f"{', '.join(removal.name for removal in held)}): {way}"
    )


def with_takedowns(version: Version) -> Version:
    """``version`` as MLflow has it now, marked with every takedown of images that it learned from.

    It learned from those of its data set, and from all that its autoencoder and the version that it began with learned
    from, however far back. What no takedown has marked yet is marked here.
    """
    client = MlflowClient()
    version = registry.version_of(client, version.model, version.number)
    names: set[str] = set()
    records: dict[str, Removal] = {}
    for each in _behind(client, version):
        names.update(names_of(parse_tags(each.tags, each.uri).takedown))
        records |= {removal.name: removal for removal in _removed_since(each)}
    here = set(names_of(version.tags.get(TAKEDOWN)))
    for name in sorted(records.keys() - here):
        mark(_only(client, version), records[name])
    if inherited := names - records.keys() - here:
        value = joined_names(version.tags.get(TAKEDOWN), *records, *inherited)
        client.set_model_version_tag(version.model, str(version.number), TAKEDOWN, value)
    return registry.version_of(client, version.model, version.number) if {*records, *names} - here else version


def _behind(client: MlflowClient, version: Version) -> Iterator[Version]:
    """``version``, and every registered one that it was made with, as far as they are still registered."""
    seen, left = {version.uri}, [version]
    while left:
        version = left.pop()
        yield version
        tags = parse_tags(version.tags, version.uri)
        for uri in filter(None, (tags.autoencoder, tags.start)):
            if uri not in seen:
                seen.add(uri)
                model, _, number = uri.removeprefix("models:/").rpartition("/")
                try:
                    left.append(registry.version_of(client, model, int(number)))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise


def _removed_since(version: Version) -> list[Removal]:
    """The takedown records of images that the data set of ``version`` held when it learned from it."""
    tags = parse_tags(version.tags, version.uri)
    dataset, content = tags.dataset, tags.content_digest
    if dataset is None or content is None:
        return []
    source, folder = data_source(), dataset_folder(dataset)
    recorded = Catalogue.of(dataset, source)
    removals = list(recorded.removals())
    if not removals:
        return []
    known = known_versions(folder) if (folder / "manifest.json").is_file() else {}
    learned_from = _of_content(known, content) or _of_content(recorded.retired() | recorded.versions(), content)
    with TemporaryDirectory() as scratch:
        elsewhere = KeptFiles(dataset, source).elsewhere(learned_from, Path(scratch))
        found = [(removal, holders(folder, removal, learned_from, elsewhere)) for removal in removals]
    # As a takedown does: versions of equal content hold the same images, whatever their tables tell besides.
    return [removal for removal, each in found if each.held and len(each.held) + len(each.unknown) == len(learned_from)]


def _of_content(versions: dict[str, Manifest], content: str) -> list[Manifest]:
    return [each for each in versions.values() if each.content_digest == content]


def _only(client: MlflowClient, version: Version) -> Derived:
    """``version`` and its run, as a takedown finds them."""
    runs = []
    try:
        run = client.get_run(version.run_id)
        content = run.data.tags.get("darkroom.content_digest", "")
        runs.append(DerivedRun(run_id=version.run_id, name=run.info.run_name, content_digest=content))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    model = DerivedModel(uri=version.uri, run_id=version.run_id, aliases=[])
    return Derived(runs=runs, models=[model], prints=[], unclear_runs=[])
