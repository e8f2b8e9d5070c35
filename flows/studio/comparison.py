"""Tab that shows two registered versions at the same seeds, and takes a blind vote between them.

A vote is evidence and decides nothing: the gate, the ledger and aliases do not read it. It is recorded when it is cast,
in ``votes/`` among the artifacts of the candidate's run, and summed up in the tag VOTES of its version.
"""

import logging
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from html import escape
from typing import Any, Literal

import gradio as gr
import mlflow
from mlflow.client import MlflowClient
from PIL import Image
from pydantic import Field, ValidationError

from diffusion.checkpoints import load_model
from diffusion.common.config import Config, PlainName
from diffusion.common.errors import ConflictError, UserError
from diffusion.common.image_grids import to_pil_image
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import generator
from diffusion.generation.limits import Budget
from diffusion.generation.requests import answer, sampling_of, tasks_of
from diffusion.process.samplers import SamplingConfig
from flows.environment import settings
from flows.registry import model_versions
from flows.registry.aliases import none_if_missing, read_record
from flows.registry.ledger import AliasNumbers, Ledger
from flows.storage.tags import RunId, VersionNumber
from flows.studio.errors import show_errors
from flows.studio.generation import condition_controls, controls_key
from flows.studio.results import BAR, ONE_AT_A_TIME, GalleryItem, pixels_class
from flows.studio.server import new_token, require_token
from flows.studio.source import StudioSource, make_progress_callback

logger = logging.getLogger(__name__)

VOTES = "darkroom.votes"
"""Tag of a version: how often people preferred it, as candidate, and how often the champion it was shown beside."""
FOLDER = "votes"
Side = Literal["left", "right"]
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

    def left_version(self, pair: int) -> Literal["candidate", "champion"]:
        """Version whose image stands on the left in a pair."""
        return "candidate" if generator(self.shuffle_seed, "vote sides", pair).integers(2) else "champion"

    def with_vote(self, side: Side | Literal["equal"]) -> "VoteSession":
        """Session after a vote on the next pair."""
        left = self.left_version(len(self.votes))
        right: Choice = "champion" if left == "candidate" else "candidate"
        choice: Choice = {"left": left, "right": right, "equal": "equal"}[side]
        return self.model_copy(update={"votes": (*self.votes, choice)})

    @property
    def artifact(self) -> str:
        """Name of the session among the artifacts of the candidate's run."""
        return f"{FOLDER}/version-{self.candidate}-champion-{self.champion}-{self.shuffle_seed:012x}.json"


@dataclass(frozen=True)
class Ballot:
    """A session with the images of its pairs, of which the votes are cast one after the other."""

    session: VoteSession
    run_id: RunId | Literal[""]
    images: Mapping[str, Sequence[Image.Image]]
    """Images of the candidate and of the champion."""
    token: str = field(default_factory=new_token)
    """What the page sends with the vote on the next pair."""

    @property
    def pair(self) -> int | None:
        """Number of the next pair; None if all were voted on."""
        vote_count = len(self.session.votes)
        return vote_count if vote_count < len(self.images["candidate"]) else None

    def sides(self) -> tuple[Image.Image, Image.Image] | None:
        """Left and right image of the next pair."""
        if (pair := self.pair) is None:
            return None
        left = self.session.left_version(pair)
        right = "champion" if left == "candidate" else "candidate"
        return self.images[left][pair], self.images[right][pair]


@lru_cache(maxsize=4)
def load_version(uri: str, sampling: SamplingConfig) -> StudioSource:
    """Load a registered version, models:/NAME/NUMBER, which never changes."""
    version = model_versions.resolve(MlflowClient(), uri)
    model = load_model(model_versions.cached_weights(version))
    origin = {"model": version.uri, "run_id": version.run_id, "content_digest": model.header.content_digest}
    return StudioSource(model, version.uri, origin, sampling)


def load_uri(uri: str, sampling: SamplingConfig) -> StudioSource:
    """Load the version that ``uri``, also of an alias, names now."""
    return load_version(model_versions.resolve(MlflowClient(), uri).uri, sampling)


def follow(source: StudioSource, uri: str) -> StudioSource:
    """Load the version that ``uri`` names now, for a page made for ``source``.

    Raises ConflictError if it needs other controls than these.
    """
    now = load_uri(uri, source.sampling)
    if controls_key(now.model) != controls_key(source.model):
        raise ConflictError(
            f"{uri} is {now.name} by now, which has another size, other classes or tasks than {source.name}, for which "
            "this page was made: start `darkroom ui` again"
        )
    return now


def read_versions(model: str) -> tuple[list[int], AliasNumbers]:
    """Numbers of the registered versions of ``model``, newest first, and its alias state by the ledger."""
    digests, versions = read_record(MlflowClient(), model)
    return sorted(versions, reverse=True), Ledger.of(model).read(digests).alias_numbers


def has_champion(model: str) -> bool:
    """Whether ``model`` has a champion by its ledger."""
    head = Ledger.of(model).head()
    return head is not None and head.alias_numbers.champion is not None


def generate_pairs(
    sources: Mapping[str, StudioSource],
    seed: int,
    count: int,
    conditions: Mapping[str, str],
    progress: Progress = ignore_progress,
) -> dict[str, list[Image.Image]]:
    """Generate images 0 to ``count`` − 1 of ``seed`` with each of ``sources``, of the same size."""
    if len({source.model.shape for source in sources.values()}) > 1:
        raise UserError("the versions generate images of different sizes: compare others")
    requests = {}
    for name, source in sources.items():
        if "sample" not in tasks_of(source.model):
            raise UserError(f"{source.name} generates nothing from noise: compare versions that do")
        requests[name] = source.request({"task": "sample", "seed": seed, "count": count, **conditions})
    images_by_name, budget = {}, Budget(settings())
    for name, source in sources.items():
        [images] = answer(source.model, [requests[name]], source.sampling, progress, budget)
        images_by_name[name] = [to_pil_image(image) for image in images]
    return images_by_name


def open_ballot(
    model: str,
    champion: int,
    candidate: int,
    seed: int,
    count: int,
    conditions: Mapping[str, str],
    sampling: SamplingConfig,
    progress: Progress = ignore_progress,
) -> Ballot:
    """Begin a blind vote over ``count`` pairs; the sides are shuffled by a new seed."""
    sources = _sources(model, champion, candidate, sampling)
    images = generate_pairs(sources, seed, count, conditions, progress)
    request = sources["candidate"].request({"seed": seed, **conditions})
    session = VoteSession(
        model=model,
        champion=champion,
        candidate=candidate,
        seed=seed,
        shuffle_seed=secrets.randbits(48),
        conditions={name: text for name, text in conditions.items() if text},
        sampling={
            "candidate": sampling_of(sources["candidate"].model, request, sampling),
            "champion": sampling_of(sources["champion"].model, request, sampling),
        },
    )
    return Ballot(session, sources["candidate"].origin["run_id"], images)


def _sources(
    model: str, champion: int | None, candidate: int | None, sampling: SamplingConfig
) -> dict[str, StudioSource]:
    if champion is None or candidate is None or champion == candidate:
        raise UserError("choose two different versions to compare")
    return {
        "champion": load_version(f"models:/{model}/{champion}", sampling),
        "candidate": load_version(f"models:/{model}/{candidate}", sampling),
    }


def cast(ballot: Ballot, side: Side | Literal["equal"]) -> tuple[Ballot, str]:
    """Record a vote on the next pair of ``ballot``; returns the ballot after it, and the tally of the version."""
    if ballot.pair is None:
        return ballot, ""
    session = ballot.session.with_vote(side)
    client = MlflowClient()
    if ballot.run_id:
        client.log_text(ballot.run_id, session.model_dump_json(indent=2), session.artifact)
    other_sessions = [
        entry for entry in read_sessions(client, ballot.run_id) if entry.shuffle_seed != session.shuffle_seed
    ]
    tally = format_tally([session, *other_sessions], session.candidate, session.champion)
    client.set_model_version_tag(session.model, str(session.candidate), VOTES, tally)
    return replace(ballot, session=session, token=new_token()), tally


def read_sessions(client: MlflowClient, run_id: str) -> list[VoteSession]:
    """Read the recorded sessions of a run; files that are none are skipped."""
    sessions = []
    for item in (none_if_missing(client.list_artifacts, run_id, FOLDER) or []) if run_id else []:
        try:
            text = mlflow.artifacts.load_text(f"runs:/{run_id}/{item.path}")
            sessions.append(VoteSession.model_validate_json(text))
        except (ValidationError, UnicodeDecodeError):
            logger.warning("%a of run %s is not a session of votes", item.path, run_id)
    return sessions


def format_tally(sessions: Sequence[VoteSession], candidate: int, champion: int) -> str:
    """Sum up the votes between two versions in words, such as "candidate 12, champion 7 (version 1)"."""
    counts = Counter(
        choice
        for session in sessions
        if (session.candidate, session.champion) == (candidate, champion)
        for choice in session.votes
    )
    equal = f", no difference {counts['equal']}" if counts["equal"] else ""
    return f"candidate {counts['candidate']}, champion {counts['champion']} (version {champion}){equal}"


class _Form:
    """Choice of two versions of ``model``, and of the seed, number and conditions of the images.

    The conditions are those that ``source``, one of the versions, knows.
    """

    def __init__(self, model: str, source: StudioSource) -> None:
        self.model, self.source = model, source
        self.alone = gr.HTML(visible=False)
        with gr.Row(visible=False) as self.choice:
            self.champion = gr.Dropdown([], label="Champion", min_width=170)
            self.candidate = gr.Dropdown([], label="Candidate", min_width=170)
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1, min_width=110)
            self.count = gr.Slider(2, 64, value=8, step=1, label="Images", min_width=160)
        with gr.Row(visible=False) as self.conditions_row:
            self.controls = condition_controls(source.model)
        with gr.Row(visible=False) as self.actions:
            self.show_button = gr.Button("Show both at the same seeds", variant="primary")
            self.vote_button = gr.Button("Vote blind")
        self.inputs = {self.champion, self.candidate, self.seed, self.count, *self.controls.values()}
        self.outputs = [self.champion, self.candidate, self.alone, self.choice, self.actions, self.conditions_row]

    def choose(self) -> tuple[Any, ...]:
        """Offer the versions: champion and candidate of the ledger, or else the newest."""
        with show_errors():
            numbers, standing = read_versions(self.model)
        names = {number: alias for alias, number in standing.model_dump().items() if number is not None}
        choices = [(f"{number} ({names[number]})" if number in names else f"{number}", number) for number in numbers]
        first = standing.champion
        candidates = [standing.candidate, *numbers, standing.previous]
        second = next((number for number in candidates if number not in (None, first)), None)
        # Rows with nothing to choose would be empty.
        rows = [gr.Row(visible=bool(numbers[1:])) for _ in (self.choice, self.actions)]
        hint = f"{self.model} has {'one version' if numbers else 'no versions'}: two can be compared, and voted on."
        empty = gr.HTML(f"<div class='empty'>{escape(hint)}</div>", visible=not numbers[1:])
        texts = gr.Row(visible=bool(numbers[1:] and self.controls))
        return gr.Dropdown(choices, value=first), gr.Dropdown(choices, value=second), empty, *rows, texts

    def compare(self, values: dict[Any, Any], bar: gr.Progress = BAR) -> tuple[Any, ...]:
        """Show the images of both versions."""
        with show_errors():
            sources = _sources(self.model, values[self.champion], values[self.candidate], self.source.sampling)
            images = generate_pairs(
                sources, values[self.seed], values[self.count], self._conditions(values), make_progress_callback(bar)
            )
        items: list[list[GalleryItem]] = [
            [(image, str(number)) for number, image in enumerate(images[name])] for name in ("champion", "candidate")
        ]
        return gr.Row(visible=True), gr.Column(visible=False), *items

    def start(self, values: dict[Any, Any], bar: gr.Progress = BAR) -> tuple[Any, ...]:
        """Begin a blind vote."""
        numbers, seed, count = (values[self.champion], values[self.candidate]), values[self.seed], values[self.count]
        conditions, progress = self._conditions(values), make_progress_callback(bar)
        with show_errors():
            ballot = open_ballot(self.model, *numbers, seed, count, conditions, self.source.sampling, progress)
        return gr.Row(visible=False), gr.Column(visible=True), *_show_ballot(ballot, "")

    def _conditions(self, values: dict[Any, Any]) -> dict[str, Any]:
        return {name: values[control] for name, control in self.controls.items()}


def tab(model: str, source: StudioSource) -> None:
    """Add the tab for versions of ``model``, with the conditions that ``source``, one of them, knows."""
    style: dict[str, Any] = {"format": "png", "elem_classes": [pixels_class(source), "tight"], "buttons": []}
    galleries = list[Any]()
    with gr.Tab("Compare") as page:
        form = _Form(model, source)
        with gr.Row(visible=False, elem_classes="answer") as both:
            for title in ("Champion", "Candidate"):
                with gr.Column(min_width=300):
                    gr.Markdown(f"**{title}**")
                    gallery = gr.Gallery(
                        columns=4, show_label=False, allow_preview=False, object_fit="contain", height="auto", **style
                    )
                    galleries.append(gallery)
        with gr.Column(visible=False, elem_classes="answer") as voting_panel:
            state, tally, token = gr.State(), gr.HTML(), gr.Textbox(visible=False)
            with gr.Row(elem_classes="pair") as pair:
                sides = [
                    gr.Image(label=label, interactive=False, height=300, min_width=120, **style)
                    for label in ("Left", "Right")
                ]
            with gr.Row(elem_classes="pair") as choices:
                titles: dict[Side | Literal["equal"], str] = {
                    "left": "Left",
                    "equal": "No difference",
                    "right": "Right",
                }
                buttons = {side: gr.Button(title, min_width=90) for side, title in titles.items()}

    def vote(side: Side | Literal["equal"], ballot: Ballot | None, sent: str | None) -> tuple[Any, ...]:
        with show_errors():
            require_token(ballot.token if ballot else None, sent)
            assert ballot is not None
            return _show_ballot(*cast(ballot, side))

    private: dict[str, Any] = {"api_visibility": "private"}
    page.select(form.choose, None, form.outputs, queue=False, **private)
    voting = [state, token, tally, pair, choices, *sides]
    panels = [both, voting_panel]
    form.show_button.click(form.compare, form.inputs, [*panels, *galleries], api_name="compare", **ONE_AT_A_TIME)
    form.vote_button.click(form.start, form.inputs, [*panels, *voting], **private, **ONE_AT_A_TIME)
    one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "votes"}
    for side, button in buttons.items():
        button.click(partial(vote, side), [state, token], voting, show_progress="hidden", **private, **one_at_a_time)


def _show_ballot(ballot: Ballot, tally: str) -> tuple[Any, ...]:
    """Values of the voting panel: state, token, words, visibility, and the two sides."""
    session, sides = ballot.session, ballot.sides()
    if sides is not None:
        text = f"Pair {len(session.votes) + 1} of {len(ballot.images['candidate'])}: which image is better?"
        return ballot, ballot.token, f"<p>{text}</p>", gr.Row(visible=True), gr.Row(visible=True), *sides
    counts = Counter(session.votes)
    text = (
        f"<p>Your votes: {counts['candidate']} for candidate {session.candidate}, {counts['champion']} for champion "
        f"{session.champion}, {counts['equal']} without a difference.</p>"
        f"<p>Recorded on models:/{escape(session.model)}/{session.candidate} as {VOTES}: <b>{escape(tally)}</b>. "
        "Votes are evidence for a person; they decide nothing.</p>"
    )
    return ballot, ballot.token, text, gr.Row(visible=False), gr.Row(visible=False), None, None
