"""Tab that shows the ledger of champions as a timeline, with rollback behind a confirmation."""

from html import escape
from typing import Any

import gradio as gr
from mlflow.client import MlflowClient

from diffusion.common.errors import ConflictError, UserError
from flows.registry.aliases import read_verified_history
from flows.registry.champion import ChampionChange, champion_problem, roll_back
from flows.registry.ledger import History, Ledger, LedgerEntry
from flows.studio.errors import show_errors
from flows.studio.server import new_token, require_token


def read_history(model: str) -> History:
    """Read the ledger of ``model``, verified; nothing is repaired."""
    return read_verified_history(MlflowClient(), Ledger.of(model))


def timeline(history: History) -> str:
    """Show the entries as HTML, the newest first."""
    if history.head is None:
        hint = "The ledger is empty: the first verdict of <code>darkroom promote</code> starts it."
        return f"<div class='empty'>{hint}</div>"
    standing = history.alias_numbers
    state = ", ".join(f"{name} {number}" for name, number in standing.model_dump().items() if number is not None)
    items = "".join(_item(entry) for entry in reversed(history.entries))
    foreign_html = "".join(
        f"<p>Foreign object among the entries, ignored: {escape(ascii(name))} {escape(reason)}</p>"
        for name, reason in history.foreign.items()
    )
    count = f"{len(history.entries)} entries, each verified against the one before."
    return f"<p><b>{escape(state)}</b>. {count}</p>{foreign_html}<ol class='timeline'>{items}</ol>"


def _item(entry: LedgerEntry) -> str:
    move = (
        f"{entry.from_version or 'none'} → {entry.to_version}" if entry.changes_champion else f"version {entry.version}"
    )
    hand = " by hand" if entry.by_hand else ""
    return (
        f"<li class='{entry.what}'><b>{entry.number}. {entry.what}</b>{hand} <b>{move}</b>"
        f"<small>{entry.when:%Y-%m-%d %H:%M} UTC, {escape(entry.who)}</small><span>{escape(entry.why)}</span></li>"
    )


def roll_back_from(model: str, champion: int, reason: str) -> ChampionChange:
    """Roll back the ``champion`` that the person saw; raises ConflictError if it is another one by now."""
    if not reason.strip():
        raise UserError("give a reason: the ledger keeps it")
    if (now := read_history(model).alias_numbers.champion) != champion:
        raise ConflictError(f"the champion is {now or 'none'} by now, not {champion}: look at the ledger again")
    return roll_back(model, reason.strip())


def tab(model: str) -> None:
    """Add the tab for the ledger of ``model``."""
    with gr.Tab("Ledger") as page:
        page_html, champion = gr.HTML(), gr.State()
        expected_token, token = gr.State(), gr.Textbox(visible=False)
        with gr.Row():
            refresh_button = gr.Button("Refresh", size="sm", scale=0, min_width=110)
            rollback_button = gr.Button("Roll back …", variant="stop", size="sm", scale=0, min_width=110, visible=False)
        with gr.Column(visible=False) as confirmation:
            question = gr.Markdown()
            reason = gr.Textbox(label="Reason, kept in the ledger", placeholder="three eyes", max_length=2000)
            with gr.Row():
                confirm_button = gr.Button("Roll back", variant="stop", min_width=110)
                cancel_button = gr.Button("Cancel", min_width=110)
        message = gr.Markdown()

    def show() -> tuple[str, int | None, Any]:
        with show_errors():
            history = read_history(model)
            problem = champion_problem(MlflowClient(), history)
        problem_html = f"<p class='problem'>{escape(problem)}</p>" if problem else ""
        standing = history.alias_numbers
        return problem_html + timeline(history), standing.champion, gr.Button(visible=standing.previous is not None)

    def question_of(number: int) -> tuple[Any, str, str, str]:
        with show_errors():
            standing = read_history(model).alias_numbers
            if standing.champion != number:
                raise ConflictError(f"the champion is {standing.champion or 'none'} by now: refresh the ledger")
        text = (
            f"Version {standing.previous} becomes champion of **{model}** instead of {number}. Everything that loads "
            f"`models:/{model}@champion` gets it, and the gate never promotes version {number} again."
        )
        return gr.Column(visible=True), text, *[new_token()] * 2

    def act(number: int, text: str, expected: str | None, sent: str | None) -> tuple[Any, str, str, None, None]:
        with show_errors():
            require_token(expected, sent)
            change = roll_back_from(model, number, text)
        return gr.Column(visible=False), "", f"`{change.version.uri}` is champion.", None, None

    outputs = [page_html, champion, rollback_button]
    # Without the cover that Gradio lays over what an event changes, and after an error leaves there.
    plain: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    page.select(show, None, outputs, **plain)
    refresh_button.click(show, None, outputs, api_name="ledger")
    tokens = [expected_token, token]
    rollback_button.click(question_of, champion, [confirmation, question, *tokens], **plain)
    cancel_button.click(lambda: gr.Column(visible=False), None, confirmation, queue=False, **plain)
    rollback = confirm_button.click(act, [champion, reason, *tokens], [confirmation, reason, message, *tokens], **plain)
    rollback.success(show, None, outputs, **plain)
