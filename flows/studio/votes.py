"""Page that takes blind votes between the images of two registered versions at the same seeds.

A vote is evidence and decides nothing: the gate, the ledger and aliases do not read it. It is recorded when it is cast,
in ``votes/`` among the artifacts of the candidate's run, and summed up in the tag VOTES of its version.
"""

import logging
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from html import escape
from typing import Any, Literal

import gradio as gr
import mlflow
import numpy as np
from mlflow.client import MlflowClient
from PIL import Image
from pydantic import Field, ValidationError

from diffusion.checkpoints import load_model
from diffusion.common.config import Config, PlainName
from diffusion.common.errors import UserError
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import generator
from diffusion.generation.requests import sampling_of
from diffusion.process.samplers import SamplingConfig
from flows.registry import model_versions
from flows.registry.aliases import none_if_missing, read_record
from flows.registry.ledger import Ledger
from flows.storage.tags import RunId, VersionNumber
from flows.studio.generate import (
    BAR,
    MAX_IMAGES,
    MAX_SEED,
    ONE_AT_A_TIME,
    PRIVATE,
    StudioSource,
    condition_controls,
    make_progress_callback,
)

logger = logging.getLogger(__name__)

VOTES = "darkroom.votes"
"""Tag of a version: how often people preferred it, as candidate, and how often the champion it was shown beside."""
FOLDER = "votes"
Side = Literal["left", "right", "equal"]
Choice = Literal["candidate", "champion", "equal"]


class VoteSession(Config):
    """A person's blind votes between the images of two versions at the same seeds, in ``votes/`` of the run."""

    format_version: Literal[1] = 1
    model: PlainName
    champion: VersionNumber
    candidate: VersionNumber
    seed: int = Field(ge=0, lt=2**63)
    """Seed of the images: pair i shows image i of it by either version."""
    shuffle_seed: int = Field(ge=0, lt=2**48)
    """Seed that decides on which side each version's image was shown."""
    conditions: dict[str, str]
    """Prompt and label of the images, if any."""
    sampling: dict[Literal["candidate", "champion"], SamplingConfig]
    votes: tuple[Choice, ...] = ()
    """Vote on each pair, in order."""

    def sides(self, pair: int) -> dict[Side, Choice]:
        """Version whose image stands on each side in a pair."""
        if generator(self.shuffle_seed, "vote sides", pair).integers(2):
            return {"left": "candidate", "right": "champion", "equal": "equal"}
        return {"left": "champion", "right": "candidate", "equal": "equal"}

    @property
    def artifact(self) -> str:
        """Name of the session among the artifacts of the candidate's run."""
        return f"{FOLDER}/version-{self.candidate}-champion-{self.champion}-{self.shuffle_seed:012x}.json"


@dataclass(frozen=True)
class Ballot:
    """A session with the images of its pairs, of which the votes are cast one after the other."""

    session: VoteSession
    run_id: RunId | Literal[""]
    images: Mapping[Choice, Sequence[Image.Image]]
    """Images of the candidate and of the champion."""

    @property
    def pair(self) -> int | None:
        """Number of the next pair; None if all were voted on."""
        vote_count = len(self.session.votes)
        return vote_count if vote_count < len(self.images["candidate"]) else None


@lru_cache(maxsize=4)
def load_version(uri: str, sampling: SamplingConfig) -> StudioSource:
    """Load a registered version, models:/NAME/NUMBER, which never changes."""
    version = model_versions.resolve(MlflowClient(), uri)
    model = load_model(model_versions.cached_weights(version))
    origin = {"model": version.uri, "run_id": version.run_id, "content_digest": model.header.content_digest}
    return StudioSource(model, version.uri, origin, sampling)


def open_ballot(
    model: str,
    champion: int | None,
    candidate: int | None,
    fields: dict[str, Any],
    sampling: SamplingConfig,
    progress: Progress = ignore_progress,
) -> Ballot:
    """Begin a blind vote over the images of a request with ``fields``; the sides are shuffled by a new seed."""
    if champion is None or candidate is None or champion == candidate:
        raise UserError("choose two different versions to compare")
    numbers: dict[Choice, int] = {"champion": champion, "candidate": candidate}
    sources = {name: load_version(f"models:/{model}/{number}", sampling) for name, number in numbers.items()}
    if len({source.model.shape for source in sources.values()}) > 1:
        raise UserError("the versions generate images of different sizes: compare others")
    made = {name: source.generate({"task": "sample"} | fields, progress) for name, source in sources.items()}
    session = VoteSession.model_validate(
        {
            **numbers,
            "model": model,
            "seed": made["candidate"].request.seed,
            "shuffle_seed": secrets.randbits(48),
            "conditions": {name: fields[name] for name in ("prompt", "label") if fields.get(name)},
            "sampling": {
                name: sampling_of(source.model, made[name].request, sampling) for name, source in sources.items()
            },
        }
    )
    # The files name their version, and so do their metadata.
    images = {name: [Image.fromarray(np.array(Image.open(path))) for path in each.paths] for name, each in made.items()}
    return Ballot(session, sources["candidate"].origin["run_id"], images)


def cast(ballot: Ballot, side: Side) -> tuple[Ballot, str]:
    """Record a vote on the next pair of ``ballot``; returns the ballot after it, and the tally of the version."""
    assert ballot.pair is not None
    choice = ballot.session.sides(ballot.pair)[side]
    session = ballot.session.model_copy(update={"votes": (*ballot.session.votes, choice)})
    client = MlflowClient()
    if ballot.run_id:
        client.log_text(ballot.run_id, session.model_dump_json(indent=2), session.artifact)
    tally = format_tally(client, ballot.run_id, session)
    client.set_model_version_tag(session.model, str(session.candidate), VOTES, tally)
    return replace(ballot, session=session), tally


def format_tally(client: MlflowClient, run_id: str, session: VoteSession) -> str:
    """Sum up all votes between the versions of a session, such as "candidate 12, champion 7 (version 1)"."""
    counts = Counter(session.votes)
    for item in (none_if_missing(client.list_artifacts, run_id, FOLDER) or []) if run_id else []:
        try:
            other = VoteSession.model_validate_json(mlflow.artifacts.load_text(f"runs:/{run_id}/{item.path}"))
        except (ValidationError, UnicodeDecodeError):
            logger.warning("%a of run %s is not a session of votes", item.path, run_id)
            continue
        is_same_pair = (other.candidate, other.champion) == (session.candidate, session.champion)
        if is_same_pair and other.shuffle_seed != session.shuffle_seed:
            counts.update(other.votes)
    equal = f", no difference {counts['equal']}" if counts["equal"] else ""
    return f"candidate {counts['candidate']}, champion {counts['champion']} (version {session.champion}){equal}"


def add_page(model: str, source: StudioSource) -> None:
    """Add the page for versions of ``model``, with the conditions that ``source``, one of them, knows."""
    style: dict[str, Any] = {"format": "png", "elem_classes": source.pixels_class, "buttons": []}
    with gr.Tab("Vote") as page:
        with gr.Row():
            versions = [gr.Dropdown([], label=label, min_width=170) for label in ("Champion", "Candidate")]
            controls = {
                "seed": gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=110),
                "count": gr.Slider(2, MAX_IMAGES, value=8, step=1, label="Images", min_width=160),
            }
        controls |= condition_controls(source.model)
        begin = gr.Button("Vote blind", variant="primary")
        ballot, text = gr.State(), gr.HTML(elem_classes="heading")
        with gr.Row(visible=False, elem_classes="pair") as pair:
            images = [gr.Image(label=label, interactive=False, min_width=120, **style) for label in ("Left", "Right")]
        with gr.Row(visible=False, elem_classes="pair") as choices:
            titles: dict[Side, str] = {"left": "Left", "equal": "No difference", "right": "Right"}
            buttons = {side: gr.Button(title, min_width=90) for side, title in titles.items()}

    def choose() -> list[Any]:
        """Offer the versions: champion and candidate of the ledger, or else the newest."""
        digests, versions = read_record(MlflowClient(), model)
        numbers, standing = sorted(versions, reverse=True), Ledger.of(model).read(digests).alias_numbers
        names = {number: alias for alias, number in standing.model_dump().items() if number is not None}
        offered = [(f"{number} ({names[number]})" if number in names else f"{number}", number) for number in numbers]
        others = [number for number in (standing.candidate, *numbers) if number not in (None, standing.champion)]
        return [gr.Dropdown(offered, value=value) for value in (standing.champion, next(iter(others), None))]

    def start(values: dict[Any, Any], bar: gr.Progress = BAR) -> list[Any]:
        fields = {name: values[control] for name, control in controls.items()}
        champion, candidate = (values[control] for control in versions)
        ballot = open_ballot(model, champion, candidate, fields, source.sampling, make_progress_callback(bar))
        return _show(ballot, "")

    def vote(side: Side, current: Ballot | None) -> list[Any]:
        if current is None or current.pair is None:
            raise UserError("there is no pair to vote on: begin a vote")
        return _show(*cast(current, side))

    voting = [ballot, text, pair, choices, *images]
    page.select(choose, None, versions, **PRIVATE)
    begin.click(start, {*versions, *controls.values()}, voting, show_progress_on=text, **PRIVATE, **ONE_AT_A_TIME)
    one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "votes", "show_progress": "hidden"}
    for side, button in buttons.items():
        button.click(partial(vote, side), ballot, voting, **PRIVATE, **one_at_a_time)


def _show(ballot: Ballot, tally: str) -> list[Any]:
    """Values of the components of a vote: state, words, visibility, and the two images."""
    session = ballot.session
    if ballot.pair is not None:
        text = f"Pair {ballot.pair + 1} of {len(ballot.images['candidate'])}: which image is better?"
        sides = session.sides(ballot.pair)
        shown = [ballot.images[sides[side]][ballot.pair] for side in ("left", "right")]
        return [ballot, text, gr.Row(visible=True), gr.Row(visible=True), *shown]
    counts = Counter(session.votes)
    text = (
        f"Your votes: {counts['candidate']} for candidate {session.candidate}, {counts['champion']} for champion "
        f"{session.champion}, {counts['equal']} without a difference. Recorded as its tag {VOTES}: {escape(tally)}."
    )
    return [ballot, text, gr.Row(visible=False), gr.Row(visible=False), None, None]
