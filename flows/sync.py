"""A data set's newest version, brought to this machine, so that one worker goes on where another ended."""

from diffusion.data.manifest import read_manifest, versions
from flows.catalogue import Catalogue
from flows.checkout import CheckedOut, checkout
from flows.environment import data_source
from flows.heads import Heads
from flows.params import Params
from flows.steps import step


@step
def sync(params: Params, version: str | None = None) -> CheckedOut | None:
    """Bring ``version`` here, or the newest if an older one or none is here; None: nothing had to be done.

    Raises UserError as ``checkout`` does.
    """
    source = data_source()
    catalogue = Catalogue.of(params.training.dataset, source)
    wanted = version or newer(params, catalogue)
    if wanted is None:
        return None
    catalogue.learn_removals(params.dataset_folder)
    return checkout(params.dataset_folder, wanted, lambda: source)


def newer(params: Params, catalogue: Catalogue) -> str | None:
    """The newest version in the ``catalogue``; None if the one here comes from it, or was never put there."""
    newest, folder = Heads(catalogue).newest(), params.dataset_folder
    if newest is None or not (folder / "manifest.json").is_file():
        return newest
    # What was never published is only here: the next ingest adds it to the newest.
    unpublished = catalogue.written(read_manifest(folder).digest) is None
    return None if unpublished or any(version.digest == newest for version in versions(folder)) else newest
