"""A data set's newest version, brought to this machine, so that one worker goes on where another ended."""

from diffusion.data.manifest import read_manifest
from flows.catalogue import Catalogue
from flows.checkout import CheckedOut, checkout
from flows.environment import data_source
from flows.params import Params
from flows.steps import step


@step
def sync(params: Params, version: str | None = None) -> CheckedOut | None:
    """Bring ``version`` here, or the newest if an older one or none is here; None: nothing had to be done.

    Raises UserError as ``checkout`` does.
    """
    source = data_source()
    wanted = version or newer(params, Catalogue.of(params.training.dataset, source))
    if wanted is None:
        return None
    return checkout(params.dataset_folder, wanted, lambda: source)


def newer(params: Params, catalogue: Catalogue) -> str | None:
    """The version that was put into the ``catalogue`` last; None if it lies here, or what does was never put there."""
    published = catalogue.published()
    if not published:
        return None
    newest = max(published, key=lambda digest: (published[digest], digest))
    folder = params.dataset_folder
    here = read_manifest(folder).digest if (folder / "manifest.json").is_file() else None
    # What was never published is only here, and newer than all that others know.
    return None if here is not None and published.get(here, published[newest]) >= published[newest] else newest
